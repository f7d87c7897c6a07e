"""What tests share: small twins, and where the real clips lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmoe.clips import ClipSpec


@pytest.fixture(scope="session")
def spec() -> ClipSpec:
    """Return a small clip spec: 4 frames of 32x32, 100 ms apart."""
    return ClipSpec(frames=4, spacing_s=0.1, height=32, width=32)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real clips and streams that VMOE_DATA names, or skip."""
    named = os.environ.get("VMOE_DATA")
    if not named or not Path(named).is_dir():
        pytest.skip(
            "no real clips here: set VMOE_DATA to a folder with streams/ and ut_interaction/"
        )
    return Path(named)

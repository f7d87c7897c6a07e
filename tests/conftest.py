"""What tests share: small twins, and where the real clips lie."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.bindings import VERSIONS, Bindings, install
from vmoe.clips import ClipSpec

if TYPE_CHECKING:
    from tests.cuda_fake import Driver
    from tests.tensorrt_fake import Fake

# torch's threads spin while they wait: on a shared machine they make tests three times as long.
# Set before torch is imported, and inherited by the commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give this process and the commands that it starts a cache of their own, not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _log_of_nobody() -> Iterator[None]:
    """Make the log nobody's again: a command that ran in this process talks to its own stderr.

    Not as it was found: a fixture of the session may have run one before.
    """
    yield
    log = logging.getLogger("vmoe")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def spec() -> ClipSpec:
    """Return a small clip spec: 4 frames of 32x32, 100 ms apart."""
    return ClipSpec(frames=4, spacing_s=0.1, height=32, width=32)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint that exports fast: r3d18, two experts."""
    from tests.twins import SPEC
    from vmoe import checkpoint
    from vmoe.models import ModelSettings, build

    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    twin = build(ModelSettings("r3d18", 0.1, 2, 2), SPEC).eval()
    checkpoint.save(checkpoint.Checkpoint(twin, ("left", "right")), path)
    return path


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real clips and streams that VMOE_DATA names, or skip."""
    named = os.environ.get("VMOE_DATA")
    if not named or not Path(named).is_dir():
        pytest.skip(
            "no real clips here: set VMOE_DATA to a folder with streams/ and ut_interaction/"
        )
    return Path(named)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint of an untrained twin: tsm, width 0.1, 4 experts, camera-motion.

    It answers differently to different clips, and noise reaches every expert (tests.twins).
    """
    from tests.twins import lively
    from vmoe.checkpoint import Checkpoint, save
    from vmoe.data.camera_motion import LABELS

    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    save(Checkpoint(lively(experts=4, classes=len(LABELS)), LABELS), path)
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bundle of `tiny_checkpoint`, lowering split, as vmoe-export writes it."""
    from vmoe.export import ExportSettings, export

    path = tmp_path_factory.mktemp("bundle") / "tiny-split"
    # A toy on a machine that others use: what it takes proves nothing.
    export(tiny_checkpoint, path, ExportSettings(gate_sparsity=1e3))
    return path


@pytest.fixture(scope="session", params=VERSIONS)
def bindings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bindings:
    """Return TensorRT's Python bindings of each version that we support, or skip with a reason."""
    root = tmp_path_factory.getbasetemp()
    return install(request.param, root.parent if hasattr(request.config, "workerinput") else root)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Driver:
    """Let this test find a GPU that is none, and have a cache folder of its own."""
    from tests import cuda_fake

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cuda_fake.install(monkeypatch, cuda_fake.Driver())


@pytest.fixture
def trt(bindings: Bindings, gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Let this test find TensorRT: the names and signatures of real bindings, our own insides."""
    from tests import tensorrt_fake

    return tensorrt_fake.install(monkeypatch, bindings.surface(), gpu)

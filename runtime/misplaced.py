"""What is given to vmoe-run in the place of something else: an address, a source."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from vmoe.errors import BundleError, SettingError

from . import addresses


def refuse_address(replay: Path) -> None:
    """Refuse an address as --replay.

    Raises:
        SettingError: it is one.
    """
    address = _address(replay)
    if address is not None:
        raise SettingError(
            f"--replay is {address}; it is a video file. Use --source for addresses."
        )


def refuse_source(path: Path) -> None:
    """Refuse what is no bundle before a camera is looked for; what can be watched is said to be.

    Raises:
        BundleError: no bundle there.
    """
    from vmoe import bundle  # numpy, which is not loaded before signals are heard

    source = _address(path)
    a_file = path.is_file() and path.suffix != ".safetensors"
    if a_file or (not path.exists() and re.fullmatch(r"test|\d{1,3}", str(path))):
        source = str(path)
    if source is not None:
        raise BundleError(
            f"{source} is no folder: not a bundle. To watch it: vmoe-run --source "
            f"{shlex.quote(source)}"
        )
    bundle.require(path)


def _address(path: Path) -> str | None:
    """Return the address that was given as a path, where it lost a slash; passwords hidden."""
    found = re.match(r"([a-z][a-z0-9+.-]+):/(.*)", str(path), re.I | re.S)
    if found is None or path.exists():
        return None
    return addresses.shown(f"{found[1]}://{found[2]}")

"""What a command works on where the user names nothing: the newest of runs/, else what ships."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vmoe.errors import SettingError, VmoeError

RUNS = Path("runs")
STATE = "state.safetensors"  # where a training stands
BEST = "best.safetensors"  # of a training's folder
REJECTED = ".rejected"  # behind the name of a bundle that vmoe-export refused
SHIPPED = Path(__file__).parent / "shipped" / "camera-motion"  # a bundle, with its twin
CARD = SHIPPED.with_name("README.md")  # what it is, what it is worth, what it is not for


def bundle(named: Path | None) -> tuple[Path, str]:
    """Return the bundle to use, and the line that says which it is.

    Args:
        named: what the user named, or None.
    """
    if named is not None:
        return named, f"bundle: {named}"
    found = _newest(_bundles())
    if found:
        return found, f"bundle: {found} (the newest under {RUNS}/)"
    return shipped(), f"bundle: {SHIPPED.name} (the one that ships)"


def checkpoint(named: Path | None) -> tuple[Path, str]:
    """Return the checkpoint to use, and the line that says which it is.

    Args:
        named: what the user named, or None; a bundle stands for the twin that it carries, a
            training's folder for its best checkpoint.
    """
    if named is not None:
        return inside(named), f"checkpoint: {named}"
    found = _newest(RUNS.glob(f"**/{BEST}"))
    if found:
        return found, f"checkpoint: {found} (the newest under {RUNS}/)"
    return shipped() / "twin.safetensors", f"checkpoint: {SHIPPED.name} (the one that ships)"


def training(named: Path | None) -> tuple[Path, str]:
    """Return the folder of the training to go on with, and the line that says which it is.

    Args:
        named: what the user named, or None.

    Raises:
        SettingError: none was named, and there is none.
    """
    if named is not None:
        return named, f"training: {named}"
    found = _newest(RUNS.glob(f"**/{STATE}"))
    if found is None:
        raise SettingError(f"no training stands under {RUNS}/: name its folder with --out.")
    return found.parent, f"training: {found.parent} (the newest under {RUNS}/)"


def target(named: Path | None) -> tuple[Path, str]:
    """Return the bundle or checkpoint to attack, and the line that says which it is.

    Args:
        named: what the user named, or None; a training's folder stands for its best checkpoint.
    """
    if named is not None:
        best = named / BEST
        trained = best.is_file() and not (named / "vmoe.json").exists()
        return (best if trained else named), f"target: {named}"
    found = _newest([*_bundles(), *RUNS.glob(f"**/{BEST}")])
    if found:
        return found, f"target: {found} (the newest under {RUNS}/)"
    return shipped(), f"target: {SHIPPED.name} (the one that ships)"


def shipped() -> Path:
    """Return the bundle that ships; it carries its twin.

    Raises:
        VmoeError: this installation has none.
    """
    if not SHIPPED.exists():
        raise VmoeError(f"this installation ships no model ({SHIPPED} is missing): name a path.")
    return SHIPPED


def inside(named: Path) -> Path:
    """Return the checkpoint that a path stands for.

    Args:
        named: a file, which is returned as it is; a bundle, for the twin that it carries; or a
            training's folder, for its best checkpoint.

    Raises:
        VmoeError: a folder that holds neither.
    """
    if not named.is_dir():
        return named
    for path in (named / "twin.safetensors", named / BEST):
        if path.is_file():
            return path
    raise VmoeError(f"{named} holds no checkpoint: neither a bundle's twin nor a training's best.")


def offered() -> list[str]:
    """Return every bundle and checkpoint under runs/, for completion."""
    found = [path.parent for path in RUNS.glob("**/vmoe.json")]
    found += RUNS.glob(f"**/{BEST}")
    return sorted(str(path) for path in found if not any(map(_is_left_out, path.parts)))


def _bundles() -> list[Path]:
    return [path.parent for path in RUNS.glob("**/vmoe.json") if not _is_random(path)]


def _is_random(manifest: Path) -> bool:
    """Return whether a bundle's weights mean nothing: `vmoe-export --counterpart` made it."""
    return b'"weights": "random"' in manifest.read_bytes()


def _newest(paths: Iterable[Path]) -> Path | None:
    # nothing half-written (its name begins with a dot), and nothing that a gate refused
    found = [path for path in paths if not any(_is_left_out(part) for part in path.parts)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _is_left_out(name: str) -> bool:
    return name.startswith(".") or name.endswith(REJECTED)

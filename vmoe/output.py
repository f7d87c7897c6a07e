"""What is written is whole: under a temporary name beside its place, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vmoe import report
from vmoe.errors import OutputError, SettingError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; rename it to `path` when the body ends well, else remove it.

    What is no plain file (/dev/stdout, /dev/null, a pipe) is written as it stands; a link stays
    one, and what it points at is replaced.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix
        )
        os.close(handle)
    except OSError as e:
        raise _cannot(path, e) from e
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as e:
        if _elsewhere(e, temporary):
            raise
        raise _cannot(path, e) from e
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(
    path: Path, *, overwrite: bool = False, replaces: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """Yield a temporary folder; rename it to `path` when the body ends well, else remove it.

    Args:
        path: the folder.
        overwrite: replace one that is there.
        replaces: returns whether it may be: by default, whether it is a bundle and no more.

    Raises:
        SettingError: `path` exists and `overwrite` is off.
        OutputError: the disk is full, or the folder cannot be written.
    """
    refuse_existing(path, overwrite=overwrite, replaces=replaces)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        temporary.chmod(0o777 & ~_umask())
    except OSError as e:
        raise _cannot(path, e) from e
    try:
        yield temporary
        _swap(temporary, path)
    except OSError as e:
        if _elsewhere(e, temporary):
            raise
        raise _cannot(path, e) from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(
    path: Path,
    *,
    overwrite: bool,
    replaces: Callable[[Path], bool] | None = None,
    flag: str = "--out",
) -> None:
    """Raise SettingError for an output that exists, before any work is done."""
    if path.exists() and not overwrite:
        raise SettingError(f"{path} exists. Choose another {flag}, or say --overwrite.")
    if path.exists() and not (replaces or _is_only_a_bundle)(path):
        what = "what vmoe-export writes there" if replaces else "a bundle"
        raise SettingError(f"{path} is or holds more than {what}, so that it is not replaced.")


def probe(path: Path) -> None:
    """Make sure, before any work, that a file or folder can be written; nothing of it stays.

    Raises:
        OutputError: the folder cannot be written or made, or the disk is full.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            return  # a pipe, /dev/stdout
        path = path.resolve()
        place = next(at for at in (path, *path.parents) if at.exists())
        if place == path and place.is_file():
            place = path.parent
        with tempfile.NamedTemporaryFile(dir=place, prefix=f".{path.stem}.") as file:
            file.write(b"x")
            file.flush()
    except OSError as e:
        raise _cannot(path, e) from e


def _is_only_a_bundle(folder: Path) -> bool:
    """Return whether replacing a folder can lose nothing else: flat, and with a manifest."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    entries = list(folder.iterdir())
    flat = all(entry.is_file() and not entry.is_symlink() for entry in entries)
    return not entries or (flat and (folder / "vmoe.json").is_file())


def _swap(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    old = temporary.with_name(temporary.name + ".old")
    path.rename(old)
    try:
        temporary.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole, as `report.plain` makes it, with a newline at its end."""
    write_text(path, report.to_json(value, indent=2) + "\n")


def _elsewhere(e: OSError, temporary: Path) -> bool:
    """Return whether an error is of another file, such as one that the body wanted to read."""
    return e.filename is not None and not str(e.filename).startswith(str(temporary))


def _cannot(path: Path, e: OSError) -> OutputError:
    return OutputError(f"cannot write {path}: {e.strerror or e}. Nothing was left half-written.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""What is written is whole: under a temporary name beside its place, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vmoe.errors import OutputError, SettingError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; rename it to `path` when the body ends well, else remove it.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
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
        raise _cannot(path, e) from e
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder; rename it to `path` when the body ends well, else remove it.

    Raises:
        SettingError: `path` exists and `overwrite` is off.
        OutputError: the disk is full, or the folder cannot be written.
    """
    refuse_existing(path, overwrite=overwrite)
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
        raise _cannot(path, e) from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise SettingError for an output that exists, before any work is done."""
    if path.exists() and not overwrite:
        raise SettingError(f"{path} exists. Choose another --out, or say --overwrite.")
    if path.is_dir() and overwrite and any(path.iterdir()) and not (path / "vmoe.json").exists():
        raise SettingError(f"{path} is a folder that is not a bundle; it is left alone.")


def _swap(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    old = temporary.with_name(temporary.name + ".old")
    path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old) if old.is_dir() else old.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file whole.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole, sorted where the order means nothing, with a newline at its end."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _cannot(path: Path, e: OSError) -> OutputError:
    return OutputError(f"cannot write {path}: {e.strerror or e}. Nothing was left half-written.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

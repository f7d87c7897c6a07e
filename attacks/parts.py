"""What a run has finished, kept in files, so that it can go on where it was interrupted.

    OUT/parts/run.json              what the run is: everything that its result depends on
    OUT/parts/batch00003-row001.npz   one batch under one attack, and what was said of it
    OUT/parts/batch00003-clean.npz    what was said of its clean clips

Every file is written whole and then renamed; a run that was killed at any point goes on from the
files that are there, to the same result. They are removed once the report is written.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np

from vmoe import cli, output, report
from vmoe.attacks.outcomes import Arrays
from vmoe.errors import SettingError, VmoeError

FOLDER = "parts"
RUN = "run.json"


class PartFiles(MutableMapping[str, Arrays]):
    """Parts as files; several processes may fill one folder, each with parts of its own."""

    def __init__(self, folder: Path) -> None:
        """Take a folder, which must be there."""
        self._folder = folder

    def __getitem__(self, name: str) -> Arrays:
        """Return a part; one that cannot be read is as good as missing."""
        path = self._path(name)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return {key: arrays[key] for key in arrays.files}
        except FileNotFoundError as e:
            raise KeyError(name) from e
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
            cli.log.warning("%s is damaged (%s): it is made again", path, e)
            raise KeyError(name) from e

    def __setitem__(self, name: str, arrays: Arrays) -> None:
        """Write a part whole.

        Raises:
            OutputError: the disk is full, or the folder cannot be written.
        """
        with output.whole_file(self._path(name)) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # its stubs take keywords for flags

    def __delitem__(self, name: str) -> None:
        """Remove a part."""
        self._path(name).unlink()

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the parts that are there."""
        # what a killed process left under a temporary name begins with a point
        return (p.stem for p in self._folder.glob("*.npz") if not p.name.startswith("."))

    def __len__(self) -> int:
        """Return how many parts are there."""
        return sum(1 for _ in self)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.npz"


def begun(out: Path) -> bool:
    """Return whether a folder holds a run that was not finished."""
    return (out / FOLDER / RUN).exists()


def begin(out: Path, run: Mapping[str, Any], command: Mapping[str, Any]) -> PartFiles:
    """Begin a run in a folder; parts of an earlier one are removed.

    Args:
        out: the run's folder.
        run: everything that its result depends on, by names that a user knows.
        command: what was given on the command line, for `command_of`.

    Raises:
        OutputError: it cannot be written.
    """
    shutil.rmtree(out / FOLDER, ignore_errors=True)
    output.write_json(out / FOLDER / RUN, {"run": run, "command": command})
    return PartFiles(out / FOLDER)


def go_on(out: Path, run: Mapping[str, Any]) -> PartFiles:
    """Go on with the run in a folder.

    Raises:
        SettingError: nothing was begun there, or another run was.
        VmoeError: what is there cannot be read.
    """
    compare(_read(out)["run"], run, f"{out} was begun", "leave it as it was, or take another --out")
    return PartFiles(out / FOLDER)


def command_of(out: Path) -> dict[str, Any]:
    """Return what was given on the command line of the run in a folder.

    Raises:
        SettingError: nothing was begun there.
        VmoeError: what is there cannot be read.
    """
    command: dict[str, Any] = _read(out)["command"]
    return command


def compare(before: Mapping[str, Any], now: Mapping[str, Any], who: str, advice: str) -> None:
    """Refuse two runs that differ.

    Raises:
        SettingError: names the first difference, then the advice.
    """
    now = report.plain(now)
    for name in dict.fromkeys([*now, *before]):
        one, other = before.get(name), now.get(name)
        if one != other:
            raise SettingError(
                f"{who} with {name}: {_short(one)}; this one has {_short(other)}: {advice}."
            )


def abandon(out: Path) -> None:
    """Remove what a run that failed leaves, where it has finished nothing."""
    parts = out / FOLDER
    if parts.is_dir() and not len(PartFiles(parts)):
        remove(out)
        if not any(out.iterdir()):
            out.rmdir()


def remove(out: Path) -> None:
    """Remove the parts of a run that is finished."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)


def _read(out: Path) -> dict[str, Any]:
    path = out / FOLDER / RUN
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        done = "its run is finished" if (out / "report.json").exists() else "no run was begun there"
        raise SettingError(f"{out} cannot be resumed: {done}. Leave --resume out.") from e
    except (OSError, ValueError, RecursionError) as e:
        raise VmoeError(f"cannot read {path}: {e}. Begin anew with --overwrite.") from e
    if not isinstance(values, dict) or not {"run", "command"} <= values.keys():
        raise VmoeError(f"{path} is damaged: it is no run. Begin anew with --overwrite.")
    return values


def _short(value: Any) -> str:
    text = "none" if value is None else ",".join(map(str, value)) if isinstance(value, list) else ""
    text = text or str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Official lists of videos: reading them, finding what they name, holding out a validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vmoe.data._splits import held_out, in_drawn_order
from vmoe.data._videos import Files, Found
from vmoe.errors import SettingError


class Row(NamedTuple):
    """One video of a list.

    Attributes:
        group: of its class; what was recorded together.
        name: of its file.
    """

    label: str
    group: str
    name: str


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a list that are not empty, stripped, with their numbers from 1.

    Raises:
        SettingError: it is not there, or is no text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise SettingError(f"cannot read the list {path}: {e.strerror}.") from e
    except UnicodeDecodeError as e:
        raise SettingError(f"the list {path} is no text: {e}.") from e
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line.strip()


def found_of(
    where: Path, labels: Sequence[str], rows: Sequence[Row], find: Callable[[str], Path | None]
) -> Found:
    """Return which videos of a list are there.

    Args:
        where: the data set's folder.
        labels: in their order.
        rows: of the list; their labels are among those.
        find: from a row's name to its file, None where there is none.
    """
    files: Files = {label: [] for label in labels}
    missing: dict[str, list[str]] = {label: [] for label in labels}
    for row in rows:
        path = find(row.name)
        if path is None:
            missing[row.label].append(row.name)
        else:
            files[row.label].append(path)
    return Found(where, {k: in_drawn_order(v) for k, v in files.items()}, missing)


def below(folder: Path) -> Callable[[str], Path | None]:
    """Return what finds the file of a name that is a path below a folder."""

    def find(name: str) -> Path | None:
        path = folder / name
        return path if path.is_file() else None

    return find


def trained_or_held_out(rows: Sequence[Row], split: str) -> list[Row]:
    """Return what `train` or `val` has of an official train list.

    Which groups validate, the list decides, not which videos are there.

    Raises:
        SettingError: a class has one group alone.
    """
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row.label, []).append(row.group)
    validating = {label: held_out(label, every) for label, every in groups.items()}
    return [row for row in rows if (row.group in validating[row.label]) == (split == "val")]

"""CSV: a row for each window, with a header; whole rows only.

Columns: stream, source, window, epoch, t_first_s, t_s, t_capture, t_label, age_ms, label, score,
smooth_label, smooth_score, event, expert, route_margin, route_entropy, guard_score, guard_alarm,
gap, dropped; as JSON lines have them (jsonl.py).
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from types import TracebackType
from typing import Any

from vmoe.errors import SettingError
from vmoe.runtime.results import Result

from . import Step
from ._lines import Lines

COLUMNS = (
    "stream", "source", "window", "epoch", "t_first_s", "t_s", "t_capture", "t_label", "age_ms",
    "label", "score", "smooth_label", "smooth_score", "event", "expert", "route_margin",
    "route_entropy", "guard_score", "guard_alarm", "gap", "dropped",
)  # fmt: skip


def open(path: Path, *, overwrite: bool = False) -> Csv:
    """Return a sink that writes a file; it begins with the first result.

    Raises:
        SettingError: the file exists and `overwrite` is off.
    """
    if path.is_dir():
        raise SettingError(f"--csv {path} is a folder; name a file.")
    if path.is_file() and not overwrite:
        raise SettingError(f"{path} exists. Choose another --csv, or say --overwrite.")
    return Csv(path)


class Csv:
    """See `Sink`."""

    wants_frames = False

    def __init__(self, path: Path) -> None:
        """Take the file."""
        self.name = str(path)
        self._lines = Lines(path, head=_row(COLUMNS))

    def take(self, step: Step) -> None:
        """Write the result, if there is one.

        Raises:
            OutputError: it cannot be written; a row that did not fit on the disk is taken back.
        """
        if step.result is not None:
            self._lines.write(_row(_values(step.result)))

    def __enter__(self) -> Csv:
        self._lines.probe()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lines.close(kind)


def _values(result: Result) -> list[Any]:
    values = result.to_json()
    guard = values["guard"] or {}
    values |= {f"guard_{key}": value for key, value in guard.items()}
    return [values.get(column, "") for column in COLUMNS]


def _row(values: Any) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()

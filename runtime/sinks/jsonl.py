"""JSON lines: one object per window (or per event), whole lines only.

window         number of the window of its stream, from 0
stream         number of the stream, in the order of the sources, from 0
source         the source's name
epoch          changes at every reconnect, loop and break in the timestamps
t_first_s      timestamp of its first frame, on the source's own clock, in seconds
t_s            timestamp of its last frame
t_capture      when its last frame was there, in seconds since 1970
t_label        when its label was there, in seconds since 1970
age_ms         t_label - t_capture, in milliseconds
frame_first    sequence of its first frame
frame_last     sequence of its last frame
gap            whether the stream was broken since the window before
dropped        frames that were lost since the window before
label, score   the most likely label and its share of the softmax, in [0, 1]
top            [{"label", "score"}, ...], best first
expert         the expert that answered
weights        softmax of the router's scores, one for each expert
route_margin   weight of the best expert less that of the second, in [0, 1]
route_entropy  entropy of the weights, in nats
smooth_label   the label with the highest share, averaged over time (--smooth)
smooth_score   that share
event          id of the event that goes on, null where none does
guard          null, or the guard's {"score", "alarm", "why", "acted"} (runtime/guard)
stage_ms       {"decode_ms", "prepare_ms", "wait_ms", "infer_ms"}, milliseconds

`--events` writes a line for each event's start, its updates (once a second) and its end instead:

event          start, update or end
id             number of the event of its stream, from 0
stream, source as above
label, score   what it is, and its highest averaged share so far
t_start_s      first frame of its first window, on the source's own clock, in seconds
t_end_s        last frame of its last window so far
t_start, t_end when those frames were there, in seconds since 1970
windows        how many windows so far
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType

from vmoe.errors import SettingError

from . import Step
from ._lines import Lines

RESULTS, EVENTS = "--jsonl", "--events"


def open(path: Path | None, *, overwrite: bool = False, kind: str = RESULTS) -> JsonLines:
    """Return a sink that writes a file, or stdout where `path` is None; results or events.

    A file begins with the first result and grows line by line, so that it can be followed while
    the run goes on. Where nothing was labelled it is as it was, or (after a clean end) empty.

    Raises:
        SettingError: the file exists and `overwrite` is off.
    """
    if path is not None and path.is_dir():
        raise SettingError(f"{kind} {path} is a folder; name a file.")
    if path is not None and path.is_file() and not overwrite:
        raise SettingError(f"{path} exists. Choose another {kind}, or say --overwrite.")
    return JsonLines(path, events=kind == EVENTS)


class JsonLines:
    """See `Sink`."""

    wants_frames = False

    def __init__(self, path: Path | None, *, events: bool = False) -> None:
        """Take the file; it is opened with the first line."""
        self.name = str(path) if path is not None else "stdout"
        self._events = events
        self._lines = Lines(path) if path is not None else None

    def take(self, step: Step) -> None:
        """Write the result, if there is one, or the events.

        Raises:
            OutputError: it cannot be written; a line that did not fit on the disk is taken back.
        """
        if self._events:
            objects = [event.to_json() for event in step.events]
        else:
            objects = [] if step.result is None else [step.result.to_json()]
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects)
        if text and self._lines is not None:
            self._lines.write(text)
        elif text:
            sys.stdout.write(text.encode(errors="backslashreplace").decode())
            sys.stdout.flush()

    def __enter__(self) -> JsonLines:
        if self._lines is not None:
            self._lines.probe()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lines is not None:
            self._lines.close(kind)

"""A sink that makes a profile of what it sees: run it on clean video, and on nothing else."""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path
from types import TracebackType

from vmoe import output
from vmoe.bundle import Bundle
from vmoe.errors import SettingError
from vmoe.runtime.sinks import Step

from . import profile as profiles

log = logging.getLogger("vmoe")


def open(
    path: Path, *, bundle: Bundle, hop_s: float, filter: str, false_alarms: float,
    overwrite: bool = False,
) -> Calibration:  # fmt: skip
    """Return the sink; the profile is written when the streams end well.

    Raises:
        SettingError: the file exists and `overwrite` is off.
    """
    if path.exists() and not overwrite:
        raise SettingError(f"{path} exists. Choose another --guard-calibrate, or say --overwrite.")
    return Calibration(path, bundle, hop_s, filter, false_alarms)


class Calibration:
    """See `Sink`."""

    wants_frames = False

    def __init__(
        self, path: Path, bundle: Bundle, hop_s: float, filter: str, false_alarms: float
    ) -> None:
        """Take where the profile goes, and what it is of."""
        self.name = str(path)
        self._path, self._bundle = path, bundle
        self._hop_s, self._filter, self._false_alarms = hop_s, filter, false_alarms
        self._streams: dict[int, list[tuple[dict[str, float], int]]] = defaultdict(list)

    def take(self, step: Step) -> None:
        """Keep the terms of a window."""
        if step.result is not None and step.result.guard is not None:
            self._streams[step.stream].append((step.result.guard.terms, step.result.expert))

    def __enter__(self) -> Calibration:
        output.probe(self._path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            return
        made = profiles.make(
            list(self._streams.values()),
            experts=self._bundle.experts,
            twin=str(self._bundle.twin.get("sha256")),
            hop_s=self._hop_s,
            filter=self._filter,
            false_alarms=self._false_alarms,
        )
        profiles.write(made, self._path)
        log.info("guard: %s, of %d windows; alarm above %.3f for %g of clean windows",
                 self._path, made.windows, made.threshold, made.false_alarms)  # fmt: skip

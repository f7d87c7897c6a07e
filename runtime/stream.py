"""`Stream`: live labels of cameras, files or a program's own frames, in a few lines.

from vmoe.runtime import Stream, load

with load() as engine, Stream(engine, "rtsp://camera.local/1", "street.mp4") as stream:
for result in stream:
print(result.source, result.t_s, result.label, result.score)
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

from . import sources
from .engine import Engine
from .frames import Stop
from .pipeline import Pipeline
from .results import Result
from .settings import StreamSettings
from .sinks import Sink
from .sources import Source, SourceSettings
from .sources._iterator import Given, IteratorSource
from .tally import Tally

Named: TypeAlias = str | int | Path | Source | Iterable[Given]


class Stream:
    """One run of one or more sources through an engine: iterate it once.

    Of a live source the newest frame wins, and every drop is counted; of all else nothing is
    dropped. Leaving the loop, or the context, ends all threads and closes the sinks.
    """

    def __init__(
        self,
        engine: Engine,
        *given: Named,
        settings: StreamSettings | None = None,
        how: SourceSettings | None = None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        """Look whether the sources can be there; nothing is read yet.

        Args:
            engine: a loaded bundle.
            given: what `sources.open` takes (a file, a camera's number, an address, `test`), an
                open `Source`, or an iterable of frames, uint8 [H, W, 3] RGB, or of pairs of a
                timestamp in seconds and a frame (`sources._iterator.IteratorSource`).
            settings: how the streams are served: hop, sampling, smoothing ...
            how: how sources that are named are read; of several, one that is not there yet is
                waited for.
            sinks: what else takes every step, such as `sinks.jsonl.open(Path("labels.jsonl"))`.

        Raises:
            SourceError: a source that is named is not there.
        """
        self._stop = Stop()
        how = how or SourceSettings()
        how = replace(how, patient=how.patient or len(given) > 1)
        opened = [_opened(source, how) for source in given]
        self._pipeline = Pipeline(engine, opened, settings, stop=self._stop)
        self._results: Generator[Result, None, None] = self._pipeline.results(sinks)

    def __iter__(self) -> Iterator[Result]:
        """Yield one result for each window of every stream, as they come.

        Raises:
            SourceError: a source broke off, is too slow or was lost; after the last result.
            OutputError: a sink missed results; after the last result.
        """
        return self._results

    @property
    def tally(self) -> Tally:
        """What has been counted so far, of all streams together."""
        return self._pipeline.tally

    @property
    def states(self) -> dict[str, str]:
        """The state of every source, by its name: opening, running, stalled, reopening, ended."""
        return {lane.source.name: lane.source.state for lane in self._pipeline.lanes}

    @property
    def hop_s(self) -> float:
        """Time between two windows of one stream, in seconds."""
        return self._pipeline.hop_s

    def stop(self) -> None:
        """End the streams in order, after what they hold; from any thread."""
        self._stop.ask()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._results.close()


def _opened(given: Named, how: SourceSettings) -> Source:
    if isinstance(given, (str, int, Path)):
        return sources.open(str(given), how)
    if isinstance(given, Iterable):
        return IteratorSource(given)
    return given

"""The whole run as one record, and as JSON (schema.json); render.py makes what people read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from vmoe import report
from vmoe.errors import VmoeError
from vmoe.runtime.engines import Times as DeviceTimes

from . import accuracy as accuracies
from . import compare
from .accuracy import Accuracy
from .certificate import Certificate
from .compare import Comparison
from .energy import Energy, Method
from .forms import Form
from .measuring import Samples
from .statistics import Summary, Times, summarise
from .verdicts import Verdict

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Streamed:
    """What one run of the scenario `stream` counted, after its warm-up.

    Attributes:
        seconds: so long it was counted.
        hop_s: between two windows of one stream, in seconds.
        windows: labelled.
        windows_dropped: made, or labelled, but something was too slow for them.
        windows_incomplete: due, but their times could not be honoured.
        frames: taken from the sources.
        frames_dropped: lost, because what follows was too slow.
    """

    seconds: float
    hop_s: float
    windows: int
    windows_dropped: int
    windows_incomplete: int
    frames: int
    frames_dropped: int


@dataclass(frozen=True)
class Row:
    """One form of one bundle, in one scenario; or why it could not be measured.

    Attributes:
        bundle, form: their names.
        scenario: single, multi, offline or stream.
        batch: clips of one call; of stream 1.
        streams: that the clips are of; 1 of single and offline.
        threads: CPU threads of the engine; None is its own choice.
        backend: what ran it.
        wall: of a call, on the clock, in ms; of stream from capture to label of each window.
        cpu: of all threads of this process, in ms a call; None of stream.
        samples: every call's; None where the row failed.
        why: it failed; one line.
        stream: counts of a stream.
        device: where a call's time went, medians, of a backend on a device that tells.
        energy: of a clip; None where it is not available, and of parts alone.
        accuracy: clean and robust, of rows that are routed freely; None where not asked for.
    """

    bundle: str
    form: str
    scenario: str
    batch: int
    streams: int
    threads: int | None
    backend: str
    wall: Summary | None = None
    cpu: Summary | None = None
    samples: Samples | None = None
    why: str | None = None
    stream: Streamed | None = None
    device: DeviceTimes | None = None
    energy: Energy | None = None
    accuracy: Accuracy | None = None

    @property
    def clips_per_s(self) -> float | None:
        """Clips answered per second, calls one after another; of stream windows labelled."""
        if self.stream is not None:
            return self.stream.windows / self.stream.seconds
        return None if self.wall is None else self.batch * 1000 / self.wall.mean

    def to_json(self, *, samples: bool = False) -> dict[str, Any]:
        """Return the row as schema.json has it; `samples` adds every call's times."""
        values: dict[str, Any] = {
            "bundle": self.bundle,
            "form": self.form,
            "scenario": self.scenario,
            "batch": self.batch,
            "streams": self.streams,
            "threads": self.threads,
            "backend": self.backend,
            "why": self.why,
            "clips_per_s": self.clips_per_s,
            "latency_ms": _plain(self.wall),
            "cpu_ms": _plain(self.cpu),
            "stream": _plain(self.stream),
            "device_ms": None if self.device is None else self.device._asdict(),
            "energy": _plain(self.energy),
            "accuracy": accuracies.to_json(self.accuracy),
        }
        if samples and self.samples is not None:
            values["samples_ms"] = {
                "wall": report.plain(self.samples.wall_ms),
                "cpu": report.plain(self.samples.cpu_ms),
            }
        return values


@dataclass(frozen=True)
class About:
    """What a bundle is, and where its clips were routed.

    Attributes:
        name, path, lowering, precision, backend: as print has them.
        experts: how many.
        clip: shape of one clip, [T, H, W, 3].
        baseline: it was given as --baseline.
        weights: trained, or random: it serves latency only.
        twin: sha256 of the twin.
        routes: how many of the clips each expert answered when they were routed freely; none
            where the bundle could not be run.
    """

    name: str
    path: str
    lowering: str
    precision: str
    backend: str
    experts: int
    clip: tuple[int, ...]
    baseline: bool
    weights: str
    twin: str | None
    routes: tuple[int, ...]


@dataclass(frozen=True)
class Record:
    """What one run of vmoe-bench found.

    Attributes:
        command: as it was typed.
        context: the machine (context.py), before the first call and, in `during`, since.
        settings: the flags, with what they resolved to.
        bundles: in the order that they were given, baselines last.
        rows: in the same order.
        certificates: of the bundles with several experts.
        verdicts: what the numbers say.
        interrupted: the user ended it before its time.
        energy: how it was measured, or why not.
        comparison: with an older record; None where none was given.
    """

    command: str
    context: dict[str, Any]
    settings: dict[str, Any]
    bundles: tuple[About, ...]
    rows: tuple[Row, ...]
    certificates: tuple[Certificate, ...]
    verdicts: tuple[Verdict, ...]
    interrupted: bool = False
    energy: Method = field(default_factory=Method)
    comparison: Comparison | None = None

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows that could not be measured."""
        return tuple(row for row in self.rows if row.why is not None)

    def to_json(self, *, samples: bool = False) -> dict[str, Any]:
        """Return the record as schema.json has it; `samples` adds every call's times."""
        return {
            "schema_version": SCHEMA_VERSION,
            "command": self.command,
            "context": self.context,
            "settings": self.settings,
            "interrupted": self.interrupted,
            "bundles": [report.plain(asdict(about)) for about in self.bundles],
            "rows": [row.to_json(samples=samples) for row in self.rows],
            "certificates": [report.plain(asdict(made)) for made in self.certificates],
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "energy": report.plain(asdict(self.energy)),
            "comparison": self.comparison and compare.to_json(self.comparison),
        }


def row(form: Form, took: Samples, percentiles: Sequence[float]) -> Row:
    """Return the row of a form that was measured."""
    return replace(
        _empty(form),
        wall=summarise(took.wall_ms, percentiles),
        cpu=summarise(took.cpu_ms, percentiles),
        samples=took,
    )


def why(error: Exception) -> str:
    """Return an error as one line; of what is not ours, with its type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, VmoeError) else f"{type(error).__name__}: {text}"


def failure(form: Form, why: str) -> Row:
    """Return the row of a form that could not be measured."""
    return replace(_empty(form), why=why)


def stream_row(form: Form, ages_ms: Times, counts: Streamed, percentiles: Sequence[float]) -> Row:
    """Return the row of a stream: `ages_ms` from capture to label, of each window."""
    return replace(
        _empty(form),
        wall=summarise(ages_ms, percentiles),
        samples=Samples(ages_ms, np.empty(0)),
        stream=counts,
    )


def _empty(form: Form) -> Row:
    return Row(form.subject, form.name, form.scenario, form.batch, form.streams, form.threads,
               form.backend)  # fmt: skip


def _plain(value: Any) -> Any:
    return None if value is None else report.plain(asdict(value))

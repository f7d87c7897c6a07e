"""The flags of vmoe-bench: one class."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vmoe.errors import SettingError
from vmoe.settings import Settings, opt, to_mapping

from . import context
from .compare import parse_threshold
from .power import AUTO
from .power import CHOICES as METERS
from .scenarios import CALLED, MULTI, OFFLINE, SCENARIOS, SINGLE, STREAM, STREAMED

T = TypeVar("T")
ALL_CORES = "all"
BATCHES = {SINGLE: (1,), OFFLINE: (8,)}  # where --batch is not given
STREAMS = {MULTI: (4,), STREAM: (1,)}  # where --streams is not given


@dataclass(frozen=True)
class BenchSettings(Settings):
    """The flags of vmoe-bench."""

    scenario: tuple[str, ...] = opt(
        (SINGLE,), "single: latency of a call; multi: of a query, one window of each stream; "
        "offline: throughput; stream: capture to label, paced as a camera", choices=SCENARIOS,
    )  # fmt: skip
    batch: tuple[int, ...] = opt((), "clips of a call of offline, else of single; several are a "
                                 "sweep; 8 of offline and 1 of single if not given",
                                 at_least=1)  # fmt: skip
    streams: tuple[int, ...] = opt((), "streams of multi and stream, several are a sweep; 4 of "
                                   "multi and 1 of stream if not given", at_least=1)  # fmt: skip
    threads: tuple[str, ...] = opt((), "CPU threads of the engine, all for every core; several "
                                   "are measured in turn; its own choice if not given")  # fmt: skip
    warmup: float = opt(200.0, "milliseconds that do not count; of calls at least one round",
                        at_least=0)  # fmt: skip
    duration: float = opt(3.0, "measure at least so many seconds: all calls together, and each "
                          "run of stream", at_least=0)  # fmt: skip
    iterations: int = opt(50, "call each form at least so often", at_least=1)
    percentile: tuple[float, ...] = opt((50.0, 90.0, 95.0, 99.0), "percentiles of the latency",
                                        above=0, at_most=100)  # fmt: skip
    force_route: str = opt("all", "all: every route; free: only the router's own; or one expert")
    device: str = opt("auto", "auto, cpu or cuda:N")
    backend: str = opt("auto", "what runs the graphs: auto, onnxruntime, openvino, tensorrt, "
                       "torch or triton")  # fmt: skip
    server: str | None = opt(None, "HOST:PORT (HTTP) or grpc://HOST:PORT of a Triton server that "
                             "has all of the bundles: backend triton")  # fmt: skip
    cuda_graph: bool | None = opt(None, "run the parts as CUDA graphs: onnxruntime on CUDA; and "
                                  "tensorrt, which does unless told not to")  # fmt: skip
    include_transfers: bool = opt(True, "latency from clips on the host to answers there; "
                                  "without: the GPU's work alone (backend tensorrt)")  # fmt: skip
    accuracy: str | None = opt(None, "data whose split `test` gives accuracy beside speed: "
                               "camera-motion, a folder of folders, NAME:/path")  # fmt: skip
    accuracy_clips: int = opt(200, "clips of --accuracy, at most", at_least=1)
    robust: Path | None = opt(None, "folder of vmoe-attack --save-adv, whose clips give robust "
                              "accuracy beside speed")  # fmt: skip
    power: str = opt(AUTO, "meter of energy, read some seconds for each form; auto: what can be "
                     "read here, of what is used; a named one: of each route, too",
                     choices=METERS)  # fmt: skip
    compare: Path | None = opt(None, "an older record, of --out: which rows became slower")
    fail_over: str | None = opt(None, "with --compare: end with 3 where a row is slower by more, "
                                "and by more than the noise: 5% or 0.05")  # fmt: skip
    out: Path | None = opt(None, "write the record as JSON, with every call's time")
    csv: Path | None = opt(None, "write the rows as CSV")
    md: Path | None = opt(None, "write the table and the verdicts as Markdown")
    plot: Path | None = opt(None, "draw latency, throughput against batch, and accuracy against "
                            "speed: FILE.png, FILE.svg, or a folder for one file each")  # fmt: skip
    overwrite: bool = opt(False, "replace the files of --out, --csv, --md and --plot")
    seed: int = opt(0, "seed of the clips, and of the order of the calls", at_least=0)

    def __post_init__(self) -> None:
        """Check every value; refuse what has no effect."""
        super().__post_init__()
        if self.fail_over is not None:
            parse_threshold(self.fail_over)
            if self.compare is None:
                raise SettingError("--fail-over does nothing without --compare OLD.json.")
        for asked in self.threads:
            if asked != ALL_CORES and not (asked.isdecimal() and int(asked)):
                raise SettingError(f"--threads is {asked!r}; it is a number from 1, or all.")
        for flag, given, scenarios in (
            ("batch", self.batch, CALLED),
            ("streams", self.streams, STREAMED),
        ):
            if given and not set(self.scenario) & set(scenarios):
                raise SettingError(
                    f"--{flag} does nothing without --scenario {' or '.join(scenarios)}."
                )

    @property
    def scenarios(self) -> tuple[str, ...]:
        """What is measured, each once."""
        return _once(self.scenario)

    def batches(self, scenario: str) -> tuple[int, ...]:
        """Return the clips of a call, of single or offline; --batch is offline's, of both."""
        if scenario == SINGLE and OFFLINE in self.scenario:
            return BATCHES[SINGLE]
        return _once(self.batch) or BATCHES[scenario]

    def stream_counts(self, scenario: str) -> tuple[int, ...]:
        """Return how many streams, of multi or stream."""
        return _once(self.streams) or STREAMS[scenario]

    def thread_counts(self) -> tuple[int | None, ...]:
        """Return CPU threads of the engines; None is their own choice."""
        asked = [context.cores() if n == ALL_CORES else int(n) for n in self.threads]
        return _once(asked) or (None,)

    def resolved(self) -> dict[str, Any]:
        """Return the flags as JSON can hold them, with what they resolved to."""
        batches = [self.batches(name) for name in CALLED if name in self.scenario]
        streams = [self.stream_counts(name) for name in STREAMED if name in self.scenario]
        return {
            **to_mapping(self),
            "scenario": list(self.scenarios),
            "batch": list(_once(n for some in batches for n in some)),
            "streams": list(_once(n for some in streams for n in some)),
            "threads": list(self.thread_counts()),
        }


def _once(values: Iterable[T]) -> tuple[T, ...]:
    """Return values in their order, without those that came before."""
    return tuple(dict.fromkeys(values))

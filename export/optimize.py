"""Which passes run, in which order, and which of several forms of an expert is the fastest here.

    none      as exported
    flat      pixels moved while they are bytes, for an expert that takes frames as a batch (tsm)
    direct    frames unrolled: 3-D convolutions as sums of 2-D ones
    joined    frames unrolled, the taps of a convolution stacked on its channels, and the stride
              over pixels too: for int8, where a sum of taps would be rounded after each
    winograd  frames unrolled with fewer multiplications; fp32 alone, as its sums widen the ranges

An expert that a form is not for stays as exported. The router stays as exported:
it is one or two percent of the cost.

A form that is named gives the same bytes for the same twin and versions. `auto` measures, so that
what it chooses belongs to the machine: report.json says which form that was, and an export with
that form named gives the same bytes again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto

from vmoe.errors import MissingDependencyError, SettingError
from vmoe.runtime.engines.onnxruntime import why_unavailable

from . import graphs
from .passes import (
    annotate_batch,
    cast_first,
    flat_pixels,
    fold_scaling,
    fold_stride,
    join_taps,
    pad_channels,
    share_ranges,
    sink_initializers,
    strip_metadata,
    temporal_winograd,
    unroll_frames,
    widen_scaling,
)

log = logging.getLogger("vmoe.export")

Pass = Callable[[GraphProto], bool]

EXPORTED: tuple[Pass, ...] = (strip_metadata.apply,)  # over each part, as the tracer gave it
_BEFORE: tuple[Pass, ...] = (fold_scaling.apply, pad_channels.apply)
FORMS: dict[str, tuple[Pass, ...]] = {  # over each expert
    "none": (),
    "flat": (fold_scaling.apply, flat_pixels.apply),
    "direct": (*_BEFORE, unroll_frames.apply),
    "joined": (fold_scaling.apply, fold_stride.apply, pad_channels.apply, join_taps.apply),
    "winograd": (*_BEFORE, temporal_winograd.apply),
}
ONLINE: tuple[Pass, ...] = (fold_scaling.apply,)  # over each expert of the online form
QUANTISED: tuple[Pass, ...] = (widen_scaling.apply,)  # over each part that becomes int8, before
RANGED: tuple[Pass, ...] = (strip_metadata.apply, share_ranges.apply)  # ... and once it is int8
LOWERED: tuple[Pass, ...] = (sink_initializers.apply, annotate_batch.apply)  # over what is written
TENSORRT: tuple[Pass, ...] = (cast_first.apply,)  # over each part that a plan is built of

AUTO = "auto"
CHOICES = (AUTO, *FORMS)
CANDIDATES = ("none", "flat", "direct", "winograd")  # of auto in fp32, the least work last
TIE = 1.1  # times within this ratio are the same, so that noise seldom decides
PARITY = 1e-5  # between forms, as a share of the largest logit
SECONDS = 0.5  # of measuring, for each candidate
ROUNDS = 3  # at least


class Choice(NamedTuple):
    """A form, and why.

    Attributes:
        asked: as the plan says.
        form: what was taken.
        cpu_ms: CPU time of one clip by form, minimum, one thread; empty where nothing was measured.
        difference: of the logits of the candidates to those of the plain form, as a share of the
            largest; None where a form changes nothing.
    """

    asked: str
    form: str
    cpu_ms: dict[str, float]
    difference: dict[str, float]

    def to_report(self) -> dict[str, Any]:
        """Return what stands in report.json."""
        return self._asdict()


def check() -> None:
    """Refuse to begin where ONNX Runtime, which measures, quantises and checks, is missing.

    Raises:
        MissingDependencyError: and the command that installs it.
    """
    why = why_unavailable()
    if why:
        raise MissingDependencyError(why)


def lower(model: ModelProto, form: str) -> ModelProto | None:
    """Return a part in another form; None where that form is the part as it is.

    A pass that does not know a layer leaves the graph alone, so that the whole form does: half a
    form is none that anyone measured.
    """
    if not FORMS[form]:
        return None
    *before, last = FORMS[form]
    made = ModelProto()
    made.CopyFrom(model)
    for apply in before:
        apply(made.graph)
    return graphs.model(made.graph, model) if last(made.graph) else None


def finish(model: ModelProto) -> ModelProto:
    """Return what a lowering made, after the passes that every graph goes through."""
    changed = [apply(model.graph) for apply in LOWERED]
    return graphs.model(model.graph, model) if any(changed) else model


def choose(experts: Sequence[ModelProto], asked: str) -> tuple[list[ModelProto], Choice]:
    """Return a model's experts in the form that is asked, or in the fastest of CANDIDATES.

    Measured is the first expert: all have one architecture, and time does not depend on weights.
    Of forms that tie, the one that does the least work is taken.

    Args:
        experts: as exported, clip -> logits.
        asked: a form, or auto.

    Raises:
        SettingError: a form that is asked computes something else than the plain one.
    """
    names = CANDIDATES if asked == AUTO else ("none", asked)
    forms = {"none": experts[0]}
    for name in names:
        made = lower(experts[0], name)
        if made is not None:
            forms[name] = made
    if len(forms) == 1:
        return list(experts), Choice(asked, "none", {}, {})
    runs = {name: _session(model) for name, model in forms.items()}
    difference = _differences(runs, _clips(experts[0]))
    wrong = [name for name, d in difference.items() if not d <= PARITY]
    if asked in wrong:
        raise SettingError(
            f"--optimize {asked} changes the logits by {difference[asked]:.1e} of the largest; at "
            f"most {PARITY:g} is rounding. Use --optimize none."
        )
    for name in wrong:
        log.warning("form %s is left out: it changes the logits by %.1e of the largest",
                    name, difference[name])  # fmt: skip
        del runs[name]
    if asked != AUTO:
        return _all(experts, asked), Choice(asked, asked, {}, difference)
    cpu_ms = measure(runs, _clips(experts[0])[:1])
    form = fastest(cpu_ms)
    log.info("optimize auto: %s (%s)", form, _said(cpu_ms))
    return _all(experts, form), Choice(asked, form, cpu_ms, difference)


def _all(experts: Sequence[ModelProto], form: str) -> list[ModelProto]:
    """Return all experts in a form, or all as exported."""
    made = [lower(expert, form) for expert in experts]
    return [expert if one is None else one for expert, one in zip(experts, made, strict=True)]


Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def _session(model: ModelProto) -> Run:
    """Return a part as a function, on one thread."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name

    def run(clips: NDArray[np.uint8]) -> NDArray[np.float32]:
        answer: NDArray[np.float32] = session.run(None, {name: clips})[0]
        return answer

    return run


def _clips(model: ModelProto) -> NDArray[np.uint8]:
    """Return three clips of noise."""
    sizes = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    return np.random.default_rng(0).integers(0, 256, (3, *sizes), np.uint8)


def _differences(runs: dict[str, Run], clips: NDArray[np.uint8]) -> dict[str, float]:
    """Return each form's largest difference to the plain one, as a share of the largest logit."""
    plain = runs["none"](clips)
    scale = float(np.abs(plain).max()) or 1.0
    return {
        name: float(np.abs(run(clips) - plain).max()) / scale
        for name, run in runs.items()
        if name != "none"
    }


def measure(
    runs: dict[str, Run], clips: NDArray[np.uint8], seconds: float = SECONDS
) -> dict[str, float]:
    """Return the CPU time of each, in ms: the minimum of calls that take turns."""
    found = {name: float("inf") for name in runs}
    begin, rounds = time.perf_counter(), 0
    while rounds < ROUNDS or time.perf_counter() - begin < seconds * len(runs):
        rounds += 1
        for name, run in runs.items():
            start = time.process_time()
            run(clips)
            found[name] = min(found[name], (time.process_time() - start) * 1e3)
    return {name: round(ms, 4) for name, ms in found.items()}


def fastest(cpu_ms: dict[str, float]) -> str:
    """Return the fastest form; of those that tie with it, the one that does the least work."""
    best = min(cpu_ms.values())
    return [name for name, ms in cpu_ms.items() if ms <= TIE * best][-1]


def _said(cpu_ms: dict[str, float]) -> str:
    return ", ".join(f"{name} {ms:.3g} ms" for name, ms in cpu_ms.items())

"""The online form, for benchmarks/export.py: a decision per frame against a window per decision.

online_window_over_frame_112, online_window_over_frame_64
    Work of one expert of tsm-online on a clip of 16 frames (the window form, --optimize flat)
    over its work on one new frame (the online form), at 112 and 64 pixels. Process CPU time of one
    thread, minima, the forms in turn within each round. Beside it: `wall`, the same of the clock;
    `medians`, of CPU time; `with_router`, both with the router's work, which sees the whole window
    either way; `tsm`, the plain two-sided tsm's window over the frame; the times themselves.
online_error_112, online_error_64
    Largest |d logits| of clips that come frame by frame, after other clips, to the same clips
    whole, as a share of the largest logit.

The weights are random: latency does not depend on them.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from figures import Figure

from vmoe.checkpoint import Checkpoint
from vmoe.clips import ClipSpec
from vmoe.export import online, onnx, optimize, pipeline
from vmoe.export.onnx import Parts
from vmoe.export.pipeline import ExportSettings, Plan
from vmoe.models import ModelSettings, VideoMoE, build
from vmoe.runtime import Engine, load
from vmoe.runtime.bench.measuring import Plan as Rounds
from vmoe.runtime.bench.measuring import Samples, interleave
from vmoe.runtime.bench.subjects import random_clips

log = logging.getLogger("vmoe")

FRAMES, WIDTH = 16, 0.5
REACH = {112: 12.0, 64: 4.5}  # asked at 112; the prototype at 64 (8 frames) came to 4.8
ERROR = 1e-5  # as a share of the largest logit
LABELS = tuple("abcdefghij")


class Forms(NamedTuple):
    """Loaded bundles of one size."""

    window: Engine
    online: Engine
    tsm: Engine


def measure(size: int, rounds: int) -> list[Figure]:
    """Export, load and measure the forms at one size of frames; return its figures."""
    spec = ClipSpec(frames=FRAMES, height=size, width=size)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        forms = _forms(stack, Path(folder), spec)
        clips = random_clips(spec, 4, seed=0)
        error = online.error(forms.online, clips)
        largest = float(np.abs(forms.online.run_all(clips)).max())
        took = dict(zip((*Forms._fields, "router"), _time(forms, rounds), strict=True))
    cpu = {name: float(times.cpu_ms.min()) for name, times in took.items()}
    more = {
        "wall": _ratio(took, lambda t: t.wall_ms.min()),
        "medians": _ratio(took, lambda t: np.median(t.cpu_ms)),
        "with_router": (cpu["window"] + cpu["router"]) / (cpu["online"] + cpu["router"]),
        "tsm": cpu["tsm"] / cpu["online"],
        **{f"{name}_ms": value for name, value in cpu.items()},
    }
    return [
        Figure(f"online_window_over_frame_{size}", cpu["window"] / cpu["online"], "ratio",
               REACH[size], "higher", n=rounds, more=more),
        Figure(f"online_error_{size}", error / largest, "share", ERROR, n=len(clips)),
    ]  # fmt: skip


def _forms(stack: ExitStack, folder: Path, spec: ClipSpec) -> Forms:
    """Write and load: tsm-online by windows and online, and plain tsm."""
    loaded = []
    for name in Forms._fields:
        arch = "tsm" if name == "tsm" else "tsm-online"
        experts = 2 if name == "window" else 1  # of two there is a router
        twin = build(ModelSettings(arch, WIDTH, experts, len(LABELS)), spec).eval()
        settings = ExportSettings(form="online" if name == "online" else "window")
        made = online.from_twin if name == "online" else _by_windows
        plan = Plan(Checkpoint(twin, LABELS), None, name, settings)
        log.info("exporting %s, %d frames of %d", name, spec.frames, spec.height)
        (folder / name).mkdir()
        pipeline.write(plan, made(twin, settings.opset), folder / name)
        engine = load(folder / name, "onnxruntime", "cpu", threads=1, all_parts=True)
        loaded.append(stack.enter_context(engine))
    return Forms(*loaded)


def _by_windows(twin: VideoMoE, opset: int) -> Parts:
    """Export the window form in the form that --optimize auto takes for it."""
    router, experts = onnx.from_twin(twin, opset)
    return Parts(router, optimize.choose(experts, "flat")[0])


def _time(forms: Forms, rounds: int) -> list[Samples]:
    """Run each form once a round; the router last."""
    clips = random_clips(forms.online.bundle.spec, 4, seed=1)
    _, states = forms.online.follow(0, clips[:1])

    def frame(number: int) -> None:
        nonlocal states
        at = number % FRAMES
        _, states = forms.online.follow(0, clips[:1, at : at + 1], states)

    def whole(engine: Engine, part: str) -> Callable[[int], object]:
        return lambda number: engine.run_part(part, clips[number % 4][None])

    calls = [whole(forms.window, "expert0"), frame, whole(forms.tsm, "expert0"),
             whole(forms.window, "router")]  # fmt: skip
    return interleave(calls, Rounds(rounds))


def _ratio(took: dict[str, Samples], of: Callable[[Samples], float]) -> float:
    return float(of(took["window"]) / of(took["online"]))

"""Host routing with CUDA graphs on a GPU: what it costs, and what a sparse mixture gains by it.

The router's graph ends with a copy of the routes to pinned memory; the host waits for it as the
backend tensorrt waits (`_cuda.finish`, the same function), and replays the graph of the expert that
it names. A batch is grouped: the host uploads which rows each
expert takes, and replays one graph for each expert that has any. Experts are cuDNN's, from torch;
the routes are steered by a bias on the scores, so that the readback is real and the case known.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from figures import Figure
from gpu_timing import Effort, Found, captured, finish, median, spread, stream, wall_us
from numpy.typing import NDArray
from torch import Tensor, nn

from vmoe import report
from vmoe.clips import ClipSpec
from vmoe.models import ModelSettings, VideoMoE, build, dense_counterpart
from vmoe.runtime.bench.subjects import random_clips
from vmoe.runtime.engines import _cuda

STEER = 1e6  # on the scores: more than any router gives
BUCKETS = (2, 8)  # rows of the graphs at batch 8, for the two cases measured
Call = Callable[[], object]


class Routed:
    """A mixture whose parts are CUDA graphs; the host routes between them."""

    def __init__(self, twin: VideoMoE, clips: Tensor, buckets: Sequence[int]) -> None:
        """Capture the router, and every expert in buckets of rows.

        Args:
            twin: on the device of the clips.
            clips: uint8 [N, T, H, W, 3]; the graphs read this memory at each call.
            buckets: of how many rows there are graphs; ascending, the last is N at least.
        """
        n, m, device = len(clips), len(twin.experts), clips.device
        assert twin.router is not None
        self.twin, self.clips, self.buckets = twin, clips, buckets
        self.bias = torch.zeros(n, m, device=device)
        self.route = torch.zeros(n, dtype=torch.int64, device=device)
        self.logits = torch.zeros(n, twin.settings.classes, device=device)
        self.rows = torch.zeros(m, n, dtype=torch.int64, device=device)
        pin = torch.cuda.is_available()
        self.host_route = torch.zeros(n, dtype=torch.int64, pin_memory=pin)
        self.host_rows = torch.zeros(m, n, dtype=torch.int64, pin_memory=pin)
        self.seen: NDArray[np.int64] = self.host_route.numpy()
        self.told: NDArray[np.int64] = self.host_rows.numpy()
        self.wait = waiter()
        self.router = captured(self._route)
        self.experts = [
            {size: captured(partial(self._answer, e, size)) for size in buckets} for e in range(m)
        ]

    def steer(self, routes: Sequence[int]) -> None:
        """Let the router send each clip to the expert that is given."""
        chosen = torch.tensor(routes, device=self.bias.device)
        self.bias.copy_(STEER * nn.functional.one_hot(chosen, self.bias.shape[1]))

    def one(self) -> None:
        """Answer one clip: router, one readback, expert."""
        self.router()
        self.wait()
        self.experts[self.seen[0]][1]()

    def blocked(self) -> None:
        """Answer one clip; the host sleeps until the route is there."""
        self.router()
        finish()
        self.experts[self.seen[0]][1]()

    def unread(self, route: int) -> None:
        """Run what `one` runs, without a look at the route: what it would cost at no cost."""
        self.router()
        self.experts[route][1]()

    def grouped(self) -> None:
        """Answer all clips, grouped by expert."""
        self.router()
        self.wait()
        order = np.argsort(self.seen, kind="stable")
        counts = np.bincount(self.seen, minlength=len(self.experts))
        work, begin = [], 0
        for expert, count in enumerate(counts.tolist()):
            if count:
                size = next(size for size in self.buckets if size >= count)
                rows = order[begin : begin + count]
                self.told[expert, :count], self.told[expert, count:size] = rows, rows[-1]
                begin += count
                work.append(self.experts[expert][size])
        upload(self.host_rows, self.rows)
        for replay in work:
            replay()

    def _route(self) -> None:
        scores = self.twin.scores(pixels(self.clips, self.twin))
        self.route.copy_((scores + self.bias).argmax(1))
        readback(self.route, self.host_route)

    def _answer(self, expert: int, size: int) -> None:
        rows = self.rows[expert, :size]
        clips = pixels(self.clips.index_select(0, rows), self.twin)
        self.logits.index_copy_(0, rows, self.twin.experts[expert](clips).float())


def waiter() -> Callable[[], None]:
    """Return what waits for the current stream as the backend tensorrt does; nothing on a CPU."""
    if not torch.cuda.is_available():
        return lambda: None
    from cuda.bindings import driver

    return partial(_cuda.finish, driver, driver.CUstream(stream()))


def readback(source: Tensor, target: Tensor) -> None:
    """Copy to pinned memory on the current stream, by the driver: torch's own copy notes events."""
    if not source.is_cuda:
        target.copy_(source)
        return
    from cuda.bindings import driver

    size = source.numel() * source.element_size()
    (error,) = driver.cuMemcpyDtoHAsync(target.data_ptr(), source.data_ptr(), size, stream())
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"cuMemcpyDtoHAsync says {error.name}")


def upload(source: Tensor, target: Tensor) -> None:
    """Copy from pinned memory on the current stream."""
    target.copy_(source, non_blocking=True)


def pixels(clips: Tensor, twin: VideoMoE) -> Tensor:
    """Return [N, 3, T, H, W] in [0, 1], in the numbers that a twin computes in."""
    kind = next(twin.experts.parameters()).dtype
    return clips.permute(0, 4, 1, 2, 3).to(kind) / 255


class Halved(nn.Module):
    """A router in float32 behind clips in half precision."""

    def __init__(self, router: nn.Module) -> None:
        """Take the router."""
        super().__init__()
        self.router = router

    def forward(self, clip: Tensor) -> Tensor:
        """Return scores of a clip."""
        scores: Tensor = self.router(clip.float())
        return scores


def halved(twin: VideoMoE) -> VideoMoE:
    """Return a copy whose experts compute in float16; near-ties of scores need the router's own."""
    made = copy.deepcopy(twin)
    made.experts.half()
    if made.router is not None:
        made.router = Halved(made.router)
    return made


def measure(device: str, effort: Effort) -> Found:
    """Time host routing, and sparse against dense, at batch 1 and 8."""
    found = Found()
    rows: list[list[Any]] = []
    for frames, pixels_ in effort.sizes:
        spec = ClipSpec(frames=frames, height=pixels_, width=pixels_)
        twin = build(ModelSettings(experts=4), spec).eval().to(device)
        wide = build(dense_counterpart(twin.settings), spec).eval().to(device)
        for kind in ("tf32", "fp16") if device != "cpu" else ("fp32",):
            torch.backends.cudnn.allow_tf32 = True
            models = (twin, wide) if kind != "fp16" else (halved(twin), halved(wide))
            name = f"{frames}x{pixels_}_{kind}"
            first = kind in ("tf32", "fp32") and (frames, pixels_) == effort.sizes[0]
            prefix = "" if first else f"{name}_"
            clips = torch.from_numpy(random_clips(spec, 8, seed=0)).to(device)
            rows += [[name, 1, *row] for row in _single(found, prefix, models, clips[:1], effort)]
            rows += [[name, 8, *row] for row in _batch(found, prefix, models, clips, effort)]
    columns = ["clips", "N", "form", "us, median", "least", "spread"]
    found.tables["Latency by the host's clock, clips on the GPU, until all is done"] = report.table(
        rows, columns
    )
    found.measured["rows"] = rows
    return found


def _single(
    found: Found, prefix: str, models: tuple[VideoMoE, VideoMoE], clips: Tensor, effort: Effort
) -> list[list[Any]]:
    """Time one clip in every form."""
    twin, wide = models
    routed = Routed(twin, clips, (1,))
    routed.steer([2])
    _check(routed, routed.one, [2])
    forms: dict[str, Call] = {
        "host routing": routed.one,
        "host routing, the host sleeps": routed.blocked,
        "router and expert, route not read": partial(routed.unread, 2),
        "router alone": routed.router,
        "expert alone": routed.experts[2][1],
        **others(twin, wide, clips),
    }
    taken = wall_us(forms, effort.calls)
    base = "router and expert, route not read"
    for name, form in (("host_routing_us", "host routing"),
                       ("host_routing_blocking_us", "host routing, the host sleeps")):  # fmt: skip
        paid = [a - b for a, b in zip(taken[form], taken[base], strict=True)]
        more = {"least": min(taken[form]) - min(taken[base])}
        found.figures.append(
            Figure(
                prefix + name, median(paid), "us", 20, n=len(paid), spread=spread(paid), more=more
            )
        )
    _gains(found, prefix, "b1", taken, "host routing")
    return _rows(taken)


def _batch(
    found: Found, prefix: str, models: tuple[VideoMoE, VideoMoE], clips: Tensor, effort: Effort
) -> list[list[Any]]:
    """Time eight clips: two for each expert, then all for one."""
    twin, wide = models
    routed = Routed(twin, clips, BUCKETS)
    mixed, alike = [i % 4 for i in range(8)], [1] * 8

    def of(routes: Sequence[int]) -> Callable[[], None]:
        def call() -> None:
            routed.steer(routes)
            finish()

        return call

    taken: dict[str, list[float]] = {}
    for name, routes in (("two for each expert", mixed), ("all for one", alike)):
        of(routes)()
        _check(routed, routed.grouped, routes)
        forms = {f"host routing, {name}": routed.grouped}
        if routes is mixed:
            forms |= others(twin, wide, clips)
        taken |= wall_us(forms, effort.calls)
    _gains(found, prefix, "b8", taken, "host routing, two for each expert")
    return _rows(taken)


def others(twin: VideoMoE, wide: VideoMoE, clips: Tensor) -> dict[str, Call]:
    """Return what is compared: all experts in one graph, the dense counterpart, torch's forward."""
    held: dict[str, Tensor] = {}
    steered = torch.zeros(len(clips), len(twin.experts), device=clips.device)

    def every() -> None:
        given = pixels(clips, twin)
        route = (twin.scores(given) + steered).argmax(1)
        logits = torch.stack([expert(given) for expert in twin.experts], 1)
        held["every"] = logits[torch.arange(len(clips), device=clips.device), route]

    def dense() -> None:
        held["dense"] = wide.experts[0](pixels(clips, wide))

    def forward() -> None:
        held["forward"] = twin(pixels(clips, twin)).logits

    return {
        "all experts, then select, one graph": captured(every),
        "dense counterpart, one graph": captured(dense),
        "torch's forward of the twin": forward,
    }


def _gains(found: Found, prefix: str, batch: str, taken: dict[str, list[float]], form: str) -> None:
    """Add how many times as long the dense forms take as host routing does."""
    for name, dense in (("dense_vs_sparse", "dense counterpart, one graph"),
                        ("all_experts_vs_sparse", "all experts, then select, one graph"),
                        ("forward_vs_sparse", "torch's forward of the twin")):  # fmt: skip
        value = median(taken[dense]) / median(taken[form])
        least = min(taken[dense]) / min(taken[form])
        found.figures.append(
            Figure(f"{prefix}{name}_{batch}", value, "ratio", 1, "higher", len(taken[form]),
                   abs(value - least) / 2, more={"minima": least})
        )  # fmt: skip


def _check(routed: Routed, answer: Call, routes: Sequence[int]) -> None:
    """Refuse to time an answer that is not the twin's."""
    routed.logits.fill_(torch.nan)
    answer()
    finish()
    given = pixels(routed.clips, routed.twin)
    want = torch.cat([routed.twin.experts[r](given[i : i + 1]) for i, r in enumerate(routes)])
    error = float((routed.logits - want.float()).abs().max())
    if routed.seen.tolist() != list(routes) or not error < 0.05 * float(want.float().norm()):
        raise RuntimeError(
            f"host routing went to {routed.seen.tolist()}, not {list(routes)}, or differs from the "
            f"twin by {error:g}"
        )


def _rows(taken: dict[str, list[float]]) -> list[list[Any]]:
    return [
        [name, statistics.median(times), min(times), spread(times)] for name, times in taken.items()
    ]

"""What a clip costs, by torch's own counter.

python -m vmoe.models.flops        # the table of docs/families.md
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vmoe import registry, report
from vmoe.clips import ClipSpec
from vmoe.models.moe import FAMILIES, ModelSettings, VideoMoE, dense_counterpart

WIDTHS = (0.125, 0.5, 1.0)
CLIPS = (ClipSpec(), ClipSpec(frames=16, height=112, width=112))
COLUMNS = ("family", "width", "clip", "expert MFLOPs", "router", "dense", "saved %", "M parameters")


class Flops(NamedTuple):
    """Floating-point operations (two to a multiply-add) of one clip.

    Attributes:
        router: of the router.
        expert: of one expert.
        dense: of the dense counterpart; None for a model that is dense itself.
        denoiser: of what stands in front of both, where there is one.
    """

    router: int
    expert: int
    dense: int | None
    denoiser: int = 0

    @property
    def moe(self) -> int:
        """Router and one expert, and the denoiser: what a clip costs."""
        return self.denoiser + self.router + self.expert

    @property
    def saved(self) -> float | None:
        """Share of the dense counterpart's FLOPs that is not spent."""
        return None if self.dense is None else 1 - self.moe / self.dense

    @property
    def said(self) -> str:
        """What a clip costs, in words, and against what."""
        text = f"{self.moe / 1e6:.4g} MFLOPs a clip"
        if self.dense is None or self.saved is None:
            return text
        share = f"{self.saved:.0%} saved" if self.saved >= 0 else f"{-self.saved:.0%} more"
        return f"{text} against {self.dense / 1e6:.4g} of the dense counterpart: {share}"


class Counter(TorchDispatchMode):
    """Adds up the FLOPs of all that runs inside of it, backward passes and attacks included.

    By the formulas of torch's own counter, whose FlopCounterMode refuses `autograd.grad`.
    """

    def __init__(self) -> None:
        """Begin at zero."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.total: int = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and count it."""
        out = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def count(twin: VideoMoE) -> Flops:
    """Count the FLOPs of one clip, on shapes alone."""
    router = 0 if twin.router is None else _forward(twin.router, twin)
    expert = _forward(twin.experts[0], twin)
    denoiser = 0 if twin.denoiser is None else _forward(twin.denoiser, twin)
    dense = None if twin.router is None else count_dense(twin.settings, twin)
    return Flops(router, expert, dense, denoiser)


def count_dense(settings: ModelSettings, twin: VideoMoE) -> int:
    """Count the FLOPs of the dense counterpart of an architecture."""
    with torch.device("meta"):
        dense = VideoMoE(dense_counterpart(settings), twin.spec)
    return _forward(dense.experts[0], dense)


def table(widths: Sequence[float] = WIDTHS, clips: Sequence[ClipSpec] = CLIPS) -> str:
    """Return what every family costs, as Markdown, at four experts and ten labels.

    MFLOPs of one clip, and the parameters of one expert in millions.
    """
    rows = []
    for family, spec, width in itertools.product(registry.names(FAMILIES), clips, widths):
        with torch.device("meta"):
            twin = VideoMoE(ModelSettings(family, width), spec)
        cost = count(twin)
        assert cost.dense is not None
        assert cost.saved is not None
        parameters = sum(tensor.numel() for tensor in twin.experts[0].parameters())
        mega = [_mega(value) for value in (cost.expert, cost.router, cost.dense)]
        clip = f"{spec.frames}x{spec.height}x{spec.width}"
        rows.append([family, width, clip, *mega, round(100 * cost.saved), _mega(parameters)])
    return report.table(rows, COLUMNS)


def _mega(value: int) -> str:
    """Return millions, to four digits or to the unit."""
    return f"{value / 1e6:.4g}" if value < 1e9 else f"{value / 1e6:.0f}"


def _forward(module: torch.nn.Module, twin: VideoMoE) -> int:
    spec = twin.spec
    clip = torch.empty(1, 3, spec.frames, spec.height, spec.width, device="meta")
    shadow = copy.deepcopy(module).to("meta").eval()
    with torch.no_grad(), Counter() as counter:
        shadow(clip)
    return int(counter.total)


if __name__ == "__main__":
    print(table())

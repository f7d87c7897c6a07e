"""fp16 and bf16: the twin's own modules in half precision, traced as such; float32 in and out."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from vmoe.models import VideoMoE

from .layers import twin_place
from .onnx import Parts, trace
from .precision import PrecisionSettings

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def export(twin: VideoMoE, settings: PrecisionSettings, opset: int) -> Parts:
    """Export router and experts in fp16 or bf16, what is kept in fp32.

    Args:
        twin: in eval mode, on the CPU.
        settings: one of the two is asked for.
        opset: version of the ONNX operators.
    """
    shape = twin.spec.shape
    router, experts = modules(twin, settings)
    made = None if router is None else trace([router], "scores", shape, opset)[0]
    return Parts(made, _trace_alike(experts, shape, opset))


def modules(
    twin: VideoMoE, settings: PrecisionSettings
) -> tuple[nn.Module | None, list[nn.Module]]:
    """Return router and experts as modules that compute in what is asked; of fp32 the twin's own.

    Args:
        twin: in eval mode, on the CPU.
        settings: fp32, fp16 or bf16.
    """
    if settings.precision not in DTYPES:
        return twin.router, list(twin.experts)
    dtype = DTYPES[settings.precision]
    t, h, w, c = twin.spec.shape
    clip = torch.rand(1, c, t, h, w, generator=torch.Generator().manual_seed(0))

    def low(module: nn.Module, part: str) -> nn.Module:
        return _low(folded(module, clip), twin_place(part), dtype, settings)

    router = None if twin.router is None else low(twin.router, "router")
    return router, [low(expert, f"expert{i}") for i, expert in enumerate(twin.experts)]


def folded(module: nn.Module, clip: Tensor) -> nn.Module:
    """Return a copy whose normalisations are folded into the convolutions before them, in float32.

    Folded later, among half weights, each would be rounded twice. Only what follows a convolution
    directly, once each, is folded; a copy that answers otherwise is not taken.

    Args:
        module: a router or an expert, in eval mode.
        clip: what it takes, float32 [B, 3, T, H, W].
    """
    made = copy.deepcopy(module)
    for conv, norm in _pairs(made, clip):
        before: Any = made.get_submodule(conv)
        after: Any = made.get_submodule(norm)
        fused = fuse_conv_bn_eval(before, after)
        _put(made, conv, fused)
        _put(made, norm, nn.Identity())
    with torch.no_grad():
        was, now = module(clip), made(clip)
    close = torch.allclose(was, now, rtol=1e-3, atol=1e-3 * float(was.abs().max()))
    return made if close else copy.deepcopy(module)


def _pairs(module: nn.Module, clip: Tensor) -> list[tuple[str, str]]:
    """Return the names of convolutions and of the normalisations that take their answers."""
    made_by: dict[int, str] = {}
    answers: list[Tensor] = []  # kept, so that no other tensor takes one's place
    pairs: list[tuple[str, str]] = []

    def note(name: str) -> Any:
        def hook(inner: nn.Module, args: tuple[Tensor, ...], answer: Tensor) -> None:
            if isinstance(inner, nn.modules.conv._ConvNd):
                made_by[id(answer)] = name
                answers.append(answer)
            elif id(args[0]) in made_by:
                pairs.append((made_by[id(args[0])], name))

        return hook

    kinds = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
    hooks = [
        inner.register_forward_hook(note(name))
        for name, inner in module.named_modules()
        if isinstance(inner, kinds)
    ]
    try:
        with torch.no_grad():
            module(clip)
    finally:
        for hook in hooks:
            hook.remove()
    once = Counter(name for pair in pairs for name in pair)
    return [(conv, norm) for conv, norm in pairs if once[conv] == once[norm] == 1]


def _put(module: nn.Module, name: str, inner: nn.Module) -> None:
    """Put a module into another, under a dotted name."""
    around, _, last = name.rpartition(".")
    setattr(module.get_submodule(around), last, inner)


def _trace_alike(
    modules: Sequence[nn.Module], shape: tuple[int, ...], opset: int
) -> list[ModelProto]:
    """Export experts; those with the same layers kept are traced together."""
    kinds = [_kind(module) for module in modules]
    made: dict[int, ModelProto] = {}
    for kind in dict.fromkeys(kinds):
        which = [i for i, other in enumerate(kinds) if other == kind]
        graphs = trace([modules[i] for i in which], "logits", shape, opset)
        made |= dict(zip(which, graphs, strict=True))
    return [made[i] for i in range(len(modules))]


def _kind(module: nn.Module) -> tuple[tuple[str, torch.dtype], ...]:
    return tuple((name, tensor.dtype) for name, tensor in module.state_dict().items())


class Low(nn.Module):
    """A module in half precision behind float32: what comes in and goes out stays as it was."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Take a module whose tensors are of that type already, but for islands."""
        super().__init__()
        self.module = module
        self.dtype = dtype

    def forward(self, clip: Tensor) -> Tensor:
        """Return what the module says, as float32."""
        answer: Tensor = self.module(clip.to(self.dtype))
        return answer.float()


class Island(nn.Module):
    """A layer that stays float32 among half ones."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Take the layer and the type of what is around it."""
        super().__init__()
        self.module = module.float()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer says, in the type of what is around it."""
        answer: Tensor = self.module(x.float())
        return answer.to(self.dtype)


def _low(
    module: nn.Module, place: str, dtype: torch.dtype, settings: PrecisionSettings
) -> nn.Module:
    """Return a copy in half precision, the layers to be kept as islands; itself if all are."""
    leaves = {
        name: leaf
        for name, leaf in module.named_modules()
        if not list(leaf.children()) and leaf.state_dict(keep_vars=True)
    }
    kept = [name for name in leaves if settings.keeps(f"{place}.{name}")]
    if len(kept) == len(leaves):
        return module
    made = copy.deepcopy(module).to(dtype)
    for name in kept:
        _put(made, name, Island(copy.deepcopy(leaves[name]), dtype))
    return Low(made, dtype)

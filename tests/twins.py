"""Small twins and clips for the tests of attacks."""

from __future__ import annotations

import copy
import functools

import numpy as np
import torch
from torch import Tensor, nn

from vmoe.batches import to_tensor
from vmoe.clips import Clips, ClipSpec
from vmoe.models import ModelSettings, VideoMoE, build
from vmoe.models.moe import Normalise

SPEC = ClipSpec(frames=4, spacing_s=0.1, height=32, width=32)
SMALL = ClipSpec(frames=3, spacing_s=0.1, height=9, width=11)


def random_clips(n: int, seed: int = 0, spec: ClipSpec = SPEC) -> Clips:
    """Return coarse noise, uint8 [N, T, H, W, 3], each clip with a colour of its own."""
    rng = np.random.default_rng(seed)
    t, h, w, _ = spec.shape
    coarse = rng.integers(40, 216, (n, t, -(-h // 8), -(-w // 8), 3))
    coarse = coarse.repeat(8, axis=2)[:, :, :h].repeat(8, axis=3)[:, :, :, :w]
    tint = rng.integers(-40, 40, (n, 1, 1, 1, 3))
    return np.clip(coarse + tint, 0, 255).astype(np.uint8)


def random_clip(n: int, seed: int = 0, spec: ClipSpec = SPEC) -> Tensor:
    """Return the same as a clip, float32 [N, 3, T, H, W] with pixels in [0, 1]."""
    return to_tensor(random_clips(n, seed, spec))


def lively(experts: int = 4, classes: int = 4, seed: int = 0, spec: ClipSpec = SPEC) -> VideoMoE:
    """Return an untrained twin whose router and experts answer differently to different clips."""
    return copy.deepcopy(_lively(experts, classes, seed, spec))


@functools.cache
def _lively(experts: int, classes: int, seed: int, spec: ClipSpec) -> VideoMoE:
    """Make one; fresh weights alone give nearly the same scores to every clip."""
    return _awake(build(ModelSettings("tsm", 0.1, experts, classes), spec, seed))


def small(experts: int = 4, classes: int = 4, seed: int = 0, spec: ClipSpec = SMALL) -> VideoMoE:
    """Return a twin like `lively`, of one convolution each: for clips of any size, and fast."""
    return copy.deepcopy(_small(experts, classes, seed, spec))


@functools.cache
def _small(experts: int, classes: int, seed: int, spec: ClipSpec) -> VideoMoE:
    twin = build(ModelSettings("tsm", 0.1, experts, classes), spec, seed)

    def part(out: int) -> nn.Module:
        return nn.Sequential(
            Normalise(spec),
            nn.Conv3d(3, 6, 3, stride=(1, 2, 2), padding=1, bias=False),
            nn.BatchNorm3d(6),
            nn.Softplus(),
            nn.AdaptiveAvgPool3d((1, 2, 2)),
            nn.Flatten(),
            nn.Linear(24, out),
        )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin.router = part(experts) if experts > 1 else None
        twin.experts = nn.ModuleList(part(classes) for _ in range(experts))
    return _awake(twin)


def _awake(twin: VideoMoE) -> VideoMoE:
    """Give a fresh twin statistics of noise, and centre and scale up its last layers on it."""
    clip = random_clip(32, 99, twin.spec)
    with torch.no_grad():
        for module in twin.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = None  # the plain average of what it sees
        twin.train()
        twin.scores(clip)
        twin.run_all(clip)
        twin.eval()
        parts = [*twin.experts] if twin.router is None else [twin.router, *twin.experts]
        for part in parts:
            _spread(part, clip)
    return twin


def _spread(part: nn.Module, clip: Tensor) -> None:
    last = [module for module in part.modules() if isinstance(module, nn.Linear)][-1]
    out = part(clip)
    scale = 1 / out.std(dim=0).clamp(min=1e-3)
    last.weight.mul_(scale[:, None])
    last.bias.copy_((last.bias - out.mean(dim=0)) * scale)


def lived(module: nn.Module) -> nn.Module:
    """Give every norm statistics and weights that are not its first ones."""
    drawn = torch.Generator().manual_seed(2)
    for name, value in module.state_dict().items():
        if name.endswith(("running_mean", "running_var", "weight", "bias")) and value.dim() == 1:
            value.copy_(0.5 + torch.rand(value.shape, generator=drawn))
    return module.eval()


def linear(experts: int = 2, classes: int = 2, seed: int = 0, spec: ClipSpec = SPEC) -> VideoMoE:
    """Return a twin whose router and experts are linear: its best perturbation is known."""
    twin = build(ModelSettings("tsm", 0.1, experts, classes), spec, seed)
    t, h, w, c = spec.shape
    generator = torch.Generator().manual_seed(seed)

    def layer(out: int) -> nn.Module:
        made = nn.Linear(t * h * w * c, out)
        with torch.no_grad():
            made.weight.copy_(0.01 * torch.randn(made.weight.shape, generator=generator))
            made.bias.zero_()
        return nn.Sequential(nn.Flatten(), made)

    twin.router = layer(experts) if experts > 1 else None
    twin.experts = nn.ModuleList(layer(classes) for _ in range(experts))
    return twin.eval()


def weight(part: nn.Module, spec: ClipSpec = SPEC) -> Tensor:
    """Return the weights of a linear part, [outputs, 3, T, H, W]."""
    t, h, w, c = spec.shape
    last = [module for module in part.modules() if isinstance(module, nn.Linear)][-1]
    return last.weight.detach().view(-1, c, t, h, w)

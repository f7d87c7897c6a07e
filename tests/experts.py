"""Small experts of one twin, and their graphs: what tests of precision and of bisect share."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from tests.twins import SPEC, random_clip, random_clips
from vmoe import checkpoint, latest
from vmoe.clips import ClipSpec
from vmoe.export.onnx import Parts, from_twin
from vmoe.models import ModelSettings, VideoMoE, build
from vmoe.models.experts.r3d18 import Block

LABELS = ("a", "b", "c")


class Small(nn.Module):
    """An R3D of two blocks: clip, normalised, to logits; seven layers."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Conv3d(3, 8, (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm3d(8), nn.ReLU())
        self.layer1 = Block(8, 8, 1)
        self.layer2 = Block(8, 16, 2)
        self.avgpool = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Linear(16, len(LABELS))

    def forward(self, clip: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(clip)))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


@functools.cache
def small_twin() -> VideoMoE:
    """Return a twin of two small experts whose normalisations have seen clips."""
    twin = build(ModelSettings("tsm", 0.1, 2, len(LABELS)), SPEC, seed=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        twin.experts = nn.ModuleList(nn.Sequential(twin.experts[0][0], Small()) for _ in range(2))
    with torch.no_grad():
        for module in twin.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = None
        clip = random_clip(8, 1)
        twin.train()
        twin.scores(clip)
        twin.run_all(clip)
    return twin.eval()


@functools.cache
def plain(family: str) -> Parts:
    """Return the graphs of small experts, or (tsm) of the model that ships."""
    if family == "small":
        return from_twin(small_twin(), 20)
    router, *experts = (onnx.load(latest.SHIPPED / f"{n}.onnx") for n in ("router", "expert0",
                                                                          "expert2"))  # fmt: skip
    return Parts(router, experts)


@functools.cache
def twin_of(family: str) -> VideoMoE:
    """Return the twin of `plain`'s graphs."""
    if family == "small":
        return small_twin()
    twin = checkpoint.load(latest.SHIPPED / "twin.safetensors").twin
    twin.experts = nn.ModuleList([twin.experts[0], twin.experts[2]])
    return twin


def clips_for(family: str, n: int, seed: int = 0) -> np.ndarray:
    spec = SPEC if family == "small" else ClipSpec(frames=8, spacing_s=0.1, height=64, width=64)
    return random_clips(n, seed, spec)

"""SlowFast-R18: a wide pathway that sees few frames, a narrow one that sees them all.

    slow: every ALPHA-th frame, the channels of a ResNet-18   -> stem -> stage 1 -> ... -> stage 4
    fast: every frame, an eighth of the channels              -> stem -> stage 1 -> ... -> stage 4

Behind the stem and each stage but the last, a lateral convolution over 5 frames with a stride of
ALPHA brings the fast pathway's frames to the slow one's, which takes them as more channels. Its
taps are centred on the slow pathway's frames: 0, ALPHA, 2 ALPHA, ... So any clip of ALPHA frames
or more will do, of T frames the slow pathway sees ceil(T / ALPHA).

Temporal kernels are the paper's: slow 1, 1, 1, 3, 3 (stem, then stages), fast 5, 3, 3, 3, 3. The
frames of neither pathway are thinned further, which short clips could not bear. The first
convolution of a block has the temporal kernel, the second one none, as in the authors' code. The
fast pathway has 8 channels at least, so that in a narrow expert it is more than an eighth.

Source: Feichtenhofer et al., "SlowFast Networks for Video Recognition", ICCV 2019 (alpha 4,
beta 1/8, time-strided convolutions with 2 beta C channels).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vmoe.errors import SettingError
from vmoe.models.experts._channels import channels

ALPHA = 4  # frames of the fast pathway to one of the slow
BETA_INVERSE = 8  # channels of the slow pathway to one of the fast
STRIDES = (1, 2, 2, 2)  # in space, of the stages


class Block(nn.Module):
    """A convolution in time and space, one in space, and a way around them."""

    def __init__(self, inner: int, outer: int, taps: int, stride: int) -> None:
        """Make a block that divides height and width by the stride."""
        super().__init__()
        self.conv1 = nn.Sequential(
            _conv(inner, outer, (taps, 3, 3), stride), nn.BatchNorm3d(outer), nn.ReLU()
        )
        self.conv2 = nn.Sequential(_conv(outer, outer, (1, 3, 3), 1), nn.BatchNorm3d(outer))
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            projection = _conv(inner, outer, (1, 1, 1), stride)
            self.downsample = nn.Sequential(projection, nn.BatchNorm3d(outer))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, outer, T, H/s, W/s] of [B, inner, T, H, W]."""
        y: Tensor = self.relu(self.conv2(self.conv1(x)) + self.downsample(x))
        return y


class SlowFast18(nn.Module):
    """Clip [B, 3, T, H, W], normalised, of ALPHA frames or more, to logits [B, K]."""

    def __init__(self, width: float, classes: int) -> None:
        """Make the network at a share of its own width."""
        super().__init__()
        full = (64, 64, 128, 256, 512)
        slow = [channels(count, width) for count in full]
        fast = [channels(count // BETA_INVERSE, width) for count in full]
        more = [2 * count for count in fast[:-1]]  # what comes over from the fast pathway
        self.slow = _pathway(slow, [*more, 0], taps=(1, 1, 1, 3, 3))
        self.fast = _pathway(fast, [0] * 5, taps=(5, 3, 3, 3, 3))
        self.lateral = nn.ModuleList(_lateral(count) for count in fast[:-1])
        self.avgpool = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Linear(slow[-1] + fast[-1], classes)

    def forward(self, clip: Tensor) -> Tensor:
        """Return logits, [B, K].

        Raises:
            SettingError: a clip of fewer than ALPHA frames.
        """
        frames = clip.shape[2]
        if frames < ALPHA:
            raise SettingError(
                f"slowfast takes clips of {ALPHA} frames or more; this one has {frames}. "
                f"Give --frames {ALPHA} or more."
            )
        slow, fast = self.slow[0](clip[:, :, ::ALPHA]), self.fast[0](clip)
        for i, lateral in enumerate(self.lateral, start=1):
            slow = self.slow[i](torch.cat([slow, lateral(fast)], dim=1))
            fast = self.fast[i](fast)
        ends = torch.cat([self.avgpool(slow), self.avgpool(fast)], dim=1)
        logits: Tensor = self.fc(ends.flatten(1))
        return logits


def _pathway(counts: list[int], more: list[int], taps: tuple[int, ...]) -> nn.ModuleList:
    """Return a stem and four stages.

    Args:
        counts: channels of the stem's answer and of each stage's.
        more: channels that are joined to each of these answers.
        taps: temporal kernel of the stem and of each stage.
    """
    stem = nn.Sequential(
        _conv(3, counts[0], (taps[0], 7, 7), 2),
        nn.BatchNorm3d(counts[0]),
        nn.ReLU(),
        nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
    )
    stages = [
        nn.Sequential(
            Block(counts[i] + more[i], counts[i + 1], taps[i + 1], stride),
            Block(counts[i + 1], counts[i + 1], taps[i + 1], 1),
        )
        for i, stride in enumerate(STRIDES)
    ]
    return nn.ModuleList([stem, *stages])


def _lateral(count: int) -> nn.Sequential:
    """Return what brings a fast answer, [B, C, T, H, W], to [B, 2C, ceil(T / ALPHA), H, W]."""
    conv = nn.Conv3d(
        count, 2 * count, (5, 1, 1), stride=(ALPHA, 1, 1), padding=(2, 0, 0), bias=False
    )
    return nn.Sequential(conv, nn.BatchNorm3d(2 * count), nn.ReLU())


def _conv(inner: int, outer: int, kernel: tuple[int, int, int], stride: int) -> nn.Conv3d:
    """Return a convolution that keeps every frame and divides height and width by the stride."""
    pads = [size // 2 for size in kernel]
    return nn.Conv3d(inner, outer, kernel, (1, stride, stride), (pads[0], pads[1], pads[2]),
                     bias=False)  # fmt: skip


def build(width: float, classes: int) -> nn.Module:
    """Make an expert with fresh weights."""
    return SlowFast18(width, classes)

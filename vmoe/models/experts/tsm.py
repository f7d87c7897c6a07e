"""TSM-R18: a 2-D ResNet-18 per frame, with a temporal shift in front of every block.

Modules are named as torchvision's `resnet18`, so that its weights fit by name at width 1.

Source: Lin et al., "TSM: Temporal Shift Module for Efficient Video Understanding", ICCV 2019
(residual shift of one eighth of the channels each way, average over the frames).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vmoe.models.experts import _pretrained
from vmoe.models.experts._channels import channels

PRETRAINED = _pretrained.Pretrained("torchvision's or timm's resnet18", *_pretrained.IMAGENET)


def shift(x: Tensor) -> Tensor:
    """Move one eighth of the channels a frame back in time, one eighth a frame on.

    Args:
        x: [B, T, C, H, W]; what comes from outside of the clip is zero.
    """
    fold = x.shape[2] // 8
    zero = torch.zeros_like(x[:, :1, :fold])
    from_next = torch.cat([x[:, 1:, :fold], zero], dim=1)
    from_last = torch.cat([zero, x[:, :-1, fold : 2 * fold]], dim=1)
    return torch.cat([from_next, from_last, x[:, :, 2 * fold :]], dim=2)


class Block(nn.Module):
    """A shift, two 2-D convolutions and a way around them."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        """Make a block that divides height and width by the stride."""
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.relu = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            projection = nn.Conv2d(inner, outer, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, outer, H/s, W/s] of [B, T, inner, H, W]."""
        frames = x.shape[1]
        moved = shift(x).flatten(0, 1)
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(moved)))))
        y = self.relu(y + self.downsample(x.flatten(0, 1)))
        out: Tensor = y.unflatten(0, (-1, frames))
        return out


class TSM18(nn.Module):
    """Clip [B, 3, T, H, W], normalised, to logits [B, K]."""

    BLOCK = Block

    def __init__(self, width: float, classes: int) -> None:
        """Make the network at a share of its own width."""
        super().__init__()
        c = [channels(full, width) for full in (64, 64, 128, 256, 512)]
        block = self.BLOCK
        self.conv1 = nn.Conv2d(3, c[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(c[0])
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(block(c[0], c[1], 1), block(c[1], c[1], 1))
        self.layer2 = nn.Sequential(block(c[1], c[2], 2), block(c[2], c[2], 1))
        self.layer3 = nn.Sequential(block(c[2], c[3], 2), block(c[3], c[3], 1))
        self.layer4 = nn.Sequential(block(c[3], c[4], 2), block(c[4], c[4], 1))
        self.fc = nn.Linear(c[4], classes)

    def forward(self, clip: Tensor) -> Tensor:
        """Return logits, [B, K]."""
        frames = clip.shape[2]
        x = clip.transpose(1, 2).flatten(0, 1)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x)))).unflatten(0, (-1, frames))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(x.mean(dim=(1, 3, 4)))
        return logits


def build(width: float, classes: int) -> nn.Module:
    """Make an expert with fresh weights."""
    return TSM18(width, classes)

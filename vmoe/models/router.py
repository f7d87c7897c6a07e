"""The router: a light 3-D CNN that looks at a small picture of the clip."""

from __future__ import annotations

from torch import nn


class Router(nn.Sequential):
    """Scores, [B, M], of a normalised clip, [B, 3, T, H, W].

    Three 3-D convolutions over the clip at a quarter of its size; about 1 M multiply-adds.

    Averaging 4x4 pixels first makes it cheap, and leaves little of a pixel-wise perturbation.
    """

    def __init__(self, experts: int) -> None:
        """Make a router over so many experts."""
        super().__init__(
            nn.AvgPool3d((1, 4, 4)),
            *_block(3, 8, stride=(1, 2, 2)),
            *_block(8, 16, stride=(2, 1, 1)),
            *_block(16, 16, stride=(2, 2, 2)),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
            nn.Linear(16, experts),
        )


def _block(inner: int, outer: int, stride: tuple[int, int, int]) -> list[nn.Module]:
    convolution = nn.Conv3d(inner, outer, 3, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm3d(outer), nn.ReLU()]

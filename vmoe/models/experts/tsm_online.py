"""TSM-R18, causal: the shift takes from the past only, so that a stream goes in frame by frame.

What a frame needs of the past is one eighth of the channels in front of each block, of the frame
before it: the states. Each block reaches one frame back, all together REACH frames.

    frames -> stem -> block 0 -> ... -> block 7 -> mean over the pixels -> logits of each frame
                       ^ state 0         ^ state 7                            | mean over the newest

Before a clip's first frame there is nothing, and zeros stand for it; a stream has a past. So that
both give one answer, the frames that would see those zeros do not vote: the logits of a clip of T
frames are the mean over its last T - REACH frames, whose whole reach lies inside the clip. Then
clip by clip, frame by frame and the network run over the whole stream agree, whatever came before:
what was trained and attacked on clips is what a stream is served with. It needs clips of more than
REACH frames; in a shorter one the last frame alone votes, which sees the whole clip, and it has no
online form.

Modules are named as torchvision's `resnet18`, so that its weights fit by name at width 1.

Source: Lin et al., "TSM: Temporal Shift Module for Efficient Video Understanding", ICCV 2019
(the uni-directional shift of one eighth of the channels). Which frames vote is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vmoe.models.experts import tsm

PRETRAINED = tsm.PRETRAINED
REACH = 8  # frames: one for each block


def shift(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Put the frame before's first eighth of the channels in the place of each frame's own.

    Args:
        x: [S*N, C, H, W], S frames of N streams, all streams' first frames first.
        state: [N, C/8, H, W], that eighth of the frame before the first.

    Returns:
        The same shapes: x after the shift, and the state after its last frame.
    """
    fold, n = state.shape[1], state.shape[0]
    chain = torch.cat([state, x[:, :fold]])
    return torch.cat([chain[:-n], x[:, fold:]], dim=1), chain[-n:]


class Block(tsm.Block):
    """A causal shift, two 2-D convolutions and a way around them."""

    def follow(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return [S*N, outer, H/s, W/s] of [S*N, inner, H, W], and the next state."""
        moved, state = shift(x, state)
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(moved)))))
        return self.relu(y + self.downsample(x)), state


class TSMOnline18(tsm.TSM18):
    """Clip [B, 3, T, H, W], normalised, to logits [B, K]; or the next frames of streams."""

    BLOCK = Block

    def forward(self, clip: Tensor) -> Tensor:
        """Return logits, [B, K]."""
        n, _, *shape = clip.shape
        return self.follow(clip, self.first(n, *shape))[0]

    def follow(self, clip: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Take the next frames of some streams.

        Args:
            clip: [N, 3, S, H, W], normalised; any S from 1.
            states: as `first` or the call before gave them.

        Returns:
            The logits of the clips that end with the last frame, [N, K], and the next states.
        """
        return self.follow_frames(clip.permute(2, 0, 1, 3, 4).flatten(0, 1), states)

    def follow_frames(self, x: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Do the same for [S*N, 3, H, W], all streams' first frames first."""
        *pasts, recent = states
        n, _, classes = recent.shape
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        nexts = []
        for block, past in zip(self._blocks(), pasts, strict=True):
            x, past = block.follow(x, past)
            nexts.append(past)
        each = self.fc(x.mean(dim=(2, 3))).reshape(-1, n, classes).transpose(0, 1)
        recent = torch.cat([recent, each], dim=1)[:, -recent.shape[1] :]
        return recent.mean(dim=1), [*nexts, recent]

    def first(self, n: int, frames: int, height: int, width: int) -> list[Tensor]:
        """Return the states of n streams before their first frame, all zeros.

        One for each block, [N, C/8, H, W]; then the logits of the frames that vote on a clip of so
        many frames, [N, V, K]. They mean something once a whole clip went in.
        """
        states = []
        height, width = (_half(_half(size)) for size in (height, width))
        for block in self._blocks():
            fold = block.conv1.in_channels // 8
            states.append(self.fc.weight.new_zeros(n, fold, height, width))
            if block.conv1.stride[0] == 2:
                height, width = _half(height), _half(width)
        return [*states, self.fc.weight.new_zeros(n, voting(frames), self.fc.out_features)]

    def _blocks(self) -> list[Block]:
        layers = (self.layer1, self.layer2, self.layer3, self.layer4)
        return [block for layer in layers for block in layer if isinstance(block, Block)]


def voting(frames: int) -> int:
    """Return how many of a clip's frames, its newest, are averaged."""
    return max(1, frames - REACH)


def remark(frames: int) -> str:
    """Return what whoever trains on clips of so many frames should know; empty of none."""
    if frames > REACH:
        return ""
    return (
        f"tsm-online on clips of {frames} frames cannot be served frame by frame: a frame sees "
        f"{REACH} before it. Give --frames {REACH + 1} or more for that."
    )


def _half(size: int) -> int:
    return (size + 1) // 2


def build(width: float, classes: int) -> nn.Module:
    """Make an expert with fresh weights."""
    return TSMOnline18(width, classes)

"""What the routed kernels compute, in torch, one sample after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the softmax weights [N, k] of the k highest scores [N, M], and their route int32.

    Of equal scores the lowest index comes first, which torch.topk does not promise.
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return scores.softmax(dim=1).gather(1, order), order.int()


def routed_linear(x: Tensor, expert: Tensor, w: Tensor, b: Tensor, relu: bool = False) -> Tensor:
    """Return [N, O] of x [N, I], expert [N], w [M, O, I] and b [M, O]."""
    rows = [functional.linear(one, w[e], b[e]) for one, e in zip(x, expert.tolist(), strict=True)]
    y = torch.stack(rows)
    return y.relu() if relu else y


def routed_conv3d(
    x: Tensor, expert: Tensor, w: Tensor, b: Tensor, strides: Sequence[int], pads: Sequence[int],
    relu: bool = False,
) -> Tensor:  # fmt: skip
    """Return [N, O, T', H', W'] of x [N, C, T, H, W], w [M, O, C, kt, kh, kw] and b [M, O]."""
    y = torch.cat([
        functional.conv3d(one[None], w[e], b[e], tuple(strides), tuple(pads))
        for one, e in zip(x, expert.tolist(), strict=True)
    ])  # fmt: skip
    return y.relu() if relu else y

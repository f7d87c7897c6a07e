"""The Lipschitz term: how much an output moves for how much the clip moves."""

from __future__ import annotations

from torch import Tensor

SMALLEST_MSE = 1e-12


def l_lip(
    clean: Tensor, moved: Tensor, clip: Tensor, adversarial: Tensor, *, quotient: bool = False
) -> Tensor:
    """Return L_Lip(g; x, d) = MSE(g(x), g(x + d)) / MSE(x, x + d) of each sample, [B].

    A mean over all elements of one sample; the batch is never averaged, so that a sample's
    gradient does not depend on the batch that it sits in. Zero perturbation makes it 0/0: the
    denominator is bounded below.

    Args:
        clean: g(x), [B, ...].
        moved: g(x + d), same shape.
        clip: x, [B, C, T, H, W], pixels in [0, 1].
        adversarial: x + d, same shape.
        quotient: let a gradient through the denominator: the paper's literal form. In an attack
            it is then maximised by shrinking d, so that it is off by default.

    Source: arXiv 2602.01369, the Lipschitz regulariser of TLA and J-TLAT; the bound and the
    detached denominator are ours.
    """
    below = _mse(clip, adversarial).clamp(min=SMALLEST_MSE)
    return _mse(clean, moved) / (below if quotient else below.detach())


def _mse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(dim=1)

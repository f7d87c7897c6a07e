"""How the router is kept from sending all clips to the same expert."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import one_hot

from vmoe.train import together

BALANCES = ("switch", "entropy", "none")


def balance_loss(scores: Tensor, form: str) -> Tensor:
    """Return the load balance of a batch's scores, [B, M], as a scalar.

    Args:
        scores: of the clips of this process; means are over all processes that share the batch.
        form: `switch`: M sum_i f_i P_i, 1 where all experts share alike, f_i being the share of
            clips routed to i and P_i the mean weight of i. `entropy`: log M - H(P), 0 where the
            mean weights are alike, however the clips are routed.

    Source: Fedus et al., "Switch Transformers", JMLR 2022, equation 4; for the entropy of the mean
    weights, Mustafa et al., "LIMoE", NeurIPS 2022 (its global entropy loss).
    """
    experts = scores.shape[1]
    weights = together.mean(scores.softmax(dim=1))
    if form == "entropy":
        return math.log(experts) + (weights * weights.clamp(min=1e-12).log()).sum()
    share = together.mean(one_hot(scores.argmax(dim=1), experts).to(scores))
    return experts * (share * weights).sum()

"""A fresh router that divides the clips from the start.

The scores of random weights hardly depend on the clip: what all clips have in common decides, and
one expert receives them all. So the last layer of a fresh router is set such that over some
training clips each expert's scores have mean 0 and deviation 1: then each is the highest for about
as many of them.

Source: data-dependent initialisation, Krähenbühl et al., ICLR 2016, here of the router's last
layer alone.
"""

from __future__ import annotations

import torch
from torch import nn

from vmoe.batches import batches
from vmoe.data import ClipData
from vmoe.models import VideoMoE

CLIPS = 128
SMALLEST_DEVIATION = 1e-6


def spread(twin: VideoMoE, data: ClipData) -> None:
    """Set the statistics and the last layer of a twin's router by the first clips of a data set.

    A dense model has no router; nothing is done.
    """
    router = twin.router
    if router is None:
        return
    last = [module for module in router.modules() if isinstance(module, nn.Linear)][-1]
    norms = [m for m in router.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    device = last.weight.device
    (batch,) = batches(data, CLIPS, device, range(min(CLIPS, len(data))))
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0  # the statistics of these clips
        router.train()(batch.clip)
        scores = router.eval()(batch.clip)
        deviation, mean = torch.std_mean(scores, dim=0, correction=0)
        deviation = deviation.clamp(min=SMALLEST_DEVIATION)
        last.weight /= deviation[:, None]
        last.bias.copy_((last.bias - mean) / deviation)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum

"""Does the model see motion? What camera-motion's labels must do when time is tampered with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from vmoe.batches import Batch, batches
from vmoe.data import ClipData
from vmoe.data.camera_motion import LABELS, REVERSED
from vmoe.models import VideoMoE

Tamper: TypeAlias = Callable[[Batch], Tensor]
# A label's axis: the lower index of the two that change places when time runs backwards.
AXES = [min(LABELS.index(a), LABELS.index(REVERSED.get(a, a))) for a in LABELS]


def gather(twin: VideoMoE, data: ClipData, batch: int = 32) -> dict[str, float | None]:
    """Return what a model of camera-motion does with tampered clips, as shares in [0, 1].

    Keys:
        one_frame_repeated_is_static: one frame repeated must be called static.
        reversed_changes_places: with time reversed, left and right, up and down, in and out must
            change places: of the directed clips that were right, the share that now have the
            reversed label.
        reversed_undirected_stays: static stays static, and shake shake, with time reversed.
        shuffled_right: accuracy with the frames of every clip in a random order.
        shuffled_direction_right: of the shuffled directed clips whose axis is still right, the
            share with the right direction; a coin toss is 0.5.
    """
    labels = torch.tensor([data[i][1] for i in range(len(data))])
    plain = _answers(twin, data, batch, lambda b: b.clip)
    frozen = _answers(twin, data, batch, lambda b: b.clip[:, :, :1].expand_as(b.clip))
    backwards = _answers(twin, data, batch, lambda b: b.clip.flip(2))
    mixed = _answers(twin, data, batch, _shuffled)
    turned = torch.tensor([LABELS.index(REVERSED.get(LABELS[k], LABELS[k])) for k in labels])
    axis = torch.tensor(AXES)
    directed, right = turned != labels, plain == labels
    same_axis = directed & (axis[mixed] == axis[labels])
    return {
        "one_frame_repeated_is_static": _share(frozen == LABELS.index("static")),
        "reversed_changes_places": _share((backwards == turned)[directed & right]),
        "reversed_undirected_stays": _share((backwards == labels)[~directed & right]),
        "shuffled_right": _share(mixed == labels),
        "shuffled_direction_right": _share((mixed == labels)[same_axis]),
    }


def _answers(twin: VideoMoE, data: ClipData, batch: int, tamper: Tamper) -> Tensor:
    """Return the label that a twin gives to each tampered clip, [N]."""
    device = next(twin.parameters()).device
    with torch.no_grad():
        parts = [
            twin(tamper(b), "frozen").logits.argmax(dim=1) for b in batches(data, batch, device)
        ]
    return torch.cat(parts).cpu()


def _shuffled(batch: Batch) -> Tensor:
    """Return clips whose frames stand in an order drawn from each clip's index, never its own."""
    rows = []
    for clip, index in zip(batch.clip, batch.index.tolist(), strict=True):
        rng, own = np.random.default_rng(index), np.arange(clip.shape[1])
        order = rng.permutation(own)
        while len(own) > 1 and (order == own).all():
            order = rng.permutation(own)
        rows.append(clip[:, torch.from_numpy(order)])
    return torch.stack(rows)


def _share(hits: Tensor) -> float | None:
    """Return the mean; None of nothing, as where no clip was right."""
    return float(hits.double().mean()) if len(hits) else None

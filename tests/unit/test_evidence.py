"""The evidence that a model sees motion, on models whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vmoe.batches import Batch, batches
from vmoe.clips import ClipSpec
from vmoe.data import DataSettings, open_data
from vmoe.data.camera_motion import LABELS, REVERSED
from vmoe.models import ModelSettings, MoEOutput, build
from vmoe.train import evidence


class Oracle(torch.nn.Module):
    """Knows each clip by its pixels: right on it, the reversed label on it backwards."""

    def __init__(self, clips: list[torch.Tensor], labels: list[int]) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.known = {self.key(c): k for c, k in zip(clips, labels, strict=True)}
        for clip, k in zip(clips, labels, strict=True):
            turned = REVERSED.get(LABELS[k], LABELS[k])
            self.known[self.key(clip.flip(1))] = LABELS.index(turned)

    @staticmethod
    def key(clip: torch.Tensor) -> bytes:
        return np.ascontiguousarray(clip.numpy()).tobytes()

    def forward(self, clip: torch.Tensor, route_grad: str) -> MoEOutput:
        said = [self.known.get(self.key(c), LABELS.index("static")) for c in clip]
        logits = torch.nn.functional.one_hot(torch.tensor(said), len(LABELS)).float()
        return MoEOutput(logits, torch.zeros(len(clip), 1), torch.zeros(len(clip)).long())


def test_a_model_that_sees_motion_passes_every_line(spec: ClipSpec) -> None:
    data = open_data("camera-motion", "test", spec, DataSettings(clips=20))
    every = next(batches(data, 20))
    oracle = Oracle(list(every.clip), every.label.tolist())
    found = evidence.gather(oracle, data)  # type: ignore[arg-type]
    assert found["one_frame_repeated_is_static"] == 1.0
    assert found["reversed_changes_places"] == 1.0
    assert found["reversed_undirected_stays"] == 1.0
    assert found["shuffled_right"] == pytest.approx(0.1)  # it calls every shuffled clip static
    assert not found["shuffled_direction_right"]  # 0 or None: at best it saw time run backwards


def test_a_blind_model_does_not(spec: ClipSpec) -> None:
    data = open_data("camera-motion", "test", spec, DataSettings(clips=20))
    twin = build(ModelSettings("tsm", 0.1, 1, 10), spec).eval()
    with torch.no_grad():
        twin.experts[0][1].fc.weight.zero_()  # type: ignore[index, union-attr]
        twin.experts[0][1].fc.bias.copy_(torch.eye(10)[1])  # type: ignore[index, union-attr]
    found = evidence.gather(twin, data)
    assert found["one_frame_repeated_is_static"] == 0.0
    assert found["reversed_changes_places"] == 0.0


@pytest.mark.parametrize("frames", [2, 3, 8])
def test_shuffled_frames_are_the_same_frames_in_another_order(frames: int) -> None:
    clip = (
        torch.arange(frames, dtype=torch.float32).view(1, 1, frames, 1, 1).expand(40, 3, -1, 1, 1)
    )
    mixed = evidence._shuffled(Batch(clip, torch.zeros(40).long(), torch.arange(40)))
    assert torch.equal(mixed.sort(dim=2).values, clip)
    assert not (mixed == clip).all(dim=2).any()

"""Gates: what they measure, and that they refuse what is wrong."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import videos
from tests.twins import lively, random_clips
from vmoe import checkpoint
from vmoe.checkpoint import Checkpoint
from vmoe.clips import Clips, ClipSpec
from vmoe.data import DataSettings, open_data
from vmoe.errors import GateError, SettingError
from vmoe.export import gates
from vmoe.export.gates import GateSettings, Reference
from vmoe.export.pipeline import ExportSettings
from vmoe.models import VideoMoE
from vmoe.runtime import Engine, Prediction, load


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Iterator[Engine]:
    with load(tiny_bundle, threads=1) as opened:
        yield opened


@pytest.fixture
def twin(tiny_checkpoint: Path) -> VideoMoE:
    return checkpoint.load(tiny_checkpoint).twin


def test_a_faithful_bundle_passes_and_every_expert_was_seen(engine: Engine, twin: VideoMoE) -> None:
    found = gates.check(twin, engine, random_clips(9), GateSettings())
    found.refuse()
    assert all(gate.ok for gate in found.gates)
    assert found.agreement_pct == 100
    assert sum(found.routed) == found.clips == 9
    assert len(found.experts) == 4
    assert all(0 < off < 1e-3 for off in found.experts)


def test_an_expert_that_the_router_never_chooses_is_checked_too(
    engine: Engine, twin: VideoMoE
) -> None:
    clips = random_clips(8)
    unused = next(i for i in range(4) if i not in engine.infer(clips[:2]).route)
    few = np.concatenate([clips[:2]] * 2)
    with torch.no_grad():
        twin.experts[unused][1].fc.bias += 0.5
    found = gates.check(twin, engine, few, GateSettings())
    assert found.logits < 1e-3
    assert found.experts[unused] == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(GateError, match=r"max \|d logits\| is 0\.5, must be at most 0\.00"):
        found.refuse()


def test_another_router_fails_the_route_gate_but_not_the_logits(
    engine: Engine, twin: VideoMoE
) -> None:
    last = twin.router[1][-1]
    with torch.no_grad():
        last.bias.copy_(last.bias.roll(1))
        last.weight.copy_(last.weight.roll(1, dims=0))
    found = gates.check(twin, engine, random_clips(8), GateSettings())
    logits, scores, route = found.gates
    assert logits.ok
    assert not scores.ok
    assert not route.ok
    with pytest.raises(GateError, match=r"route agreement is 0 %, must be at least 100 %, on 8"):
        found.refuse()
    loose = gates.check(
        twin, engine, random_clips(8), GateSettings(gate_parity=10.0, gate_route=0.0)
    )
    loose.refuse()


def test_not_a_number_is_refused(engine: Engine, twin: VideoMoE) -> None:
    broken = copy.deepcopy(twin)
    with torch.no_grad():
        broken.experts[2][1].fc.bias[0] = torch.nan
    found = gates.check(broken, engine, random_clips(8), GateSettings())
    assert not found.gates[0].ok
    with pytest.raises(GateError, match="nan"):
        found.refuse()


class ForcedToNan:
    """An engine whose scores break down where its route is forced."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def infer(self, clips: Clips, force_route: Sequence[int] | None = None) -> Prediction:
        found = self.engine.infer(clips, force_route)
        if force_route is None:
            return found
        return found._replace(scores=np.full_like(found.scores, np.nan))


def test_not_a_number_of_the_forced_run_is_refused(engine: Engine, twin: VideoMoE) -> None:
    broken: Any = ForcedToNan(engine)
    found = gates.check(twin, broken, random_clips(8), GateSettings())
    assert [gate.ok for gate in found.gates] == [True, False, True]
    with pytest.raises(GateError, match=r"max \|d scores\| is nan"):
        found.refuse()


def test_a_tie_within_the_tolerance_is_agreement() -> None:
    scores = np.array([[1.0, 1.0 - 1e-5, 0], [1.0, 0.5, 0], [0, 0, 2.0]], np.float32)
    route = np.array([1, 1, 2])
    free = Prediction(np.zeros((3, 2), np.float32), scores, route)
    reference = Reference(scores, np.zeros((3, 3, 2), np.float32))
    assert gates._agreement(free, reference, bound=1e-4) == (2, 1)
    assert gates._agreement(free, reference, bound=0.0) == (1, 0)


def test_clips_of_a_check_are_seeded_and_hold_noise_black_and_white(spec: ClipSpec) -> None:
    clips = gates.clips_for(spec, None, seed=3)
    assert clips.shape == (64, *spec.shape)
    assert clips.dtype == np.uint8
    assert np.array_equal(clips, gates.clips_for(spec, None, seed=3))
    assert not np.array_equal(clips, gates.clips_for(spec, None, seed=4))
    assert clips[-2].max() == 0
    assert clips[-1].min() == 255
    assert len(gates.clips_for(spec, "camera-motion", seed=3)) == 64
    with pytest.raises(SettingError, match="nowhere"):
        gates.clips_for(spec, "./nowhere", seed=0)


def test_clips_of_a_folder_are_split_as_the_twin_was_trained(
    spec: ClipSpec, tmp_path: Path
) -> None:
    """Two takes of each sequence: alone, one of them may fall into the split `val`."""
    for label in ("hug", "kick"):
        (tmp_path / label).mkdir()
        for sequence in range(12):
            for take in range(2):
                name = f"seq{sequence:02d}_{take}.avi"
                videos.write(tmp_path / label / name, frames=8 + sequence)
    for group in ("", r"seq\d+"):
        data = open_data(str(tmp_path), "val", spec, DataSettings(group=group))
        wanted = np.stack([data[i][0] for i in range(len(data))])
        assert np.array_equal(gates.clips_for(spec, str(tmp_path), 0, group), wanted)
    recipe = {"clips": {"group": r"seq\d+"}}
    assert Checkpoint(lively(), (), recipe).group == r"seq\d+"
    assert Checkpoint(lively(), ()).group == ""
    with pytest.raises(SettingError, match="--group splits --verify-data: give that too"):
        ExportSettings(group=r"seq\d+")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"gate_parity": 0.0}, "--gate-parity is 0.0; it must be above 0"),
        ({"gate_route": 101.0}, "--gate-route is 101.0; it must be at most 100"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(settings: dict[str, float], says: str) -> None:
    with pytest.raises(SettingError, match=re.escape(says)):
        GateSettings(**settings)

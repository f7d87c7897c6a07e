"""Gates: what they measure, and that they refuse what is wrong."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests import videos
from tests.twins import lively, random_clips
from vmoe import adversarial, checkpoint
from vmoe.adversarial import AdversarialClips, Attacked
from vmoe.attacks.evaluate import evaluate, plan
from vmoe.attacks.gate import refuse as refuse_lost
from vmoe.attacks.judge import of_twin
from vmoe.checkpoint import Checkpoint
from vmoe.clips import Clips, ClipSpec
from vmoe.data import DataSettings, open_data
from vmoe.data.camera_motion import LABELS
from vmoe.errors import GateError, SettingError
from vmoe.export import accuracy, gates, parity, sparsity
from vmoe.export.accuracy import UNKNOWN, Adversarial, Sample
from vmoe.export.gates import Gate, GateSettings
from vmoe.export.parity import Reference
from vmoe.export.pipeline import ExportSettings
from vmoe.models import VideoMoE
from vmoe.runtime import Engine, Prediction, load
from vmoe.runtime.bench import subjects
from vmoe.runtime.bench.certificate import BOUND, Route
from vmoe.runtime.bench.measuring import Samples
from vmoe.runtime.bench.statistics import Ratio


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Iterator[Engine]:
    with load(tiny_bundle, threads=1) as opened:
        yield opened


@pytest.fixture
def twin(tiny_checkpoint: Path) -> VideoMoE:
    return checkpoint.load(tiny_checkpoint).twin


def refuse(found: parity.Findings) -> None:
    gates.refuse(found.gates, "Kept as x.")


def test_a_faithful_bundle_passes_and_every_expert_was_seen(engine: Engine, twin: VideoMoE) -> None:
    found = parity.check(twin, engine, random_clips(9), GateSettings())
    refuse(found)
    assert all(gate.ok for gate in found.gates)
    assert found.agreement_pct == 100
    assert sum(found.routed) == found.clips == 9
    assert len(found.experts) == 4
    assert all(0 < off < 1e-3 for off in found.experts)
    assert 0 < found.mean < max(found.experts)
    assert list(found.twin_said) == list(found.engine_said)
    assert list(found.twin_said) == list(parity.twin_says(twin, random_clips(9)))


def test_an_expert_that_the_router_never_chooses_is_checked_too(
    engine: Engine, twin: VideoMoE
) -> None:
    clips = random_clips(8)
    unused = next(i for i in range(4) if i not in engine.infer(clips[:2]).route)
    few = np.concatenate([clips[:2]] * 2)
    with torch.no_grad():
        twin.experts[unused][1].fc.bias += 0.5
    found = parity.check(twin, engine, few, GateSettings())
    assert found.logits < 1e-3
    assert found.experts[unused] == pytest.approx(0.5, abs=1e-3)
    assert found.mean == pytest.approx(0.5 / 8, abs=1e-3), "one of four forced, of eight answers"
    with pytest.raises(GateError, match=r"max \|d logits\| is 0\.5, must be at most 0\.00"):
        refuse(found)


def test_a_small_error_everywhere_fails_the_mean_alone(engine: Engine, twin: VideoMoE) -> None:
    with torch.no_grad():
        for expert in twin.experts:
            expert[1].fc.bias += 1e-3
    settings = GateSettings(gate_parity=0.1)
    found = parity.check(twin, engine, random_clips(8), settings)
    assert [gate.name for gate in found.gates if not gate.ok] == ["parity-mean"]
    with pytest.raises(GateError, match=r"mean \|d logits\| is 0\.000999.*--gate-parity-mean\."):
        refuse(found)


def test_another_router_fails_the_route_gate_but_not_the_logits(
    engine: Engine, twin: VideoMoE
) -> None:
    last = twin.router[1][-1]
    with torch.no_grad():
        last.bias.copy_(last.bias.roll(1))
        last.weight.copy_(last.weight.roll(1, dims=0))
    found = parity.check(twin, engine, random_clips(8), GateSettings())
    logits, scores, mean, route = found.gates
    assert logits.ok
    assert mean.ok
    assert not scores.ok
    assert not route.ok
    with pytest.raises(GateError, match=r"route agreement is 0 %, must be at least 100 %\. Kept"):
        refuse(found)
    loose = GateSettings(gate_parity=10.0, gate_route=0.0)
    refuse(parity.check(twin, engine, random_clips(8), loose))


def test_not_a_number_is_refused(engine: Engine, twin: VideoMoE) -> None:
    broken = copy.deepcopy(twin)
    with torch.no_grad():
        broken.experts[2][1].fc.bias[0] = torch.nan
    found = parity.check(broken, engine, random_clips(8), GateSettings())
    assert not found.gates[0].ok
    with pytest.raises(GateError, match="nan"):
        refuse(found)


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
    found = parity.check(twin, broken, random_clips(8), GateSettings())
    assert [gate.ok for gate in found.gates] == [True, False, True, True]
    with pytest.raises(GateError, match=r"max \|d scores\| is nan"):
        refuse(found)


def test_a_tie_within_the_tolerance_is_agreement() -> None:
    scores = np.array([[1.0, 1.0 - 1e-5, 0], [1.0, 0.5, 0], [0, 0, 2.0]], np.float32)
    route = np.array([1, 1, 2])
    free = Prediction(np.zeros((3, 2), np.float32), scores, route)
    reference = Reference(scores, np.zeros((3, 3, 2), np.float32), np.ones((3, 3), bool))
    assert parity._agreement(free, reference, bound=1e-4) == (2, 1)
    assert parity._agreement(free, reference, bound=0.0) == (1, 0)


class Flipped:
    """An engine that routes its first clip to the expert that comes second."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def infer(self, clips: Clips, force_route: Sequence[int] | None = None) -> Prediction:
        found = self.engine.infer(clips, force_route)
        if force_route is not None:
            return found
        route = found.route.copy()
        route[0] = np.argsort(found.scores[0])[-2]
        return self.engine.infer(clips, route.tolist())._replace(scores=found.scores, route=route)


@pytest.mark.parametrize(
    ("settings", "router"), [(GateSettings(), "int8"), (GateSettings(gate_parity=10.0), "fp32")]
)
def test_a_loose_bound_of_parity_does_not_make_a_flip_a_tie(
    engine: Engine, twin: VideoMoE, settings: GateSettings, router: str
) -> None:
    flipped: Any = Flipped(engine)
    found = parity.check(twin, flipped, random_clips(8), settings, "int8", router)
    assert (found.agreement_pct, found.ties) == (87.5, 0)
    assert [gate.name for gate in found.gates if not gate.ok] == ["route"]


def test_of_fewer_clips_than_experts_every_expert_is_forced_all_the_same(
    engine: Engine, twin: VideoMoE
) -> None:
    clip = random_clips(1)
    last = (int(engine.infer(clip).route[0]) + 3) % 4
    with torch.no_grad():
        twin.experts[last][1].fc.bias += 0.5
    for clips in (clip, np.concatenate([clip] * 3)):
        found = parity.check(twin, engine, clips, GateSettings())
        assert all(off > 0 for off in found.experts)
        assert found.experts[last] == pytest.approx(0.5, abs=1e-3)
        assert not found.gates[0].ok


def test_what_the_twin_said_once_it_is_not_asked_again(engine: Engine, twin: VideoMoE) -> None:
    clips = random_clips(8)
    first = parity.check(twin, engine, clips, GateSettings())
    flipped: Any = Flipped(engine)
    again = parity.check(twin, flipped, clips, GateSettings())
    with torch.no_grad():
        for parameter in twin.router.parameters():
            parameter.zero_()
    said = parity.check(twin, flipped, clips, GateSettings(), known=first.reference)
    assert said.logits == again.logits < 1e-3, "an expert that only the second run chose"
    assert said.agreement_pct == again.agreement_pct


def test_a_router_in_fp32_keeps_its_own_bound_beside_int8_experts(
    engine: Engine, twin: VideoMoE
) -> None:
    clips = random_clips(8)
    settings = GateSettings()
    tight = parity.check(twin, engine, clips, settings, "int8")
    loose = parity.check(twin, engine, clips, settings, "int8", "int8")
    assert tight.gates[0].bound == loose.gates[0].bound > 100 * tight.gates[1].bound
    assert loose.gates[1].bound == pytest.approx(tight.gates[1].bound * 0.12 / 1e-4)


@pytest.mark.parametrize(
    ("gate", "line"),
    [
        (Gate("clean", "lost", 1.0, 1.0, " points"), "gate clean: lost 1 points <= 1 points: ok"),
        (Gate("route", "same", 99.0, 100.0, " %", least=True),
         "gate route: same 99 % < 100 %: REFUSED"),
        (Gate("parity", "d", float("nan"), 1.0), "gate parity: d nan > 1: REFUSED"),
    ],
)  # fmt: skip
def test_a_gate_says_what_it_found(gate: Gate, line: str) -> None:
    assert gate.line() == line
    assert gate.to_report()["ok"] == line.endswith("ok")


def test_accuracy_is_compared_clip_by_clip() -> None:
    label = np.array([0, 1, 2, 3])
    made = accuracy.compare("clean", np.array([0, 1, 2, 0]), np.array([0, 0, 1, 3]), label)
    assert (made.twin_right, made.engine_right, made.lost, made.won) == (3, 2, 2, 1)
    assert made.agree == 1
    assert made.drop == 25.0
    assert made.to_report()["top1_agreement_pct"] == 25.0


class Shifted:
    """An engine that gives every clip the next label."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def infer(self, clips: Clips, force_route: Sequence[int] | None = None) -> Prediction:
        found = self.engine.infer(clips, force_route)
        return found._replace(logits=np.roll(found.logits, 1, axis=1))


def test_clean_accuracy_is_judged_by_labels_or_by_the_twins_own_answers(
    engine: Engine, twin: VideoMoE
) -> None:
    clips = random_clips(8)
    said = parity.twin_says(twin, clips)
    nameless = np.full(8, UNKNOWN)
    for label, whose in ((said, "the data's"), (nameless, "the twin's own answers")):
        found = parity.check(twin, engine, clips, GateSettings())
        gate, report = accuracy.clean(found, Sample(clips, label), GateSettings())
        assert gate.ok
        assert report["clean"]["labels"] == whose
        assert report["clean"]["twin_pct"] == report["clean"]["engine_pct"] == 100
        shifted: Any = Shifted(engine)
        found = parity.check(twin, shifted, clips, GateSettings())
        gate, report = accuracy.clean(found, Sample(clips, label), GateSettings())
        assert gate.measured == 100
        assert not gate.ok
    half = np.where(np.arange(8) < 4, said, UNKNOWN)  # noise has no label, and is not judged
    gate, report = accuracy.clean(found, Sample(clips, half), GateSettings(gate_clean=100.0))
    assert report["clean"]["clips"] == report["clean"]["lost"] == 4
    assert gate.ok


def test_robust_is_judged_on_clips_that_pgd_made_on_the_twin(
    engine: Engine, twin: VideoMoE
) -> None:
    clips = random_clips(6)
    held = Checkpoint(twin, LABELS, {"method": {"eps": 2 / 255}})
    attacked = accuracy.attack(held, Sample(clips, parity.twin_says(twin, clips)), 4, seed=0)
    gate, report = accuracy.robust(attacked, engine, GateSettings())
    (said,) = report["robust"].values()
    assert list(report["robust"]) == ["pgd 2/255"]
    assert said["clips"] == 4
    assert said["twin_pct"] < 100, "this attack fooled nobody"
    assert gate.ok
    shifted: Any = Shifted(engine)
    gate, report = accuracy.robust(attacked, shifted, GateSettings())
    (other,) = report["robust"].values()
    assert other["lost"] == round(said["twin_pct"] * 4 / 100), "what the twin had right is lost"
    assert gate.measured == 100 * other["lost"] / 4


def test_what_the_engine_alone_gets_right_excuses_no_clip_that_it_alone_gets_wrong(
    engine: Engine, twin: VideoMoE
) -> None:
    clips = random_clips(4)
    said = parity.twin_says(twin, clips)
    label = np.array([said[0], (said[1] + 1) % 10, (said[2] + 1) % 10, (said[3] + 2) % 10])
    shifted: Any = Shifted(engine)  # wrong on the first, right on the next two
    attacked = [Adversarial("pgd", "8/255", clips, label, said)]
    gate, report = accuracy.robust(attacked, shifted, GateSettings())
    found = report["robust"]["pgd 8/255"]
    assert (found["lost"], found["won"], found["drop_points"]) == (1, 2, -25)
    assert gate.measured == found["broken_on_engine_alone_pct"] == 25
    assert gate.refusal() == (
        "adversarial clips broken on the engine alone (pgd 8/255: 1 of 4; on the twin alone 2) is "
        "25 %, must be at most 2 %"
    )


def test_a_clip_that_another_attack_of_the_budget_breaks_on_the_twin_does_not_count(
    engine: Engine, twin: VideoMoE
) -> None:
    clips = random_clips(2)
    said = parity.twin_says(twin, clips)
    shifted: Any = Shifted(engine)  # wrong on both
    pgd, fgsm = (Adversarial(name, "8/255", clips, said, said) for name in ("pgd", "fgsm"))
    wider = fgsm._replace(budget="9/255")
    first = pgd._replace(twin_said=np.array([said[0], (said[1] + 1) % 10]))
    gate, report = accuracy.robust([first, fgsm], shifted, GateSettings())
    assert "(pgd, fgsm 8/255: 1 of 2; on the twin alone 0)" in gate.what
    assert gate.measured == 50
    assert [each["lost"] for each in report["robust"].values()] == [1, 2]
    gate, _ = accuracy.robust([first, wider], shifted, GateSettings())
    assert "(fgsm 9/255: 2 of 2; on the twin alone 0)" in gate.what
    gate, report = accuracy.robust([pgd, first, fgsm], shifted, GateSettings())  # two of one name
    assert "(pgd, pgd (2), fgsm 8/255: 1 of 2; on the twin alone 0)" in gate.what
    lost = {name: each["lost"] for name, each in report["robust"].items()}
    assert lost == {"pgd 8/255": 2, "pgd (2) 8/255": 1, "fgsm 8/255": 2}


def test_the_gate_of_vmoe_attack_comes_to_the_same(twin: VideoMoE) -> None:
    for module in twin.modules():
        if isinstance(module, torch.nn.Linear) and module.out_features == len(LABELS):
            module.bias.detach()[3] += 100  # else a random twin withstands nothing
    clips, eps = random_clips(6), 2 / 255
    label = parity.twin_says(twin, clips)
    label[0] = (label[0] + 1) % 10  # what the engine alone gets right
    held = Checkpoint(twin, LABELS, {"method": {"eps": eps}})
    shifted: Any = Shifted(SimpleNamespace(infer=of_twin(twin)))  # type: ignore[arg-type]
    attacked = accuracy.attack(held, Sample(clips, label), 6, seed=3)
    gate, _ = accuracy.robust(attacked, shifted, GateSettings())
    rows = plan(["pgd"], [eps], ["straight-through"], steps=accuracy.STEPS, seed=3)
    judges = {"twin": of_twin(twin), "engine": shifted.infer}
    found = evaluate(twin, clips, label, rows, judges, keep_clips=True)
    assert np.array_equal(found.outcomes[0].clips, attacked[0].clips)
    assert 0 < gate.measured < 100, "nothing to tell apart"
    refuse_lost(found, gate.measured)
    with pytest.raises(GateError):
        refuse_lost(found, gate.measured - 0.1)


def test_robust_is_judged_on_clips_of_a_folder_by_the_worst_attack(
    engine: Engine, twin: VideoMoE, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clips, other = random_clips(4), random_clips(4, seed=1)
    said = [int(k) for k in parity.twin_says(twin, clips)]
    held, sha256 = Checkpoint(twin, LABELS), 64 * "a"
    saved = AdversarialClips(
        spec=twin.spec, labels=LABELS, clean=clips, label=tuple(said), index=(0, 1, 2, 3),
        attacked=(
            Attacked("none", 8 / 255, [], clips), Attacked("pgd", 1.5, [], other, "l2"),
            Attacked("none", 8 / 255, [], other, mode="adaptive", against="engine"),
        ),
        origin={"twin_sha256": sha256},
    )  # fmt: skip
    adversarial.save(saved, tmp_path / "clips")
    attacked = accuracy.given(held, tmp_path / "clips", sha256)
    assert "1 of 3 attacks left out: their clips were made on an engine." in caplog.text
    gate, report = accuracy.robust(attacked, engine, GateSettings())
    assert set(report["robust"]) == {"none 8/255", "pgd l2 1.5"}
    assert report["robust"]["none 8/255"]["twin_pct"] == 100
    assert gate.ok
    shifted: Any = Shifted(engine)
    gate, _ = accuracy.robust(attacked, shifted, GateSettings())
    assert "(none 8/255: 4 of 4; on the twin alone 0)" in gate.what
    assert gate.measured == 100
    elsewhere = Checkpoint(lively(4, 4), ("a", "b", "c", "d"))
    with pytest.raises(SettingError, match="holds clips of other labels than the twin's"):
        accuracy.given(elsewhere, tmp_path / "clips", sha256)
    with pytest.raises(SettingError, match=r"made on another twin: it names aaaaaaaaaaaa\.\.\. as"):
        accuracy.given(held, tmp_path / "clips", 64 * "b")
    adversarial.save(dataclasses.replace(saved, origin={}), tmp_path / "nameless")
    with pytest.raises(SettingError, match="made on another twin: it names nothing as its sha256"):
        accuracy.given(held, tmp_path / "nameless", sha256)
    adversarial.save(dataclasses.replace(saved, attacked=saved.attacked[2:]), tmp_path / "engine")
    with pytest.raises(SettingError, match=r"holds no clips that were made on a twin\. Make them"):
        accuracy.saved(held, tmp_path / "engine", sha256)


def test_sparsity_tells_a_routed_clip_from_one_that_runs_every_expert(
    tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = GateSettings(gate_sparsity=1e6)
    gate, report = sparsity.judge(
        tiny_bundle, "split", "onnxruntime", "cpu", lambda folder: None, settings, seed=0
    )
    assert gate is not None
    assert gate.ok
    assert len(report["sparsity"]["routes"]) == 4
    assert all(route["alone_ms"] > 0 for route in report["sparsity"]["routes"])
    tight = GateSettings(gate_sparsity=1e-9)  # nothing costs less than its parts by that much
    monkeypatch.setattr(sparsity, "HOST_MS", 0.0)
    gate, _ = sparsity.judge(
        tiny_bundle, "split", "onnxruntime", "cpu", lambda folder: None, tight, seed=0
    )
    assert gate is not None
    assert not gate.ok
    nothing, report = sparsity.judge(
        tiny_bundle, "dense", "onnxruntime", "cpu", lambda folder: None, GateSettings(), seed=0
    )
    assert nothing is None
    assert "every expert" in report["sparsity"]


def test_what_the_host_may_take_never_excuses_a_second_expert() -> None:
    twice = Ratio(medians=1.0, minima=2.0, low=None, high=None)  # as noise would have the medians
    for alone_ms, excused in ((10.0, 0.01), (1.0, 0.1), (0.01, 0.5), (0.0, 0.5)):
        route = Route(0, 2 * alone_ms, alone_ms, twice, None)
        assert sparsity._ratio(route) == pytest.approx(2 - excused)
        assert sparsity._ratio(route) > BOUND


def test_rounds_that_are_measured_again_count_with_the_first(tiny_bundle: Path) -> None:
    measured: dict[tuple[str, str], Samples] = {}
    how: Any = {"backend": "onnxruntime", "device": "cpu", "threads": 1, "batch": 1, "seed": 0}
    with ExitStack() as stack:
        opened = subjects.open_all(stack, [tiny_bundle], [], **how)
        for _ in range(2):
            sparsity._measure(opened, measured, 0)
    assert all(len(taken.wall_ms) >= 2 * sparsity.ROUNDS for taken in measured.values())


def test_clips_of_a_check_are_seeded_and_hold_noise_black_and_white(spec: ClipSpec) -> None:
    made = accuracy.sample(spec, LABELS, None, seed=3)
    clips = made.clips
    assert clips.shape == (64, *spec.shape)
    assert clips.dtype == np.uint8
    assert np.array_equal(clips, accuracy.sample(spec, LABELS, None, seed=3).clips)
    assert not np.array_equal(clips, accuracy.sample(spec, LABELS, None, seed=4).clips)
    assert clips[-2].max() == 0
    assert clips[-1].min() == 255
    assert list(made.known) == list(range(48))
    assert list(made.label[:48]) == [i % 10 for i in range(48)]
    assert not len(accuracy.sample(spec, ("left", "right"), None, seed=3).known)
    assert len(accuracy.sample(spec, LABELS, "camera-motion", seed=3).clips) == 64
    few = accuracy.sample(spec, LABELS, None, seed=3, clips=4).clips  # one of them of noise: white
    assert len(few) == 4
    assert few[-1].min() == 255
    assert len(accuracy.sample(spec, LABELS, None, seed=3, clips=8).clips) == 8
    with pytest.raises(SettingError, match="nowhere"):
        accuracy.sample(spec, LABELS, "./nowhere", seed=0)


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
    labels = ("hug", "kick")
    for group in ("", r"seq\d+"):
        data = open_data(str(tmp_path), "val", spec, DataSettings(group=group))
        wanted = np.stack([data[i][0] for i in range(len(data))])
        made = accuracy.sample(spec, labels, str(tmp_path), 0, group)
        assert np.array_equal(made.clips, wanted)
        assert list(made.label) == [data[i][1] for i in range(len(data))]
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
        ({"gate_clean": -1.0}, "--gate-clean is -1.0; it must be at least 0"),
        ({"gate_sparsity": 0.0}, "--gate-sparsity is 0.0; it must be above 0"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(settings: dict[str, float], says: str) -> None:
    with pytest.raises(SettingError, match=re.escape(says)):
        GateSettings(**settings)  # type: ignore[arg-type]

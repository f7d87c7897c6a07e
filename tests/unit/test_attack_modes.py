"""Attacks on an engine: its values, its twin's gradients, what the report says of bad engines."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.twins import SMALL, random_clip, random_clips, small
from vmoe.attacks import deployment, flags, gate, tables
from vmoe.attacks.evaluate import Evaluation, Row, evaluate, plan
from vmoe.attacks.figures import everything, gap
from vmoe.attacks.judge import Judge, of_twin
from vmoe.attacks.modes import ADAPTIVE, MODES, QUERY, TRANSFER, Deployed, graft
from vmoe.attacks.straight import _quantise
from vmoe.clips import Clips
from vmoe.errors import GateError, SettingError, VmoeError
from vmoe.models import VideoMoE
from vmoe.models.moe import Normalise
from vmoe.runtime.engine import Prediction

N, EPS = 24, 6 / 255
CLIPS = random_clips(N, spec=SMALL)


def engine_of(twin: VideoMoE, judge: Judge | None = None, *, gradients: bool = True) -> Deployed:
    return Deployed(
        judge or of_twin(twin), twin.settings, twin.spec, small() if gradients else None
    )


def rows(*modes: str, names: Sequence[str] = ("engine",), **values: Any) -> list[Row]:
    how = {"steps": 2, "queries": 10, "pairs": 2, **values}
    named = plan(["pgd"], [EPS], ["frozen", "straight-through"], **how)
    asking = plan(["square", "nes"], [EPS], **how)
    return flags.in_modes(flags.Rows(named, asking), modes, names, as_given=False)


def attacked(
    engine: VideoMoE, *modes: str, judge: Judge | None = None, **values: Any
) -> Evaluation:
    """Return what becomes of an engine, whose twin is `small()`, by all modes or some."""
    twin = small()
    label = of_twin(twin)(CLIPS).logits.argmax(axis=1)
    asked = judge or of_twin(engine)
    judges = {"twin": of_twin(twin), "engine": asked}
    made = rows(*(modes or MODES))
    engines = {"engine": engine_of(engine, asked)}
    return evaluate(twin, CLIPS, label, made, judges, engines=engines, keep_clips=True)


def test_a_graft_has_one_tensor_s_value_and_another_s_gradient() -> None:
    of = torch.tensor([1.0, 2.0], requires_grad=True)
    value = torch.tensor([0.1, 0.7])
    made = graft(value, 3 * of)
    assert torch.equal(made, value)
    made.sum().backward()
    assert torch.equal(of.grad, torch.tensor([3.0, 3.0]))


@pytest.mark.parametrize("way", ["frozen", "straight-through", "all"])
def test_values_are_the_engine_s_and_gradients_the_twin_s_by_the_engine_s_route(way: str) -> None:
    twin, other = small(), small(seed=5)
    clip = (255 * random_clip(6, spec=SMALL)).round() / 255
    said = of_twin(other)(random_clips(6, spec=SMALL))
    at = clip.clone().requires_grad_()
    found = engine_of(other)(at, way)
    assert np.array_equal(found.logits.detach().numpy(), said.logits)
    assert np.array_equal(found.scores.detach().numpy(), said.scores)
    assert found.route.tolist() == said.route.tolist()
    assert (found.route != twin(clip).route).any()  # or forcing it would not be seen
    (slope,) = torch.autograd.grad(found.logits.sum() + found.scores[:, 0].sum(), at)
    again = clip.clone().requires_grad_()
    own = twin(again, way, torch.from_numpy(said.route))
    (wanted,) = torch.autograd.grad(own.logits.sum() + own.scores[:, 0].sum(), again)
    assert torch.equal(slope, wanted)
    with torch.no_grad():
        assert not engine_of(other)(clip).logits.requires_grad
    asked = engine_of(other, gradients=False)(clip.clone().requires_grad_())
    assert not asked.logits.requires_grad


def test_adaptive_keeps_what_transfer_found_and_query_asks_for_no_gradient() -> None:
    found = attacked(small(seed=5))
    named = {(o.row.attack, o.row.mode): o for o in found.outcomes}
    assert list(named) == [
        ("pgd", TRANSFER), ("pgd", ADAPTIVE), ("square", QUERY), ("nes", QUERY),
    ]  # fmt: skip
    transfer, adaptive = named["pgd", TRANSFER], named["pgd", ADAPTIVE]
    lost = transfer.seen["engine"].success & ~adaptive.seen["engine"].success
    assert not lost.any()
    assert all(o.linf <= 6 for o in found.outcomes)
    for name in ("square", "nes"):
        assert not named[name, QUERY].backwards.any()
        assert named[name, QUERY].forwards.max() <= 10 + 1  # the clean clip
    for row in everything(found, list(range(N)))["rows"]:
        assert (row["queries"] > 0) == (row["mode"] != TRANSFER)


def test_a_faithful_engine_passes_and_has_no_gap_but_that_of_more_steps() -> None:
    found = attacked(small())
    report = deployment.everything(found)
    assert "FAILED" not in {line["verdict"] for line in report["sanity"]}
    assert [line["name"] for line in report["sanity"]] == [
        "the twin's routes", "the twin's labels", "adaptive against transfer",
        "query against adaptive", "gradients in the loop",
    ]  # fmt: skip
    (row,) = report["rows"]
    assert row["gap_transfer"] == {"points": 0.0, "low": 0.0, "high": 0.0}
    assert row["worst_of"]["hits"] <= row["adaptive"]["hits"] <= row["transfer"]["hits"]
    assert row["transfer"] == row["twin"]
    assert row["worst_of"]["hits"] < row["twin"]["hits"], "the engine in the loop broke no more"
    assert row["gap"] == row["gap_transfer"], "the same clips, the same answers"
    assert row["says"].startswith("none of ")
    gate.refuse(found, 0)


def test_every_clip_that_an_engine_is_asked_about_is_counted() -> None:
    twin, asked = small(), [0]

    def counting(clips: Clips, force_route: Sequence[int] | None = None) -> Prediction:
        asked[0] += len(clips)
        return of_twin(twin)(clips, force_route)

    row = plan(["pgd"], [EPS], ["soft"], steps=2, early_stop=False)[0]
    row = replace(row, mode=ADAPTIVE, against="engine")
    judges = {"twin": of_twin(twin), "engine": of_twin(twin)}
    label, engines = np.zeros(6, np.int64), {"engine": engine_of(twin, counting)}
    found = evaluate(twin, CLIPS[:6], label, [row], judges, engines=engines, batch=4)
    assert found.outcomes[0].asked == asked[0] > found.outcomes[0].forwards.sum()
    assert everything(found, list(range(6)))["rows"][0]["queries"] == asked[0] / 6


def test_every_sanity_line_can_fail() -> None:
    found = attacked(small(), TRANSFER)
    (made,) = found.outcomes
    right, wrong, ones = found.label, (found.label + 1) % 4, np.ones(N, np.int64)

    def of(mode: str, said: Any, dead: int = 0) -> Any:
        row = made.row if mode == TRANSFER else replace(made.row, mode=mode, against="engine")
        seen = {k: s._replace(seen=s.seen._replace(said=said)) for k, s in made.seen.items()}
        return replace(made, row=row, seen=seen, backwards=ones, dead=dead * ones)

    def failed(transfer: Any, adaptive: Any, query: Any, dead: int = 0, shift: int = 0) -> set[str]:
        clean = found.clean["engine"]
        clean = clean._replace(said=(clean.said + shift) % 4, route=clean.route + shift)
        outcomes = of(TRANSFER, transfer), of(ADAPTIVE, adaptive, dead), of(QUERY, query)
        planted = replace(found, clean={**found.clean, "engine": clean}, outcomes=outcomes)
        lines = deployment.sane(planted, "engine", EPS)
        return {line.name for line in lines if line.verdict == deployment.FAILED}

    assert failed(wrong, wrong, wrong) == set()
    assert failed(wrong, right, right) == {"adaptive against transfer"}
    assert failed(right, right, wrong) == {"query against adaptive"}
    assert failed(right, wrong, right, dead=1) == {"gradients in the loop"}
    assert failed(right, right, right, shift=1) == {"the twin's routes", "the twin's labels"}


def swapped() -> VideoMoE:
    bad = small()
    bad.experts = nn.ModuleList([*bad.experts[1:], bad.experts[0]])
    return bad


def otherwise_normalised() -> VideoMoE:
    bad = small()
    for module in bad.modules():
        if isinstance(module, Normalise):
            module.mean, module.std = module.mean - 0.3, 2 * module.std
    return bad


class Saturated(nn.Module):
    """A quantiser of uint8 whose range was calibrated at a small part of what it meets."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _quantise(x, torch.tensor(1e-4), torch.tensor(0, dtype=torch.uint8))


def saturated() -> VideoMoE:
    bad = small()
    for expert in bad.experts:
        expert.insert(5, Saturated())  # behind the pooling
    return bad


@pytest.mark.parametrize("plant", [swapped, otherwise_normalised, saturated])
def test_a_planted_bug_is_seen(plant: Callable[[], VideoMoE]) -> None:
    found = attacked(plant(), TRANSFER)
    report = deployment.everything(found)
    failed = {line["name"] for line in report["sanity"] if line["verdict"] == "FAILED"}
    assert "the twin's labels" in failed
    assert ("the twin's routes" in failed) == (plant is otherwise_normalised)
    (row,) = report["rows"]
    assert ". FAILED: " in row["says"]
    assert row["clean"]["hits"] < N == row["twin"]["n"]


def test_a_quantiser_that_saturates_still_has_a_gradient() -> None:
    """Its own would be 0, and the engine would look robust: it is not asked."""
    twin, clip = saturated(), random_clip(4, spec=SMALL).requires_grad_()
    (slope,) = torch.autograd.grad(twin(clip, "frozen").logits.square().sum(), clip)
    assert (slope.abs().amax(dim=(1, 2, 3, 4)) > 0).all()


def test_the_lower_end_at_zero_is_a_relu_and_no_other_end_is_there() -> None:
    def slopes(x: list[float], zero: torch.Tensor) -> list[float]:
        at = torch.tensor(x, requires_grad=True)
        (slope,) = torch.autograd.grad(_quantise(at, torch.tensor(0.1), zero).sum(), at)
        return slope.tolist()

    assert slopes([-1.0, 0.5, 99.0], torch.tensor(0, dtype=torch.uint8)) == [0.0, 1.0, 1.0]
    assert slopes([-99.0, 0.5, 99.0], torch.tensor(7, dtype=torch.uint8)) == [1.0, 1.0, 1.0]
    assert slopes([-99.0, 0.5, 99.0], torch.tensor(0, dtype=torch.int8)) == [1.0, 1.0, 1.0]
    value = _quantise(torch.tensor([-1.0, 0.26, 99.0]), torch.tensor(0.1),
                      torch.tensor(0, dtype=torch.uint8))  # fmt: skip
    assert torch.allclose(value, torch.tensor([0.0, 0.3, 25.5]))


def test_an_engine_that_hides_gradients_looks_stronger_by_transfer_alone() -> None:
    row: dict[str, Any] = {
        "against": None, "apart": None, "gap": {"points": 1.0, "low": -2.0, "high": 4.0},
        "gap_transfer": {"points": -9.0, "low": -12.0, "high": -6.0},
    }  # fmt: skip
    assert deployment.says(row) == (
        "no different from the twin: +1.0 points (-2.0 to +4.0); by transfer alone it looks 9.0 "
        "points stronger than the twin"
    )
    stronger = {"points": -5.0, "low": -8.0, "high": -2.0}
    said = deployment.says({**row, "against": "fp32", "apart": stronger})
    assert said == "stronger than fp32: -5.0 points (-8.0 to -2.0)"
    assert deployment.says({**row, "gap": None}) == "nothing to compare with"
    none = {"points": 0.0, "low": 0.0, "high": 0.0}
    said = deployment.says({**row, "gap": none, "gap_transfer": none, "clean": {"n": 60}})
    assert (
        said == "none of 60 clips differs from the twin, which excludes a gap of 5.0 points or more"
    )


def test_a_gap_is_paired() -> None:
    first, second = np.zeros(200, bool), np.zeros(200, bool)
    first[:60], second[:80] = True, True
    points, low, high = gap(first, second)
    assert points == pytest.approx(10)
    # 20 of 200 differ, all one way: the deviation of a share of 0.1 is 0.0212
    assert (low, high) == (pytest.approx(5.8, abs=0.8), pytest.approx(14.2, abs=0.8))
    assert gap(second, first).points == pytest.approx(-10)
    assert gap(first, first) == (0, 0, 0)


def test_the_gate_counts_what_the_engine_alone_loses() -> None:
    found = attacked(small(seed=5), TRANSFER)
    twin, engine = (deployment.worst(found, name, EPS) for name in ("twin", "engine"))
    assert twin is not None
    assert engine is not None
    count = int((engine & ~twin).sum())
    assert count
    gate.refuse(found, 100 * count / N)
    with pytest.raises(GateError, match=f"broken on engine alone are {count} of {N} at eps 6/255"):
        gate.refuse(found, 100 * count / N - 1)
    alone = evaluate(small(), CLIPS, found.label, rows(TRANSFER), {"twin": of_twin(small())})
    with pytest.raises(SettingError, match="--gate-robust compares an engine with its twin"):
        gate.refuse(alone, 1)


def test_an_engine_that_answers_nan_is_refused_in_every_mode() -> None:
    calls = {"n": 0}

    def later(clips: Clips, force_route: Sequence[int] | None = None) -> Prediction:
        calls["n"] += 1
        answer = of_twin(small())(clips, force_route)
        if calls["n"] > 4:  # of clean clips it is none
            answer.logits[0] = np.nan
        return answer

    for mode in MODES:
        calls["n"] = 0
        with pytest.raises(VmoeError, match=r"clip \d+: the (model|engine) answers NaN"):
            attacked(small(), mode, judge=later)


def test_modes_that_are_asked_for() -> None:
    pgd = plan(["pgd"], [EPS], ["frozen"])
    square = plan(["square"], [EPS])
    made = flags.in_modes(flags.Rows(pgd, square), MODES, ["a", "b"], as_given=False)
    assert [(row.attack, row.mode, row.against) for row in made] == [
        ("pgd", TRANSFER, ""), ("pgd", ADAPTIVE, "a"), ("pgd", ADAPTIVE, "b"),
        ("square", QUERY, "a"), ("square", QUERY, "b"),
    ]  # fmt: skip
    early = [row.settings[0].early_stop for row in made]  # type: ignore[attr-defined]
    assert early == [False, True, True, True, True]
    as_given = flags.in_modes(flags.Rows(pgd, []), [TRANSFER], ["a"], as_given=True)
    assert as_given[0].settings[0].early_stop  # type: ignore[attr-defined]
    with pytest.raises(
        SettingError, match="--mode adaptive follows gradients, and square has none"
    ):
        flags.in_modes(flags.Rows(square, []), [ADAPTIVE], ["a"], as_given=False)


def test_engines_side_by_side_count_each_for_itself() -> None:
    twin, other = small(), small(seed=5)
    judges = {"twin": of_twin(twin), "one": of_twin(twin), "two": of_twin(other)}
    engines = {"one": engine_of(twin), "two": engine_of(other)}
    label = judges["twin"](CLIPS).logits.argmax(axis=1)
    made = rows(TRANSFER, ADAPTIVE, names=("one", "two"))
    found = evaluate(twin, CLIPS, label, made, judges, engines=engines)
    assert [sorted(o.seen) for o in found.outcomes] == [
        ["one", "twin", "two"], ["one", "twin"], ["twin", "two"],
    ]  # fmt: skip
    report = {**everything(found, list(range(N))), "deployed": deployment.everything(found)}
    first, second = report["deployed"]["rows"]
    assert (first["against"], second["against"]) == (None, "one")
    assert second["apart"]["points"] == pytest.approx(
        100 * (first["worst_of"]["share"] - second["worst_of"]["share"])
    )
    text = tables.deployed(report)
    assert "| two    |" in text
    assert "sanity of what was deployed" in text
    alone = [o for o in made if o.against in ("", "two")]
    again = evaluate(twin, CLIPS, label, alone, {"twin": judges["twin"], "two": judges["two"]},
                     engines={"two": engines["two"]})  # fmt: skip
    assert deployment.everything(again)["rows"][0]["worst_of"] == second["worst_of"]


def test_saved_clips_of_a_mode_are_judged_by_everyone() -> None:
    from vmoe.attacks.evaluate import replay

    found = attacked(small(seed=5), ADAPTIVE)
    (outcome,) = found.outcomes
    row = replace(outcome.row, against="", origin="engine", begun=None)
    judges = {"twin": of_twin(small()), "third": of_twin(copy.deepcopy(small(seed=5)))}
    again = replay(CLIPS, found.label, [(row, outcome.clips)], judges)
    assert (again.outcomes[0].seen["third"].seen.said == outcome.seen["engine"].seen.said).all()
    assert everything(again, list(range(N)))["rows"][1]["made_on"] == "engine"
    names = [line["name"] for line in deployment.everything(again)["sanity"]]
    assert names == ["the twin's routes", "the twin's labels"]
    (line,) = deployment.everything(again)["rows"]
    assert line["adaptive"] is None, "they were made against another engine"
    assert line["twin"] is None, "no clip was made on the twin"
    assert line["gap"] is line["gap_transfer"] is None
    assert line["worst_of"]["hits"] < N
    own = deployment.everything(
        replay(CLIPS, found.label, [(replace(row, origin="third"), outcome.clips)], judges)
    )["rows"][0]
    assert own["adaptive"] == own["worst_of"] == line["worst_of"]

"""Evaluation: what is rounded, what is judged, and what is counted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.twins import lively, random_clips
from vmoe.attacks.evaluate import Evaluation, Outcome, Row, evaluate, plan, replay
from vmoe.attacks.figures import agreement, broken, everything, figures, worst_of
from vmoe.attacks.grid import l2, linf
from vmoe.attacks.judge import Seen, SeenAttacked, l_lip_of, look, of_twin
from vmoe.attacks.methods import pgd
from vmoe.clips import Clips
from vmoe.errors import SettingError, UnknownNameError, VmoeError
from vmoe.models import ROUTE_GRADS, VideoMoE
from vmoe.runtime.engine import Prediction

N, EPS = 8, 1 / 255
CLIPS = random_clips(N)


def labels(twin: VideoMoE) -> np.ndarray:
    """Return what the twin says, except of the first clip, on which it is wrong."""
    said = of_twin(twin)(CLIPS).logits.argmax(axis=1)
    said[0] = (said[0] + 1) % 4
    return said


def attacked(names: list[str], **values: object) -> tuple[VideoMoE, Evaluation]:
    twin = lively()
    ways = values.pop("ways", ["frozen", "soft"])
    rows = plan(names, [EPS, 2 * EPS], ways, steps=2, **values)  # type: ignore[arg-type]
    judges = {"twin": of_twin(twin), "engine": of_twin(lively(seed=1))}
    found = evaluate(twin, CLIPS, labels(twin), rows, judges, batch=4, keep_clips=True)
    return twin, found


def without_cost(row: dict[str, Any]) -> dict[str, Any]:
    cost = ("forwards", "backwards", "dead", "seconds")
    return {key: value for key, value in row.items() if not key.startswith(cost)}


def test_plan_has_every_attack_at_every_budget() -> None:
    rows = plan(["pgd", "tlga-r"], [EPS, 2 * EPS], steps=3, gamma1=2.0)
    assert [(row.attack, row.part, row.eps) for row in rows] == [
        ("pgd", "model", EPS), ("tlga-r", "router", EPS),
        ("pgd", "model", 2 * EPS), ("tlga-r", "router", 2 * EPS),
    ]  # fmt: skip
    assert [s.route_grad for s in rows[0].settings] == list(ROUTE_GRADS)  # type: ignore[attr-defined]
    assert len(rows[1].settings) == 1
    assert rows[3].settings[0].gamma1 == 2.0  # type: ignore[attr-defined]
    assert all(s.eps == row.eps for row in rows for s in row.settings)  # type: ignore[attr-defined]


def test_plan_refuses_what_is_not_there() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'tlga-r'"):
        plan(["tlga"], [EPS])
    with pytest.raises(UnknownNameError, match="attack 'stpes': did you mean 'steps'"):
        plan(["pgd"], [EPS], stpes=100)
    with pytest.raises(UnknownNameError, match="route-grad"):
        plan(["pgd"], [EPS], ["hard"])
    with pytest.raises(SettingError, match="--steps is 0"):
        plan(["pgd"], [EPS], steps=0)


def test_every_figure_can_be_found_again_from_the_clips() -> None:
    twin, found = attacked(["pgd", "tlga-r", "tla-e"])
    y, clean = labels(twin), of_twin(twin)(CLIPS)
    right = clean.logits.argmax(axis=1) == y
    assert right.sum() == N - 1
    for outcome in found.outcomes:
        row, answer = outcome.row, of_twin(twin)(outcome.clips)
        assert outcome.linf == linf(outcome.clips, CLIPS) == round(255 * row.eps)
        assert outcome.l2 == l2(outcome.clips, CLIPS)
        said = answer.logits.argmax(axis=1)
        rows = figures(found, outcome, "twin")
        assert rows["clean"]["hits"] == N - 1
        assert rows["robust"]["hits"] == (right & (said == y)).sum()
        assert rows["flips"]["hits"] == (answer.route != clean.route).sum()
        assert rows["weakest"]["hits"] == (answer.route == clean.scores.argmin(axis=1)).sum()
        kept = of_twin(twin)(outcome.clips, clean.route.tolist()).logits.argmax(axis=1)
        assert rows["route_kept"]["hits"] == (right & (kept == y)).sum()
        success = {
            "model": (said != y) & right, "router": answer.route != clean.route,
            "expert": of_twin(twin)(outcome.clips, [0] * N).logits.argmax(axis=1) != y,
        }[row.part]  # fmt: skip
        assert rows["success"]["hits"] == success.sum()
        assert rows["success"]["n"] == (N - 1 if row.part == "model" else N)


def test_worst_of_is_per_clip() -> None:
    _, found = attacked(["pgd-r", "j-tlga", "fgsm"])
    for eps in (EPS, 2 * EPS):
        at = [o for o in found.outcomes if o.row.eps == eps]
        any_broken = np.logical_or.reduce([broken(found, o, "twin") for o in at])
        worst = worst_of(found, eps, "twin")
        assert worst["robust"]["hits"] == N - any_broken.sum()
        assert worst["forwards_total"] == sum(o.forwards.sum() for o in at)
        assert worst["forwards"] == sum(o.forwards for o in at).mean()
        assert all(worst["robust"]["hits"] <= N - broken(found, o, "twin").sum() for o in at)


def test_several_route_grads_count_with_the_worst_per_clip() -> None:
    _, together = attacked(["pgd"], ways=["frozen", "straight-through", "soft"])
    for way in ("frozen", "straight-through", "soft"):
        _, alone = attacked(["pgd"], ways=[way])
        for more, less in zip(together.outcomes, alone.outcomes, strict=True):
            assert (broken(together, more, "twin") | ~broken(alone, less, "twin")).all()


def test_next_route_grad_sees_only_the_clips_that_still_stand() -> None:
    _, together = attacked(["frame-sparse"], ways=["frozen", "soft"], touched_frames=1)
    _, alone = attacked(["frame-sparse"], ways=["frozen"], touched_frames=1)
    stood = 0
    for both, first in zip(together.outcomes, alone.outcomes, strict=True):
        fell = first.seen["twin"].success
        assert fell.any()
        stood += int((~fell).sum())
        assert (both.forwards[fell] == first.forwards[fell]).all()
        assert (both.forwards[~fell] > first.forwards[~fell]).all()
        assert both.forwards[0] == both.backwards[0] == 0  # wrong as it is: costs nothing
    assert stood


def test_without_early_stop_every_route_grad_sees_every_clip() -> None:
    _, found = attacked(["pgd"], ways=["frozen", "soft"], early_stop=False)
    for outcome in found.outcomes:
        assert (outcome.backwards == 2 * 2).all()  # two ways, two steps
    _, stopped = attacked(["pgd"], ways=["frozen", "soft"])
    for full, early in zip(found.outcomes, stopped.outcomes, strict=True):
        assert (full.seen["twin"].success >= early.seen["twin"].success).all()


def test_l2_is_measured_on_the_final_clips() -> None:
    twin = lively()
    rows = plan(["pgd", "pgd-r"], [1.0, 2.0], ["frozen"], steps=2, norm="l2", early_stop=False)
    found = evaluate(twin, CLIPS, labels(twin), rows, {"twin": of_twin(twin)}, keep_clips=True)
    for outcome in found.outcomes:
        delta = (outcome.clips.astype(float) - CLIPS) / 255
        sizes = np.sqrt((delta**2).sum(axis=(1, 2, 3, 4)))
        assert outcome.l2 == pytest.approx(sizes.max())
        assert 0.5 * outcome.row.eps < outcome.l2 <= outcome.row.eps
        row = figures(found, outcome, "twin")
        assert (row["norm"], row["radius"], row["l2"]) == ("l2", None, outcome.l2)
        assert row["linf"] == linf(outcome.clips, CLIPS)


def test_nan_of_a_model_is_refused_with_the_clip_s_number() -> None:
    """NaN compares as False: unseen, it would count as a label."""
    twin, engine = lively(), of_twin(lively())

    def broken_engine(clips: Clips, force_route: Sequence[int] | None = None) -> Prediction:
        answer = engine(clips, force_route)
        hit = (clips == CLIPS[6]).all(axis=(1, 2, 3, 4))
        return answer._replace(logits=np.where(hit[:, None], np.nan, answer.logits))

    judges = {"twin": of_twin(twin), "engine": broken_engine}
    rows = plan(["noise"], [EPS])
    with pytest.raises(VmoeError, match="clip 106: the engine answers NaN"):
        evaluate(twin, CLIPS, labels(twin), rows, judges, index=np.arange(100, 108), batch=4)
    pairs = [(rows[0], CLIPS)]
    with pytest.raises(VmoeError, match="clip 6: the engine answers NaN"):
        replay(CLIPS, labels(twin), pairs, judges)


def test_wrong_clean_clip_is_broken_by_every_attack() -> None:
    twin, found = attacked(["pgd", "pgd-r"])
    for outcome in found.outcomes:
        assert broken(found, outcome, "twin")[0]
    whole = found.outcomes[0]
    assert of_twin(twin)(whole.clips).logits.argmax(axis=1)[0] != labels(twin)[0]


def test_budget_below_a_grey_level_deploys_the_clean_clip() -> None:
    twin = lively()
    rows = plan(["pgd"], [0.9 / 255], ["frozen"], steps=2)
    found = evaluate(twin, CLIPS, labels(twin), rows, {"twin": of_twin(twin)}, keep_clips=True)
    assert (found.outcomes[0].clips == CLIPS).all()
    row = figures(found, found.outcomes[0], "twin")
    assert (row["linf"], row["radius"], row["l_lip_router"]) == (0, 0, None)
    assert row["robust"] == row["clean"]


def test_starts_are_drawn_from_the_clip_s_own_number() -> None:
    twin, y = lively(), labels(lively())
    rows = plan(["pgd"], [EPS], ["frozen"], steps=1)
    index = np.arange(100, 100 + N)

    def made(at: slice, number: np.ndarray) -> np.ndarray:
        judges = {"twin": of_twin(twin)}
        found = evaluate(
            twin, CLIPS[at], y[at], rows, judges, index=number, batch=4, keep_clips=True
        )
        return found.outcomes[0].clips

    whole = made(slice(0, 8), index[:8])
    assert (made(slice(4, 8), index[4:8]) == whole[4:]).all()
    assert (made(slice(4, 8), index[:4]) != whole[4:]).any()


def test_replay_says_the_same() -> None:
    twin, found = attacked(["pgd", "tlga-r"])
    judges = {"twin": of_twin(twin), "engine": of_twin(lively(seed=1))}
    pairs = [(o.row, o.clips) for o in found.outcomes]
    again = replay(CLIPS, labels(twin), pairs, judges, batch=4)
    for a, b in zip(found.outcomes, again.outcomes, strict=True):
        for model in judges:
            one, two = figures(found, a, model), figures(again, b, model)
            assert two["forwards_total"] == two["seconds"] == 0
            assert without_cost(one) == without_cost(two)


def test_everything_is_json() -> None:
    _, found = attacked(["pgd"])
    report = json.loads(json.dumps(everything(found, list(range(N))), allow_nan=False))
    assert len(report["rows"]) == len(report["worst_of"]) == 4
    assert [row["attack"] for row in report["agreement"]] == ["clean", "pgd", "pgd"]
    assert len(report["clips"]["attacked"][0]["engine"]["route"]) == N


def test_part_that_the_twin_does_not_have() -> None:
    dense = lively(experts=1)
    for name, why in (
        ("pgd-r", "attacks a router, and this model is dense"),
        ("tla-e", "0 to 0"),
        ("frame-sparse", "--touched-frames is 5; a clip of this model has 4"),
    ):
        rows = plan([name], [EPS], expert=1, touched_frames=5)
        with pytest.raises(SettingError, match=why):
            evaluate(dense, CLIPS, np.zeros(N, np.int64), rows, {})
    with pytest.raises(SettingError, match="expert 4 does not exist: the twin has 0 to 3"):
        of_twin(lively())(CLIPS[:1], [4])


def test_dense_model_is_evaluated_without_a_route() -> None:
    dense = lively(experts=1)
    judges = {"twin": of_twin(dense)}
    found = evaluate(dense, CLIPS, labels(dense), plan(["j-tlga"], [EPS], steps=2), judges)
    assert len(found.outcomes[0].row.settings) == 1  # every route_grad is the same attack
    assert found.outcomes[0].backwards.max() == 2
    row = figures(found, found.outcomes[0], "twin")
    assert (row["flips"]["hits"], row["weakest"]["hits"]) == (0, 0)
    assert (row["gap_clean"], row["l_lip_router"]) == (0, 0)


def test_twin_is_judged_in_eval_mode_and_left_as_found() -> None:
    twin = lively().train()
    buffers = {name: value.clone() for name, value in twin.state_dict().items()}
    first = of_twin(twin)(CLIPS)
    assert twin.training
    assert all(torch.equal(buffers[name], value) for name, value in twin.state_dict().items())
    assert (first.logits == of_twin(lively())(CLIPS).logits).all()


def hand_made() -> Evaluation:
    """Five clips: right and held, broken on both, only twin, only engine, wrong when clean."""
    label = np.zeros(5, np.int64)

    def seen(said: list[int], route: list[int]) -> Seen:
        return Seen(np.array(said), np.array(route), np.ones(5), np.full(5, 3))

    def under(said: list[int], route: list[int]) -> SeenAttacked:
        moved, success = seen(said, route), np.array(said) != 0
        term = np.array([1, 2, 3, np.nan, np.nan])
        return SeenAttacked(moved, success, np.zeros(5, int), term, 10 * term)

    clean = {"twin": seen([0, 0, 0, 0, 1], [0] * 5), "engine": seen([0, 0, 0, 0, 1], [0] * 5)}
    attacked = {
        "twin": under([0, 1, 1, 0, 0], [0, 3, 1, 0, 0]),
        "engine": under([0, 1, 0, 1, 0], [0, 3, 0, 0, 0]),
    }
    row = Row("pgd", "model", 8 / 255, (pgd.Settings(),))
    passes = np.array([3, 20, 20, 5, 0])
    outcome = Outcome(
        row, attacked, 8, 2.5, passes + 1, passes, np.array([0, 1, 0, 0, 0]), 1.5, CLIPS[:0]
    )
    return Evaluation(label, clean, (outcome,))


def test_figures_worked_by_hand() -> None:
    found = hand_made()
    row = figures(found, found.outcomes[0], "twin")
    counts = {k: (v["hits"], v["n"]) for k, v in row.items() if isinstance(v, dict)}
    assert counts == {
        "clean": (4, 5), "robust": (2, 5), "success": (2, 4), "flips": (2, 5), "weakest": (1, 5),
        "route_kept": (4, 5),
    }  # fmt: skip
    assert (row["l_lip_router"], row["l_lip_model"]) == (2.0, 20.0)
    assert (row["forwards"], row["forwards_total"]) == (10.6, 53)
    assert (row["backwards"], row["backwards_total"]) == (9.6, 48)
    assert (row["dead_total"], row["seconds"], row["l2"], row["radius"]) == (1, 1.5, 2.5, 8)
    assert row["robust"]["low"] < 0.4 < row["robust"]["high"]


def test_agreement_worked_by_hand() -> None:
    found = hand_made()
    row = agreement(found, found.outcomes[0], "twin", "engine")
    kinds = ("both_broken", "only_twin", "only_engine", "neither")
    assert [row[kind] for kind in kinds] == [2, 1, 1, 1]  # what is wrong clean is broken on both
    assert row["route"]["hits"] == 4
    assert row["said"]["hits"] == 3
    assert agreement(found, None, "twin", "engine")["route"]["hits"] == 5


def test_look_worked_by_hand() -> None:
    scores = np.array([[1.0, 4.0, 2.5], [0.0, 0.0, -1.0]], np.float32)
    answer = Prediction(np.array([[0, 1], [1, 0]], np.float32), scores, np.array([1, 0]))
    seen = look(answer)
    assert seen.gap.tolist() == [1.5, 0]
    assert seen.weakest.tolist() == [0, 2]
    assert seen.said.tolist() == [1, 0]
    dense = look(answer._replace(scores=np.zeros((2, 1), np.float32)))
    assert dense.gap.tolist() == [0, 0]


def test_l_lip_worked_by_hand() -> None:
    clean, moved = np.zeros((2, 4), np.float32), np.full((2, 4), 0.5, np.float32)
    clips = np.full((2, 1, 2, 2, 3), 100, np.uint8)
    adversarial = clips.copy()
    adversarial[0] += 51  # 0.2 of 1
    term = l_lip_of(clean, moved, clips, adversarial)
    assert term[0] == pytest.approx(0.25 / 0.04)
    assert np.isnan(term[1])


def test_row_is_a_plain_value() -> None:
    row = plan(["tla-e"], [EPS], expert=2)[0]
    assert row.expert == 2
    assert dataclasses.replace(row, eps=0.5).eps == 0.5

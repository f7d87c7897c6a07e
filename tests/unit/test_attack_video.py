"""Attacks that know of frames, and misroute: TT, flicker, frame-sparse, against closed forms."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.twins import SMALL, linear, random_clip, random_clips, small, weight
from vmoe.attacks import ball
from vmoe.attacks.evaluate import evaluate, plan
from vmoe.attacks.figures import figures
from vmoe.attacks.judge import of_twin
from vmoe.attacks.loop import AttackResult
from vmoe.attacks.methods import flicker, frame_sparse, misroute, pgd, tt
from vmoe.errors import SettingError
from vmoe.models import VideoMoE

EPS = 4 / 255
BUDGETS = [("linf", EPS), ("l2", 0.5)]


def noisy(shape: tuple[int, ...], low: int = 0, high: int = 255) -> Tensor:
    """Return clips of noise on the uint8 grid."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(low, high + 1, shape, generator=generator) / 255


def said(twin: VideoMoE, clip: Tensor) -> Tensor:
    with torch.no_grad():
        return twin(clip).logits.argmax(dim=1)


def dense() -> tuple[VideoMoE, Tensor, Tensor, Tensor]:
    """Return a linear dense twin of 2 labels, clips far from 0 and 1, labels, and the way out."""
    twin, clip = linear(1, spec=SMALL), noisy((4, 3, 3, 9, 11), 60, 190)
    y, w = said(twin, clip), weight(twin.experts[0], SMALL)
    return twin, clip, y, w[1 - y] - w[y]


def run(method: ModuleType, twin: VideoMoE, clip: Tensor, y: Tensor, **how: Any) -> AttackResult:
    found: AttackResult = method.attack(
        twin, clip, y, method.Settings(**{"early_stop": False, "steps": 8} | how)
    )
    return found


@settings(max_examples=12, deadline=None)
@given(
    frames=st.integers(1, 5), height=st.integers(1, 9), width=st.integers(1, 9),
    experts=st.sampled_from([1, 2, 8]), budget=st.sampled_from(BUDGETS), grid=st.booleans(),
)  # fmt: skip
def test_any_shape(
    frames: int, height: int, width: int, experts: int, budget: tuple[str, float], grid: bool
) -> None:
    twin, clip = small(experts, 2), noisy((2, 3, frames, height, width))
    y, (norm, eps) = said(twin, clip), budget
    how = {"norm": norm, "eps": eps, "grid": grid, "steps": 2, "restarts": 2}
    for method in (tt, flicker, frame_sparse):
        more = {"touched_frames": frames} if method is frame_sparse else {}
        found = run(method, twin, clip, y, **how, **more)
        x = found.adversarial
        assert (ball.size((x - clip).double(), norm) <= eps + 1e-6).all()
        assert x.min() >= 0
        assert x.max() <= 1
        assert torch.equal(found.success, said(twin, x) != y)


def test_flicker_of_a_linear_loss_is_the_sign_of_each_frame_s_sum() -> None:
    twin, clip, y, toward = dense()
    summed = toward.sum(dim=(3, 4), keepdim=True)
    found = run(flicker, twin, clip, y, eps=EPS)
    torch.testing.assert_close(found.adversarial, clip + EPS * summed.sign())
    along = ball.steepest(summed.expand_as(clip), "l2")
    found = run(flicker, twin, clip, y, eps=0.5, norm="l2", steps=60)
    torch.testing.assert_close(found.adversarial, clip + 0.5 * along, atol=1e-3, rtol=0)


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 3.5 / 255), ("linf", 0.2), ("l2", 1.0)])
@pytest.mark.parametrize("random_start", [False, True])
def test_flicker_is_one_offset_for_each_frame_and_channel_but_for_clipping(
    norm: str, eps: float, grid: bool, random_start: bool
) -> None:
    twin, clip = small(), noisy((6, 3, 3, 9, 11))
    clip[..., 0, 0] = 128 / 255  # shows the offset, as nothing is cut there
    how = {"norm": norm, "eps": eps, "grid": grid, "random_start": random_start, "restarts": 2}
    x = run(flicker, twin, clip, said(twin, clip), **how).adversarial
    offset = (x - clip)[..., :1, :1]
    assert offset.abs().amax() > 0
    torch.testing.assert_close(x, (clip + offset).clamp(0, 1), atol=1e-6, rtol=0)
    if grid:
        levels = 255 * (x - clip)
        torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)


def test_flicker_on_the_grid_rounds_the_offset_and_not_each_pixel() -> None:
    """An offset of one and a half levels would round to the even one, by pixel."""
    twin, clip, y, toward = dense()
    how = {"eps": 2 / 255, "step": 0.75, "steps": 1, "random_start": False, "grid": True}
    x = run(flicker, twin, clip, y, **how).adversarial
    summed = toward.sum(dim=(3, 4), keepdim=True)
    torch.testing.assert_close(x, clip + 2 / 255 * summed.sign())


def test_flicker_does_not_follow_pixels_that_are_at_their_end() -> None:
    """One pixel of weight 10 has room for 0.3 eps, 8 others weigh -5: best is 0.3 eps.

    Further up the weights of all pixels still sum to 5, but only those of the others count.
    """
    twin = linear(1, spec=SMALL)
    clip = torch.full((8, 3, 3, 9, 11), 0.5)
    clip[:, 0, 0, 0, 0] = 1 - 0.3 * 0.1
    toward = torch.zeros_like(clip[0])
    toward[0, 0, 0, 0], toward[0, 0, 0, 1:9] = 10, -5 / 8
    head = [module for module in twin.experts[0].modules() if hasattr(module, "weight")][-1]
    with torch.no_grad():
        head.weight.copy_(torch.stack([-toward.flatten() / 2, toward.flatten() / 2]))
        head.bias[0] = 100.0
    y = torch.zeros(8).long()
    found = run(flicker, twin, clip, y, eps=0.1, step=0.05, steps=60)
    gain = ((found.adversarial - clip) * toward).flatten(1).sum(dim=1)
    assert (gain > 0.85 * 5 * 0.3 * 0.1).all()


@pytest.mark.parametrize(("norm", "eps"), BUDGETS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_frame_sparse_takes_the_best_frames_of_a_linear_loss(
    norm: str, eps: float, count: int
) -> None:
    twin, clip, y, toward = dense()
    gain = toward.abs() if norm == "linf" else toward.square()
    first = gain.sum(dim=(1, 3, 4)).topk(count, dim=1).indices
    best = torch.zeros_like(clip)
    for row, frames in enumerate(first.tolist()):
        best[row, :, frames] = toward[row, :, frames]
    how = {"norm": norm, "eps": eps, "touched_frames": count, "steps": 60, "restarts": 2}
    found = run(frame_sparse, twin, clip, y, **how)
    wanted = clip + eps * ball.steepest(best, norm)
    torch.testing.assert_close(found.adversarial, wanted, atol=1e-3 * eps, rtol=0)


@pytest.mark.parametrize(("norm", "eps"), BUDGETS)
@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_frame_sparse_leaves_the_other_frames_as_they_are(
    norm: str, eps: float, count: int, grid: bool
) -> None:
    twin, clip = small(), noisy((6, 3, 4, 9, 11))
    how = {"norm": norm, "eps": 4 * eps, "touched_frames": count, "grid": grid, "restarts": 3}
    x = run(frame_sparse, twin, clip, said(twin, clip), **how).adversarial
    touched = (x != clip).any(dim=4).any(dim=3).any(dim=1).sum(dim=1)
    assert (touched <= count).all()
    assert (touched == count).any()


def test_frame_sparse_refuses_more_frames_than_there_are() -> None:
    twin, clip = small(), random_clip(1, spec=SMALL)
    with pytest.raises(SettingError, match="--touched-frames is 4; a clip of this model has 3"):
        run(frame_sparse, twin, clip, torch.tensor([0]), touched_frames=4)


@pytest.mark.parametrize("how", ["gaussian", "linear", "uniform"])
def test_weights_of_shifts(how: str) -> None:
    found = tt.weights(tt.Settings(shifts=3, shift_weights=how), 16)
    assert sum(found.values()) == pytest.approx(1)
    assert sorted(found) == [0, 1, 2, 3, 13, 14, 15]
    assert all(found[i] == pytest.approx(found[16 - i]) for i in (1, 2, 3))
    ratio = {"gaussian": np.exp(-0.5), "linear": 0.75, "uniform": 1.0}[how]
    assert found[1] / found[0] == pytest.approx(ratio)
    ends = {"gaussian": np.exp(-4.5), "linear": 0.25, "uniform": 1.0}[how]
    assert found[3] / found[0] == pytest.approx(ends)
    assert tt.weights(tt.Settings(shifts=3, shift_weights=how), 1) == {0: pytest.approx(1)}


def test_tt_without_a_shift_is_pgd() -> None:
    twin, clip = small(), random_clip(4, spec=SMALL)
    y = said(twin, clip)
    plain = run(pgd, twin, clip, y, eps=EPS)
    assert torch.equal(run(tt, twin, clip, y, eps=EPS, shifts=0).adversarial, plain.adversarial)
    one, y = clip[:, :, :1], said(twin, clip[:, :, :1])
    plain, shifted = run(pgd, twin, one, y, eps=EPS), run(tt, twin, one, y, eps=EPS)
    assert torch.equal(shifted.adversarial, plain.adversarial)
    assert torch.equal(shifted.backwards, plain.backwards)  # of one frame there is one copy


def test_tt_step_by_hand() -> None:
    """CE's gradient at a copy is p (w_other - w_left), p the weight of the other label there."""
    twin, clip, y, toward = dense()
    how = tt.Settings(shifts=1, shift_weights="linear")
    average = torch.zeros_like(clip)
    for shift, share in {0: 1 / 2, 1: 1 / 4, -1: 1 / 4}.items():
        with torch.no_grad():
            logits = twin(torch.roll(clip, shift, dims=2)).logits
        p = 1 - logits.softmax(dim=1).gather(1, y[:, None])[:, 0]
        average += share * ball.spread(p, clip) * torch.roll(toward, -shift, dims=2)
    values = {"shifts": how.shifts, "shift_weights": how.shift_weights}
    one = {"eps": EPS, "steps": 1, "step": 1.0, "random_start": False}
    found = run(tt, twin, clip, y, **one, **values)
    better = (toward * average.sign()).flatten(1).sum(dim=1) > 0  # else the clip itself is best
    assert better.any()
    wanted = clip + EPS * average.sign() * ball.spread(better, clip)
    torch.testing.assert_close(found.adversarial, wanted)
    assert found.backwards.tolist() == [3] * 4


@pytest.mark.parametrize(("norm", "eps"), BUDGETS)
def test_misroute_reaches_the_optimum_of_a_linear_router(norm: str, eps: float) -> None:
    twin, clip, y = linear(2, spec=SMALL), noisy((4, 3, 3, 9, 11), 60, 190), torch.zeros(4).long()
    with torch.no_grad():
        route = twin(clip).route
    assert twin.router is not None
    w = weight(twin.router, SMALL)
    toward = w[1 - route] - w[route]
    wanted = clip + eps * ball.steepest(toward, norm)
    how = {"norm": norm, "eps": eps, "steps": 60}
    anywhere = run(misroute, twin, clip, y, **how)
    torch.testing.assert_close(anywhere.adversarial, wanted, atol=1e-3 * eps, rtol=0)
    there = [run(misroute, twin, clip, y, **how, to_expert=e) for e in (0, 1)]
    for row, own in enumerate(route.tolist()):
        torch.testing.assert_close(
            there[1 - own].adversarial[row], wanted[row], atol=1e-3 * eps, rtol=0
        )
        assert bool(there[own].success[row])


def test_misroute_to_a_chosen_expert() -> None:
    twin, clip, y = small(), random_clip(24, spec=SMALL), torch.zeros(24).long()
    with torch.no_grad():
        route = twin(clip).route
    for expert in range(4):
        found = run(misroute, twin, clip, y, eps=0.2, to_expert=expert, early_stop=True)
        assert torch.equal(found.success, found.route_after == expert)
        assert found.success.all()
        there = route == expert
        assert not found.backwards[there].any()
        assert torch.equal(found.adversarial[there], clip[there])
        assert found.backwards[~there].all()


def test_misroute_needs_a_router_and_the_expert() -> None:
    clip, y = random_clip(1, spec=SMALL), torch.zeros(1).long()
    with pytest.raises(SettingError, match="dense"):
        run(misroute, small(1), clip, y)
    with pytest.raises(SettingError, match="--to-expert is 4; this model has experts 0 to 3"):
        run(misroute, small(), clip, y, to_expert=4)
    with pytest.raises(SettingError, match="--to-expert is 4; this model has experts 0 to 3"):
        evaluate(
            small(), random_clips(1, spec=SMALL), np.zeros(1, np.int64),
            plan(["misroute"], [EPS], to_expert=4), {},
        )  # fmt: skip


def test_misroute_is_judged_by_its_own_rule_after_rounding() -> None:
    twin, clips = small(), random_clips(12, spec=SMALL)
    judge = of_twin(twin)
    clean = judge(clips)
    label = clean.logits.argmax(axis=1)
    rows = plan(["misroute"], [2 / 255], to_expert=2, steps=3)
    found = evaluate(twin, clips, label, rows, {"twin": judge}, keep_clips=True)
    (outcome,) = found.outcomes
    there = judge(outcome.clips).route == 2
    assert np.array_equal(outcome.seen["twin"].success, there)
    elsewhere = clean.route != 2
    assert 0 < there[elsewhere].sum() < elsewhere.sum()
    said = figures(found, outcome, "twin")["success"]
    assert (said["hits"], said["n"]) == (int(there[elsewhere].sum()), int(elsewhere.sum()))
    rows = plan(["misroute"], [2 / 255], steps=3)
    found = evaluate(twin, clips, label, rows, {"twin": judge}, keep_clips=True)
    changed = judge(found.outcomes[0].clips).route != clean.route
    assert np.array_equal(found.outcomes[0].seen["twin"].success, changed)
    assert changed.any()

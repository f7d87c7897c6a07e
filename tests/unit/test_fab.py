"""FAB: its projection against optima known otherwise, its walk, and what counts as found."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch import Tensor

from tests.twins import SMALL, linear, random_clip, small, weight
from vmoe.attacks import ball
from vmoe.attacks.methods import apgd_ce, fab
from vmoe.attacks.methods.fab import onto_boundary

NORMS = ("linf", "l2")


def nearest(x: np.ndarray, value: float, w: np.ndarray, norm: str) -> float:
    """Return the size of the smallest such d, by a solver of scipy; inf where there is none."""
    n = len(x)
    if norm == "linf":  # variables d and s: minimise s, |d_i| <= s
        rows = np.block([[np.eye(n), -np.ones((n, 1))], [-np.eye(n), -np.ones((n, 1))]])
        solved = linprog(
            [0] * n + [1], rows, np.zeros(2 * n), np.append(w, 0)[None], [-value],
            [*zip(-x, 1 - x, strict=True), (0, None)],
        )  # fmt: skip
        return float(solved.fun) if solved.success else math.inf
    solved = minimize(
        lambda d: d @ d, np.zeros(n), jac=lambda d: 2 * d, method="SLSQP",
        bounds=list(zip(-x, 1 - x, strict=True)), options={"ftol": 1e-15, "maxiter": 500},
        constraints={"type": "eq", "fun": lambda d: value + w @ d, "jac": lambda d: w},
    )  # fmt: skip
    return math.sqrt(solved.fun) if solved.success else math.inf


def as_clip(values: np.ndarray) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1, 1)


@pytest.mark.parametrize("norm", NORMS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_projection_is_the_smallest_step_onto_the_boundary(norm: str, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 8))
    edge = st.sampled_from([0.0, 1.0, 0.5]) | st.floats(0, 1)
    slope = st.just(0.0) | st.floats(0.1, 3) | st.floats(-3, -0.1)
    x = np.array(data.draw(st.lists(edge, min_size=n, max_size=n)))
    w = np.array(data.draw(st.lists(slope, min_size=n, max_size=n)))
    value = data.draw(st.floats(0.05, 4)) * data.draw(st.sampled_from([-1, 1]))
    d = onto_boundary(as_clip(x), torch.tensor([value], dtype=torch.float64), as_clip(w), norm)
    moved = d.flatten().numpy()
    assert (x + moved >= -1e-12).all()
    assert (x + moved <= 1 + 1e-12).all()
    assert (moved[w == 0] == 0).all()
    room = np.where(-np.sign(value) * w > 0, 1 - x, x)
    reach = float(np.abs(w) @ room)
    if reach < abs(value) - 1e-9:  # out of reach: the corner that is nearest to it
        np.testing.assert_allclose(np.abs(moved), np.where(w != 0, room, 0), atol=1e-12)
    elif reach > abs(value) + 1e-9:
        assert value + w @ moved == pytest.approx(0, abs=1e-9)
        size = float(ball.size(d, norm))
        assert size == pytest.approx(nearest(x, value, w, norm), rel=1e-4, abs=1e-6)


def test_projection_worked_by_hand() -> None:
    """From (.5, .9) with w = (1, 2): the second pixel stops at 1, the first goes the rest."""
    x, w = as_clip(np.array([0.5, 0.9])), as_clip(np.array([1.0, 2.0]))
    value = torch.tensor([-0.5], dtype=torch.float64)
    for norm in NORMS:  # 0.1 * 2 of the second, and 0.3 of the first
        assert onto_boundary(x, value, w, norm).flatten().tolist() == pytest.approx([0.3, 0.1])
    value = torch.tensor([0.5], dtype=torch.float64)
    level = onto_boundary(x, value, w, "linf").flatten().tolist()
    assert level == pytest.approx([-0.5 / 3, -0.5 / 3])
    along = onto_boundary(x, value, w, "l2").flatten().tolist()
    assert along == pytest.approx([-0.1, -0.2])


def test_gradient_of_any_size_leads_to_the_same_place() -> None:
    clip = random_clip(3, spec=SMALL)
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    value = torch.tensor([-1.0, 2.0, -0.5])
    for norm in NORMS:
        usual = onto_boundary(clip, *fab._scaled(value, noise), norm)
        assert usual.abs().sum() > 0
        for scale in (1e-30, 1e30):
            found = onto_boundary(clip, *fab._scaled(scale * value, scale * noise), norm)
            torch.testing.assert_close(found, usual, rtol=1e-3, atol=1e-6)
        still = onto_boundary(clip, *fab._scaled(value, 0 * noise), norm)
        assert not still.any()


@pytest.mark.parametrize("norm", NORMS)
def test_smallest_perturbation_of_a_linear_model_is_found(norm: str) -> None:
    """Its size is |z_t - z_y| over the dual norm of w_t - w_y, where no pixel reaches an end."""
    twin, clip = linear(1, spec=SMALL), 0.5 * torch.ones(4, *random_clip(1, spec=SMALL).shape[1:])
    clip += 0.1 * (random_clip(4, spec=SMALL) - 0.5)
    with torch.no_grad():
        logits = twin(clip).logits
    y = logits.argmax(dim=1)
    w = weight(twin.experts[0], SMALL)
    toward = (w[1 - y] - w[y]).flatten(1)
    gap = logits.amax(dim=1) - logits.amin(dim=1)
    dual = toward.abs().sum(dim=1) if norm == "linf" else toward.norm(dim=1)
    eps = 2 * float((gap / dual).max())
    how = fab.Settings(norm=norm, eps=eps, steps=12, early_stop=False)
    found = fab.attack(twin, clip, y, how)
    assert found.success.all()
    size = ball.size(found.adversarial - clip, norm)
    torch.testing.assert_close(size, gap / dual, rtol=0.06, atol=0)
    assert (size > gap / dual).all()
    torch.testing.assert_close(found.loss, -size)
    # a budget between the distances: those beyond it are crossed, but out of the ball
    distance = gap / dual
    eps = float(distance.sort().values[1:3].prod().sqrt())
    near, far = 1.06 * distance < eps, distance > eps
    assert near.any()
    assert far.any()
    less = fab.attack(twin, clip, y, fab.Settings(norm=norm, eps=eps, steps=12))
    assert less.success[near].all()
    assert not less.success[far].any()
    assert torch.equal(less.adversarial[far], clip[far])


@pytest.mark.parametrize("norm", NORMS)
def test_smaller_than_what_a_whole_budget_finds(norm: str) -> None:
    twin, clip = small(), random_clip(8, spec=SMALL)
    with torch.no_grad():
        y = twin(clip).logits.argmax(dim=1)
    eps = 8 / 255 if norm == "linf" else 0.5
    how = {"norm": norm, "eps": eps, "steps": 20, "early_stop": False}
    found = fab.attack(twin, clip, y, fab.Settings(**how))
    whole = apgd_ce.attack(twin, clip, y, apgd_ce.Settings(**how))
    assert found.success.sum() >= whole.success.sum() - 1
    both = found.success & whole.success
    assert both.any()
    size = ball.size(found.adversarial - clip, norm)[both]
    assert (size < 0.9 * ball.size(whole.adversarial - clip, norm)[both]).all()


def test_found_on_the_grid() -> None:
    twin, clip = small(), random_clip(8, spec=SMALL)
    with torch.no_grad():
        y = twin(clip).logits.argmax(dim=1)
    how = {"eps": 8 / 255, "steps": 10}
    free = fab.attack(twin, clip, y, fab.Settings(**how))
    found = fab.attack(twin, clip, y, fab.Settings(grid=True, **how))
    levels = 255 * (found.adversarial - clip)
    assert found.success.sum() >= free.success.sum() > 0
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    assert float(levels.abs().max()) <= 8 + 1e-3
    with torch.no_grad():
        assert torch.equal(twin(found.adversarial).logits.argmax(dim=1) != y, found.success)


def test_later_starts_are_random_and_near() -> None:
    """The first begins at the clip; a later one within half of what was found, else of eps."""
    twin, clip = small(), random_clip(8, spec=SMALL)
    with torch.no_grad():
        y = twin(clip).logits.argmax(dim=1)
    seen: list[Tensor] = []
    assert twin.router is not None
    twin.router.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].detach()) if inputs[0].requires_grad else None
    )
    how = {"eps": 1 / 255, "steps": 1, "targets": 1, "early_stop": False}
    one = fab.attack(twin, clip, y, fab.Settings(**how))
    fab.attack(twin, clip, y, fab.Settings(restarts=2, **how))
    assert torch.equal(seen[0], clip)
    assert torch.equal(seen[1], clip)
    reach = torch.where(one.success, -one.loss, 1 / 255) / 2
    assert one.success.any()
    assert not one.success.all()
    torch.testing.assert_close(ball.size(seen[2] - clip), reach, rtol=0.01, atol=0)


def test_boundary_is_that_of_the_hard_choice() -> None:
    """The mixture of `soft` crosses elsewhere: by its value, FAB would turn back too early."""
    twin, clip = small(experts=8, classes=2), random_clip(8, spec=SMALL)
    with torch.no_grad():
        y = twin(clip).logits.argmax(dim=1)
    how = {"norm": "l2", "eps": 0.8, "steps": 6}
    frozen = fab.attack(twin, clip, y, fab.Settings(route_grad="frozen", **how))
    soft = fab.attack(twin, clip, y, fab.Settings(route_grad="soft", **how))
    assert frozen.success.all()
    assert soft.success.sum() >= 4  # by the value of the mixture, none

"""Exact relations among the attacks, for whatever is drawn: norm, shape, experts, settings."""

from __future__ import annotations

import gc
import weakref
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from tests.twins import SMALL, random_clip, small
from vmoe.attacks import ball, grid
from vmoe.attacks.climbs import temporal_step
from vmoe.attacks.loop import AttackResult, TemporalSettings
from vmoe.attacks.methods import fgsm, j_tla, j_tlga, pgd, pgd_r, tla_m, tla_r, tlga_r
from vmoe.clips import ClipSpec
from vmoe.models import ROUTE_GRADS, VideoMoE

few = settings(max_examples=6, deadline=None, derandomize=True)
many = settings(max_examples=60, deadline=None, derandomize=True)
PLAIN = {"lam": 0.0, "temporal": "off"}
Case = tuple[VideoMoE, Tensor, Tensor, dict[str, Any]]


@st.composite
def cases(draw: DrawFn, least_experts: int = 1) -> Case:
    """Draw a twin, clips, labels, and settings of a temporal attack without its terms."""
    experts = draw(st.sampled_from([m for m in (1, 2, 4, 8) if m >= least_experts]))
    classes = draw(st.sampled_from([2, 3, 5]))
    spec = ClipSpec(frames=draw(st.sampled_from([1, 2, 5])), height=9, width=11)
    clip = random_clip(3, draw(st.integers(0, 9)), spec)
    label = torch.arange(3) % classes
    norm = draw(st.sampled_from(ball.NORMS))
    how = {
        "norm": norm,
        "eps": draw(st.floats(0.5, 12)) / 255 * (1 if norm == "linf" else 20),
        "steps": draw(st.integers(1, 4)),
        "step": draw(st.floats(0.1, 1)),
        "restarts": draw(st.integers(1, 2)),
        "seed": draw(st.integers(0, 99)),
        "early_stop": draw(st.booleans()),
        "grid": draw(st.booleans()),
        "random_start": draw(st.booleans()),
    }
    return small(experts, classes, spec=spec), clip, label, how


terms = st.fixed_dictionaries(
    {
        "lam": st.sampled_from([0.0, 1e-3, 0.1]),
        "lip": st.sampled_from(["detached", "quotient"]),
        "temporal": st.sampled_from(["iterations", "frames", "off"]),
        "beta": st.floats(0, 1),
    }
)
ways = st.sampled_from(ROUTE_GRADS)
weights = st.floats(0.01, 3)


def found(method: ModuleType, case: Case, **values: Any) -> AttackResult:
    twin, clip, label, how = case
    result: AttackResult = method.attack(twin, clip, label, method.Settings(**how | values))
    return result


def same(a: AttackResult, b: AttackResult) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@few
@given(case=cases(), term=terms, way=ways, weight=weights)
def test_joint_attacks_contain_their_parts(
    case: Case, term: dict[str, Any], way: str, weight: float
) -> None:
    how = {**term, "route_grad": way}
    model = found(tla_m, case, **how)
    assert same(found(j_tlga, case, gamma2=0.0, **how), model)
    assert same(found(j_tla, case, gamma2=0.0, **how), model)
    joint = found(j_tla, case, gamma2=weight, **how)
    assert same(found(j_tlga, case, gamma1=0.0, gamma2=weight, **how), joint)


@few
@given(case=cases(least_experts=2), term=terms)
def test_router_attacks_contain_their_parts(case: Case, term: dict[str, Any]) -> None:
    assert same(found(tlga_r, case, gamma1=0.0, **term), found(tla_r, case, **term))
    assert same(found(tla_r, case, **PLAIN), found(pgd_r, case))


@few
@given(case=cases(), way=ways)
def test_tla_without_its_terms_is_pgd_and_fgsm_is_one_step(case: Case, way: str) -> None:
    plain = found(pgd, case, route_grad=way)
    assert same(found(tla_m, case, route_grad=way, **PLAIN), plain)
    one = {"steps": 1, "step": 1.0, "random_start": False, "restarts": 1}
    twin, clip, label, how = case
    given = {name: how[name] for name in ("norm", "eps", "seed", "early_stop", "grid")}
    fast = fgsm.attack(twin, clip, label, fgsm.Settings(route_grad=way, **given))
    assert same(fast, found(pgd, case, route_grad=way, **one))


finite = st.floats(0, 2.0**100, width=32)


@many
@given(
    scale=st.lists(finite, min_size=4, max_size=4),
    before=st.lists(finite, min_size=4, max_size=4),
    how=terms,
    eps=st.floats(1e-3, 1),
    step=st.floats(1e-2, 1),
)
def test_temporal_step_lies_in_its_range(
    scale: list[float], before: list[float], how: dict[str, Any], eps: float, step: float
) -> None:
    """Every a_f is in (0, step eps]; V stays finite."""
    gradient = torch.tensor(scale).view(1, 1, 4, 1, 1) * torch.ones(1, 3, 4, 2, 2)
    reading = {**how, "temporal": "iterations" if how["temporal"] == "off" else how["temporal"]}
    settings = TemporalSettings(eps=eps, step=step, **reading)
    size, velocity = temporal_step(gradient, torch.tensor([before]), settings)
    assert velocity.isfinite().all()
    assert (size > 0).all()
    assert (size <= torch.tensor(step * eps)).all()


@many
@given(
    seed=st.integers(0, 999), eps=st.floats(0, 3), reach=st.floats(0, 5),
    norm=st.sampled_from(ball.NORMS),
)  # fmt: skip
def test_projection_lies_in_the_ball_and_moves_nothing_that_does(
    seed: int, eps: float, reach: float, norm: str
) -> None:
    clip = random_clip(2, seed % 7, SMALL).double()
    own = torch.Generator().manual_seed(seed)
    moved = clip + reach * torch.randn(clip.shape, generator=own, dtype=clip.dtype)
    at = ball.project(clip, moved, eps, norm)
    assert (ball.size(at - clip, norm) <= eps * (1 + 1e-9) + 1e-12).all()
    assert float(at.min()) >= 0
    assert float(at.max()) <= 1
    torch.testing.assert_close(ball.project(clip, at, eps, norm), at, rtol=0, atol=1e-12)
    inside = ball.size(moved.clamp(0, 1) - clip, norm) <= eps
    torch.testing.assert_close(
        ball.project(clip, moved.clamp(0, 1), eps, norm)[inside], moved.clamp(0, 1)[inside]
    )
    if norm == "linf":  # of a box, the nearest point is the nearest value by value
        by_hand = torch.minimum(torch.maximum(moved, clip - eps), clip + eps).clamp(0, 1)
        assert torch.equal(at, by_hand)


@many
@given(seed=st.integers(0, 999), eps=st.floats(0, 4), level=st.floats(0.1, 6))
def test_rounding_stays_in_the_l2_ball(seed: int, eps: float, level: float) -> None:
    """Also of clips whose values all lie a hair below a grey level, and of those on the grid."""
    clip = random_clip(2, seed % 7, SMALL)
    own = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, clip.shape, generator=own) * 2 - 1
    for near in (level, round(level + 0.5) - 5e-5, float(round(level + 0.5))):
        moved = ball.project(clip, clip + sign * near / 255, eps, "l2")
        tight = float(ball.size(moved - clip, "l2").max())
        at = grid.rounded(moved, clip, tight, "l2")
        assert (ball.size((at - clip).double(), "l2") <= tight * (1 + 2e-6) + 1e-7).all()
        assert ((at - clip).abs() <= (moved - clip).abs() + 1e-6).all()
        assert torch.equal(grid.rounded(at, clip, tight, "l2"), at)


@pytest.mark.parametrize("norm", ball.NORMS)
def test_nothing_is_kept_from_step_to_step(norm: str) -> None:
    """At each step, of the clips that were attacked so far at most a few are still there."""
    twin, clip = small(), random_clip(2, spec=SMALL)
    label = twin(clip).logits.argmax(dim=1)
    alive: list[weakref.ref[Tensor]] = []
    most: list[int] = []

    def note(_module: object, inputs: tuple[Tensor], out: Tensor) -> None:
        alive.extend([weakref.ref(inputs[0]), weakref.ref(out)])
        most.append(sum(ref() is not None for ref in alive))

    assert twin.router is not None
    twin.router.register_forward_hook(note)
    gc.disable()
    try:
        how = {"eps": 4 / 255, "early_stop": False, "norm": norm, "lam": 1e-3, "gamma2": 0.1}
        j_tlga.attack(twin, clip, label, j_tlga.Settings(steps=30, **how))
    finally:
        gc.enable()
    assert len(most) == 32  # of the clean clip, of every step, of the last clip
    assert max(most[20:]) <= max(most[2:8])

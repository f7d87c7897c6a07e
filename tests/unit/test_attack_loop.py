"""The attacks' loop and losses against closed forms, and exact relations among the attacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.twins import SMALL, linear, random_clip, random_clips, small
from vmoe.attacks import ball, losses
from vmoe.attacks.ball import uniform
from vmoe.attacks.climbs import temporal_step
from vmoe.attacks.judge import of_twin
from vmoe.attacks.loop import TemporalSettings
from vmoe.attacks.methods import (
    apgd_margin,
    apgd_t,
    fab,
    j_tla,
    j_tlga,
    j_tlga_plus,
    pgd,
    pgd_r,
    tla_e,
    tla_m,
    tla_r,
    tlga_r,
)  # fmt: skip
from vmoe.errors import SettingError
from vmoe.lipschitz import l_lip
from vmoe.models import ROUTE_GRADS, VideoMoE


def test_terms_change_what_is_found() -> None:
    twin, clip, y = small(), random_clip(4, spec=SMALL), torch.tensor([0, 1, 2, 3])
    model = found(tla_m, twin, clip, y)
    for changed in (
        found(tla_m, twin, clip, y, lam=1.0), found(tla_m, twin, clip, y, temporal="off"),
        found(tla_m, twin, clip, y, temporal="frames"), found(j_tla, twin, clip, y, gamma2=1.0),
        found(j_tlga, twin, clip, y, gamma2=1.0), found(tla_m, twin, clip, y, route_grad="frozen"),
    ):  # fmt: skip
        assert not torch.equal(changed, model)
    assert not torch.equal(found(tlga_r, twin, clip, y), found(tla_r, twin, clip, y))


def found(method: ModuleType, twin: VideoMoE, clip: Tensor, y: Tensor, **values: Any) -> Tensor:
    how = {"eps": 4 / 255, "steps": 4, "early_stop": False} | values
    adversarial: Tensor = method.attack(twin, clip, y, method.Settings(**how)).adversarial
    return adversarial


@pytest.mark.parametrize("norm", ball.NORMS)
@pytest.mark.parametrize("method", [pgd, tla_m, apgd_margin, fab, j_tlga_plus])
def test_steps_in_place_leave_the_clips_and_where_they_begin(method: Any, norm: str) -> None:
    twin, clip, y = small(), random_clip(3, spec=SMALL), torch.tensor([0, 1, 2])
    given = (clip + 0.1).clamp_(max=1)  # farther than eps
    held = clip.clone(), given.clone()
    twin.begin = lambda order: given  # type: ignore[assignment]
    how = method.Settings(eps=8 / 255, steps=3, norm=norm, restarts=2, early_stop=False)
    adversarial = method.attack(twin, clip, y, how).adversarial
    assert torch.equal(clip, held[0])
    assert torch.equal(given, held[1])
    assert not any(adversarial.data_ptr() == own.data_ptr() for own in (clip, given))


def test_soft_is_judged_with_the_hard_choice() -> None:
    twin, clip = small(), random_clip(16, spec=SMALL)
    out, hard = losses.answer(twin, clip, "soft")
    with torch.no_grad():
        soft, frozen = twin(clip, "soft"), twin(clip, "frozen")
    torch.testing.assert_close(out.logits, soft.logits)
    torch.testing.assert_close(hard, frozen.logits)
    assert torch.equal(out.route, frozen.route)
    y = frozen.logits.argmax(dim=1)
    assert (soft.logits.argmax(dim=1) != y).any()  # the mixture does say other labels
    how = pgd.Settings(eps=0.0, steps=1, route_grad="soft")
    assert not pgd.attack(twin, clip, y, how).success.any()


def test_frozen_gradient_is_the_derivative_of_the_hard_function() -> None:
    twin, clip = small().double(), random_clip(3, spec=SMALL).double()
    y = torch.tensor([0, 1, 2])
    generator = torch.Generator().manual_seed(0)
    toward = torch.randn(clip.shape, generator=generator, dtype=torch.float64)

    def slope(route_grad: str) -> Tensor:
        x = clip.clone().requires_grad_()
        losses.ce(twin(x, route_grad).logits, y).sum().backward()
        assert x.grad is not None
        return (x.grad * toward).sum(dim=(1, 2, 3, 4))

    def value(x: Tensor) -> Tensor:
        with torch.no_grad():
            return losses.ce(twin(x, "frozen").logits, y)

    h = 1e-7
    numeric = (value(clip + h * toward) - value(clip - h * toward)) / (2 * h)
    torch.testing.assert_close(slope("frozen"), numeric, rtol=1e-4, atol=1e-6)
    assert ((slope("straight-through") - numeric).abs() > 1e-3).any()


def test_lipschitz_term_of_identity_is_one_and_of_a_constant_none() -> None:
    clip = random_clip(3, spec=SMALL)
    moved = clip + 0.1 * torch.rand(clip.shape, generator=torch.Generator().manual_seed(0))
    assert l_lip(clip, moved, clip, moved).tolist() == pytest.approx([1, 1, 1])
    constant = torch.ones(3, 4)
    assert l_lip(constant, constant, clip, moved).tolist() == [0, 0, 0]
    assert l_lip(clip, clip, clip, clip).tolist() == [0, 0, 0]  # and 0/0 is no NaN
    assert l_lip(3 * clip, 3 * moved, clip, moved).tolist() == pytest.approx([9, 9, 9])


def test_lipschitz_quotient_is_the_form_that_shrinking_maximises() -> None:
    clip = random_clip(1, spec=SMALL).double()
    delta = torch.full_like(clip, 0.1).requires_grad_()
    root = delta.abs().sqrt()  # grows slower than the perturbation
    l_lip(torch.zeros_like(clip), root, clip, clip + delta, quotient=True).sum().backward()
    assert delta.grad is not None
    assert (delta.grad < 0).all()
    delta.grad = None
    root = delta.abs().sqrt()
    l_lip(torch.zeros_like(clip), root, clip, clip + delta).sum().backward()
    assert (delta.grad > 0).all()


def gradient_of_norms(norms: list[list[float]]) -> Tensor:
    """Return a gradient [B, 1, T, 2, 2] whose frames have these norms."""
    return torch.tensor(norms)[:, None, :, None, None].expand(-1, 1, -1, 2, 2) / 2


def test_temporal_step_worked_by_hand() -> None:
    """Eps 0.1, step 0.5, beta 0.5. Over iterations: V = 0.5 * (4, 0) + (2, 9) = (4, 9)."""
    gradient, before = gradient_of_norms([[2.0, 9.0]]), torch.tensor([[4.0, 0.0]])
    how = TemporalSettings(eps=0.1, step=0.5, beta=0.5, temporal="iterations")
    size, velocity = temporal_step(gradient, before, how)
    assert velocity.tolist() == [[4.0, 9.0]]
    by_hand = [0.05 / (1 + math.log(1 + 2)), 0.05 / (1 + math.log(1 + 3))]
    assert size[0].tolist() == pytest.approx(by_hand)


def test_temporal_step_along_frames_worked_by_hand() -> None:
    """V_0 = 4; V_1 = 0.5 * 4 + 7 = 9; V_2 = 0.5 * 9 + 11.5 = 16; what was before is forgotten."""
    gradient, before = gradient_of_norms([[4.0, 7.0, 11.5]]), torch.full((1, 3), 99.0)
    how = TemporalSettings(eps=0.1, step=0.5, beta=0.5, temporal="frames")
    size, velocity = temporal_step(gradient, before, how)
    assert velocity[0].tolist() == pytest.approx([4, 9, 16])
    assert size[0].tolist() == pytest.approx([0.05 / (1 + math.log(1 + r)) for r in (2, 3, 4)])


def test_one_step_by_hand() -> None:
    """From the clip itself, one step of TLA-M moves frame f by a_f sign(grad)."""
    twin, clip = linear(experts=1, spec=SMALL), 0.5 * torch.ones(1, 3, 3, 9, 11)
    y = twin(clip).logits.argmax(dim=1)
    x = clip.clone().requires_grad_()
    losses.ce(twin(x).logits, y).sum().backward()
    assert x.grad is not None
    norms = x.grad.square().sum(dim=(1, 3, 4)).sqrt()
    size = 0.5 * 0.1 / (1 + (1 + norms.sqrt()).log())
    by_hand = clip + size[:, None, :, None, None] * x.grad.sign()
    how = {"eps": 0.1, "step": 0.5, "steps": 1, "random_start": False}
    torch.testing.assert_close(found(tla_m, twin, clip, y, **how), by_hand)


def test_noise_is_of_seed_index_and_restart() -> None:
    clip = random_clip(3, spec=SMALL)
    both = uniform(clip, 0, torch.tensor([4, 2, 4]), 0)
    assert torch.equal(both[0], both[2])
    assert not torch.equal(both[0], both[1])
    assert torch.equal(uniform(clip[:1], 0, torch.tensor([2]), 0)[0], both[1])
    assert not torch.equal(uniform(clip[:1], 0, torch.tensor([2]), 1)[0], both[1])
    assert not torch.equal(uniform(clip[:1], 1, torch.tensor([2]), 0)[0], both[1])
    assert float(both.min()) >= -1
    assert float(both.max()) <= 1
    assert abs(float(both.mean())) < 0.02


@pytest.mark.parametrize("method", [pgd_r, tla_r, tlga_r])
def test_router_of_a_dense_model_cannot_be_attacked(method: ModuleType) -> None:
    twin = small(experts=1)
    with pytest.raises(SettingError, match="dense"):
        found(method, twin, random_clip(1, spec=SMALL), torch.tensor([0]))


def test_joint_attack_on_a_dense_model_is_tla_m() -> None:
    twin, clip, y = small(experts=1), random_clip(2, spec=SMALL), torch.tensor([0, 1])
    assert torch.equal(found(j_tlga, twin, clip, y), found(tla_m, twin, clip, y))


def test_expert_that_does_not_exist() -> None:
    with pytest.raises(SettingError, match="--expert is 4; this model has experts 0 to 3"):
        found(tla_e, small(), random_clip(1, spec=SMALL), torch.tensor([0]), expert=4)


def test_joint_attack_works_where_gradients_are_off() -> None:
    twin, clip, y = small(), random_clip(2, spec=SMALL), torch.tensor([0, 1])
    free = found(j_tlga, twin, clip, y)
    with torch.no_grad():
        assert torch.equal(found(j_tlga, twin, clip, y), free)
        assert not torch.is_grad_enabled()


def gradient_of(to: float) -> VideoMoE:
    """Return a dense twin whose loss is as it was, and whose gradient is `to` in clip 1."""
    twin = small(experts=1)

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, clip: Tensor) -> Tensor:
            return clip.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            grad = grad.clone()
            grad[-1] = to
            return grad

    def spoil(_module: Any, inputs: tuple[Tensor]) -> Tensor:
        moved: Tensor = Spoilt.apply(inputs[0])  # type: ignore[no-untyped-call]
        return moved

    twin.experts[0].register_forward_pre_hook(spoil)
    return twin


@pytest.mark.parametrize("to", [torch.nan, torch.inf, -torch.inf, 0.0])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_gradient_that_is_dead_is_counted_and_leads_nowhere_else(to: float, norm: str) -> None:
    twin, clip = gradient_of(to), random_clip(2, spec=SMALL)
    y = small(experts=1)(clip).logits.argmax(dim=1)
    how = pgd.Settings(steps=3, eps=1e-3, norm=norm, early_stop=False, random_start=False)
    result = pgd.attack(twin, clip, y, how)
    assert result.dead.tolist() == [0, 3]
    assert result.adversarial.isfinite().all()
    assert (ball.size(result.adversarial - clip, norm) <= 1e-3 + 1e-7).all()
    assert (result.adversarial[0] != clip[0]).any()
    if to == 0:
        assert torch.equal(result.adversarial[1], clip[1])


def test_loss_that_does_not_hang_on_the_clip_has_a_dead_gradient() -> None:
    twin, clip = small(experts=1), random_clip(2, spec=SMALL)
    y = twin(clip).logits.argmax(dim=1)
    for cut in (
        lambda out: out.detach(),
        lambda out: out.detach() * torch.ones(1).requires_grad_(),
    ):
        handle = twin.experts[0].register_forward_hook(lambda _m, _i, out, cut=cut: cut(out))
        result = pgd.attack(twin, clip, y, pgd.Settings(steps=2, early_stop=False))
        assert result.dead.tolist() == [2, 2]
        handle.remove()


@pytest.fixture(params=[False, True])
def tf32(request: pytest.FixtureRequest) -> Iterator[Callable[[], list[bool]]]:
    """Allow TF32 everywhere, or nowhere; return what says where it is allowed."""
    switches: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [each.allow_tf32 for each in switches]
    for each in switches:
        each.allow_tf32 = request.param
    yield lambda: [each.allow_tf32 for each in switches]
    for each, allowed in zip(switches, before, strict=True):
        each.allow_tf32 = allowed


def test_nothing_runs_in_tf32_and_the_switches_are_put_back(
    tf32: Callable[[], list[bool]],
) -> None:
    found, seen = tf32(), []
    twin, clip = small(), random_clip(2, spec=SMALL)
    assert twin.router is not None
    twin.router.register_forward_hook(lambda *_: seen.append(tf32()))
    pgd.attack(twin, clip, torch.tensor([0, 1]), pgd.Settings(steps=1, early_stop=False))
    of_twin(twin)(random_clips(2, spec=SMALL))
    assert seen == 4 * [[False, False]]  # clean, a slope, the last iterate; and the judge
    assert tf32() == found
    twin.router.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        of_twin(twin)(random_clips(2, spec=SMALL))
    assert tf32() == found


@pytest.mark.parametrize("worth", [math.nan, math.inf])
@pytest.mark.parametrize("method", [pgd, j_tlga, apgd_margin, apgd_t, fab, j_tlga_plus])
def test_an_expert_that_no_clip_reaches_may_answer_nothing(
    method: ModuleType, worth: float
) -> None:
    """What asks every expert has nothing to follow, and says so; the rest is as it was."""
    clip, y = random_clip(4, spec=SMALL), torch.tensor([0, 1, 2, 3])
    for way in ROUTE_GRADS:
        twin = small()
        assert twin.router is not None
        with torch.no_grad():
            twin.router[-1].bias[3] = -1e3  # type: ignore[index, union-attr, operator]
        how = method.Settings(
            eps=4 / 255, steps=3, early_stop=False, route_grad=way,
            **({"router_steps": 0} if method is j_tlga_plus else {}),
        )  # fmt: skip
        sound = method.attack(twin, clip, y, how)
        with torch.no_grad():
            twin.experts[3][-1].bias.fill_(worth)  # type: ignore[index, union-attr, operator]
        spoilt = method.attack(twin, clip, y, how)
        if way in ("all", "soft"):
            assert torch.equal(spoilt.dead, spoilt.backwards)
            assert torch.equal(spoilt.success, twin(spoilt.adversarial).logits.argmax(dim=1) != y)
        else:
            assert torch.equal(spoilt.adversarial, sound.adversarial)
            assert not spoilt.dead.any()

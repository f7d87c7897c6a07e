"""j-tlga-plus: APGD-margin where nothing can be misrouted; where something can, it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.twins import SMALL, linear, random_clip, small
from vmoe.attacks.methods import apgd_margin, j_tlga_plus
from vmoe.models import VideoMoE

EPS = 8 / 255


class Known(nn.Module):
    """A part that says, to each clip, how bright its frames are, and 0."""

    def __init__(self, at: float, first: float = 0.0, second: float = 0.0) -> None:
        """Take the weights of the first two frames, and what they say of grey 0.5."""
        super().__init__()
        self.at, self.weights = at, torch.tensor([first, second])

    def forward(self, clip: Tensor) -> Tensor:
        """Answer [B, 2]."""
        level = clip[:, :, :2].mean(dim=(1, 3, 4)) - 0.5
        moving = self.at + level @ self.weights
        return torch.stack([moving, torch.zeros_like(moving)], dim=1)


def known(reach: float, need: float, pull: float = 0.0) -> tuple[VideoMoE, Tensor, Tensor]:
    """Return a twin of two experts, a grey clip, and its label, 0.

    Expert 0 is never wrong. The router goes to expert 1 where frame 0 is darker by `reach`; expert
    1 is wrong where frame 1 is darker by `need`, and by `pull` times what frame 0 is.
    """
    twin = linear(2, spec=SMALL)
    twin.router = Known(10 * reach, first=10.0)
    twin.experts = nn.ModuleList([Known(1.0), Known(10 * need, first=-10 * pull, second=10.0)])
    clip = torch.full((2, 3, SMALL.frames, SMALL.height, SMALL.width), 0.5)
    return twin.eval(), clip, torch.zeros(2, dtype=torch.int64)


def settings(**values: object) -> j_tlga_plus.Settings:
    return j_tlga_plus.Settings(**{"eps": EPS, "steps": 8, **values})  # type: ignore[arg-type]


def last_linear(part: nn.Module) -> nn.Linear:
    return [module for module in part.modules() if isinstance(module, nn.Linear)][-1]


@pytest.mark.parametrize("experts", [1, 4])
def test_clip_that_cannot_be_misrouted_gets_apgd_margin(experts: int) -> None:
    twin, clip = small(experts), random_clip(5, spec=SMALL)
    if twin.router is not None:
        with torch.no_grad():
            last_linear(twin.router).bias[0] += 100
    with torch.no_grad():
        y = twin(clip).logits.argmax(dim=1)
    how = {"eps": 2 / 255, "steps": 6, "early_stop": False}
    plain = apgd_margin.attack(twin, clip, y, apgd_margin.Settings(**how))
    found = j_tlga_plus.attack(twin, clip, y, j_tlga_plus.Settings(**how))
    assert torch.equal(found.adversarial, plain.adversarial)
    assert torch.equal(found.loss, plain.loss)


def test_expert_that_fails_is_reached_though_it_has_the_lower_score() -> None:
    twin, clip, y = known(reach=0.5 * EPS, need=-0.1)  # wrong wherever it is chosen
    found = j_tlga_plus.attack(twin, clip, y, settings())
    assert found.success.all()
    assert (found.route_after == 1).all()
    unguided = apgd_margin.Settings(eps=EPS, steps=8, route_grad="frozen")
    assert not apgd_margin.attack(twin, clip, y, unguided).success.any()


class Three(nn.Module):
    """A router whose expert 0 leads; frame 0 darker leads to both others, of which 2 has less."""

    def forward(self, clip: Tensor) -> Tensor:
        """Answer [B, 3]."""
        dark = 0.5 - clip[:, :, 0].mean(dim=(1, 2, 3))
        light = clip[:, :, 2].mean(dim=(1, 2, 3)) - 0.5
        zero = torch.zeros_like(dark)
        return torch.stack([zero, dark - 0.4 * EPS, light - 0.5 * EPS], dim=1)


@pytest.mark.parametrize(("toward", "reached"), [("failing", 1), ("weakest", 2)])
def test_it_is_guided_to_what_is_nearest_to_failing_or_of_lowest_score(
    toward: str, reached: int
) -> None:
    twin = linear(3, spec=SMALL)
    twin.router = Three()
    # 1 is wrong where frame 1 is darker by half of eps; 2, of the lower score, never is
    twin.experts = nn.ModuleList([Known(1.0), Known(5 * EPS, second=10.0), Known(1.0)])
    twin.eval()
    clip = torch.full((2, 3, SMALL.frames, SMALL.height, SMALL.width), 0.5)
    y = torch.zeros(2, dtype=torch.int64)
    how = settings(toward=toward, route_grad="frozen")
    found = j_tlga_plus.attack(twin, clip, y, how)
    assert found.success.all() == (toward == "failing")
    ran = [0, 0, 0]

    def count(which: int) -> None:
        def backward(_module: nn.Module, _inputs: object, grads: tuple[Tensor, ...]) -> None:
            ran[which] += len(grads[0])

        twin.experts[which].register_full_backward_hook(backward)

    for which in range(3):
        count(which)
    j_tlga_plus.attack(twin, clip, y, how)
    assert ran[reached] >= 2
    assert ran[3 - reached] == 0


def test_route_is_held_while_its_expert_is_attacked() -> None:
    twin, clip, y = known(reach=0.5 * EPS, need=0.05 * EPS, pull=1.0)
    how = {"steps": 40, "route_grad": "frozen"}  # by which the margin alone leads nowhere
    found = j_tlga_plus.attack(twin, clip, y, settings(**how))
    assert found.success.all()
    assert (found.route_after == 1).all()
    loose = j_tlga_plus.attack(twin, clip, y, settings(**how, hold=0.0))
    assert not loose.success.any()  # the expert is wrong, but nobody asks it
    with torch.no_grad():
        assert torch.equal(twin(loose.adversarial).logits.argmax(dim=1), y)


def test_what_lies_beyond_the_ball_is_not_reached() -> None:
    for reach, need in ((1.5 * EPS, 0.5 * EPS), (0.5 * EPS, 1.5 * EPS)):
        twin, clip, y = known(reach, need)
        assert not j_tlga_plus.attack(twin, clip, y, settings()).success.any()


def test_steps_are_gradients_of_the_whole_model() -> None:
    twin, clip, y = known(reach=0.5 * EPS, need=1.5 * EPS)
    ran = [0, 0]

    def count(which: int) -> None:
        def backward(_module: nn.Module, _inputs: object, grads: tuple[Tensor, ...]) -> None:
            ran[which] += len(grads[0])

        twin.experts[which].register_full_backward_hook(backward)

    for which in (0, 1):
        count(which)
    found = j_tlga_plus.attack(twin, clip, y, settings(steps=9, router_steps=3))
    assert sum(ran) == 9 * len(clip)
    assert ran[1] >= 4 * len(clip)  # those that are guided
    assert (found.backwards == 9 + 3).all()

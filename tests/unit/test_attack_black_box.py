"""Attacks that ask for no gradient: Square, NES, SPSA and noise, against closed forms."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.twins import SMALL, linear, random_clip, small
from vmoe.attacks import ball, losses
from vmoe.attacks.estimate import Draw, EstimateSettings, Estimator
from vmoe.attacks.loop import Aim, Judged, Search
from vmoe.attacks.methods import nes, noise, spsa, square
from vmoe.errors import SettingError
from vmoe.models import VideoMoE

BLIND = [square, nes, spsa, noise]
EPS = 4 / 255


def noisy(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return clips of noise on the uint8 grid."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=generator) / 255


def few() -> tuple[VideoMoE, Tensor, Tensor, Tensor]:
    """Return a linear dense twin of 2 labels, small clips, their labels, and the way out of them.

    The clips' pixels are far from 0 and 1.
    """
    twin, shape = linear(1), (3, 2, 3, 4)
    head = nn.Linear(72, 2, bias=False)
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(0))
    twin.experts = nn.ModuleList([nn.Sequential(nn.Flatten(), head)])
    clip = 0.25 + 0.5 * noisy((3, *shape))
    with torch.no_grad():
        y = twin(clip).logits.argmax(dim=1)
        w = head.weight.detach().view(2, *shape)
    return twin, clip, y, w[1 - y] - w[y]


class _NoBackward(torch.autograd.Function):
    """The identity; its derivative cannot be asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        raise AssertionError("a gradient was asked for")


class Opaque(nn.Module):
    """A part whose answers can be read, and whose backward pass raises."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, clip: Tensor) -> Tensor:
        found: Tensor = _NoBackward.apply(self.part(clip))
        return found


@pytest.mark.parametrize("norm", ball.NORMS)
@pytest.mark.parametrize("method", BLIND)
def test_model_whose_backward_raises_is_attacked(method: ModuleType, norm: str) -> None:
    twin, clip = small(), random_clip(4, spec=SMALL)
    with torch.no_grad():
        y = twin(clip).logits.argmax(dim=1)
    assert twin.router is not None
    twin.router = Opaque(twin.router)
    twin.experts = nn.ModuleList(map(Opaque, twin.experts))
    with pytest.raises(AssertionError, match="a gradient was asked for"):
        twin(clip.clone().requires_grad_()).logits.sum().backward()
    cost = {} if method is noise else {"queries": 120}
    how = method.Settings(eps=0.08 if norm == "linf" else 2.0, norm=norm, **cost)
    found = method.attack(twin, clip, y, how)
    assert found.success.any()
    assert not found.backwards.any()


@pytest.mark.parametrize("method", BLIND)
@pytest.mark.parametrize("norm", ball.NORMS)
@settings(max_examples=8, deadline=None)
@given(
    frames=st.integers(1, 4), height=st.integers(1, 9), width=st.integers(1, 9),
    experts=st.sampled_from([1, 2, 8]), grid=st.booleans(),
)  # fmt: skip
def test_any_shape(
    method: ModuleType, norm: str, frames: int, height: int, width: int, experts: int, grid: bool
) -> None:
    twin, clip = small(experts, 2), noisy((2, 3, frames, height, width))
    with torch.no_grad():
        y = twin(clip).logits.argmax(dim=1)
    cost = {"restarts": 2} if method is noise else {"queries": 30}
    cost |= {"pairs": 3} if method in (nes, spsa) else {}
    how = method.Settings(eps=EPS, norm=norm, grid=grid, early_stop=False, **cost)
    found = method.attack(twin, clip, y, how)
    x = found.adversarial
    assert (ball.size((x - clip).double(), norm) <= EPS + 1e-6).all()
    assert x.min() >= 0
    assert x.max() <= 1
    with torch.no_grad():
        assert torch.equal(found.success, twin(x).logits.argmax(dim=1) != y)


def test_square_finds_the_corner_of_a_linear_loss() -> None:
    twin, *case = few()
    clip, y, toward = (each[:1] for each in case)
    how = square.Settings(eps=EPS, queries=2000, early_stop=False)
    found = square.attack(twin, clip, y, how)
    torch.testing.assert_close(found.adversarial, clip + EPS * toward.sign())


def test_square_climbs_a_linear_loss_in_l2() -> None:
    twin, clip, y, toward = few()
    best = 0.5 * ball.size(toward, "l2")
    gains = []
    for queries in (1, 30, 300):
        how = square.Settings(eps=0.5, norm="l2", queries=queries, early_stop=False)
        delta = square.attack(twin, clip, y, how).adversarial - clip
        torch.testing.assert_close(ball.size(delta, "l2"), torch.full((3,), 0.5))
        gains.append((delta * toward).flatten(1).sum(dim=1) / best)
    assert (gains[0] < gains[1]).all()
    assert (gains[1] < gains[2]).all()
    assert (gains[2] > 0.35).all()  # bumps do not make every shape


def test_cuboids_shrink_as_the_paper_says() -> None:
    plain = square.Settings(queries=10000, p_init=0.8)
    by_hand = {0: 1, 10: 1, 11: 2, 51: 4, 201: 8, 501: 16, 1001: 32, 2001: 64, 4001: 128,
               6001: 256, 8001: 512, 9999: 512}  # fmt: skip
    for query, halved in by_hand.items():
        assert square.share(query, plain) == 0.8 / halved
    stretched = square.Settings(queries=1000)
    assert square.share(6, stretched) == square.share(60, plain)
    slow = square.Settings(queries=1000, rescale=False)
    assert square.share(60, slow) == square.share(60, plain)


@given(
    p=st.floats(1e-4, 1), frames=st.integers(1, 16), height=st.integers(1, 64),
    width=st.integers(1, 64),
)  # fmt: skip
def test_cuboid_has_its_share_of_the_clip(p: float, frames: int, height: int, width: int) -> None:
    t, h, w = square.cuboid(p, frames, height, width)
    assert 1 <= t <= frames
    assert 1 <= h <= height
    assert 1 <= w <= width
    if frames == 1 and height == width:  # as the image attack has it
        assert h == w == max(round(math.sqrt(p * height * width)), 1)
    wanted = p * frames * height * width
    if min(t, h, w) > 1:  # each side is rounded by less than a half
        assert (t - 0.51) * (h - 0.51) * (w - 0.51) <= wanted * 1.01
        assert (t + 0.51) * (h + 0.51) * (w + 0.51) >= wanted * 0.99


def test_cuboid_of_everything_is_the_clip() -> None:
    for shape in ((1, 8, 8), (4, 8, 8), (3, 7, 12), (3, 12, 7)):
        assert square.cuboid(1.0, *shape) == shape


def test_square_begins_with_stripes_and_paints_cuboids() -> None:
    clean, own = torch.zeros(3, 4, 6, 14), torch.Generator().manual_seed(0)
    first = square.stripes(clean, own)
    assert set(first.unique().tolist()) == {-1, 1}
    assert torch.equal(first, first[:, :1, :1].expand_as(first))
    assert 0.3 < float((first > 0).float().mean()) < 0.7
    seen = torch.zeros(4, 6, 14, dtype=torch.bool)
    for _ in range(600):
        delta = torch.zeros_like(clean)
        square.paint(delta, (2, 3, 5), 0.1, own)
        where = delta[0].nonzero()
        low, high = where.amin(dim=0).tolist(), (where.amax(dim=0) + 1).tolist()
        (t, h, w), (a, b, c) = low, high
        assert (a - t, b - h, c - w) == (2, 3, 5)
        assert len(where) == 30
        seen |= delta[0] != 0
    painted = delta[:, t:a, h:b, w:c].flatten(1)
    assert (painted == painted[:, :1]).all()
    torch.testing.assert_close(painted.abs(), torch.full_like(painted, 0.1))
    assert seen.all()  # the corners, too


def nested(height: int, width: int) -> Tensor:
    """Return the paper's eta of one half: sum_k 1 / (k + 1)^2 over nested boxes."""
    bump = torch.zeros(height, width)
    for k in range(max(height, width) // 2 + 1):
        top, left = height // 2, width // 2
        bump[max(top - k, 0) : top + k + 1, max(left - k, 0) : left + k + 1] += 1 / (k + 1) ** 2
    return bump / bump.norm()


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8, 13])
def test_window_of_one_frame_is_the_image_attack_s(side: int) -> None:
    own, like = torch.Generator().manual_seed(0), torch.zeros(3, 1, side, side)
    halves = [nested(n, side) for n in (side // 2, side - side // 2) if n]
    up = torch.cat([halves[0], -halves[1]] if side > 1 else [-halves[0]])
    up = up / up.norm()
    seen = set()
    for _ in range(20):
        window = square._bump((1, side, side), own, like)
        for channel in window[:, 0]:
            forms = {"down": up, "up": -up, "right": up.T, "left": -up.T}
            near = [name for name, form in forms.items() if torch.allclose(channel, form)]
            assert near
            seen.add(near[0])
    assert seen == ({"down", "up"} if side == 1 else {"down", "up", "right", "left"})


def test_exchange_moves_the_length_of_one_window_to_another() -> None:
    own = torch.Generator().manual_seed(0)
    moved = 0
    for _ in range(30):
        before = 0.1 * torch.randn(3, 4, 9, 9, generator=own, dtype=torch.float64)
        size = float(before.norm())
        after = before.clone()
        square.exchange(after, (2, 3, 3), size + 0.2, own)
        changed = (after != before).any(dim=0)
        assert int(changed.sum()) <= 2 * 2 * 3 * 3
        unused = ((size + 0.2) ** 2 - size**2) / 3
        lengths = after.square().sum(dim=(1, 2, 3)) - before.square().sum(dim=(1, 2, 3))
        assert lengths.tolist() == pytest.approx([unused] * 3)
        moved += bool((after[:, changed] == 0).any())
    assert moved > 20  # the other window is empty, where they do not lie on each other


@pytest.mark.parametrize("draw", [nes.gaussian, spsa.signs])
def test_estimate_of_a_linear_gradient_is_unbiased(draw: Draw) -> None:
    clip = 0.5 * torch.ones(30, 3, 1, 2, 2, dtype=torch.float64)
    w = torch.randn(clip[:1].shape, generator=torch.Generator().manual_seed(1)).double()

    def objective(x: Tensor, rows: Tensor) -> Judged:
        loss = (x * w).flatten(1).sum(dim=1)
        return Judged(loss, loss > torch.inf, torch.zeros_like(rows))

    none = torch.zeros(30, dtype=torch.bool)
    aim = Aim((objective,), none.long(), None, none)
    how = EstimateSettings(pairs=100)
    found = Estimator(Search(clip, how, aim, torch.arange(30)), draw).slope(clip)
    # n pairs are off by |w| sqrt((d + 1) / n), d = 12: each by a third, all together by 7 %
    each, mean = ball.size(found - w, "l2"), ball.size(found.mean(dim=0, keepdim=True) - w, "l2")
    assert 0.25 < float(each.mean() / ball.size(w, "l2")) < 0.5
    assert float(mean / ball.size(w, "l2")) < 0.1


@pytest.mark.parametrize("method", [nes, spsa])
@pytest.mark.parametrize(("norm", "eps"), [("linf", EPS), ("l2", 0.3)])
def test_estimates_climb_a_linear_loss(method: ModuleType, norm: str, eps: float) -> None:
    twin, clip, y, toward = few()
    how = method.Settings(eps=eps, norm=norm, queries=1000, early_stop=False)
    delta = method.attack(twin, clip, y, how).adversarial - clip
    best = eps * (toward.abs().flatten(1).sum(1) if norm == "linf" else ball.size(toward, "l2"))
    assert ((delta * toward).flatten(1).sum(dim=1) > 0.75 * best).all()


def test_estimates_refuse_a_budget_that_pays_for_no_step() -> None:
    with pytest.raises(SettingError, match=r"--queries is 51; a step of 25 pairs takes 52\."):
        nes.Settings(queries=51)
    assert nes.Settings(queries=52).rounds == 1
    assert spsa.Settings(queries=5000, pairs=25).rounds == 98


@pytest.mark.parametrize("norm", ball.NORMS)
def test_noise_is_the_best_of_its_draws(norm: str) -> None:
    twin, clip, indices = small(), random_clip(3, spec=SMALL), torch.tensor([4, 0, 9])
    with torch.no_grad():
        y = twin(clip).logits.argmax(dim=1)
        draws = [ball.start(clip, 0.1, norm, 0, indices, number) for number in range(6)]
        margins = torch.stack([losses.margin(twin(x).logits, y) for x in draws])
    how = noise.Settings(eps=0.1, norm=norm, restarts=6, early_stop=False)
    found = noise.attack(twin, clip, y, how, indices)
    best = margins.argmax(dim=0)
    wanted = torch.stack([draws[int(number)][row] for row, number in enumerate(best)])
    torch.testing.assert_close(found.loss, margins.amax(dim=0))
    assert torch.equal(found.adversarial, wanted)

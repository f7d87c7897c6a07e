"""The twin: families against plain references, routing, grouping, gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tests.twins import lived
from vmoe import registry
from vmoe.clips import ClipSpec
from vmoe.errors import SettingError, UnknownNameError
from vmoe.models import ROUTE_GRADS, ModelSettings, VideoMoE, build, dense_counterpart
from vmoe.models.experts._channels import channels
from vmoe.models.moe import FAMILIES, expert_shares

SPEC = ClipSpec(frames=4, height=32, width=32)
FAMILY_NAMES = registry.names(FAMILIES)


def small(arch: str = "tsm", experts: int = 3, classes: int = 5, seed: int = 0) -> VideoMoE:
    return build(ModelSettings(arch, 0.125, experts, classes), SPEC, seed).eval()


def clips(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 4, 32, 32, generator=torch.Generator().manual_seed(seed))


class FixedRouter(torch.nn.Module):
    """Scores that a test chooses; with a parameter, so that gradients can be seen."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = torch.nn.Parameter(scores)

    def forward(self, clip: Tensor) -> Tensor:
        return self.scores[: len(clip)]


def routed(twin: VideoMoE, route: list[int]) -> VideoMoE:
    """Make a twin route as a test says."""
    scores = F.one_hot(torch.tensor(route), len(twin.experts)).float()
    twin.router = FixedRouter(scores)
    return twin


@contextmanager
def calls(twin: VideoMoE) -> Iterator[list[tuple[int, Tensor]]]:
    """Collect what reaches each expert, by a forward hook."""
    seen: list[tuple[int, Tensor]] = []

    def note(i: int) -> Any:
        return lambda _module, args, _out: seen.append((i, args[0].detach()))

    handles = [e.register_forward_hook(note(i)) for i, e in enumerate(twin.experts)]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("arch", FAMILY_NAMES)
@pytest.mark.parametrize("shape", [(4, 32, 32), (5, 24, 40), (8, 17, 33)])
def test_every_family_takes_any_size(arch: str, shape: tuple[int, int, int]) -> None:
    twin = small(arch)
    with torch.no_grad():
        out = twin(torch.rand(2, 3, *shape))
    assert out.logits.shape == (2, 5)
    assert out.scores.shape == (2, 3)
    assert out.route.shape == (2,)
    assert out.route.dtype == torch.int64


@pytest.mark.parametrize("arch", FAMILY_NAMES)
def test_a_gradient_reaches_every_parameter(arch: str) -> None:
    twin = small(arch).train()
    clip = clips(3).requires_grad_()
    weights = torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    (twin(clip, "soft").logits * weights).sum().backward()
    without = [n for n, p in twin.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    assert clip.grad is not None
    assert clip.grad.any()


@pytest.mark.parametrize("arch", FAMILY_NAMES)
def test_weights_come_from_the_seed_alone(arch: str) -> None:
    torch.manual_seed(5)
    one, other = small(arch).state_dict(), small(arch, seed=1).state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    again = small(arch).state_dict()
    assert all(torch.equal(again[name], value) for name, value in one.items())
    assert not torch.equal(one["experts.0.1.fc.weight"], other["experts.0.1.fc.weight"])
    assert not torch.equal(one["experts.0.1.fc.weight"], one["experts.1.1.fc.weight"])


@pytest.mark.parametrize(
    ("full", "width", "wanted"),
    [(64, 1, 64), (64, 0.5, 32), (64, 0.125, 8), (64, 0.25, 16), (512, 0.3, 160), (64, 0.19, 16)],
)
def test_channels_are_multiples_of_16(full: int, width: float, wanted: int) -> None:
    assert channels(full, width) == wanted


def test_clips_are_normalised_inside() -> None:
    spec = ClipSpec(frames=4, height=32, width=32, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    twin = build(ModelSettings("tsm", 0.125, 2, 3), spec).eval()
    clip = clips(2)
    mean, std = torch.tensor(spec.mean).view(3, 1, 1, 1), torch.tensor(spec.std).view(3, 1, 1, 1)
    with torch.no_grad():
        inside = twin.experts[0][1]((clip - mean) / std)  # type: ignore[index]
        torch.testing.assert_close(twin.run_expert(0, clip), inside)
    assert not [name for name in twin.state_dict() if name.endswith((".mean", ".std"))]


def test_an_unknown_family_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"expert family \(--arch\) 'r3d': did you mean"):
        build(ModelSettings("r3d"), SPEC)


def test_a_batch_runs_each_expert_at_most_once_and_only_on_its_clips() -> None:
    twin, clip = routed(small(), [2, 0, 2, 0, 2]), clips(5)
    for route_grad in ("frozen", "straight-through"):
        with torch.no_grad(), calls(twin) as seen:
            out = twin(clip, route_grad)
        assert out.route.tolist() == [2, 0, 2, 0, 2]
        assert [i for i, _ in seen] == [0, 2]
        assert torch.equal(seen[0][1], clip[[1, 3]])
        assert torch.equal(seen[1][1], clip[[0, 2, 4]])


def test_a_batch_gives_what_its_clips_give_alone() -> None:
    twin, clip = small().double(), clips(6).double()
    with torch.no_grad():
        twin = routed(twin, [1, 0, 2, 2, 0, 1]).double()
        whole = twin(clip).logits
        route = twin(clip).route.tolist()
        alone = [twin.run_expert(i, clip[j : j + 1])[0] for j, i in enumerate(route)]
    torch.testing.assert_close(whole, torch.stack(alone), rtol=1e-12, atol=1e-12)


def test_one_clip_runs_one_expert() -> None:
    twin = small()
    with torch.no_grad(), calls(twin) as seen:
        out = twin(clips(1))
    assert [i for i, _ in seen] == [int(out.route)]


def test_ties_take_the_lowest_index() -> None:
    twin = small()
    twin.router = FixedRouter(torch.tensor([[1.0, 1, 1], [0, 2, 2], [-1, -1, -2]]))
    assert twin(clips(3)).route.tolist() == [0, 1, 0]


@pytest.mark.parametrize("route_grad", ["straight-through", "all"])
def test_surrogates_leave_the_value_to_the_last_bit(route_grad: str) -> None:
    twin, clip = small(), clips(5)
    with torch.no_grad():
        hard = twin(clip, "frozen")
        for scale in (1, 50):
            twin.router = FixedRouter(hard.scores.detach() * scale)
            out = twin(clip, route_grad)
            assert torch.equal(out.route, hard.route)
            if route_grad == "straight-through":
                assert torch.equal(out.logits, hard.logits)
            else:  # experts run on the whole batch: kernels may sum in another order
                every = twin.run_all(clip)
                assert torch.equal(out.logits, every[torch.arange(5), out.route])
                torch.testing.assert_close(out.logits, hard.logits, rtol=1e-4, atol=1e-5)


def test_soft_is_the_mixture() -> None:
    twin, clip = small(), clips(4)
    with torch.no_grad():
        out = twin(clip, "soft")
        p = out.scores.exp() / out.scores.exp().sum(dim=1, keepdim=True)
        mixed = sum(p[:, i, None] * twin.run_expert(i, clip) for i in range(3))
    torch.testing.assert_close(out.logits, mixed)


@pytest.mark.parametrize("route_grad", ROUTE_GRADS)
def test_which_gradient_the_router_gets(route_grad: str) -> None:
    """Of the logits by the scores: none, l_r p_r (1[j=r] - p_j), or p_j (l_j - sum_i p_i l_i)."""
    twin, clip = small(), clips(3)
    router = FixedRouter(torch.tensor([[0.1, 0.5, 0.2], [0.9, 0.3, 0.3], [0.0, 0.1, 0.4]]))
    twin.router = router
    out = twin(clip, route_grad)
    (found,) = torch.autograd.grad(out.logits.sum(), router.scores, allow_unused=True)
    if route_grad == "frozen":
        assert found is None
        return
    with torch.no_grad():
        sums = twin.run_all(clip).sum(dim=2)  # [B, M]
        p = out.scores.softmax(dim=1)
        if route_grad == "straight-through":
            row = torch.arange(3)
            own = F.one_hot(out.route, 3) - p
            wanted = (sums * p)[row, out.route][:, None] * own
        else:
            wanted = p * (sums - (p * sums).sum(dim=1, keepdim=True))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("route_grad", ["frozen", "straight-through"])
def test_only_the_routed_expert_gets_a_gradient(route_grad: str) -> None:
    twin = routed(small(), [1, 1])
    twin(clips(2), route_grad).logits.square().sum().backward()
    with_gradient = [any(p.grad is not None for p in e.parameters()) for e in twin.experts]
    assert with_gradient == [False, True, False]


def test_an_unknown_route_grad() -> None:
    with pytest.raises(UnknownNameError, match="'sofd': did you mean 'soft'"):
        small()(clips(1), "sofd")


def test_a_dense_model_has_no_router() -> None:
    twin = small(experts=1)
    assert twin.router is None
    with torch.no_grad():
        hard = twin(clips(2), "frozen")
        assert hard.scores.tolist() == [[0], [0]]
        assert hard.route.tolist() == [0, 0]
        for route_grad in ROUTE_GRADS:
            assert torch.equal(twin(clips(2), route_grad).logits, hard.logits)


def test_the_dense_counterpart_is_twice_as_wide() -> None:
    wide = dense_counterpart(ModelSettings("tsm", 0.25, 4, 7))
    assert wide == ModelSettings("tsm", 0.5, 1, 7)
    with pytest.raises(SettingError, match="dense already"):
        dense_counterpart(wide)


@pytest.mark.parametrize("arch", FAMILY_NAMES)
def test_an_expert_of_fewer_than_two_clips_uses_and_leaves_its_statistics(arch: str) -> None:
    twin = routed(small(arch), [1, 0, 1])
    lived(twin.experts)
    clip = clips(3)
    with torch.no_grad():
        still = twin(clip).logits
        twin.train()
        before = [{n: v.clone() for n, v in e.state_dict().items()} for e in twin.experts]
        out = twin(clip).logits
    assert all(module.training for module in twin.modules())
    torch.testing.assert_close(out[1], still[1])
    assert not torch.allclose(out[0], still[0])
    left = [
        all(torch.equal(v, before[i][n]) for n, v in e.state_dict().items())
        for i, e in enumerate(twin.experts)
    ]
    assert left == [True, False, True]


def test_a_router_of_fewer_than_two_clips_uses_and_leaves_its_statistics() -> None:
    twin, clip = small(), torch.rand(1, 3, 1, 16, 16)
    assert twin.router is not None
    lived(twin.router)
    with torch.no_grad():
        still = twin.scores(clip)
        twin.train()
        before = {n: v.clone() for n, v in twin.router.state_dict().items()}
        torch.testing.assert_close(twin.scores(clip), still)
    assert all(module.training for module in twin.modules())
    assert all(torch.equal(v, before[n]) for n, v in twin.router.state_dict().items())


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("route_grad", ROUTE_GRADS)
def test_no_clips_give_empty_answers(experts: int, route_grad: str) -> None:
    twin = small(experts=experts)
    for mode in (twin.eval(), twin.train()):
        out = mode(clips(0), route_grad)
        assert out.logits.shape == (0, 5)
        assert out.scores.shape == (0, experts)
        assert out.route.shape == (0,)
    assert twin.run_all(clips(0)).shape == (0, experts, 5)


@pytest.mark.parametrize("strange", [-1, 3])
def test_a_route_to_no_expert_is_refused(strange: int) -> None:
    wanted = f"expert {strange} does not exist: the twin has 0 to 2"
    with pytest.raises(SettingError, match=wanted):
        small().run_routed(clips(2), torch.tensor([0, strange]))


def test_a_width_that_no_machine_holds_is_refused() -> None:
    with pytest.raises(SettingError, match="--width is 100000; it must be at most 4"):
        ModelSettings(width=100000.0)
    assert dense_counterpart(ModelSettings(width=4.0)).width == 8
    with pytest.raises(SettingError, match="--width is 9; it must be at most 8"):
        ModelSettings(width=9.0, experts=1)


def test_modes_come_back_as_they_were_also_after_an_error() -> None:
    twin = routed(small(), [0]).train()
    frozen = twin.experts[0][1].bn1  # type: ignore[index]
    frozen.eval()
    twin(clips(1))
    with pytest.raises(RuntimeError):
        twin.run_expert(0, torch.rand(1, 4, 4, 32, 32))
    off = [module for module in twin.modules() if not module.training]
    assert off == [frozen]


def test_expert_shares() -> None:
    assert expert_shares([0, 2, 2, 2], 4) == [0.25, 0, 0.75, 0]
    assert expert_shares(torch.tensor([], dtype=torch.int64), 2) == [0, 0]

"""What every file of attacks/methods promises; a new file is tested with no edit here.

What an attack can do is read off its file (see `vmoe.attacks.methods`).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.twins import SMALL, linear, random_clip, small, weight
from vmoe import registry
from vmoe.attacks import ball
from vmoe.attacks.loop import AttackResult, BallSettings
from vmoe.batches import to_tensor
from vmoe.clips import ClipSpec
from vmoe.errors import SettingError, VmoeError
from vmoe.models import ROUTE_GRADS, VideoMoE

METHODS = "vmoe.attacks.methods"
EPS = 8 / 255
L2 = 0.5  # about 4 grey levels a pixel of SMALL
CHEAP = {"steps": 3, "queries": 12, "pairs": 2, "touched_frames": 1, "restarts": 1}


@pytest.fixture(params=registry.names(METHODS))
def method(request: pytest.FixtureRequest) -> ModuleType:
    return registry.load(METHODS, request.param, "attack")


@pytest.fixture(params=ball.NORMS)
def budget(request: pytest.FixtureRequest, method: ModuleType) -> dict[str, Any]:
    """Return the settings of a budget of each norm; skip a norm that the method refuses."""
    values = {"norm": request.param, "eps": EPS if request.param == "linf" else L2}
    try:
        settings(method, **values)
    except SettingError as e:
        assert "--norm" in str(e)  # noqa: PT017
        pytest.skip(f"{method.__name__} has no {request.param} form")
    return values


def has(method: ModuleType, name: str) -> bool:
    return name in {field.name for field in dataclasses.fields(method.Settings)}


def settings(method: ModuleType, **values: Any) -> BallSettings:
    """Return the method's settings, with those of the values that it has; few passes."""
    given = CHEAP | {"early_stop": False} | values
    wanted = {name: value for name, value in given.items() if has(method, name)}
    made: BallSettings = method.Settings(**wanted)
    return made


def run(
    method: ModuleType, twin: VideoMoE, clip: Tensor, label: Tensor, *indices: Tensor, **values: Any
) -> AttackResult:
    found: AttackResult = method.attack(twin, clip, label, settings(method, **values), *indices)
    return found


def clips(n: int, seed: int = 0, spec: ClipSpec = SMALL) -> Tensor:
    return random_clip(n, seed, spec)


def part_of(method: ModuleType, twin: VideoMoE) -> nn.Module:
    """Return a part of the twin that every pass of the method runs."""
    part = twin.experts[0] if method.PART == "expert" or twin.router is None else twin.router
    assert part is not None
    return part


def succeeded(method: ModuleType, twin: VideoMoE, clip: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Judge a result anew, by the method's own criterion."""
    with torch.no_grad():
        if method.PART == "router":
            return twin(x).route != twin(clip).route
        logits = twin.run_expert(0, x) if method.PART == "expert" else twin(x).logits
        return logits.argmax(dim=1) != y


def labels(twin: VideoMoE, clip: Tensor, method: ModuleType) -> Tensor:
    """Return what the twin says (of an attack on an expert: what that expert says)."""
    with torch.no_grad():
        logits = twin.run_expert(0, clip) if method.PART == "expert" else twin(clip).logits
        return logits.argmax(dim=1)


def within(found: AttackResult, clip: Tensor, budget: dict[str, Any]) -> bool:
    """Return whether a result lies in the ball, up to float32's rounding, and in [0, 1]."""
    x = found.adversarial
    size = ball.size((x - clip).double(), budget["norm"])
    near = size <= budget["eps"] * (1 + 1e-6) + 1e-7
    return bool(near.all() and x.min() >= 0 and x.max() <= 1)


def test_file_holds_what_the_folder_promises(method: ModuleType) -> None:
    assert issubclass(method.Settings, BallSettings)
    assert method.PART in ("model", "router", "expert")
    names = list(inspect.signature(method.attack).parameters)
    assert names == ["twin", "clip", "label", "settings", "indices"]
    assert has(method, "expert") == (method.PART == "expert")
    assert method.PART == "model" or not has(method, "route_grad")
    assert isinstance(getattr(method, "OPTIMAL", True), bool)


def test_result_lies_in_the_ball_and_leaves_the_clip_alone(
    method: ModuleType, budget: dict[str, Any]
) -> None:
    twin, clip = small(), clips(4)
    clip[0], clip[1] = 0, 1  # at the edge of what a pixel can be
    before = clip.clone()
    found = run(method, twin, clip, labels(twin, clip, method), step=0.8, **budget)
    assert torch.equal(clip, before)
    assert not clip.requires_grad
    assert not found.adversarial.requires_grad
    assert within(found, clip, budget)
    assert (found.adversarial != clip).any()


def test_no_budget_returns_the_clip(method: ModuleType, budget: dict[str, Any]) -> None:
    twin, clip = small(), clips(3)
    found = run(method, twin, clip, labels(twin, clip, method), **{**budget, "eps": 0.0})
    assert torch.equal(found.adversarial, clip)
    assert not found.success.any()


def test_what_it_says_is_true(method: ModuleType, budget: dict[str, Any]) -> None:
    twin, clip = small(), clips(8)
    y = labels(twin, clip, method)
    y[0] = (y[0] + 1) % 4  # already wrong
    for early_stop in (False, True):
        found = run(method, twin, clip, y, early_stop=early_stop, **budget)
        assert torch.equal(found.success, succeeded(method, twin, clip, found.adversarial, y))
        with torch.no_grad():
            assert torch.equal(found.route_before, twin(clip).route)
            assert torch.equal(found.route_after, twin(found.adversarial).route)


def test_seed_fixes_the_result_and_the_global_one_is_left_alone(method: ModuleType) -> None:
    twin, clip = small(), clips(3)
    y = labels(twin, clip, method)
    torch.manual_seed(5)
    first = run(method, twin, clip, y, eps=EPS, restarts=2)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    again = run(method, twin, clip, y, eps=EPS, restarts=2)
    assert torch.equal(first.adversarial, again.adversarial)
    if has(method, "random_start"):
        other = run(method, twin, clip, y, eps=EPS, seed=1)
        assert not torch.equal(first.adversarial, other.adversarial)


@pytest.mark.parametrize("early_stop", [False, True])
def test_batch_and_order_change_nothing_in_float64(
    method: ModuleType, budget: dict[str, Any], early_stop: bool
) -> None:
    twin, clip = small().double(), clips(5).double()
    y, index = labels(twin, clip, method), torch.tensor([7, 3, 11, 0, 5])
    values = {"lam": 1e-3, "restarts": 2, "early_stop": early_stop, **budget}
    whole = run(method, twin, clip, y, index, **values)
    for rows in ([2], [4, 1], [3, 0, 2, 4, 1]):
        part = run(method, twin, clip[rows], y[rows], index[rows], **values)
        # V sums in another order; a step in another direction would differ by more than 1e-3
        assert float((part.adversarial - whole.adversarial[rows]).abs().max()) < 1e-12
        for field in ("success", "route_after", "forwards", "backwards", "dead"):
            assert torch.equal(getattr(part, field), getattr(whole, field)[rows]), field


def disturbed() -> VideoMoE:
    """Return a twin with a mix of modes, gradients and flags, as a trainer may leave one."""
    twin = small().train()
    twin.experts[1].eval()
    for i, parameter in enumerate(twin.parameters()):
        parameter.requires_grad_(i % 3 != 0)
        if i % 2:
            parameter.grad = torch.full_like(parameter, 0.5)
    return twin


def state(twin: VideoMoE) -> dict[str, Any]:
    return {
        "modes": [module.training for module in twin.modules()],
        "values": {name: value.clone() for name, value in twin.state_dict().items()},
        "flags": [p.requires_grad for p in twin.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in twin.parameters()],
        "hooks": [len(module._forward_hooks) for module in twin.modules()],
    }


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    for key in ("modes", "flags", "hooks"):
        assert a[key] == b[key]
    assert all(torch.equal(a["values"][name], b["values"][name]) for name in a["values"])
    for x, y in zip(a["grads"], b["grads"], strict=True):
        assert (x is None) == (y is None)
        assert x is None or torch.equal(x, y)


def test_twin_is_left_as_found(method: ModuleType) -> None:
    twin, clip = disturbed(), clips(3)
    before = state(twin)
    run(method, twin, clip, torch.tensor([0, 1, 2]), eps=EPS)
    assert_same(before, state(twin))


def test_twin_is_left_as_found_after_an_exception(method: ModuleType) -> None:
    twin, clip = disturbed(), clips(3)
    calls = 0

    def break_down(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise MemoryError("in the middle of the attack")

    part_of(method, twin).register_forward_hook(break_down)
    before = state(twin)
    with pytest.raises(MemoryError):
        run(method, twin, clip, torch.tensor([0, 1, 2]), eps=EPS, restarts=3)
    assert_same(before, state(twin))


def test_linear_loss_is_raised_as_far_as_it_goes(method: ModuleType) -> None:
    """With two outputs, the best perturbation is eps sign(w_other - w_left), cut to [0, 1]."""
    twin, clip = linear(1 if method.PART == "model" else 2, spec=SMALL), clips(4)
    part = part_of(method, twin)
    with torch.no_grad():
        leave = part(clip).argmax(dim=1)
    w = weight(part, SMALL)
    toward = w[1 - leave] - w[leave]
    draws = 1 if has(method, "steps") or has(method, "queries") else 20  # of noise
    found = run(method, twin, clip, leave, steps=60, queries=60, restarts=draws, eps=EPS)
    gain = ((found.adversarial - clip) * toward).flatten(1).sum(dim=1)
    assert (gain >= 0).all()
    assert (gain > 0).any()
    if getattr(method, "OPTIMAL", True):
        best = (clip + EPS * toward.sign()).clamp(0, 1)
        assert float((found.adversarial - best).abs().max()) < 1e-6


def stronger_or_equal(more: AttackResult, less: AttackResult) -> bool:
    """Return whether `more` is nowhere weaker: by success, then by loss."""
    gained = more.success & ~less.success
    same = (more.success == less.success) & (more.loss >= less.loss)
    return bool((gained | same).all())


def test_more_steps_and_more_restarts_are_never_weaker(
    method: ModuleType, budget: dict[str, Any]
) -> None:
    twin, clip = small(), clips(6)
    y, values = labels(twin, clip, method), {**budget, "eps": budget["eps"] / 20, "steps": 2}
    less = run(method, twin, clip, y, **values)
    if has(method, "step") and has(method, "steps"):  # of fixed step: a longer climb begins alike
        assert stronger_or_equal(run(method, twin, clip, y, **{**values, "steps": 5}), less)
    if has(method, "restarts"):
        assert stronger_or_equal(run(method, twin, clip, y, **values, restarts=3), less)


@contextmanager
def counted(method: ModuleType, twin: VideoMoE) -> Iterator[list[int]]:
    """Count the samples that pass forward, and backward through what is attacked."""
    seen, handles = [0, 0], []

    def forward(_module: Any, _inputs: Any, out: Tensor) -> None:
        seen[0] += len(out)

    def backward(_module: Any, _inputs: Any, grads: Any) -> None:
        seen[1] += len(grads[0])

    assert twin.router is not None
    handles.append(twin.router.register_forward_hook(forward))  # it sees every pass
    for part in twin.experts if method.PART == "expert" else [twin.router]:
        handles.append(part.register_full_backward_hook(backward))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("lam", [0.0, 1e-3])
def test_passes_are_counted_as_they_happen(
    method: ModuleType, lam: float, early_stop: bool
) -> None:
    twin, clip = small(), clips(3)
    y = labels(twin, clip, method)
    values = {"eps": EPS, "restarts": 2, "lam": lam, "early_stop": early_stop}
    with counted(method, twin) as ran:
        found = run(method, twin, clip, y, **values)
    assert ran[0] == int(found.forwards.sum())
    if has(method, "queries") and has(method, "steps"):  # an ensemble: in a backward pass
        return  # of some of its parts every expert runs
    assert ran[1] == int(found.backwards.sum())
    if has(method, "queries") and not has(method, "route_grad"):
        assert not found.backwards.any()
        most = CHEAP["queries"] * (2 if has(method, "restarts") else 1) + 1
        assert (found.forwards <= most).all()  # one of the clean clip


def test_clip_that_would_make_it_void_is_refused(method: ModuleType) -> None:
    twin, clip, y = small(), clips(2), torch.tensor([0, 1])
    for bad, why in (
        (255 * clip, "pixels from"), (clip * torch.nan, "nan"), (clip.byte(), "uint8"),
        (clip[0], "float"), (clip[:0], "float"),
    ):  # fmt: skip
        with pytest.raises(SettingError, match=why):
            run(method, twin, bad, y)
    with pytest.raises(SettingError, match="1 indices for 2 clips"):
        run(method, twin, clip, y, torch.tensor([0]))


def test_early_stop_finds_the_same_for_less(method: ModuleType) -> None:
    twin, clip = small().double(), clips(6).double()
    y, values = labels(twin, clip, method), {"eps": EPS / 2, "restarts": 2}
    full = run(method, twin, clip, y, **values)
    short = run(method, twin, clip, y, early_stop=True, **values)
    assert torch.equal(short.success, full.success)
    assert (short.forwards <= full.forwards).all()
    assert (short.backwards <= full.backwards).all()
    if has(method, "restarts") and short.success.any():  # a first start that succeeds is the last
        assert (short.forwards < full.forwards)[short.success].any()


def test_clip_that_is_wrong_already_costs_nothing(method: ModuleType) -> None:
    if method.PART == "router":
        pytest.skip("a clean clip has its own route")
    twin, clip = small(), clips(5)
    y, wrong = labels(twin, clip, method), torch.tensor([False, True, False, True, False])
    y[wrong] = (y[wrong] + 1) % 4
    with counted(method, twin) as ran:
        found = run(method, twin, clip, y, eps=EPS, early_stop=True)
    assert ran[0] == found.forwards.sum()
    assert found.forwards[wrong].tolist() == [1, 1]
    assert not found.backwards[wrong].any()
    assert (found.forwards[~wrong] > 1).all()
    assert found.success[wrong].all()
    assert torch.equal(found.adversarial[wrong], clip[wrong])


@pytest.mark.parametrize("of", ["router", "experts"])
@pytest.mark.parametrize("when", ["clean", "moved"])
def test_nan_names_the_clip(method: ModuleType, of: str, when: str) -> None:
    """One of a batch is answered with a NaN: as it is, or only once it is perturbed."""
    if method.PART == "router" and of == "experts":
        pytest.skip("an attack on the router never runs an expert")
    twin, clip = small(), 0.5 * clips(3)
    clip[1] = 0.9
    y = labels(twin, clip, method)

    def spoil(_module: Any, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        bright = inputs[0].flatten(1).mean(dim=1) > 0.7
        if when == "moved":
            bright &= (inputs[0] != clip[1]).flatten(1).any(dim=1)
        last = torch.arange(out.shape[1]) == out.shape[1] - 1
        return out.masked_fill(bright[:, None] & last, torch.nan)

    assert twin.router is not None
    for part in [twin.router] if of == "router" else twin.experts:
        part.register_forward_hook(spoil)
    for way in ROUTE_GRADS if has(method, "route_grad") else ("frozen",):
        for early_stop in (False, True):
            with pytest.raises(VmoeError, match="clip 11: the model answers NaN"):
                run(
                    method, twin, clip, y, torch.tensor([7, 11, 3]),
                    eps=EPS, route_grad=way, early_stop=early_stop,
                )  # fmt: skip


def test_bfloat16_claims_nothing_that_float32_denies(method: ModuleType) -> None:
    twin, clip = small(), clips(8)
    y = labels(twin, clip, method)
    for early_stop in (False, True):
        found = run(method, twin, clip, y, eps=EPS / 4, bf16=True, early_stop=early_stop)
        assert torch.equal(found.success, succeeded(method, twin, clip, found.adversarial, y))
        with torch.no_grad():
            assert torch.equal(found.route_after, twin(found.adversarial).route)


def test_on_the_grid_every_result_is_one_that_uint8_holds(
    method: ModuleType, budget: dict[str, Any]
) -> None:
    twin, clip = small(), clips(6)
    y, eps = labels(twin, clip, method), 1.07 * budget["eps"]  # 8.56 grey levels
    found = run(method, twin, clip, y, grid=True, **{**budget, "eps": eps})
    x = found.adversarial
    assert torch.equal(x, to_tensor((255 * x).round().byte().permute(0, 2, 3, 4, 1).numpy()))
    assert (x != clip).any()
    if budget["norm"] == "linf":
        assert int((255 * (x - clip)).round().abs().max()) <= 8
    assert within(found, clip, {**budget, "eps": eps})
    assert torch.equal(found.success, succeeded(method, twin, clip, x, y))


@pytest.mark.parametrize(
    ("frames", "height", "width", "experts", "classes"),
    [(1, 8, 9, 1, 2), (5, 9, 8, 2, 2), (2, 11, 13, 8, 3)],
)
def test_any_shape(
    method: ModuleType, frames: int, height: int, width: int, experts: int, classes: int
) -> None:
    spec = ClipSpec(frames=frames, height=height, width=width)
    twin, clip = small(experts, classes, spec=spec), clips(5, spec=spec)
    y = labels(twin, clip, method)
    if method.PART == "router" and experts == 1:
        with pytest.raises(SettingError, match="dense"):
            run(method, twin, clip, y, eps=EPS)
        return
    found = run(method, twin, clip, y, eps=EPS, lam=1e-3)
    assert within(found, clip, {"norm": "linf", "eps": EPS})
    assert torch.equal(found.success, succeeded(method, twin, clip, found.adversarial, y))

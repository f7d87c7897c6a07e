"""What every file of attacks/methods promises; a new file is tested with no edit here."""

from __future__ import annotations

import dataclasses
import inspect
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.twins import linear, lively, random_clip, weight
from vmoe import registry
from vmoe.attacks.loop import AttackResult
from vmoe.errors import SettingError
from vmoe.models import VideoMoE
from vmoe.settings import Settings

METHODS = "vmoe.attacks.methods"
EPS = 8 / 255


@pytest.fixture(params=registry.names(METHODS))
def method(request: pytest.FixtureRequest) -> ModuleType:
    return registry.load(METHODS, request.param, "attack")


def settings(method: ModuleType, **values: Any) -> Settings:
    """Return the method's settings, with those of the values that it has; no early stop."""
    values = {"early_stop": False} | values
    fields = {field.name for field in dataclasses.fields(method.Settings)}
    made: Settings = method.Settings(**{k: v for k, v in values.items() if k in fields})
    return made


def run(
    method: ModuleType, twin: VideoMoE, clip: Tensor, label: Tensor, *indices: Tensor, **values: Any
) -> AttackResult:
    found: AttackResult = method.attack(twin, clip, label, settings(method, **values), *indices)
    return found


def succeeded(method: ModuleType, twin: VideoMoE, clip: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Judge a result anew, by the method's own criterion."""
    with torch.no_grad():
        if method.PART == "router":
            return twin(x).route != twin(clip).route
        logits = twin.run_expert(0, x) if method.PART == "expert" else twin(x).logits
        return logits.argmax(dim=1) != y


def labels(twin: VideoMoE, clip: Tensor, method: ModuleType | None = None) -> Tensor:
    """Return what the twin says (of an attack on an expert: what that expert says)."""
    with torch.no_grad():
        if method is not None and method.PART == "expert":
            return twin.run_expert(0, clip).argmax(dim=1)
        answer: Tensor = twin(clip).logits.argmax(dim=1)
        return answer


def test_file_holds_what_the_folder_promises(method: ModuleType) -> None:
    assert issubclass(method.Settings, Settings)
    assert method.PART in ("model", "router", "expert")
    names = list(inspect.signature(method.attack).parameters)
    assert names == ["twin", "clip", "label", "settings", "indices"]
    assert (method.PART == "model") == hasattr(settings(method), "route_grad")
    assert (method.PART == "expert") == hasattr(settings(method), "expert")


def test_result_lies_in_the_ball_and_leaves_the_clip_alone(method: ModuleType) -> None:
    twin, clip = lively(), random_clip(4)
    clip[0], clip[1] = 0, 1  # at the edge of what a pixel can be
    before = clip.clone()
    found = run(method, twin, clip, labels(twin, clip), steps=3, eps=EPS, step=0.8)
    assert torch.equal(clip, before)
    assert not clip.requires_grad
    assert not found.adversarial.requires_grad
    assert float((found.adversarial - clip).abs().max()) <= EPS + 1e-7
    assert float(found.adversarial.min()) >= 0
    assert float(found.adversarial.max()) <= 1
    assert (found.adversarial != clip).any()


def test_no_budget_returns_the_clip(method: ModuleType) -> None:
    twin, clip = lively(), random_clip(3)
    found = run(method, twin, clip, labels(twin, clip, method), steps=2, eps=0.0)
    assert torch.equal(found.adversarial, clip)
    assert not found.success.any()


def test_what_it_says_is_true(method: ModuleType) -> None:
    twin, clip = lively(), random_clip(6)
    y = labels(twin, clip)
    found = run(method, twin, clip, y, steps=3, eps=2 / 255)
    assert torch.equal(found.success, succeeded(method, twin, clip, found.adversarial, y))
    with torch.no_grad():
        assert torch.equal(found.route_before, twin(clip).route)
        assert torch.equal(found.route_after, twin(found.adversarial).route)


def test_seed_fixes_the_result_and_the_global_one_is_left_alone(method: ModuleType) -> None:
    twin, clip = lively(), random_clip(3)
    y = labels(twin, clip)
    torch.manual_seed(5)
    first = run(method, twin, clip, y, steps=2, eps=EPS, restarts=2)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    again = run(method, twin, clip, y, steps=2, eps=EPS, restarts=2)
    assert torch.equal(first.adversarial, again.adversarial)
    if hasattr(settings(method), "random_start"):
        other = run(method, twin, clip, y, steps=2, eps=EPS, seed=1)
        assert not torch.equal(first.adversarial, other.adversarial)


def test_batch_and_order_change_nothing_in_float64(method: ModuleType) -> None:
    twin, clip = lively().double(), random_clip(5).double()
    y, index = labels(twin, clip), torch.tensor([7, 3, 11, 0, 5])
    values = {"steps": 3, "eps": EPS, "lam": 1e-3, "restarts": 2}
    whole = run(method, twin, clip, y, index, **values).adversarial
    for rows in ([2], [4, 1], [3, 0, 2, 4, 1]):
        part = run(method, twin, clip[rows], y[rows], index[rows], **values).adversarial
        # V sums in another order; a step in another direction would differ by more than 1e-3
        assert float((part - whole[rows]).abs().max()) < 1e-12


def disturbed() -> VideoMoE:
    """Return a twin with a mix of modes, gradients and flags, as a trainer may leave one."""
    twin = lively().train()
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
    twin, clip = disturbed(), random_clip(3)
    before = state(twin)
    run(method, twin, clip, torch.tensor([0, 1, 2]), steps=2, eps=EPS)
    assert_same(before, state(twin))


def test_twin_is_left_as_found_after_an_exception(method: ModuleType) -> None:
    twin, clip = disturbed(), random_clip(3)
    calls = 0

    def break_down(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise MemoryError("in the middle of the attack")

    part = twin.experts[0] if method.PART == "expert" else twin.router
    assert part is not None
    part.register_forward_hook(break_down)
    before = state(twin)
    with pytest.raises(MemoryError):
        run(method, twin, clip, torch.tensor([0, 1, 2]), steps=9, eps=EPS, restarts=3)
    assert_same(before, state(twin))


def test_optimum_of_a_linear_loss_is_found(method: ModuleType) -> None:
    """With two outputs, the best perturbation is eps sign(w_other - w_left), cut to [0, 1]."""
    twin, clip = linear(1 if method.PART == "model" else 2), random_clip(4)
    part = twin.router if method.PART == "router" else twin.experts[0]
    assert part is not None
    with torch.no_grad():
        leave = part(clip).argmax(dim=1)
    w = weight(part)
    best = (clip + EPS * (w[1 - leave] - w[leave]).sign()).clamp(0, 1)
    found = run(method, twin, clip, leave, steps=60, eps=EPS)
    assert float((found.adversarial - best).abs().max()) < 1e-6


def stronger_or_equal(more: AttackResult, less: AttackResult) -> bool:
    """Return whether `more` is nowhere weaker: by success, then by loss."""
    gained = more.success & ~less.success
    same = (more.success == less.success) & (more.loss >= less.loss)
    return bool((gained | same).all())


def test_more_steps_and_more_restarts_are_never_weaker(method: ModuleType) -> None:
    twin, clip = lively(), random_clip(6)
    y = labels(twin, clip)
    few = {"steps": 2, "eps": 0.3 / 255, "temporal": "off"}
    less = run(method, twin, clip, y, **few)
    if hasattr(settings(method), "step"):  # of fixed step, a longer climb begins as the shorter
        assert stronger_or_equal(run(method, twin, clip, y, **{**few, "steps": 5}), less)
    assert stronger_or_equal(run(method, twin, clip, y, **few, restarts=3), less)
    less = run(method, twin, clip, y, steps=2, eps=0.3 / 255)
    assert stronger_or_equal(run(method, twin, clip, y, steps=2, eps=0.3 / 255, restarts=3), less)


@pytest.mark.parametrize("lam", [0.0, 1e-3])
def test_passes_are_counted_as_they_happen(method: ModuleType, lam: float) -> None:
    twin, clip = lively(), random_clip(3)
    y, ran, back = labels(twin, clip), [0, 0], [0, 0]

    def count(module: nn.Module, which: int) -> None:
        def forward(_module: Any, _inputs: Any, out: Tensor) -> None:
            ran[which] += len(out)

        def backward(_module: Any, _inputs: Any, grads: Any) -> None:
            back[which] += len(grads[0])

        module.register_forward_hook(forward)
        module.register_full_backward_hook(backward)

    assert twin.router is not None
    count(twin.router, 0)
    for expert in twin.experts:
        count(expert, 1)
    found = run(method, twin, clip, y, steps=3, eps=EPS, restarts=2, lam=lam)
    part = 1 if method.PART == "expert" else 0  # every pass of the model is one of its router
    assert ran[part] == found.forwards.sum()
    assert back[0 if method.PART == "router" else 1] == found.backwards.sum()


def test_clip_that_would_make_it_void_is_refused(method: ModuleType) -> None:
    twin, clip, y = lively(), random_clip(2), torch.tensor([0, 1])
    for bad, why in (
        (255 * clip, "pixels from"), (clip * torch.nan, "nan"), (clip.byte(), "uint8"),
        (clip[0], "float"), (clip[:0], "float"),
    ):  # fmt: skip
        with pytest.raises(SettingError, match=why):
            run(method, twin, bad, y, steps=1)
    with pytest.raises(SettingError, match="1 indices for 2 clips"):
        run(method, twin, clip, y, torch.tensor([0]), steps=1)

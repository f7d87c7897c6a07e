"""The sanity checks on a healthy twin, and on planted faults: each is caught, by number."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.twins import SMALL, random_clips, small
from vmoe.attacks import checks, loop, sanity, tables, trials
from vmoe.attacks.evaluate import evaluate, plan, replay
from vmoe.attacks.figures import everything
from vmoe.attacks.judge import of_twin
from vmoe.attacks.loop import AttackResult
from vmoe.attacks.methods import pgd
from vmoe.attacks.sanity import Sanity
from vmoe.batches import to_tensor
from vmoe.clips import Clips
from vmoe.models import VideoMoE

EPS = 6 / 255
LABELS = 3
N = 32  # of which the small twins label 21 and 22 rightly


@pytest.fixture(autouse=True)
def _few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "QUERIES", 40)


def tinted(n: int, seed: int) -> tuple[Clips, Any]:
    """Return clips of coarse noise with more of one colour, and which colour that is."""
    label = np.arange(n) % LABELS
    clips = random_clips(n, seed, SMALL).astype(int)
    clips[np.arange(n), ..., label] += 30
    return np.clip(clips, 0, 255).astype(np.uint8), label


@functools.cache
def trained(experts: int = 2) -> VideoMoE:
    """Return a small twin that tells the colours apart, from a minute of nobody's time.

    Its scores are made smaller at the end: the routes stay, and cross-entropy of the scores, which
    pgd-r climbs, does not saturate.
    """
    twin = small(experts, LABELS)
    clips, label = tinted(240, 1)
    clip, y = to_tensor(clips), torch.as_tensor(label)
    optimizer = torch.optim.Adam(twin.parameters(), 0.02)
    twin.eval()
    for step in range(60):
        at = torch.arange(step, 240, 6)
        loss = nn.functional.cross_entropy(twin(clip[at]).logits, y[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if twin.router is not None:
        last = list(twin.router.modules())[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.weight *= 0.1
            last.bias *= 0.1
    return twin


def healthy(experts: int = 2) -> VideoMoE:
    return copy.deepcopy(trained(experts))


def checked(twin: VideoMoE, eps: float = EPS, **more: Any) -> Sanity:
    clips, label = tinted(N, 2)
    return sanity.check(twin, clips, label, np.arange(N), eps=eps, batch=N, **more)


def failed(found: Sanity) -> set[int]:
    return {each.number for each in found.checks if each.verdict == sanity.FAILED}


class Answer(nn.Module):
    """A part whose answer goes through a function."""

    def __init__(self, part: nn.Module, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.part, self.then = part, then

    def forward(self, clip: Tensor) -> Tensor:
        return self.then(self.part(clip))


class Steps(nn.Module):
    """Rounds activations: a staircase, flat wherever it has a derivative."""

    def forward(self, values: Tensor) -> Tensor:
        return (4 * values).round() / 4


def with_answers(then: Callable[[Tensor], Tensor]) -> VideoMoE:
    twin = healthy()
    twin.experts = nn.ModuleList(Answer(part, then) for part in twin.experts)
    return twin


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_healthy_twin_passes_all(norm: str) -> None:
    twin = healthy()
    found = checked(
        twin, EPS if norm == "linf" else 1.0, norm=norm, judges={"again": of_twin(twin)}
    )
    assert [each.number for each in found.checks] == list(range(1, 15))
    assert {each.number: each.line for each in found.checks if each.verdict != "ok"} == {}
    assert found.verdict() == "no sign of gradient masking."
    assert 0 < found.checks[0].measured[f"pgd-{checks.STEPS}"] < found.checks[0].measured["of"]


def test_what_is_not_run_is_named() -> None:
    found = checked(healthy())
    assert found.verdict() == (
        "no sign of gradient masking (undecided: 14 replay in what is deployed)."
    )
    dense = checked(healthy(1))
    assert failed(dense) == set()
    assert "6 transfer" in dense.verdict()
    assert "no sign of gradient masking" not in dense.verdict()
    given = checked(healthy(1), other=healthy(2), judges={"again": of_twin(healthy(1))})
    assert given.verdict() == "no sign of gradient masking."


def staircase() -> VideoMoE:
    twin = healthy()
    for part in (twin.router, *twin.experts):
        assert isinstance(part, nn.Sequential)
        part.insert(4, Steps())
    return twin


def noisy(logits: Tensor) -> Tensor:
    return logits + 0.5 * torch.randn_like(logits)


@pytest.mark.parametrize(
    ("make", "numbers"),
    [
        (staircase, {3, 8}),
        (lambda: with_answers(lambda logits: 1e4 * logits), {3, 8}),
        (lambda: with_answers(lambda logits: logits.softmax(dim=1)), {9}),
        (lambda: with_answers(lambda logits: logits * 0), {8, 12}),
        (lambda: with_answers(noisy), {10}),
    ],
    ids=["staircase", "saturated", "probabilities", "constant", "stochastic"],
)
def test_planted_model_is_caught(make: Callable[[], VideoMoE], numbers: set[int]) -> None:
    torch.manual_seed(0)
    found = checked(make())
    assert numbers <= failed(found)
    assert "no sign" not in found.verdict()
    assert found.verdict().startswith("FAILED: ")


def test_attack_without_gradients_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_gradient", lambda loss, clip: torch.zeros_like(clip))
    assert {3, 8} <= failed(checked(healthy()))


@pytest.mark.parametrize(("factor", "numbers"), [(1.5, {11}), (0.0, {3})], ids=["out", "still"])
def test_attack_that_leaves_the_ball_or_the_clip_as_it_is_is_caught(
    monkeypatch: pytest.MonkeyPatch, factor: float, numbers: set[int]
) -> None:
    right = pgd.attack

    def wrong(twin: VideoMoE, clip: Tensor, *rest: Any) -> AttackResult:
        found = right(twin, clip, *rest)
        moved = clip + factor * (found.adversarial - clip)
        return found._replace(adversarial=moved.clamp(0, 1))

    monkeypatch.setattr(pgd, "attack", wrong)
    assert numbers <= failed(checked(healthy()))


def test_reported_figures_are_checked() -> None:
    twin, (clips, label) = healthy(), tinted(N, 2)
    judges = {"twin": of_twin(twin)}
    rows = plan(["pgd"], [EPS], steps=10)
    whole = evaluate(twin, clips, label, rows, judges)
    assert checked(twin, found=whole).verdict().startswith("no sign of gradient masking (")
    part = checked(
        twin, found=evaluate(twin, clips, label, plan(["pgd"], [EPS], ["frozen"], steps=10), judges)
    )
    assert failed(part) == set()
    assert "without some route_grad: pgd" in part.checks[12].line
    assert "no sign of gradient masking" not in part.verdict()
    far = np.clip(clips.astype(int) + 7, 0, 255).astype(np.uint8)  # one level too far
    assert 11 in failed(checked(twin, found=replay(clips, label, [(rows[0], far)], judges)))


@pytest.mark.parametrize("experts", [1, 2])
def test_report_of_an_attack_that_does_nothing_is_caught(experts: int) -> None:
    twin, (clips, label) = healthy(experts), tinted(N, 2)
    still = plan(["pgd"], [EPS], steps=1, step=1e-6, random_start=False)
    void = checked(twin, found=evaluate(twin, clips, label, still, {"twin": of_twin(twin)}))
    assert failed(void) == {13}
    seen = void.checks[12].measured
    assert seen["reported"] == 0
    assert seen["missed"] == seen["worst"] > 4
    assert "robust figures may be too high" in void.verdict()


def test_report_is_compared_on_the_same_clips_at_the_same_budget() -> None:
    twin, (clips, label) = healthy(), tinted(N, 2)
    judges = {"twin": of_twin(twin)}
    rows = plan(["pgd"], [EPS / 6, EPS], steps=10)
    found = evaluate(twin, clips, label, rows, judges)
    some = np.arange(21)
    first = sanity.check(twin, clips[some], label[some], some, eps=EPS, found=found)
    assert failed(first) == set()
    assert first.checks[12].measured["of"] == first.right <= 21
    weak = evaluate(twin, clips, label, rows[:1], judges)
    assert (
        "no attack on the whole model is reported at" in checked(twin, found=weak).checks[12].line
    )
    case: Any = SimpleNamespace(eps=EPS, trials=SimpleNamespace(norm="linf"), right=some)
    on_engine = [replace(o, row=replace(o.row, against="engine")) for o in found.outcomes]
    assert checks._reported(case, found) is not None
    assert checks._reported(case, replace(found, outcomes=tuple(on_engine))) is None
    router = evaluate(twin, clips, label, plan(["pgd-r"], [EPS], steps=2), judges)
    only = checked(twin, found=router)
    assert only.checks[12].verdict == sanity.UNDECIDED
    assert "no sign" not in only.verdict()


def test_few_clips_cannot_pass_what_they_cannot_fail() -> None:
    twin, (clips, label) = healthy(), tinted(N, 2)
    for n in (1, 3, trials.ENOUGH - 1):
        at = np.arange(n)
        found = sanity.check(twin, clips[at], label[at], at, eps=EPS)
        assert failed(found) == set()
        undecided = {each.number for each in found.checks if each.verdict == sanity.UNDECIDED}
        assert {1, 2, 3, 4, 5, 6, 7, 8} <= undecided
        assert "no sign" not in found.verdict()
        assert f"classified rightly, and had {found.right} (more: --n)" in found.verdict()
    masked = with_answers(lambda logits: 1e4 * logits)
    right = np.flatnonzero(of_twin(masked)(clips).logits.argmax(axis=1) == label)
    for n in (1, 3):
        at = right[:n]
        assert 8 in failed(sanity.check(masked, clips[at], label[at], at, eps=EPS))


def test_noise_of_which_the_grid_leaves_nothing_is_no_evidence() -> None:
    noise = checked(healthy(), 0.05, norm="l2").checks[3]
    assert noise.verdict == sanity.UNDECIDED
    assert "leaves nothing" in noise.line


@pytest.mark.parametrize(
    ("norm", "eps", "said"),
    [("l2", 0.05, "0.05"), ("linf", 0.003, "0.765 grey levels"), ("linf", EPS, ""), ("l2", 2, "")],
)
def test_budget_of_which_the_grid_leaves_nothing_is_named(norm: str, eps: float, said: str) -> None:
    clips, label = tinted(N, 2)
    twin, rows = healthy(), plan(["noise", "pgd"], [eps], norm=norm, steps=2)
    found = evaluate(twin, clips, label, rows, {"twin": of_twin(twin)})
    text = tables.attacks(everything(found, list(range(N))))
    if said:
        assert f"a budget of {said} was left unused, after rounding to uint8, by noise (0)" in text
    else:
        assert "left unused" not in text


def test_engine_that_says_something_else_is_caught() -> None:
    twin = healthy()
    found = checked(twin, judges={"twin": of_twin(twin), "engine": of_twin(small(2, LABELS))})
    assert failed(found) == {14}
    assert "engine differs on" in found.checks[13].line


def test_rule_of_chance_worked_by_hand() -> None:
    """P(X >= 2 | 8, 0.05) = 0.057, P(X >= 3) = 0.0058; P(X >= 4 | 32) = 0.074, 5: 0.021."""
    allowed = [(0, 0), (0, 1), (2, 8), (3, 20), (4, 32)]
    refused = [(1, 1), (3, 8), (4, 20), (5, 32), (2, 2), (32, 32)]
    assert not any(trials.beyond(*each) for each in allowed)
    assert all(trials.beyond(*each) for each in refused)
    assert trials.few((3, 20), (0, 20)) is True
    assert trials.few((2, 8), (0, 20)) is None
    assert trials.few((0, 8), (4, 20)) is False

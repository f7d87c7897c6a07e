"""The attack that knows the guard: its copies of the guard's scores, and what it keeps to."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.twins import lively
from vmoe.attacks import guarded
from vmoe.attacks.guarded import StreamAttackSettings
from vmoe.errors import SettingError
from vmoe.runtime.guard import MONITOR, Guard, profile, terms
from vmoe.runtime.guard.profile import Profile

M, K, N = 4, 10, 40


def softmax(values: np.ndarray) -> np.ndarray:
    raised = np.exp(values - values.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def windows(seed: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return tuple(softmax(scale * rng.normal(size=(N, k))) for k in (K, M, K))  # type: ignore[return-value]


def judged(clean: Profile | None, seed: int, scale: float = 1.0) -> list:
    shares, weights, filtered = windows(seed, scale)
    guard = Guard(MONITOR, clean, experts=M)
    return [
        guard.judge(shares[i], weights[i], 0, epoch=0, t_first_s=i * 0.4, t_s=i * 0.4 + 0.7,
                    age_s=0.0, filtered=filtered[i])
        for i in range(N)
    ]  # fmt: skip


def calibrated() -> Profile:
    streams = [[(v.terms, 0) for v in judged(None, seed)] for seed in range(5)]
    return profile.make(streams, experts=M, twin="t", hop_s=0.4, filter="median", false_alarms=0.05)


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])  # within and beyond what clean video shows
def test_the_copies_are_the_guards_own_scores(scale: float) -> None:
    clean = calibrated()
    shares, weights, filtered = map(torch.from_numpy, windows(9, scale))
    got = guarded.score(clean, shares, weights, filtered)
    drift = clean.strangeness({"route_drift": 0.0})["route_drift"]
    wanted = [v.score - (drift if "route_drift" in v.terms else 0) for v in judged(clean, 9, scale)]
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-9, atol=1e-9)
    for name, (values, where) in guarded.terms(shares, weights, filtered).items():
        own = [v.terms[name] for i, v in enumerate(judged(None, 9, scale)) if i in where]
        np.testing.assert_allclose(values.numpy(), own, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", list(guarded.FILTERS))
def test_the_filters_are_the_guards_own(name: str) -> None:
    noise = np.random.default_rng(0).normal(120, 12, (2, 6, 8, 8, 3))
    clips = noise.clip(0, 255).astype(np.uint8)
    got = guarded.FILTERS[name](torch.from_numpy(clips).permute(0, 4, 1, 2, 3).double() / 255)
    apart = 255 * got.permute(0, 2, 3, 4, 1).numpy() - terms.filtered(clips, name)
    assert np.abs(apart).max() <= 0.5 + 1e-3  # the guard's is rounded


def test_scores_have_a_gradient() -> None:
    clean = calibrated()
    logits = torch.randn(N, K, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(N, M, dtype=torch.float64, requires_grad=True)
    guarded.score(clean, logits.softmax(1), scores.softmax(1)).sum().backward()
    assert logits.grad is not None
    assert scores.grad is not None
    assert logits.grad.abs().sum() > 0
    assert scores.grad.abs().sum() > 0


def test_the_attack_stays_in_the_ball_on_the_grid_and_lowers_the_guards_score() -> None:
    twin = lively(experts=M, classes=K)
    spec = twin.spec
    rng = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (spec.frames + 8, 3, spec.height, spec.width), generator=rng)
    frames = frames.float() / 255
    idx = torch.stack([torch.arange(spec.frames) + start for start in (0, 4, 8)])
    clean = calibrated()
    found = {}
    for weight in (0.0, 10.0):
        settings = StreamAttackSettings(eps=4 / 255, steps=4, weight=weight)
        moved = guarded.attack(twin, frames, idx, clean, settings)
        assert (moved - frames).abs().max() <= 4 / 255 + 1e-6
        assert ((255 * moved).round() / 255 == moved).all()
        assert moved.min() >= 0
        assert moved.max() <= 1
        with torch.no_grad():
            out = twin(moved[idx].transpose(1, 2))
        found[weight] = guarded.score(clean, out.logits.softmax(1), out.scores.softmax(1)).mean()
    assert found[10.0] < found[0.0]
    jpeg = dataclasses.replace(clean, filter="jpeg")
    with pytest.raises(SettingError, match="the guard's filter is 'jpeg', which has no gradient"):
        guarded.attack(twin, frames, idx, jpeg, StreamAttackSettings(weight=1.0))

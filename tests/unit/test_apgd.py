"""APGD against its paper: the checkpoints, and algorithm 1 written out for one sample."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.twins import lively, random_clip
from vmoe.attacks import losses
from vmoe.attacks.apgd import checkpoints
from vmoe.attacks.methods import apgd_ce, apgd_dlr, apgd_margin, apgd_t
from vmoe.models import VideoMoE


def test_checkpoints_of_the_paper() -> None:
    assert sorted(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert sorted(checkpoints(20)) == [5, 9, 12, 14, 16, 18, 19, 20]
    assert sorted(checkpoints(1)) == [1]


def by_the_paper(
    twin: VideoMoE, clip: Tensor, y: Tensor, eps: float, norm: str, steps: int
) -> tuple[Tensor, list[int]]:
    """Run algorithm 1 on one sample from the clip itself; return its best point and its halvings.

    x[k], f[k] are the paper's x^(k), f(x^(k)).
    """

    def look(at: Tensor) -> tuple[float, Tensor]:
        at = at.clone().requires_grad_()
        loss = losses.ce(twin(at).logits, y).sum()
        return loss.item(), torch.autograd.grad(loss, at)[0]

    def onto(at: Tensor) -> Tensor:
        delta = at - clip
        if norm == "linf":
            return (clip + delta.clamp(-eps, eps)).clamp(0, 1)
        return (clip + delta * min(1.0, eps / max(delta.norm().item(), 1e-30))).clamp(0, 1)

    def rise(at: Tensor, gradient: Tensor) -> Tensor:
        unit = gradient.sign() if norm == "linf" else gradient / gradient.norm()
        return onto(at + eta[-1] * unit)

    shares = [0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    marks = [math.ceil(round(p * steps, 9)) for p in shares if p <= 1]
    eta, x, f = [2 * eps], [clip], [0.0]
    f[0], gradient = look(clip)
    best, f_best, g_best, reached, halvings = clip, f[0], gradient, [f[0]], []
    x.append(rise(clip, gradient))
    rises = 0
    for k in range(1, steps + 1):
        value, gradient = look(x[k])
        f.append(value)
        rises += value > f[k - 1]
        if value > f_best:
            best, f_best, g_best = x[k], value, gradient
        if k in marks[1:]:
            j = marks.index(k)
            eta.append(eta[-1])
            if rises < 0.75 * (k - marks[j - 1]) or (
                (len(eta) < 3 or eta[-2] == eta[-3]) and f_best == reached[-1]
            ):
                eta[-1] /= 2
                halvings.append(k)
                x[k], f[k], gradient = best, f_best, g_best
            reached.append(f_best)
            rises = 0
        z = rise(x[k], gradient)
        x.append(onto(x[k] + 0.75 * (z - x[k]) + 0.25 * (x[k] - x[k - 1])))
    return best, halvings


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_batch_moves_as_algorithm_1_moves_each_sample(norm: str) -> None:
    twin, clip = lively().double(), random_clip(4).double()
    eps, steps = (0.5 / 255, 17) if norm == "linf" else (0.5, 17)
    with torch.no_grad():
        y = twin(clip).logits.argmin(dim=1)  # wrong already: best by success is best by loss
    how = {"eps": eps, "norm": norm, "steps": steps, "random_start": False, "early_stop": False}
    found = apgd_ce.attack(twin, clip, y, apgd_ce.Settings(**how)).adversarial
    every = []
    for i in range(len(clip)):
        rows = slice(i, i + 1)
        best, halvings = by_the_paper(twin, clip[rows], y[rows], eps, norm, steps)
        torch.testing.assert_close(found[rows], best, rtol=0, atol=1e-9)
        every.append(tuple(halvings))
    assert len(set(every)) > 1  # the samples halved their steps at times of their own


@pytest.mark.parametrize("method", [apgd_ce, apgd_dlr, apgd_margin, apgd_t])
def test_sample_that_falls_early_leaves_the_others_alone(method: ModuleType) -> None:
    twin, clip = lively().double(), random_clip(6).double()
    with torch.no_grad():
        y = twin(clip).logits.argmax(dim=1)
    y[3] = (y[3] + 1) % 4
    how = method.Settings(eps=0.15 / 255, steps=12)
    whole = method.attack(twin, clip, y, how)
    assert 0 < int(whole.success.sum()) < len(clip)
    assert whole.forwards[3] == 1
    assert whole.backwards[3] == 0
    assert len(set(whole.forwards.tolist())) > 1
    for i in range(len(clip)):
        own = slice(i, i + 1)
        index = torch.tensor([i])
        alone = method.attack(twin, clip[own], y[own], how, index)
        torch.testing.assert_close(whole.adversarial[own], alone.adversarial, rtol=0, atol=1e-9)
        assert whole.forwards[own] == alone.forwards
        assert whole.backwards[own] == alone.backwards


def test_attack_towards_labels_tries_the_nearest_first() -> None:
    twin, clip = lively(), random_clip(4)
    with torch.no_grad():
        logits = twin(clip).logits
    y = logits.argmax(dim=1)
    how = apgd_t.Settings(eps=0.0, steps=2, early_stop=False)
    tried = apgd_t.attack(twin, clip, y, how)
    assert tried.backwards.tolist() == [3 * 2] * 4  # K - 1 = 3 of at most 9
    assert tried.forwards.tolist() == [1 + 3 * 3] * 4
    how = apgd_t.Settings(eps=0.0, steps=1, early_stop=False, targets=1)
    nearest = logits.topk(2, dim=1).indices[:, 1]
    first = apgd_t.attack(twin, clip, y, how)
    torch.testing.assert_close(first.loss, losses.targeted_dlr(logits, y, nearest))


@pytest.mark.parametrize("classes", [2, 3])
def test_few_labels(classes: int) -> None:
    twin, clip = lively(classes=classes), random_clip(6)
    with torch.no_grad():
        y = twin(clip).logits.argmax(dim=1)
    for method in (apgd_dlr, apgd_margin, apgd_t):
        found = method.attack(twin, clip, y, method.Settings(eps=4 / 255, steps=8))
        assert found.success.all()

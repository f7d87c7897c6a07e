"""AutoAttack for clips: the worst of its parts for each sample, at the cost of those that stand."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.twins import SMALL, random_clip, small
from vmoe.attacks import losses
from vmoe.attacks.methods import autoattack
from vmoe.models import ROUTE_GRADS, VideoMoE

FEW: dict[str, Any] = {"steps": 3, "queries": 20, "targets": 2}


def case(experts: int = 4, classes: int = 4) -> tuple[VideoMoE, Tensor, Tensor]:
    """Return a twin, clips and labels; of the first clip, a wrong one."""
    twin, clip = small(experts, classes), random_clip(10, spec=SMALL)
    with torch.no_grad():
        y = twin(clip).logits.argmax(dim=1)
    y[0] = (y[0] + 1) % classes
    return twin, clip, y


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 3 / 255), ("l2", 0.25)])
@pytest.mark.parametrize(("experts", "classes"), [(4, 4), (1, 4), (8, 2)])
def test_it_is_the_worst_of_its_parts(
    norm: str, eps: float, experts: int, classes: int, early_stop: bool
) -> None:
    twin, clip, y = case(experts, classes)
    how = autoattack.Settings(eps=eps, norm=norm, early_stop=early_stop, **FEW)
    found = autoattack.attack(twin, clip, y, how)
    parts = [
        part.method.attack(twin, clip, y, part.settings) for part in autoattack.stages(how, experts)
    ]
    broken = torch.stack([part.success for part in parts])
    assert torch.equal(found.success, broken.any(dim=0))
    assert found.success.any()
    assert not found.success.all()
    with torch.no_grad():
        out = twin(found.adversarial)
        assert torch.equal(found.success, out.logits.argmax(dim=1) != y)
        assert torch.equal(found.route_after, out.route)
        margins = [losses.margin(twin(part.adversarial).logits, y) for part in parts]
    if not early_stop:  # the best of all parts, where they are compared
        assert torch.equal(found.loss, torch.stack(margins).amax(dim=0))
    looked = found.loss > -torch.inf
    torch.testing.assert_close(found.loss[looked], losses.margin(out.logits, y)[looked])
    # a clip pays for the parts until the first that breaks it
    pays = torch.ones_like(broken)
    if early_stop:
        pays[1:] = ~broken[:-1].cummax(dim=0).values
    for name in ("backwards", "dead"):
        counts = torch.stack([getattr(part, name) for part in parts])
        assert torch.equal(getattr(found, name), (counts * pays).sum(dim=0))
    counts = torch.stack([part.forwards + (part.loss > -torch.inf) for part in parts])
    assert torch.equal(found.forwards, (counts * pays).sum(dim=0))
    if early_stop:
        assert found.forwards[0] == 1
        assert torch.equal(found.adversarial[0], clip[0])


def test_parts_in_the_standard_order_with_the_true_derivative_and_then_every_route_grad() -> None:
    how = autoattack.Settings(eps=0.1, norm="l2", seed=3, grid=True, steps=7, targets=3, queries=99)
    parts = list(autoattack.stages(how, experts=4))
    assert [part.name for part in parts] == [
        "apgd-ce", "apgd-t", "fab", "square", *(f"j-tlga {way}" for way in ROUTE_GRADS),
        *(f"j-tlga-plus {way}" for way in ROUTE_GRADS),
    ]  # fmt: skip
    for part in parts:
        for name in ("eps", "norm", "seed", "grid", "early_stop", "bf16"):
            assert getattr(part.settings, name) == getattr(how, name)
        for name, value in {"steps": 7, "targets": 3, "queries": 99, "rescale": False}.items():
            assert getattr(part.settings, name, value) == value
    ways = [getattr(part.settings, "route_grad", None) for part in parts]
    assert ways == ["frozen"] * 3 + [None] + 2 * list(ROUTE_GRADS)
    assert [part.name for part in autoattack.stages(how, experts=1)] == [
        "apgd-ce", "apgd-t", "fab", "square"
    ]  # fmt: skip


def test_defaults_are_those_of_the_public_ensemble() -> None:
    how = autoattack.Settings()
    assert (how.steps, how.targets, how.queries) == (100, 9, 5000)


def test_it_says_what_each_part_leaves(caplog: pytest.LogCaptureFixture) -> None:
    twin, clip, y = case()
    how = autoattack.Settings(eps=3 / 255, **FEW)
    with caplog.at_level(logging.INFO, "vmoe"):
        found = autoattack.attack(twin, clip, y, how)
    lines = [record.getMessage() for record in caplog.records]
    right = [int(line.split()[1]) for line in lines]
    assert lines[0].endswith("of 10 clips right after apgd-ce")
    assert lines[-1].endswith("of 10 clips right after j-tlga-plus soft")
    assert right == sorted(right, reverse=True)
    assert right[-1] == int((~found.success).sum())
    caplog.clear()
    with caplog.at_level(logging.INFO, "vmoe"):
        autoattack.attack(twin, clip, (y + 1) % 4, how)
    assert len(caplog.records) == 1  # nothing was left to do

"""The benchmark of attacks: its statistics, what it counts, who takes part."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.twins import SMALL, random_clip, small
from vmoe.errors import SettingError

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # as a script sees its neighbours

from benchmarks import attacks as benchmark

contest = benchmark.contest
Clips, Contestant = contest.Clips, contest.Contestant


def test_share_and_paired_difference_in_closed_form() -> None:
    one, other = np.array([1, 1, 1, 0], bool), np.array([1, 0, 0, 0], bool)
    assert contest.share(one) == (0.75, math.sqrt(0.75 * 0.25 / 4))
    assert contest.difference(one, other) == (0.5, math.sqrt(0.25 / 4))
    assert contest.difference(one, one) == (0, 0)


def run(*contestants: Any) -> list[Any]:
    twin, clip = small(), random_clip(6, spec=SMALL)
    with torch.no_grad():
        label = twin(clip).logits.argmax(dim=1)
    label[0] = (label[0] + 1) % 4  # wrong as it is
    clips = Clips(clip, label, torch.arange(6))
    return contest.run(twin, clips, contestants, eps=1 / 255, seed=0, batch=4, done=lambda _: None)


def test_passes_of_every_expert_are_counted_and_what_early_stop_saves() -> None:
    held, stopped, every = run(
        Contestant("a", "pgd", 3, {"steps": 3, "early_stop": False}),
        Contestant("b", "pgd", 3, {"steps": 3}),
        Contestant("c", "pgd", 3, {"steps": 3, "early_stop": False, "route_grad": "all"}),
    )
    assert held.spent.expert_backwards == held.spent.gradients == 3
    assert held.spent.router_forwards == 5  # clean, three gradients, and the last point
    assert stopped.spent.gradients <= 3 * 5 / 6  # the clip that is wrong costs none
    assert every.spent.gradients == 3
    assert every.spent.expert_backwards == 12
    assert every.spent.gflops > 2 * held.spent.gflops
    assert np.array_equal(held.broken, stopped.broken)
    assert held.broken[0]


def test_a_team_is_the_worst_of_its_members() -> None:
    a, b, team = run(
        Contestant("a", "pgd", 2, {"steps": 2}),
        Contestant("b", "apgd_margin", 4, {"steps": 4}),
        Contestant("team", "", 6, team=("a", "b")),
    )
    assert np.array_equal(team.broken, a.broken | b.broken)
    assert team.spent.gradients == a.spent.gradients + b.spent.gradients


@pytest.mark.parametrize("ablations", [False, True])
def test_who_takes_part_spends_the_same_unless_it_says_so(ablations: bool) -> None:
    twin = small()
    rows = benchmark.contestants(20, twin, ablations=True)
    if ablations:
        rows = benchmark.ablated(20, twin)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert all(set(row.team) <= set(names) for row in rows)
    for row in rows:
        if row.team or row.extra:
            continue
        every = row.values.get("route_grad") in ("all", "soft")
        assert row.values["steps"] * (4 if every else 1) <= 20
        assert row.given == row.values["steps"]


@pytest.mark.parametrize("text", ["a", "a=", "=x", "a=x,a=y", "a=x@eight"])
def test_models_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(SettingError):
        benchmark.read_models(text)


def test_models_are_names_paths_and_budgets() -> None:
    one, other = benchmark.read_models("a=x/y.safetensors@1/255, b=z")
    assert one == ("a", Path("x/y.safetensors"), 1 / 255)
    assert other == ("b", Path("z"), 4 / 255)

"""benchmarks/bench.py: what it calls, what it counts as vmoe-bench's own, and what agrees."""

from __future__ import annotations

import functools
import importlib
import itertools
from pathlib import Path
from types import ModuleType

import pytest

from vmoe.runtime.bench.statistics import Summary

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the benchmark's module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench")


def test_the_bare_loop_makes_the_same_calls_in_turn_with_the_measurement(bench: ModuleType) -> None:
    seen: list[int] = []
    bench._cost(seen.append, 50)
    assert seen[0] == 0  # the warm-up
    stretches = (range(20), range(20, 40), range(40, 50))
    twice = itertools.chain.from_iterable((*each, *each) for each in stretches)
    assert seen[1:] == list(twice)


def test_a_cost_is_what_the_bare_loop_does_not_take(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of two stretches the bare loop took 10 s of 25.5 s; the warm-up's call took 0.25 s.
    whole, bare = bench.Block(25.5, 25.5), bench.Block(5.0, 5.0)

    def timed(body: object) -> object:
        assert callable(body)
        body()
        return bare if isinstance(body, functools.partial) else whole

    monkeypatch.setattr(bench, "_timed", timed)
    cost = bench._cost(lambda _: None, 40)
    assert cost.wall == cost.cpu == pytest.approx(15.5 / 10.25)


@pytest.mark.parametrize(
    ("low", "high", "fits"), [(10.5, 12, True), (11, 13, True), (11.1, 13, False)]
)
def test_two_runs_agree_where_their_intervals_meet(
    bench: ModuleType, low: float, high: float, fits: bool
) -> None:
    one = Summary(9, 9, 11, 10, 10, {}, 0, 9, 11)
    other = Summary(9, 9, 13, 12, 12, {}, 0, low, high)
    for a, b in ((one, other), (other, one)):
        assert bench._compared(a, b) == (pytest.approx(0.2), fits)

"""vmoe-bench: which calls a scenario makes, rows that fail, and a run that is cut short."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import bundles as tiny
from tests.planted import FakeClock, PlantedBackend
from vmoe import bundle as bundles
from vmoe.clips import ClipSpec
from vmoe.errors import SettingError, UnknownNameError
from vmoe.runtime.bench import forms, measuring, subjects, verdicts
from vmoe.runtime.bench.measuring import Interrupted, Plan, Took
from vmoe.runtime.bench.record import Streamed
from vmoe.runtime.bench.scenarios import multi, offline, single
from vmoe.runtime.bench.settings import BenchSettings
from vmoe.runtime.bench.statistics import summarise
from vmoe.runtime.bench.subjects import Subject
from vmoe.runtime.engine import Engine
from vmoe.runtime.engines import Times

CLIPS = 8  # of the largest call


def subject(path: Path, spec: ClipSpec, **ms: float) -> tuple[Subject, PlantedBackend]:
    """Return a bundle of three experts on a planted backend."""
    read = bundles.read(tiny.write(path, spec))
    backend = PlantedBackend(FakeClock(), read, **ms)
    engine = Engine(read, backend, "planted")
    clips = subjects.random_clips(spec, subjects.CALLS * CLIPS, seed=0)
    return Subject("b", engine, False, clips, CLIPS, threads=2), backend


# ---- settings


def test_every_core_is_a_number_of_threads_and_none_is_asked_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vmoe.runtime.bench.context.cores", lambda: 4)
    assert BenchSettings(threads=("1", "all", "4")).thread_counts() == (1, 4)
    assert BenchSettings().thread_counts() == (None,)
    both = BenchSettings(scenario=("offline", "single", "single"), batch=(2, 4, 2))
    assert both.scenarios == ("offline", "single")
    assert (both.batches("offline"), both.batches("single")) == ((2, 4), (1,))
    alone = BenchSettings(batch=(2, 4))
    assert alone.batches("single") == (2, 4)
    assert BenchSettings(scenario=("multi",)).stream_counts("multi") == (4,)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"threads": ("1", "many")}, "--threads is 'many'; it is a number from 1, or all."),
        ({"threads": ("0",)}, "--threads is '0'"),
        ({"streams": (2,)}, "--streams does nothing without --scenario multi or stream."),
        ({"scenario": ("stream",), "batch": (2,)},
         "--batch does nothing without --scenario single or offline."),
        ({"scenario": ("multi",), "streams": (2, 0)}, "--streams is 0; it must be at least 1."),
    ],
)  # fmt: skip
def test_settings_that_are_none_or_do_nothing(given: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        BenchSettings(**given)


def test_a_scenario_that_is_none() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'offline'"):
        BenchSettings(scenario=("single", "ofline"))


# ---- what is called


def test_a_sweep_has_all_forms_once_then_the_free_one_and_the_slowest_route(
    tmp_path: Path, spec: ClipSpec
) -> None:
    of, backend = subject(tmp_path / "b", spec, expert1=30.0)
    clock = backend.clock
    made = forms.sweep(of, "offline", (2, 4), "all", whole=True, wall_ns=clock)
    assert [(form.batch, form.name) for form in made[-3:]] == [
        (2, "all experts"), (4, "free"), (4, "route 1"),
    ]  # fmt: skip
    assert {(form.scenario, form.streams, form.threads, form.backend) for form in made} == {
        ("offline", 1, 2, "planted")
    }
    backend.seen.clear()
    made[-1].call(1)
    assert backend.seen == [("router", 4), ("expert1", 4)]
    short = forms.sweep(of, "offline", (2,), "all", whole=False, wall_ns=clock)
    assert [form.name for form in short] == ["free", "route 1"]
    one = forms.sweep(of, "offline", (2,), "2", whole=False, wall_ns=clock)
    assert [form.name for form in one] == ["free", "route 2"]
    free = forms.sweep(of, "offline", (2, 4), "free", whole=False, wall_ns=clock)
    assert [form.name for form in free] == ["free", "free"]


def test_a_route_that_fails_in_the_probe_is_the_slowest_and_fails_where_it_is_measured(
    tmp_path: Path, spec: ClipSpec
) -> None:
    of, backend = subject(tmp_path / "b", spec)
    backend.most = 1
    made = forms.sweep(of, "single", (2,), "all", whole=False, wall_ns=backend.clock)
    assert [form.name for form in made] == ["free", "route 0"]


def test_single_and_offline_take_their_own_batches(tmp_path: Path, spec: ClipSpec) -> None:
    of, _ = subject(tmp_path / "b", spec)
    how = BenchSettings(scenario=("single", "offline"), batch=(2, 4), force_route="0")
    assert {form.batch for form in single.calls(of, how, whole=True)} == {1}
    assert {form.batch for form in offline.calls(of, how, whole=False)} == {2, 4}


def test_a_query_holds_one_window_of_each_stream_and_runs_each_expert_once(
    tmp_path: Path, spec: ClipSpec
) -> None:
    of, backend = subject(tmp_path / "b", spec)
    made = multi.calls(of, BenchSettings(scenario=("multi",), streams=(1, 5)))
    assert [(form.name, form.batch, form.streams) for form in made] == [
        ("free", 1, 1), ("free", 5, 5), ("mixed routes", 5, 5),
    ]  # fmt: skip
    backend.seen.clear()
    made[2].call(0)
    assert backend.seen == [("router", 5), ("expert0", 2), ("expert1", 2), ("expert2", 1)]
    base = multi.calls(replace(of, baseline=True), BenchSettings(scenario=("multi",)))
    assert [form.name for form in base] == ["free"]


def test_an_online_bundle_answers_no_query(tmp_path: Path, spec: ClipSpec) -> None:
    of, _ = subject(tmp_path / "b", spec)
    of.engine.bundle = replace(of.bundle, extra={"form": "online"})
    (form, _) = multi.calls(of, BenchSettings(scenario=("multi",)))
    with pytest.raises(SettingError, match="frame by frame, which is no query: use --scenario st"):
        form.call(0)


# ---- calls that fail, or are cut short


def test_a_call_that_fails_is_told_and_the_others_go_on() -> None:
    clock, told = FakeClock(), []

    def fails(number: int) -> None:
        clock.work(5)
        if number == 2:
            raise RuntimeError("boom")

    took = measuring.interleave(
        [lambda _: clock.work(1), fails],
        Plan(rounds=4),
        on_error=lambda at, e: told.append((at, str(e))),
        wall_ns=clock,
        cpu_ns=clock,
    )
    assert told == [(1, "boom")]
    assert [samples.wall_ms.tolist() for samples in took] == [[1] * 4, [5] * 2]


def test_a_call_that_fails_in_the_warm_up_is_never_measured() -> None:
    def fails(_: int) -> None:
        raise RuntimeError("boom")

    told: list[int] = []
    (took,) = measuring.interleave([fails], Plan(rounds=9), on_error=lambda at, _: told.append(at))
    assert told == [0]
    assert len(took.wall_ms) == 0
    with pytest.raises(RuntimeError, match="boom"):
        measuring.interleave([fails], Plan(rounds=1))


def test_what_is_cut_short_keeps_the_rounds_that_were_whole() -> None:
    clock = FakeClock()

    def cut(rounds: Iterable[int]) -> Iterator[int]:
        for number in rounds:
            if number == 3:
                raise KeyboardInterrupt
            yield number

    with pytest.raises(Interrupted) as found:
        measuring.interleave(
            [lambda _: clock.work(1)], Plan(rounds=9), show=cut, wall_ns=clock, cpu_ns=clock
        )
    assert [samples.wall_ms.tolist() for samples in found.value.samples] == [[1, 1, 1]]

    def at_once(number: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as bare:
        measuring.interleave([at_once], Plan(rounds=9))
    assert not isinstance(bare.value, Interrupted)


def test_a_call_that_measured_itself_is_believed() -> None:
    clock = FakeClock()
    (took,) = measuring.interleave(
        [lambda _: Took(0.25)], Plan(rounds=2), wall_ns=clock, cpu_ns=clock
    )
    assert took.wall_ms.tolist() == [0.25, 0.25]


# ---- what is said of streams, and of a GPU's times


def test_streams_that_lose_something_and_those_that_keep_up() -> None:
    good = Streamed(3.0, 0.2, 15, 0, 0, 90, 0)
    ages = summarise(np.linspace(10, 20, 15))
    said = verdicts.of_streams({"b free": (good, ages)})
    assert [(v.name, v.good) for v in said] == [("keeps up", True), ("few windows", None)]
    assert "percentile 99 of 15 windows is about the slowest: --duration 20 or" in said[1].says
    bad = replace(good, windows_dropped=4, frames_dropped=30)
    many = summarise(np.linspace(10, 20, 150))
    (lost,) = verdicts.of_streams({"b free": (good, many), "c free": (bad, many)})
    assert lost.name == "dropped"
    assert "1 of 2 rows" in lost.says
    assert "c free, 4 windows, 0 that were incomplete, 30 frames; 15 windows labelled" in lost.says
    assert verdicts.of_streams({}) == []


@pytest.mark.parametrize(
    ("times", "names"),
    [
        (Times(0.1, 0.5, 1.0, 0.1), []),
        (Times(0.1, 0.9, 1.0, 0.1), ["enqueue-bound"]),
        (Times(0.9, 0.1, 1.0, 0.2), ["transfer-bound"]),
        (Times(0.0, 0.0, 0.0, 0.0), []),
    ],
)
def test_a_gpu_that_waits_for_its_host_or_for_copies(times: Times, names: list[str]) -> None:
    said = verdicts.of_device({"b free": times, "b route 0": Times(0, 0, 1, 0)})
    assert [verdict.name for verdict in said] == names
    assert all("1 of 2 rows (most: b free)" in verdict.says for verdict in said)

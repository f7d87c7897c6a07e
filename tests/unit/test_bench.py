"""vmoe-bench: statistics in closed form, the certificate's arithmetic, a planted dense engine."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import bundles as tiny
from tests.planted import FakeClock, PlantedBackend
from vmoe import bundle as bundles
from vmoe.clips import ClipSpec
from vmoe.errors import EngineMismatchError, SettingError
from vmoe.runtime.bench import certificate, context, forms, measuring, subjects, verdicts
from vmoe.runtime.bench.certificate import Against, Certificate, Entry, Measured, Route
from vmoe.runtime.bench.measuring import Plan, Samples
from vmoe.runtime.bench.statistics import Ratio, median_interval, ratio, summarise
from vmoe.runtime.bench.subjects import Subject
from vmoe.runtime.engine import Engine

# ---- statistics


def test_a_summary_is_what_numpy_and_the_definition_say() -> None:
    made = summarise(np.arange(1.0, 102.0), (50, 90, 99.9))
    assert (made.n, made.min, made.max, made.mean, made.median) == (101, 1, 101, 51, 51)
    assert made.percentiles == pytest.approx({"50": 51, "90": 91, "99.9": 100.9})
    assert made.cv == pytest.approx(np.sqrt(101 * 102 / 12) / 51)  # variance n (n + 1) / 12


def test_one_call_has_no_variation_and_no_interval() -> None:
    made = summarise(np.array([3.0]))
    assert (made.cv, made.low, made.high) == (0, None, None)


def test_the_spread_of_a_median_is_by_stretches_so_that_a_drift_widens_it() -> None:
    # Twelve stretches of five calls.
    made = summarise(np.repeat(np.arange(1.0, 13.0), 5))
    assert (made.low, made.median, made.high) == (1, 6.5, 12)
    noise = np.random.default_rng(0).normal(10, 1, 600)
    steady, drifting = summarise(noise), summarise(noise + np.linspace(-4, 4, 600))
    assert steady.low is not None
    assert steady.high is not None
    assert drifting.low is not None
    assert drifting.high is not None
    assert steady.high - steady.low < 1
    assert drifting.high - drifting.low > 3


@pytest.mark.parametrize(
    ("n", "places"),
    # Conover's table of the sign test: ranks that enclose the median with at least 95 %.
    [(5, None), (6, (1, 6)), (9, (2, 8)), (12, (3, 10)), (20, (6, 15)), (25, (8, 18))],
)
def test_the_sign_interval_has_the_ranks_of_the_tables(
    n: int, places: tuple[int, int] | None
) -> None:
    shuffled = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    assert median_interval(shuffled) == (places or (None, None))


def test_the_sign_interval_covers_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        low, high = median_interval(rng.exponential(size=40))
        assert low is not None
        assert high is not None
        hits += low <= np.log(2) <= high
    assert 0.92 < hits / 400 <= 1


def test_a_ratio_is_of_medians_of_minima_and_of_rounds() -> None:
    router, expert = np.full(7, 1.0), np.array([9.0, 9, 9, 9, 9, 9, 19])
    route = np.array([11.0, 11, 11, 11, 11, 11, 22])  # the last round was slow for all
    found = ratio(route, router, expert)
    assert (found.medians, found.minima) == pytest.approx((1.1, 1.1))
    assert (found.low, found.high) == pytest.approx((1.1, 1.1))


# ---- measuring


def test_every_form_is_called_once_a_round_and_every_time_is_kept() -> None:
    clock, seen = FakeClock(), []

    def call(which: int, number: int) -> None:
        seen.append((number, which))
        clock.work(10 * which + number)

    calls = [lambda n, i=i: call(i, n) for i in range(3)]
    took = measuring.interleave(calls, Plan(rounds=4), wall_ns=clock, cpu_ns=clock)
    for which, samples in enumerate(took):
        assert samples.wall_ms.tolist() == [10 * which + n for n in range(4)]
        assert samples.cpu_ms.tolist() == samples.wall_ms.tolist()
    counted = seen[3:]  # one round of warm-up
    assert [number for number, _ in counted] == sorted([0, 1, 2, 3] * 3)
    orders = {tuple(which for n, which in counted if n == number) for number in range(4)}
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert len(orders) > 1  # else each form always has the same predecessor


def test_orders_are_drawn_anew_for_each_round_and_are_of_the_seed() -> None:
    rounds = measuring.DRAWN + 3  # more than are drawn at once
    orders = [list(islice(measuring._orders(4, seed), rounds)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders[0])
    assert len({tuple(order) for order in orders[0]}) == 24
    assert orders[0][:3] != orders[0][measuring.DRAWN :]


def test_a_latency_holds_the_call_and_no_other_clock() -> None:
    wall, cpu = FakeClock(), FakeClock()

    def cpu_ns() -> int:
        wall.work(1)  # to read it takes time
        return cpu()

    (took,) = measuring.interleave(
        [lambda _: wall.work(5)], Plan(rounds=2), wall_ns=wall, cpu_ns=cpu_ns
    )
    assert took.wall_ms.tolist() == [5, 5]


def test_no_garbage_is_collected_within_a_call_and_it_is_afterwards() -> None:
    seen: list[bool] = []
    assert gc.isenabled()
    measuring.interleave([lambda _: seen.append(gc.isenabled())], Plan(rounds=2))
    assert seen == [True, False, False]  # the first is the warm-up
    assert gc.isenabled()


def test_duration_and_warm_up_are_kept() -> None:
    clock, calls = FakeClock(), []

    def call(number: int) -> None:
        calls.append(number)
        clock.work(100)

    plan = Plan(rounds=2, duration_s=1.0, warmup_s=0.3)
    (took,) = measuring.interleave([call], plan, wall_ns=clock, cpu_ns=clock)
    assert len(took.wall_ms) == 10
    assert calls[:3] == [0, 1, 2]
    assert len(calls) == 13


# ---- the certificate, on planted numbers


def planted(**times_ms: float) -> Measured:
    """Return samples that are all alike: `split__route_0=11` is split's `route 0`.

    Routes have half of their time as CPU time, all else all of it.
    """
    named = {}
    for key, ms in times_ms.items():
        subject, form = key.split("__")
        times = np.full(8, ms)
        cpu = times / 2 if form.startswith("route_") else times
        named[subject, form.replace("_", " ")] = Samples(times, cpu)
    return named


def entry(name: str, lowering: str, experts: int = 2, **more: Any) -> Entry:
    path = Path("my runs", name)
    return Entry(name, path, lowering, experts, more.pop("twin", "t"), (4, 32, 32), **more)


SPLIT = entry("split", "split")
ONE = entry("one", "if")
DENSE = entry("dense", "split", 1, twin="d", baseline=True, random=True)
TIMES = planted(
    split__free=11, split__route_0=11, split__route_1=22, split__router_alone=1,
    split__expert_0_alone=9, split__expert_1_alone=19, one__route_0=12, one__route_1=24,
    dense__free=40,
)  # fmt: skip


def test_the_certificate_of_a_split_bundle_is_of_its_own_parts() -> None:
    made = certificate.certify(SPLIT, [SPLIT, ONE, DENSE], TIMES)
    assert (made.parts_of, made.why, made.worst) == ("split", None, 1)
    assert [r.latency_ms for r in made.routes] == [11, 22]
    assert [r.alone_ms for r in made.routes] == pytest.approx([10, 20])
    assert [r.ratio.medians for r in made.routes if r.ratio] == pytest.approx([1.1, 1.1])
    assert [r.cpu.medians for r in made.routes if r.cpu] == pytest.approx([0.55, 0.55])
    (against,) = made.against
    assert (against.baseline, against.same_lowering, against.dense) == ("dense", True, True)
    assert [r.medians for r in against.ratios] == pytest.approx([11 / 40, 22 / 40])
    assert against.worst.medians == pytest.approx(22 / 40)


@pytest.mark.parametrize("missing", ["route 0", "expert 0 alone"])
def test_a_route_that_is_missing_makes_nothing_sparse(missing: str) -> None:
    some = {name: samples for name, samples in TIMES.items() if name != ("split", missing)}
    made = certificate.certify(SPLIT, [SPLIT], some)
    assert made.why == "route 0 of 2 could not be judged: not asked for, or failed"
    (said,) = verdicts.of_certificate(made)
    assert (said.name, said.good) == ("unclear", None)
    assert "route 1 costs 1.10" in said.says
    assert said.says.endswith(f"but {made.why}.")


def test_certificates_of_several_threads_are_told_apart() -> None:
    made = certificate.certify(SPLIT, [SPLIT, DENSE], TIMES)
    said = verdicts.of_certificate(replace(made, threads=2))
    assert [v.name for v in said] == ["sparse", "against"]
    assert all(v.says.startswith("threads 2: ") for v in said)


def test_a_clock_of_cpu_time_that_is_too_coarse_gives_no_ratio() -> None:
    coarse = {name: Samples(s.wall_ms, np.zeros(8)) for name, s in TIMES.items()}
    made = certificate.certify(SPLIT, [SPLIT], coarse)
    assert [r.cpu for r in made.routes] == [None, None]
    assert verdicts.of_certificate(made)[0].name == "sparse"


def test_a_bundle_in_one_file_takes_the_parts_of_a_split_one_of_its_twin() -> None:
    made = certificate.certify(ONE, [ONE, SPLIT], TIMES)
    assert made.parts_of == "split"
    assert [r.ratio.medians for r in made.routes if r.ratio] == pytest.approx([1.2, 1.2])


@pytest.mark.parametrize(
    "other",
    [
        entry("split", "split", twin="another"),
        entry("split", "split", precision="fp16"),
        entry("elsewhere", "split"),
    ],
)
def test_parts_of_another_twin_or_precision_do_not_serve(other: Entry) -> None:
    made = certificate.certify(ONE, [ONE, other], TIMES)
    assert made.parts_of is None
    assert "vmoe-export CKPT --lowering split" in str(made.why)
    assert "vmoe-bench 'my runs/one' DIR" in str(made.why)
    (said,) = verdicts.of_certificate(made)
    assert said.name == "uncertified"


def test_a_baseline_of_another_lowering_or_clip_certifies_nothing() -> None:
    smaller = Entry("small", Path("small"), "if", 1, "d", (4, 16, 16), baseline=True)
    made = certificate.certify(ONE, [ONE, DENSE, smaller], TIMES)
    assert [(a.baseline, a.same_lowering) for a in made.against] == [("dense", False)]
    said = {verdict.name: verdict.says for verdict in verdicts.of_certificate(made)}
    assert "certifies nothing" in said["other lowering"]
    assert "serves latency only" in said["other lowering"]


# ---- verdicts


def certified(medians: float, minima: float, latency_ms: float = 50) -> Certificate:
    return of_worst(Ratio(medians, minima, minima, medians), latency_ms)


def of_worst(worst: Ratio, latency_ms: float = 50) -> Certificate:
    alone_ms = latency_ms / worst.medians
    return Certificate("b", "b", None, (Route(0, latency_ms, alone_ms, worst),), 0, ())


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (certified(1.04, 1.02), "sparse"),
        (certified(1.3, 1.3), "sparse"),
        (certified(3.9, 3.8), "not sparse"),
        (certified(1.5, 1.1), "unclear"),
        (certified(2.0, 2.0, latency_ms=0.1), "unclear"),  # the host's own time
        (of_worst(Ratio(3.9, 3.8, None, None)), "unclear"),  # fewer calls than an interval takes
        (of_worst(Ratio(1.0, 1.0, None, None)), "unclear"),
    ],
)
def test_sparse_not_sparse_or_unclear(made: Certificate, name: str) -> None:
    (said,) = verdicts.of_certificate(made)
    assert said.name == name
    assert said.good is {"sparse": True, "not sparse": False}.get(name)
    assert "route 0 costs" in said.says


def test_against_a_dense_counterpart_only_less_is_good() -> None:
    for medians, good in ((0.31, True), (1.2, False)):
        worst = Ratio(medians, medians, 0.3, 0.4)
        against = Against("d", True, True, False, (worst,), worst)
        made = Certificate("b", None, "why", (), None, (against,))
        assert verdicts.of_certificate(made)[1].good is good


def test_unstable_and_too_few_calls_are_said() -> None:
    steady, restless = np.full(50, 5.0), np.tile([5.0, 10.0], 25)
    rows = {"b free": summarise(steady), "b route 0": summarise(restless)}
    said = {verdict.name: verdict.says for verdict in verdicts.of_rows(rows)}
    assert said["unstable"].startswith("1 of 2 rows")
    assert "b route 0" in said["unstable"]
    assert "--iterations 100" in said["few calls"]
    assert not verdicts.of_rows({"b free": summarise(np.full(100, 5.0))})


def test_a_busy_machine_and_a_saving_governor_are_said() -> None:
    quiet = {"load_1min": 0.1, "cores": 4, "quota_cores": None, "governor": None}
    assert not verdicts.of_context(quiet)
    busy = {"load_1min": 5.0, "cores": 4, "quota_cores": 1.5, "governor": "powersave"}
    assert [v.name for v in verdicts.of_context(busy)] == ["loaded", "quota", "governor"]


def test_pieces_and_random_weights_are_said() -> None:
    (said,) = verdicts.of_pieces({"b": 1, "c": 8}, 8)
    assert said.bundle == "b"
    assert [v.name for v in verdicts.of_accuracy([], ["d"])] == ["no accuracy", "random weights"]


def test_the_machine_can_be_read() -> None:
    read = context.read()
    assert read["cpu"]
    assert read["cores"] >= 1
    assert read["versions"]["vmoe"]
    assert read["versions"]["numpy"] in context.line(read)


# ---- a planted engine, through the real engine, forms and measuring


@pytest.mark.parametrize(
    ("moe_ms", "name"),
    [(11.2, "sparse"), (1 + 3 * 10, "not sparse")],  # an If; all three experts and a select
)
def test_an_engine_that_runs_every_expert_is_not_sparse(
    tmp_path: Path, spec: ClipSpec, moe_ms: float, name: str
) -> None:
    clock = FakeClock()
    found = []
    for folder, lowering in (("split", "split"), ("one", "if")):
        read = bundles.read(tiny.write(tmp_path / folder, spec, lowering=lowering))
        engine = Engine(read, PlantedBackend(clock, read, moe_ms), "planted")
        clips = np.zeros((subjects.CALLS, *spec.shape), np.uint8)
        found.append(Subject(folder, engine, False, clips, 1))
    calls = [form for subject in found for form in forms.of(subject, "all")]
    took = measuring.interleave(
        [form.call for form in calls], Plan(rounds=6), wall_ns=clock, cpu_ns=clock
    )
    measured = {(f.subject, f.name): s for f, s in zip(calls, took, strict=True)}
    entries = [certificate.entry(s.name, s.bundle) for s in found]
    split, one = (certificate.certify(e, entries, measured) for e in entries)
    assert verdicts.of_certificate(split)[0].name == "sparse"
    assert verdicts.of_certificate(one)[0].name == name
    assert [r.ratio.medians for r in one.routes if r.ratio] == pytest.approx([moe_ms / 11] * 3)


# ---- subjects and forms


def test_clips_are_textured_moving_and_of_their_seed(spec: ClipSpec) -> None:
    clips = subjects.random_clips(spec, 3, seed=5)
    assert clips.shape == (3, *spec.shape)
    assert clips.dtype == np.uint8
    assert (subjects.random_clips(spec, 3, seed=5) == clips).all()
    assert (subjects.random_clips(spec, 3, seed=6) != clips).any()
    assert all(clip.std() > 5 for clip in clips)
    assert all((clip[0] != clip[-1]).any() for clip in clips)


@pytest.mark.parametrize(("asked", "routes"), [("all", (0, 1, 2)), ("free", ()), ("1", (1,))])
def test_routes_that_are_asked(asked: str, routes: tuple[int, ...]) -> None:
    assert forms.routes_asked(asked, 3) == routes


@pytest.mark.parametrize(
    ("asked", "says"),
    [("al", "did you mean 'all'"), ("3", "experts 0 to 2"), ("-1", "all, free or a number")],
)
def test_routes_that_are_none(asked: str, says: str) -> None:
    with pytest.raises(SettingError, match=says):
        forms.routes_asked(asked, 3)


def open_all(stack: ExitStack, *paths: Path, baselines: tuple[Path, ...] = ()) -> list[Subject]:
    how: dict[str, Any] = {"backend": "auto", "device": "cpu", "threads": 1}
    return subjects.open_all(stack, paths, baselines, batch=2, seed=0, **how)


def test_two_folders_of_one_name_are_told_apart(tmp_path: Path, spec: ClipSpec) -> None:
    paths = [tiny.write(tmp_path / place / "bundle", spec) for place in "ab"]
    with ExitStack() as stack:
        names = [subject.name for subject in open_all(stack, *paths)]
    assert names == [str(path) for path in paths]


def test_the_same_bundle_twice_is_refused(tmp_path: Path, spec: ClipSpec) -> None:
    path = tiny.write(tmp_path / "bundle", spec)
    again = tmp_path / "." / "x" / ".." / "bundle"
    with ExitStack() as stack, pytest.raises(SettingError, match="given twice"):
        open_all(stack, path, baselines=(again,))


def test_a_baseline_of_another_clip_spec_is_refused(tmp_path: Path, spec: ClipSpec) -> None:
    path = tiny.write(tmp_path / "bundle", spec)
    other = tiny.write(tmp_path / "other", ClipSpec(frames=8, height=32, width=32), experts=1)
    with ExitStack() as stack, pytest.raises(EngineMismatchError, match="8x32x32, the bundle 4x"):
        open_all(stack, path, baselines=(other,))


def test_a_dense_bundle_has_one_form_and_a_split_one_all(tmp_path: Path, spec: ClipSpec) -> None:
    paths = [
        tiny.write(tmp_path / "split", spec, experts=2),
        tiny.write(tmp_path / "dense", spec, experts=1),
    ]
    with ExitStack() as stack:
        split, dense = open_all(stack, *paths)
        made = forms.of(split, "all")
        for form in made:
            form.call(7)
    assert [form.name for form in forms.of(dense, "all")] == ["free"]
    assert [form.name for form in made] == [
        "free", "route 0", "route 1", "router alone", "expert 0 alone", "expert 1 alone",
        "all experts",
    ]  # fmt: skip
    assert [f.name for f in forms.of(split, "1")] == [
        "free", "route 1", "router alone", "expert 1 alone",
    ]  # fmt: skip

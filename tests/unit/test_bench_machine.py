"""vmoe-bench looks at the machine: files of a planted one, and what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vmoe.runtime.bench import context, sensors, verdicts, watch
from vmoe.runtime.bench.statistics import Drift, drift
from vmoe.runtime.bench.watch import Watch


def plant(root: Path, **files: object) -> Path:
    """Write files; `a__b` is a/b."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def machine(root: Path, *, khz: int = 3_000_000, hot: int = 60_000, steal: int = 5) -> Path:
    plant(
        root,
        sys__devices__system__cpu__cpu0__cpufreq__scaling_cur_freq=khz,
        sys__devices__system__cpu__cpu1__cpufreq__scaling_cur_freq=800_000,
        sys__devices__system__cpu__cpu0__thermal_throttle__core_throttle_count=2,
        sys__class__thermal__thermal_zone0__temp=hot,
        proc__stat=f"cpu  100 0 50 {845 - steal} 5 0 0 {steal} 7 0\ncpu0 1 2 3",
    )
    return root


# ---- what is read


def test_a_machine_that_tells_nothing_is_none(tmp_path: Path) -> None:
    assert sensors.clock_mhz(tmp_path) is None
    assert sensors.temperature_c(tmp_path) is None
    assert sensors.throttles(tmp_path) is None
    assert sensors.stolen(tmp_path) is None
    assert sensors.quota(tmp_path) == (None, None)
    found = Watch(root=tmp_path).found()
    assert {key for key, value in found.items() if value is not None} <= {"seconds", "load_1min"}


def test_the_fastest_core_and_the_hottest_sensor_are_read(tmp_path: Path) -> None:
    machine(tmp_path)
    plant(tmp_path, sys__class__hwmon__hwmon0__temp1_input=71_500)
    plant(tmp_path, sys__class__hwmon__hwmon0__temp2_input="N/A")
    assert sensors.clock_mhz(tmp_path) == 3000
    assert sensors.temperature_c(tmp_path) == 71.5
    assert sensors.throttles(tmp_path) == 2
    assert sensors.stolen(tmp_path) == (5, 1000)


def test_the_narrowest_quota_of_version_2_counts(tmp_path: Path) -> None:
    plant(
        tmp_path,
        proc__self__cgroup="0::/pod/box",
        sys__fs__cgroup__pod__cpu_max="",
        sys__fs__cgroup__pod__box__note="",
    )
    box = tmp_path / "sys/fs/cgroup/pod/box"
    (box / "cpu.max").write_text("max 100000\n")
    assert sensors.quota(tmp_path) == (None, None)
    (box / "cpu.max").write_text("400000 100000\n")
    (box.parent / "cpu.max").write_text("150000 100000\n")
    (box.parent / "cpu.stat").write_text("usage_usec 9\nthrottled_usec 2500000\n")
    assert sensors.quota(tmp_path) == (1.5, 2.5)


def test_a_quota_of_version_1_is_read_at_the_mount_of_a_container(tmp_path: Path) -> None:
    plant(tmp_path, proc__self__cgroup="5:memory:/x\n4:cpu,cpuacct:/docker/1\n0::/")
    folder = tmp_path / "sys/fs/cgroup/cpu"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text("200000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    (folder / "cpu.stat").write_text("nr_periods 3\nthrottled_time 4000000000\n")
    assert sensors.quota(tmp_path) == (2, 4)
    (folder / "cpu.cfs_quota_us").write_text("-1\n")
    assert sensors.quota(tmp_path) == (None, None)


def test_what_nvidia_smi_says_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert context.gpu_now() == (None, None)
    told.write_text("#!/bin/sh\necho '1410, 55'\necho '210, [N/A]'\n")
    told.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert context.gpu_now() == (1410, 55)
    seen = Watch(gpu=True, root=tmp_path).found()
    assert seen["gpu_clock_mhz"]["max"] == 1410
    assert seen["gpu_temperature_c"]["second_half"] == 55
    told.write_text("#!/bin/sh\nexit 9\n")
    assert context.gpu_now() == (None, None)


def test_a_watch_looks_between_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "EVERY_S", 0.0)
    seen = Watch(root=machine(tmp_path))
    for number in seen.rounds(range(4)):
        machine(tmp_path, khz=3_000_000 - 500_000 * number, hot=60_000 + 9_000 * number, steal=105)
    found = seen.found()
    assert found["clock_mhz"] == {
        "min": 2000, "max": 3000, "first_half": 3000, "second_half": 2500,
    }  # fmt: skip
    assert found["temperature_c"]["max"] == 78
    assert found["steal_share"] is None  # the planted sum of ticks stood still
    plant(tmp_path, proc__stat="cpu  100 0 50 1000 5 0 0 105 7 0")
    assert found["throttles"] == 0
    assert seen.found()["steal_share"] == pytest.approx(100 / 260, abs=1e-4)


# ---- what is said of it


def during(**more: Any) -> dict[str, Any]:
    quiet: dict[str, Any] = dict.fromkeys(
        ("clock_mhz", "gpu_clock_mhz", "throttles", "quota_stopped_s", "steal_share")
    )
    return {**quiet, "seconds": 10.0, **more}


def halves(first: float, second: float) -> dict[str, float]:
    return {"min": 0, "max": 0, "first_half": first, "second_half": second}


@pytest.mark.parametrize(
    ("seen", "drifted", "name", "says"),
    [
        ({}, None, None, ""),
        ({}, Drift(1.2, True), "throttled", "20% slower than the first, beyond noise, and no"),
        ({}, Drift(1.2, False), None, ""),
        ({}, Drift(1.04, True), None, ""),
        ({}, Drift(0.7, True), None, ""),
        ({"clock_mhz": halves(3000, 2990)}, Drift(1.2, True), "drifting", "though the clock held"),
        ({"clock_mhz": halves(3000, 2400)}, Drift(1.2, True), "throttled",
         "the CPU's clock fell from 3000 to 2400 MHz; the second half of the run was 20% slower"),
        ({"gpu_clock_mhz": halves(1980, 1200)}, None, "throttled", "the GPU's clock fell"),
        ({"throttles": 3}, None, "throttled", "heat lowered a clock 3 times"),
        ({"quota_stopped_s": 0.5}, None, "throttled", "quota stopped its threads for 0.5 s"),
        ({"quota_stopped_s": 0.05}, None, None, ""),
        ({"steal_share": 0.07}, None, "stolen", "gave 7% of this machine's CPU time to others"),
        ({"steal_share": 0.01}, None, None, ""),
    ],
)  # fmt: skip
def test_what_held_the_machine_back_is_said(
    seen: dict[str, Any], drifted: Drift | None, name: str | None, says: str
) -> None:
    said = verdicts.of_watch(during(**seen), drifted)
    assert [verdict.name for verdict in said] == [name] * (name is not None)
    assert all(says in verdict.says and verdict.good is False for verdict in said)


# ---- the trend within a run


def test_a_run_that_slows_down_is_told_from_noise_and_from_one_slow_form() -> None:
    rng = np.random.default_rng(0)
    noise = [np.exp(rng.normal(0, 0.1, 60)) * ms for ms in (1.0, 20.0, 5.0)]
    steady = drift(noise)
    assert steady is not None
    assert not steady.sure
    slope = np.linspace(1, 1.4, 60)
    slower = drift([times * slope for times in noise])
    assert slower is not None
    assert slower.sure
    assert slower.ratio == pytest.approx(1.18, abs=0.05)
    one = drift([np.where(np.arange(60) == 40, 1000.0, times) for times in noise])
    assert one is not None
    assert not one.sure


def test_bursts_that_last_for_many_rounds_are_no_trend() -> None:
    calm = np.random.default_rng(0).normal(10, 0.01, 1200)
    burst = np.repeat([1, 1, 1.4, 1, 1.4, 1, 1, 1.4, 1.4, 1, 1.4, 1.4], 100)
    found = drift([calm * burst])
    assert found is not None
    assert found.ratio > 1.3  # by the rounds one by one it would be beyond any doubt
    assert not found.sure


def test_a_short_run_has_no_trend() -> None:
    assert drift([np.arange(1.0, 12.0)]) is None
    assert drift([]) is None

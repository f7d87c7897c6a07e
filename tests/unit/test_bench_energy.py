"""Energy: meters over planted counters, real lines of tegrastats, and the blocks' arithmetic."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmoe.errors import MissingDependencyError, SettingError, VmoeError
from vmoe.runtime.bench import energy, power
from vmoe.runtime.bench.energy import Method
from vmoe.runtime.bench.power import nvml, rapl, tegrastats
from vmoe.runtime.bench.power._sampled import Integral, Poll

# Lines as boards print them: Orin Nano (L4T 36), Nano, TX1, AGX Xavier; AGX Orin as a plain user.
ORIN_NANO = (
    "11-30-2025 13:26:01 RAM 2461/7620MB (lfb 3x2MB) SWAP 1243/3810MB (cached 5MB) CPU "
    "[19%@729,14%@729,22%@729,8%@729,15%@729,17%@729] EMC_FREQ 4%@2133 GR3D_FREQ 0%@[305] NVDEC "
    "off NVJPG off NVJPG1 off VIC off OFA off APE 200 cpu@46.531C soc2@47.312C soc0@46.593C "
    "gpu@48.218C tj@48.843C soc1@48.843C VDD_IN 5704mW/5704mW VDD_CPU_GPU_CV 831mW/831mW VDD_SOC "
    "1624mW/1624mW"
)
NANO = (
    "RAM 613/3964MB (lfb 634x4MB) SWAP 0/1982MB (cached 0MB) CPU [2%@102,1%@102,0%@102,0%@102] "
    "EMC_FREQ 0% GR3D_FREQ 0% PLL@39C CPU@40.5C PMIC@100C GPU@41C AO@46C thermal@41C POM_5V_IN "
    "900/943 POM_5V_GPU 0/0 POM_5V_CPU 123/123"
)
TX1 = (
    "RAM 1179/3983MB (lfb 120x4MB) IRAM 0/252kB(lfb 252kB) CPU [1%@102,4%@102,0%@102,0%@102] "
    "EMC_FREQ 7%@408 GR3D_FREQ 0%@76 APE 25 AO@42.5C CPU@37.5C GPU@39C PLL@37C Tdiode@42.75C "
    "PMIC@100C Tboard@42C thermal@38.5C VDD_IN 2532/2698 VDD_CPU 76/178 VDD_GPU 19/19"
)
AGX_XAVIER = (
    "RAM 1903/15692MB (lfb 3251x4MB) CPU [1%@1190,1%@1190,2%@1190,0%@1190] EMC_FREQ 0% GR3D_FREQ "
    "0% AO@32.5C GPU@32C Tboard@32C Tdiode@34.75C AUX@31.5C CPU@33.5C thermal@32.9C PMIC@100C GPU "
    "0/0 CPU 216/216 SOC 864/864 CV 0/0 VDDRQ 144/144 SYS5V 1889/1889"
)
NOT_ROOT = (
    "RAM 4093/30596MB (lfb 7x4MB) SWAP 0/15298MB (cached 0MB) CPU [9%@2188,4%@2188] EMC_FREQ "
    "2%@2133 GR3D_FREQ 25%@[1377] CPU@49C GPU@48.281C"
)


# ---- power summed up


def test_power_is_summed_by_trapezoids_and_held_since_the_last_reading() -> None:
    now = [10.0]
    sums = Integral(lambda: now[0])
    assert sums.joules() == 0
    for at, watts in ((10, 4.0), (12, 6.0), (13, 6.0)):
        now[0] = at
        sums.add(watts)
    assert sums.joules() == pytest.approx(2 * 5 + 6)
    now[0] = 13.5
    assert sums.joules() == pytest.approx(16 + 3)


def test_a_poll_reads_until_it_is_closed_and_says_what_failed() -> None:
    poll = Poll(lambda: 7.0, 0.001)
    time.sleep(0.01)
    assert poll.joules() > 0
    poll.close()
    poll.close()
    answers = iter([1.0])

    def watts() -> float:
        for value in answers:
            return value
        raise VmoeError("gone")

    poll = Poll(watts, 0.001)
    poll._thread.join()
    with pytest.raises(VmoeError, match="gone"):
        poll.joules()
    poll.close()


# ---- RAPL


def zone(root: Path, folder: str, name: str, energy_uj: int, whole: int = 262143328850) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    (path / "max_energy_range_uj").write_text(f"{whole}\n")
    return path


def test_rapl_counts_packages_and_memory_and_not_what_they_hold(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    core = zone(tmp_path, "intel-rapl:0:0", "core", 500_000)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 0)
    whole = zone(tmp_path, "intel-rapl:1", "psys", 0)
    again = zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0)
    meter = rapl.open_meter("auto", tmp_path)
    assert meter.covers == "CPU (1 package, memory), by RAPL"
    assert meter.joules() == 0
    for path, risen in ((package, 3_500_000), (core, 900_000), (memory, 250_000),
                        (whole, 9_000_000), (again, 9_000_000)):  # fmt: skip
        (path / "energy_uj").write_text(str(risen))
    assert meter.joules() == pytest.approx(2.5 + 0.25)
    meter.close()


def test_a_counter_that_begins_anew_is_followed(tmp_path: Path) -> None:
    counters = [
        zone(tmp_path, f"intel-rapl:{i}", f"package-{i}", 9_000_000, 10_000_000) for i in (0, 1)
    ]
    meter = rapl.open_meter("cpu", tmp_path)
    assert meter.covers == "CPU (2 packages, memory not counted), by RAPL"
    (counters[0] / "energy_uj").write_text("1000000")
    assert meter.joules() == pytest.approx(2)
    (counters[0] / "energy_uj").write_text("1500000")
    assert meter.joules() == pytest.approx(2.5)


def test_no_counter_and_no_number_are_said(tmp_path: Path) -> None:
    with pytest.raises(VmoeError, match=r"no RAPL counter of a package under .*virtual machine"):
        rapl.open_meter("cpu", tmp_path)
    package = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    (package / "energy_uj").write_text("much")
    with pytest.raises(VmoeError, match=r"energy_uj holds no number.* Use --power none"):
        rapl.open_meter("cpu", tmp_path)
    (package / "energy_uj").unlink()
    with pytest.raises(VmoeError, match=r"energy_uj: No such file.* Use --power none"):
        rapl.open_meter("cpu", tmp_path)


def deny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no one read energy_uj, as since Linux 5.10 no one but root may; tests may be root."""
    read = Path.read_text

    def denied(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, os.strerror(13), str(path))
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", denied)


def test_a_counter_that_may_not_be_read_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    deny(monkeypatch)
    with pytest.raises(VmoeError) as found:
        rapl.open_meter("cpu", tmp_path)
    assert found.value.exit_code == 1
    assert str(found.value) == (
        f"cannot read {tmp_path}/intel-rapl:0/energy_uj: Permission denied. Run as root, or until "
        "the next boot: sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj"
    )


# ---- NVML


class Card:
    """libnvidia-ml.so.1 as far as it is called; answers are the codes of its functions."""

    def __init__(self, **answers: int) -> None:
        self.answers = answers
        self.millijoules, self.milliwatts = 5_000_000_000_000, 71_500  # beyond 32 bits
        self.closed = 0

    def library(self) -> SimpleNamespace:
        def answer(name: str, then: Callable[..., None]) -> Callable[..., int]:
            def call(*args: Any) -> int:
                if not self.answers.get(name, 0):
                    then(*args)
                return self.answers.get(name, 0)

            return call

        calls: dict[str, Callable[..., None]] = {
            "nvmlInit_v2": lambda: None,
            "nvmlShutdown": self.close,
            "nvmlDeviceGetHandleByIndex_v2": self.handle,
            "nvmlDeviceGetName": self.name,
            "nvmlDeviceGetTotalEnergyConsumption": self.total,
            "nvmlDeviceGetPowerUsage": self.usage,
        }
        says = {2: b"Invalid Argument", 3: b"Not Supported", 4: b"Insufficient Permissions"}
        return SimpleNamespace(
            nvmlErrorString=lambda code: says[code],
            **{name: answer(name, then) for name, then in calls.items()},
        )

    def close(self) -> None:
        self.closed += 1

    def handle(self, index: ctypes.c_uint, card: Any) -> None:
        card._obj.value = 100 + index.value

    def name(self, card: ctypes.c_void_p, text: Any, size: ctypes.c_uint) -> None:
        assert size.value == len(text)
        text.value = f"NVIDIA Test {card.value}".encode()

    def total(self, card: ctypes.c_void_p, value: Any) -> None:
        value._obj.value = self.millijoules

    def usage(self, card: ctypes.c_void_p, value: Any) -> None:
        value._obj.value = self.milliwatts


@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_nvml_counts_the_gpu_of_the_device(device: str, index: int) -> None:
    card = Card()
    meter = nvml.open_meter(device, card.library())
    assert meter.covers == f"GPU {index} (NVIDIA Test {100 + index}), by NVML's counter"
    assert meter.joules() == 0
    card.millijoules += 2_500
    assert meter.joules() == 2.5
    meter.close()
    meter.close()
    assert card.closed == 1


def test_a_gpu_without_a_counter_has_its_power_summed_up() -> None:
    card = Card(nvmlDeviceGetTotalEnergyConsumption=3)
    meter = nvml.open_meter("cuda:0", card.library())
    assert meter.covers.endswith("by NVML's power, summed up")
    time.sleep(0.002)
    assert meter.joules() > 0
    meter.close()
    assert card.closed == 1


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ({"nvmlInit_v2": 4}, "NVML's nvmlInit_v2 says 'Insufficient Permissions'"),
        ({"nvmlDeviceGetHandleByIndex_v2": 2}, "HandleByIndex_v2 says 'Invalid Argument'"),
        ({"nvmlDeviceGetTotalEnergyConsumption": 4}, "says 'Insufficient Permissions'"),
        (
            {"nvmlDeviceGetTotalEnergyConsumption": 3, "nvmlDeviceGetPowerUsage": 3},
            "nvmlDeviceGetPowerUsage says 'Not Supported': the GPU's energy cannot be read here.",
        ),
    ],
)
def test_what_nvml_refuses_is_said_and_closed(answers: dict[str, int], says: str) -> None:
    card = Card(**answers)
    with pytest.raises(VmoeError) as found:
        nvml.open_meter("auto", card.library())
    assert says in str(found.value)
    assert card.closed == ("nvmlInit_v2" not in answers)


def test_no_driver_and_no_gpu_in_use_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "LIBRARY", "libno-such-thing.so.1")
    with pytest.raises(MissingDependencyError, match=r"libno-such-thing.so.1\) is not here"):
        nvml.open_meter("auto")
    with pytest.raises(SettingError, match="--device cpu leaves idle: take rapl"):
        nvml.open_meter("cpu")


# ---- tegrastats


def test_rails_are_read_from_lines_of_every_kind() -> None:
    assert tegrastats.rails(ORIN_NANO) == {
        "VDD_IN": 5.704,
        "VDD_CPU_GPU_CV": 0.831,
        "VDD_SOC": 1.624,
    }
    assert tegrastats.rails(NANO) == {"POM_5V_IN": 0.9, "POM_5V_GPU": 0, "POM_5V_CPU": 0.123}
    assert tegrastats.rails(TX1) == {"VDD_IN": 2.532, "VDD_CPU": 0.076, "VDD_GPU": 0.019}
    assert tegrastats.rails(NOT_ROOT) == {}


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return what puts a tegrastats on the path that prints a line every 10 ms, and only it."""

    def put(script: str) -> None:
        path = tmp_path / "tegrastats"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return put


def printing(line: str) -> str:
    return f"while echo '{line}'; do sleep 0.01; done"


@pytest.mark.parametrize(
    ("line", "rail", "watts"), [(ORIN_NANO, "VDD_IN", 5.704), (NANO, "POM_5V_IN", 0.9)]
)
def test_tegrastats_counts_the_whole_module(
    tool: Callable[[str], None], line: str, rail: str, watts: float
) -> None:
    tool(printing(line))
    meter = tegrastats.open_meter("auto")
    try:
        assert meter.covers == f"the whole module ({rail}), by tegrastats"
        began, before, after = time.perf_counter(), meter.joules(), time.perf_counter()
        time.sleep(0.03)
        still, risen, ended = time.perf_counter(), meter.joules() - before, time.perf_counter()
        assert 0.999 * watts * (still - after) <= risen <= 1.001 * watts * (ended - began)
    finally:
        meter.close()
    meter.close()
    assert meter._process.returncode is not None


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (printing(AGX_XAVIER), "only GPU, CPU, SOC, CV, VDDRQ, SYS5V, which are parts of it"),
        (
            printing(NOT_ROOT),
            "no power here: some boards show it to root alone. Run as root",
        ),
        ("exit 1", "tegrastats printed nothing in 10 s"),
    ],
)
def test_a_tegrastats_that_does_not_serve_says_why(
    tool: Callable[[str], None], script: str, says: str
) -> None:
    tool(script)
    with pytest.raises(VmoeError) as found:
        tegrastats.open_meter("auto")
    assert says in str(found.value)


def test_a_tegrastats_that_ends_is_said(tool: Callable[[str], None]) -> None:
    tool(f"echo '{NANO}'; exit 3")
    meter = tegrastats.open_meter("auto")
    meter._process.wait()
    with pytest.raises(VmoeError, match="ended in the middle, with 3"):
        meter.joules()
    meter.close()


# ---- which of them


def test_auto_takes_what_can_be_read_and_says_of_the_rest_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tegrastats, "TOOL", "no-such-tegrastats")
    monkeypatch.setattr(nvml, "LIBRARY", "libno-such-thing.so.1")
    monkeypatch.setattr(rapl.open_meter, "__defaults__", (tmp_path,))
    with ExitStack() as stack:
        found = power.open_meters(stack, "auto", "auto")
        assert found.meters == ()
        assert [why.split()[0] for why in found.why_not] == ["NVML", "no", "no-such-tegrastats"]
        on_cpu = power.open_meters(stack, "auto", "cpu")
        assert [why.split()[0] for why in on_cpu.why_not] == ["no", "no-such-tegrastats"]
        assert power.open_meters(stack, "none", "auto") == ((), ())
        for name, code in (("rapl", 1), ("nvml", 5), ("tegrastats", 5)):
            with pytest.raises(VmoeError) as refused:
                power.open_meters(stack, name, "auto")
            assert refused.value.exit_code == code
        zone(tmp_path, "intel-rapl:0", "package-0", 0)
        (meter,) = power.open_meters(stack, "rapl", "auto").meters
        assert meter.covers.startswith("CPU")
        some = power.open_meters(stack, "auto", "auto")
        assert [meter.covers[:3] for meter in some.meters] == ["CPU"]
        assert some.why_not == ()  # no GPU here: nothing is missing
        monkeypatch.setattr(nvml, "_load", Card(nvmlInit_v2=4).library)
        assert [why.split()[0] for why in power.open_meters(stack, "auto", "auto").why_not] == [
            "NVML's"
        ]


def test_auto_on_a_jetson_is_the_whole_module_alone(tool: Callable[[str], None]) -> None:
    tool(printing(ORIN_NANO))
    with ExitStack() as stack:
        found = power.open_meters(stack, "auto", "cpu")
        assert [meter.covers for meter in found.meters] == [
            "the whole module (VDD_IN), by tegrastats"
        ]
    assert found.meters[0]._process.returncode is not None


def test_the_choices_are_the_files() -> None:
    assert set(power.CHOICES) == {"auto", "nvml", "rapl", "tegrastats", "none"}


# ---- blocks


class World:
    """Time and energy that pass only when somebody works: idling draws 10 W."""

    covers, step_s = "the world", 0.001

    def __init__(self) -> None:
        self.s = self.j = 0.0
        self.order: list[str] = []

    def work(self, name: str, seconds: float, watts: float) -> None:
        self.s += seconds
        self.j += seconds * watts
        if not self.order or self.order[-1] != name:
            self.order.append(name)

    def joules(self) -> float:
        return self.j

    def close(self) -> None:
        pass


def test_energy_is_of_blocks_in_turn_total_and_above_idle() -> None:
    world = World()
    calls = [
        lambda n: world.work("light", 0.010, 30.0),
        lambda n: world.work("heavy", 0.040, 60.0),
    ]
    (light, heavy), idle = energy.measure(
        calls, [1, 8], [world], seconds=1.0, now_s=lambda: world.s,
        sleep=lambda s: world.work("idle", s, 10.0),
    )  # fmt: skip
    assert idle == pytest.approx(10)
    assert light.joules_per_clip == pytest.approx(0.3)
    assert (light.low, light.high) == pytest.approx((0.3, 0.3))
    assert light.joules_per_clip_above_idle == pytest.approx(0.2)
    assert light.watts == pytest.approx(30)
    assert light.watts_above_idle == pytest.approx(20)
    assert heavy.joules_per_clip == pytest.approx(2.4 / 8)
    assert heavy.joules_per_clip_above_idle == pytest.approx(2.0 / 8)
    assert heavy.clips >= energy.TURNS * 8 * 25
    for name in ("light", "heavy", "idle"):
        assert energy.TURNS >= world.order.count(name) >= energy.TURNS - 1  # two may meet
    assert len(world.order) > 6


def test_blocks_last_many_readings_of_the_slowest_meter() -> None:
    slow = SimpleNamespace(step_s=0.1)
    assert energy.block_s([World()]) == energy.MIN_BLOCK_S
    assert energy.block_s([World(), slow]) == pytest.approx(2)


def test_the_line_says_how_or_why_not() -> None:
    assert energy.line(Method()) == "energy: not available: not asked for (--power none)"
    assert energy.line(Method(why_not=("no RAPL here.",))) == (
        "energy: not available: no RAPL here."
    )
    said = energy.line(Method(("CPU, by RAPL",), ("no GPU.",), 12.3456, 1.0, 3))
    assert said == (
        "energy: CPU, by RAPL; 3 blocks of 1 s of each form, in turn; idle 12.35 W. It counts all "
        "that runs there. Not counted: no GPU."
    )

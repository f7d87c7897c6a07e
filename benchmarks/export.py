r"""What lowering and precision are worth, on this machine's own CPU.

    python benchmarks/export.py --quick
    python benchmarks/export.py --out benchmarks/results/export.json \
        --out benchmarks/results/export.md --overwrite

Experts r3d18 of width 0.5, four of them, and their dense counterpart of width 1.0; clips 8x64x64,
and 16x112x112 with the prefix `large_`. Naive is what torch.onnx.export gives, in ONNX Runtime.
Forms that are compared take turns in one run. A value is the ratio of the minima of the CPU time on
one thread; `medians` stands beside it, and `all_cores` is the ratio of the wall-clock minima with
every core, where there are several. `spread` is half of the distance between the ratios of minima
and medians. The weights are random, as time does not depend on them.

fp32_lowered_vs_naive        naive expert over the lowered one (temporal Winograd)
fp32_lowered_vs_openvino     OpenVINO's expert over the lowered one
int8_vs_naive                naive fp32 expert over the one in int8, in ONNX Runtime (taps joined)
int8_openvino_vs_naive       the same with int8 in OpenVINO (not lowered)
moe_vs_parts_b1              the mixture as deployed over router alone + expert alone
batch8_per_clip_vs_b1        eight clips, two to an expert, over eight times one clip
moe_vs_dense_naive           the dense counterpart as everybody exports it over the mixture
moe_vs_dense_same_lowering   the dense counterpart, lowered as the mixture is, over the mixture
moe_vs_all_then_mask         all experts run and one chosen, naive, over the mixture
sgemm_executed, _nominal     FLOPs of the lowered expert that are executed, and of the plain one,
                             per second, over those of a matrix product of 2048
if_load_ms                   the lowered `if` file with the device cache: CPU time of loading it
if_memory_mib                the naive `if` file: resident after loading and one clip, beyond what
                             router and one expert take as parts of their own
int8_top1_agreement          the model that ships, in int8: clips of the split `val`, rendered for
                             this, that get the label that the twin gives them; `spread` is half of
                             the 95 % interval; `_openvino` is that in OpenVINO; not with --quick
online_*                     export_online.py says what; not with --quick
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import click
import export_agreement
import export_forms
import export_loading
import export_online
import export_speed
import figures
import numpy as np
from export_speed import Measured
from figures import Figure

from vmoe import cli, report
from vmoe.runtime.bench import context

NO_VNNI = "this CPU has no AVX-512 VNNI, for which the figure was set"


class Rounds(NamedTuple):
    """How much is measured at one size of clips.

    Attributes:
        one: calls of each form on one thread.
        all_cores: the same on all cores; 0 leaves it out.
        starts: of a process that loads.
    """

    one: int
    all_cores: int
    starts: int


class Effort(NamedTuple):
    """How much is measured.

    Attributes:
        sizes: of the clips, by prefix.
        agreement: clips that int8 answers; 0 leaves it out.
        online: calls of each form, by pixels.
    """

    sizes: dict[str, Rounds]
    agreement: int
    online: dict[int, int]


QUICK = Effort({"": Rounds(10, 0, 2)}, 0, {})
FULL = Effort({"": Rounds(40, 12, 5), "large_": Rounds(12, 6, 3)}, 1000, {112: 100, 64: 200})


@cli.command(
    "export.py",
    "python benchmarks/export.py --quick",
    "python benchmarks/export.py --json",
    "python benchmarks/export.py --quick --out quick.json --out quick.md",
)
@click.option("--quick", is_flag=True, help="About a minute; small clips and one thread alone.")
@figures.result_options
def main(quick: bool, out: tuple[Path, ...], overwrite: bool, as_json: bool) -> None:
    """Measure the figures of export, everything that is compared interleaved in one run."""
    figures.check_files(out, overwrite=overwrite)
    machine = context.read()
    effort = QUICK if quick else FULL
    found: list[Figure] = []
    tables: dict[str, str] = {}
    times: dict[str, Any] = {}
    for prefix, rounds in effort.sizes.items():
        case = export_forms.prepare(prefix)
        one, all_ = measure(case, rounds)
        found += export_speed.figures(case, one, all_)
        with tempfile.TemporaryDirectory() as folder:
            found += export_loading.figures(case, Path(folder), rounds.starts)
        tables[case.size] = table(one, all_)
        times[case.size] = {"one_thread": _plain(one), "all_cores": _plain(all_)}
    for pixels, calls in effort.online.items():
        found += export_online.measure(pixels, calls)
    if not has_vnni():
        found = [unjudged(figure) for figure in found]
    if effort.agreement:
        found += export_agreement.figures(effort.agreement)
    figures.say(found, as_json=as_json)
    figures.write(out, "Export", found, machine, tables, {"seconds": times})


def measure(case: export_forms.Case, rounds: Rounds) -> tuple[Measured, Measured]:
    """Time all forms on one thread, then on all cores; nothing of those that are left out."""
    cores = context.cores()
    with tempfile.TemporaryDirectory() as folder:
        one = export_speed.measure(export_forms.subjects(case, Path(folder) / "one", 1), rounds.one)
        if cores == 1 or not rounds.all_cores:
            return one, {}
        calls = export_forms.subjects(case, Path(folder) / "all", cores)
        return one, export_speed.measure(calls, rounds.all_cores)


def has_vnni() -> bool:
    """Return whether this CPU is of the kind that the figures were set for."""
    try:
        return "avx512_vnni" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def unjudged(figure: Figure) -> Figure:
    """Return a figure that is shown, and not judged."""
    if figure.value is None:
        return figure
    more = {"measured": figure.value, **figure.more}
    return dataclasses.replace(figure, value=None, why=NO_VNNI, more=more)


def table(one: Measured, all_: Measured) -> str:
    """Return the times of all forms: CPU and clock of one thread, the clock of all cores."""
    columns = ["form", "CPU ms, least", "median", "wall ms, least", "median", "n"]
    if all_:
        columns += [f"wall ms on {context.cores()} cores, least", "median", "n"]

    rows: list[list[object]] = []
    for name, (cpu, wall) in one.items():
        row = [name, *_ms(cpu), *_ms(wall), len(cpu)]
        rows.append([*row, *_ms(all_[name].wall), len(all_[name].wall)] if all_ else row)
    return report.table(rows, columns)


def _ms(seconds: list[float]) -> tuple[float, float]:
    return min(seconds) * 1e3, float(np.median(seconds)) * 1e3


def _plain(measured: Measured) -> dict[str, dict[str, list[float]]]:
    return {name: times._asdict() for name, times in measured.items()}


if __name__ == "__main__":
    main()

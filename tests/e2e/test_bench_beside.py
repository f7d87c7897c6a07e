"""vmoe-bench: what stands beside the times, on tiny bundles whose answers are known."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner, Result

from tests import bundles as tiny
from tests.bundles import BLACK, GREEN, RED, attack, attacked_clips
from vmoe import adversarial, output
from vmoe import bundle as bundles
from vmoe.clips import ClipSpec
from vmoe.runtime.bench import energy
from vmoe.runtime.bench.cli import main
from vmoe.runtime.bench.power import nvml, rapl, tegrastats

FAST = tiny.fast(8)
AUTO = ("--power", "auto")  # of two, the last counts


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, spec: ClipSpec) -> Path:
    """Return a folder: bundles `split` and `dense`, saved clips, and a data set."""
    folder = tmp_path_factory.mktemp("beside")
    tiny.write(folder / "split", spec)
    tiny.write(folder / "dense", spec, experts=1)
    manifest = folder / "dense" / bundles.MANIFEST
    values = json.loads(manifest.read_text())
    output.write_json(manifest, {**values, "weights": "random"})
    adversarial.save(
        attacked_clips(
            spec,
            attack(spec, "pgd", BLACK, GREEN, BLACK, RED),
            attack(spec, "pgd", BLACK, BLACK, BLACK, RED, eps=16 / 255),
        ),
        folder / "clips",
    )
    tiny.coloured_videos(folder / "videos")
    return folder


def bench(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def record(path: Path) -> dict[str, Any]:
    """Return what --out wrote, valid by the schema."""
    found: dict[str, Any] = json.loads(path.read_text())
    schema = json.loads((files("vmoe.runtime.bench") / "schema.json").read_text())
    jsonschema.validate(found, schema, jsonschema.Draft202012Validator)
    return found


def one_line(result: Result, code: int, *says: str) -> None:
    """Prove that a command ended before any measurement, with one line."""
    assert result.exit_code == code, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("vmoe-bench: ")
    for text in says:
        assert text in line
    assert not result.stdout


# ---- accuracy


def test_accuracy_stands_in_the_row_of_the_speed(made: Path, tmp_path: Path) -> None:
    out, rows, page = tmp_path / "r.json", tmp_path / "r.csv", tmp_path / "r.md"
    result = bench(
        made / "split", "--baseline", made / "dense", "--accuracy", made / "videos", "--robust",
        made / "clips", *FAST, "--out", out, "--csv", rows, "--md", page,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = record(out)
    by_form = {(row["bundle"], row["form"]): row["accuracy"] for row in found["rows"]}
    judged = by_form.pop(("split", "free"))
    assert not any(by_form.values())  # forced routes are not used, and dense is random
    assert judged["clean"]["data"] == f"{made / 'videos'} test"
    assert judged["clean"]["right"]["share"] == 0.75
    assert [(r["budget"], r["right"]["hits"], r["own"]) for r in judged["robust"]] == [
        ("8/255", 3, True), ("16/255", 2, True),
    ]  # fmt: skip
    table = result.stdout[result.stdout.index("As used") :].splitlines()
    assert [column.strip() for column in table[1].split("|")[-4:-1]] == [
        "clean %", "robust % 8/255", "robust % 16/255",
    ]  # fmt: skip
    assert "75.0 (30.1-95.4)" in table[3]
    assert table[4].split("|")[-4].strip() == "-"
    right = "75.0 (30.1-95.4) % of 4 clips"
    assert f"Robust accuracy, eps 8/255: {right} under pgd, transfer from its twin" in result.stdout
    assert "robust: split: pgd at eps 8/255 (0.0314), 16/255 (0.0627), transfer" in result.stdout
    assert "no accuracy" not in result.stdout
    with rows.open() as file:
        flat = {row["bundle"]: row for row in csv.DictReader(file) if row["form"] == "free"}
    assert (flat["split"]["clean"], flat["split"]["robust 8/255 n"]) == ("0.75", "4")
    assert flat["dense"]["clean"] == ""
    assert "## As used, routed freely" in page.read_text()
    assert "| split  |" in page.read_text()


def test_clips_of_another_twin_are_told(made: Path, spec: ClipSpec, tmp_path: Path) -> None:
    foreign = attacked_clips(spec, attack(spec, "pgd", GREEN, GREEN, BLACK, RED),
                             origin={"twin_sha256": "e" * 64})  # fmt: skip
    adversarial.save(foreign, tmp_path / "foreign")
    result = bench(made / "split", "--robust", tmp_path / "foreign", *FAST, "--json")
    assert result.exit_code == 0
    said = {v["name"]: v for v in json.loads(result.stdout)["verdicts"]}
    assert said["foreign clips"]["bundle"] == "split"
    assert "from another twin (sha256 eeeeeeeeeeee)" in said["foreign clips"]["says"]
    assert "prove less" in said["foreign clips"]["says"]


def test_a_table_without_accuracy_says_so(made: Path) -> None:
    bare = bench(made / "split", *FAST)
    assert "no accuracy: speed only: no accuracy stands beside it. Measure it: --acc" in bare.stdout
    clean = bench(made / "split", "--accuracy", made / "videos", *FAST)
    assert "no robust accuracy: clean clips only. Measure it: vmoe-attack" in clean.stdout


def test_a_bundle_that_cannot_answer_says_why_and_the_rest_goes_on(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr("vmoe.runtime.bench.accuracy._clean", broken)
    result = bench(made / "split", "--accuracy", made / "videos", *FAST, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    why = "RuntimeError: out of memory"
    assert found["rows"][0]["accuracy"]["why"] == why
    assert why in [v["says"] for v in found["verdicts"] if v["name"] == "no accuracy"]


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("--accuracy", "camera-motin"), 2, "did you mean 'camera-motion'"),
        (("--accuracy", "camera-motion"), 2, "the label 'static', which split does not know"),
        (("--accuracy", "{}/nowhere"), 2, "is no folder: give a folder with one per class"),
        (("--accuracy-clips", "0"), 2, "--accuracy-clips is 0; it must be at least 1."),
        (("--robust", "{}/nowhere"), 1, "has no manifest.json: make it by vmoe-attack BUNDLE"),
        (("--robust", "{}/split"), 1, "has no manifest.json: make it by vmoe-attack BUNDLE"),
        (("--power", "nvlm"), 2, "did you mean 'nvml'"),
        (("--compare", "{}/nowhere"), 1, "No such file or directory. Measure again"),
        (("--compare", "{}/split/vmoe.json"), 1, "is no record of vmoe-bench"),
        (("--fail-over", "5%"), 2, "--fail-over does nothing without --compare OLD.json"),
        (("--compare", "x", "--fail-over", "5"), 2, "could mean 5 % or 5 times: write 5% or 0.05"),
        (("--plot", "x.pdf"), 2, "--plot x.pdf: write FILE.png, FILE.svg or a folder."),
        (("--plot", "{}/split/vmoe.json"), 2, "write FILE.png, FILE.svg or a folder."),
    ],
)
def test_bad_input_is_one_line(made: Path, args: tuple[str, ...], code: int, says: str) -> None:
    one_line(bench(made / "split", *FAST, *(arg.format(made) for arg in args)), code, says)


# ---- energy


def counters(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this machine a package that draws 20 mJ at every reading, and no other meter."""
    zone = root / "intel-rapl:0"
    zone.mkdir(parents=True)
    for name, text in (("name", "package-0"), ("energy_uj", "0"), ("max_energy_range_uj", "9")):
        (zone / name).write_text(text)
    monkeypatch.setattr(rapl.open_meter, "__defaults__", (root,))
    monkeypatch.setattr(nvml, "LIBRARY", "libno-such-thing.so.1")
    monkeypatch.setattr(tegrastats, "TOOL", "no-such-tegrastats")
    monkeypatch.setattr(energy, "MIN_BLOCK_S", 0.01)
    monkeypatch.setattr(energy, "BLOCK_STEPS", 1)


def rising(monkeypatch: pytest.MonkeyPatch) -> None:
    read, asked = rapl._micro, iter(range(10**6))

    def micro(path: Path) -> int:
        return 20_000 * next(asked) if path.name == "energy_uj" else read(path)

    monkeypatch.setattr(rapl, "_micro", micro)


def test_energy_stands_beside_and_its_method_is_said(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters(tmp_path / "powercap", monkeypatch)
    rising(monkeypatch)
    out = tmp_path / "r.json"
    result = bench(made / "split", *FAST, "--power", "rapl", "--out", out)
    assert result.exit_code == 0, result.stderr
    found = record(out)
    drawn = {row["form"]: row["energy"] for row in found["rows"]}
    assert [form for form, each in drawn.items() if each is None] == [
        "router alone", "expert 0 alone", "expert 1 alone", "expert 2 alone",
    ]  # fmt: skip
    assert drawn["free"]["joules_per_clip"] > 0
    assert drawn["free"]["clips"] >= energy.TURNS
    assert found["energy"]["covers"] == ["CPU (1 package, memory not counted), by RAPL"]
    assert found["energy"]["blocks"] == energy.TURNS
    assert "energy: 5 forms and idling, 3 blocks of 0.01 s each" in result.stderr
    assert "energy: CPU (1 package, memory not counted), by RAPL; 3 blocks of 0.01" in result.stdout
    assert "| mJ/clip |" in result.stdout
    assert "J/clip (" in result.stdout
    used = json.loads(bench(made / "split", *FAST, *AUTO, "--json").stdout)["rows"]
    assert [row["form"] for row in used if row["energy"]] == ["free", "all experts"]


def test_energy_that_cannot_be_read_is_a_remark_and_by_name_an_error(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters(tmp_path / "powercap", monkeypatch)
    (tmp_path / "powercap" / "intel-rapl:0" / "energy_uj").unlink()
    result = bench(made / "split", *FAST, *AUTO)
    assert result.exit_code == 0
    assert "energy: not available: NVML (libno-such-thing.so.1) is not here" in result.stdout
    assert "mJ/clip" not in result.stdout
    one_line(bench(made / "split", *FAST, "--power", "rapl"), 1, "energy_uj: No such file")
    one_line(bench(made / "split", *FAST, "--power", "nvml"), 5, "NVML (libno-such-thing.so.1)")
    one_line(bench(made / "split", *FAST, "--power", "tegrastats"), 5, "comes with JetPack")
    nothing = bench(made / "split", *FAST, "--power", "none")
    assert "energy: not available: not asked for (--power none)" in nothing.stdout


def test_a_meter_that_breaks_costs_no_measurement(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters(tmp_path / "powercap", monkeypatch)
    monkeypatch.setattr(energy, "measure", lambda *_, **__: 1 / 0)
    result = bench(made / "split", *FAST, *AUTO)
    assert result.exit_code == 0
    assert "energy: not available: ZeroDivisionError: division by zero" in result.stdout


def test_streams_alone_have_no_energy_and_say_so(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters(tmp_path / "powercap", monkeypatch)
    result = bench(made / "split", "--scenario", "stream", "--duration", "0.3", "--warmup", "0")
    assert "energy: not available: it is measured of calls, and none could be" in result.stdout


@pytest.mark.parametrize("when", ["accuracy.measure", "energy.measure"])
def test_an_interrupt_beside_the_times_keeps_them(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    counters(tmp_path / "powercap", monkeypatch)
    monkeypatch.setattr(f"vmoe.runtime.bench.{when}", interrupt)
    result = bench(made / "split", "--accuracy", made / "videos", *FAST, *AUTO, "--json")
    assert result.exit_code == 130
    found = json.loads(result.stdout)
    assert found["interrupted"]
    assert all(row["latency_ms"]["n"] >= 8 for row in found["rows"])
    assert found["energy"]["why_not"] == ["the run was interrupted."]
    assert bool(found["rows"][0]["accuracy"]) is (when == "energy.measure")


def test_what_stands_beside_needs_neither_torch_nor_onnx(made: Path) -> None:
    args = [made / "split", "--accuracy", made / "videos", "--robust", made / "clips", *FAST]
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'matplotlib'): sys.modules[name] = None\n"
        "from vmoe.runtime.bench.cli import main\n"
        f"main({[str(arg) for arg in args]!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Robust accuracy, eps 8/255" in done.stdout


# ---- comparison


@pytest.fixture(scope="module")
def old(made: Path) -> Path:
    path = made / "old.json"
    assert bench(made / "split", *FAST, "--out", path).exit_code == 0
    return path


def scaled(old: Path, path: Path, by: float, change: Callable[[Any], None] | None = None) -> Path:
    """Write a record as if its machine had been slower by a factor."""
    values = json.loads(old.read_text())
    for row in values["rows"]:
        row["samples_ms"]["wall"] = [by * ms for ms in row["samples_ms"]["wall"]]
    if change is not None:
        change(values)
    path.write_text(json.dumps(values))
    return path


def test_a_regression_ends_with_3_after_everything_is_written(
    made: Path, old: Path, tmp_path: Path
) -> None:
    faster = scaled(old, tmp_path / "faster.json", 1e-3)
    out = tmp_path / "new.json"
    result = bench(made / "split", *FAST, "--compare", faster, "--fail-over", "5%", "--out", out)
    assert result.exit_code == 3
    assert "9 of 9 rows are slower by more than 5 %; the worst: split" in result.stderr
    found = record(out)["comparison"]
    assert (found["threshold"], len(found["rows"])) == (0.05, 9)
    assert {row["found"] for row in found["rows"]} == {"slower"}
    assert f"Compared with {faster}: medians of all calls, new over old" in result.stdout
    alone = bench(made / "split", *FAST, "--compare", faster, "--md", tmp_path / "c.md")
    assert alone.exit_code == 0  # no one asked it to fail
    assert "rows are slower beyond noise" in alone.stdout
    assert "## Against an older record" in (tmp_path / "c.md").read_text()


def test_what_is_faster_passes_and_a_row_that_is_gone_is_named(
    made: Path, old: Path, tmp_path: Path
) -> None:
    def elsewhere(values: Any) -> None:
        values["context"] |= {"cpu": "Cortex-A78AE", "cores": 6}

    slower = scaled(old, tmp_path / "slower.json", 1e3, elsewhere)
    result = bench(made / "split", "--force-route", "free", *FAST, "--compare", slower,
                   "--fail-over", "0.05")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "none of 1 rows is slower by more than 5 %." in result.stdout
    assert "cores" in result.stdout.partition("the machines differ: ")[2].splitlines()[0]
    assert (
        "only in the old one: split single threads 1 onnxruntime: route 0, route 1, "
        in result.stdout
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.update(schema_version=1), "has schema version 1; this vmoe compares 2."),
        (lambda v: [row.pop("samples_ms") for row in v["rows"]], "has no samples"),
        (lambda v: [row.update(batch=3) for row in v["rows"]], "has no row of this run: it has"),
        (lambda v: v.pop("context"), "is damaged: key 'context' is missing"),
    ],
)
def test_a_record_that_cannot_be_compared_is_refused_before_measuring(
    made: Path, old: Path, tmp_path: Path, change: Callable[[Any], None], says: str
) -> None:
    path = scaled(old, tmp_path / "old.json", 1, change)
    one_line(bench(made / "split", *FAST, "--compare", path), 1, says)


# ---- plots


def test_plots_are_written_and_never_replaced_unasked(made: Path, tmp_path: Path) -> None:
    file, folder = tmp_path / "bench.png", tmp_path / "plots"
    args = (made / "split", "--batch", "1,2", "--robust", made / "clips", *FAST)
    result = bench(*args, "--plot", file)
    assert result.exit_code == 0, result.stderr
    assert file.read_bytes()[:4] == b"\x89PNG"
    assert "plot: no" not in result.stderr
    one_line(bench(*args, "--plot", file), 2, f"{file} exists. Choose another --plot, or say")
    assert bench(*args, "--plot", folder).exit_code == 0
    assert sorted(p.name for p in folder.iterdir()) == [
        "accuracy.png", "accuracy.svg", "latency.png", "latency.svg", "throughput.png",
        "throughput.svg",
    ]  # fmt: skip
    one_line(bench(*args, "--plot", folder), 2, "latency.png exists")


def test_without_matplotlib_no_plot_is_begun(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = bench(made / "split", "--plot", "x.png", *FAST)
    one_line(result, 5, "which draws --plot, is not installed: pip install 'vmoe[plot]'")

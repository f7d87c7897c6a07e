"""vmoe-bench as a user runs it, on tiny bundles whose answers are known. No time is asserted."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner, Result

from tests import bundles as tiny
from vmoe import bundle as bundles
from vmoe import output
from vmoe.clips import ClipSpec
from vmoe.runtime.bench.cli import main

FAST = tiny.fast(6)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, spec: ClipSpec) -> Path:
    """Return a folder of bundles: split, one (if), and dense counterparts of both."""
    folder = tmp_path_factory.mktemp("bundles")
    tiny.write(folder / "split", spec)
    tiny.write(folder / "one", spec, lowering="if")
    tiny.write(folder / "dense", spec, experts=1)
    tiny.write(folder / "dense-one", spec, experts=1, lowering="if")
    for name in ("dense", "dense-one"):
        manifest = folder / name / bundles.MANIFEST
        values = json.loads(manifest.read_text())
        output.write_json(manifest, {**values, "weights": "random", "twin": {"sha256": "d" * 64}})
    return folder


def bench(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def record(*args: object) -> dict[str, Any]:
    result = bench(*args, *FAST, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    schema = json.loads((files("vmoe.runtime.bench") / "schema.json").read_text())
    jsonschema.validate(found, schema, jsonschema.Draft202012Validator)
    return found


def test_split_and_one_file_against_their_counterparts(made: Path) -> None:
    found = record(
        made / "split", made / "one", "--baseline", made / "dense", "--baseline", made / "dense-one"
    )
    forms: dict[str, list[str]] = {about["name"]: [] for about in found["bundles"]}
    for row in found["rows"]:
        forms[row["bundle"]].append(row["form"])
        assert row["latency_ms"]["n"] >= 6
    assert forms == {
        "split": ["free", "route 0", "route 1", "route 2", "router alone", "expert 0 alone",
                  "expert 1 alone", "expert 2 alone", "all experts"],
        "one": ["free", "route 0", "route 1", "route 2", "all experts"],
        "dense": ["free"],
        "dense-one": ["free"],
    }  # fmt: skip
    certificates = {c["bundle"]: c for c in found["certificates"]}
    assert set(certificates) == {"split", "one"}
    for name, dense in (("split", "dense"), ("one", "dense-one")):
        assert certificates[name]["parts_of"] == "split"
        assert [r["route"] for r in certificates[name]["routes"]] == [0, 1, 2]
        same = {a["baseline"]: a["same_lowering"] for a in certificates[name]["against"]}
        assert same == {"dense": dense == "dense", "dense-one": dense == "dense-one"}
        assert all(a["random"] for a in certificates[name]["against"])
    said = [verdict["name"] for verdict in found["verdicts"]]
    assert said.count("random weights") == 2
    assert "no accuracy" in said
    assert "other lowering" not in said  # each has a counterpart in its own


def test_ratios_are_those_of_the_rows(made: Path) -> None:
    found = record(made / "split")
    median = {row["form"]: row["latency_ms"]["median"] for row in found["rows"]}
    least = {row["form"]: row["latency_ms"]["min"] for row in found["rows"]}
    for route in found["certificates"][0]["routes"]:
        i = route["route"]
        alone = median["router alone"] + median[f"expert {i} alone"]
        assert route["ratio"]["medians"] == pytest.approx(median[f"route {i}"] / alone)
        assert route["alone_ms"] == pytest.approx(alone)
        least_alone = least["router alone"] + least[f"expert {i} alone"]
        assert route["ratio"]["minima"] == pytest.approx(least[f"route {i}"] / least_alone)


def test_one_file_alone_says_what_to_export(made: Path) -> None:
    found = record(made / "one", "--baseline", made / "dense")
    (made_for,) = found["certificates"]
    assert made_for["parts_of"] is None
    said = {verdict["name"]: verdict["says"] for verdict in found["verdicts"]}
    assert "vmoe-export CKPT --lowering split" in said["uncertified"]
    assert "lowered otherwise" in said["other lowering"]


def test_the_text_has_the_block_the_table_the_verdicts_and_the_next_command(made: Path) -> None:
    result = bench(made / "split", "--baseline", made / "dense", *FAST)
    assert result.exit_code == 0, result.stderr
    assert "=== Performance summary: split (split, onnxruntime, fp32) ===" in result.stdout
    assert "Latency: min = " in result.stdout
    assert "percentile(99%) = " in result.stdout
    assert "| worst route    |" in result.stdout
    assert "serves latency only" in result.stdout
    assert "no accuracy: speed only" in result.stdout
    assert f"next: vmoe-run {made / 'split'} --source test" in result.stderr
    nudged = bench(made / "split", *FAST)
    assert "next: vmoe-export CKPT --counterpart --lowering split" in nudged.stderr


def test_files(made: Path, tmp_path: Path) -> None:
    out, rows, page = tmp_path / "r.json", tmp_path / "r.csv", tmp_path / "r.md"
    args = (made / "split", *FAST, "--out", out, "--csv", rows, "--md", page)
    assert bench(*args).exit_code == 0
    written = json.loads(out.read_text())
    for row in written["rows"]:
        assert len(row["samples_ms"]["wall"]) == row["latency_ms"]["n"]
    with rows.open() as file:
        assert [line["form"] for line in csv.DictReader(file)] == [
            r["form"] for r in written["rows"]
        ]
    assert "| route 0        |" in page.read_text()
    again = bench(*args)
    assert again.exit_code == 2
    assert "r.json exists" in again.stderr
    assert bench(*args, "--overwrite").exit_code == 0


def test_offline_takes_batches_and_forcing_one_route(made: Path) -> None:
    found = record(made / "split", "--scenario", "offline", "--force-route", "2")
    assert found["settings"]["batch"] == [8]
    assert {row["batch"] for row in found["rows"]} == {8}
    assert [row["form"] for row in found["rows"]] == [
        "free", "route 2", "router alone", "expert 2 alone",
    ]  # fmt: skip
    assert found["certificates"][0]["worst"] == 2
    free = record(made / "split", "--force-route", "free", "--batch", "3")
    assert {row["batch"] for row in free["rows"]} == {3}
    assert "--force-route all" in free["certificates"][0]["why"]


def test_parts_of_a_fixed_batch_are_said_to_run_in_pieces(tmp_path: Path, spec: ClipSpec) -> None:
    path = tiny.write(tmp_path / "fixed", spec, batch=1)
    found = record(path, "--batch", "4")
    assert "pieces" in [verdict["name"] for verdict in found["verdicts"]]
    assert "pieces" not in [verdict["name"] for verdict in record(path)["verdicts"]]


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("{}/nowhere",), 1, "does not exist: not a bundle"),
        (("{}",), 1, "holds no vmoe.json"),
        (("{}/split", "--baseline", "{}/nowhere"), 1, "does not exist: not a bundle"),
        (("{}/split", "--baseline", "{}/split"), 2, "given twice"),
        (("{}/split", "--iterations", "0"), 2, "--iterations is 0; it must be at least 1."),
        (("{}/split", "--batch", "0"), 2, "--batch is 0"),
        (("{}/split", "--percentile", "50,101"), 2, "--percentile is 101.0; it must be at most"),
        (("{}/split", "--percentile", "high"), 2, "'high' is not a valid float"),
        (("{}/split", "--scenario", "sngle"), 2, "did you mean 'single'"),
        (("{}/split", "--force-route", "fre"), 2, "did you mean 'free'"),
        (("{}/split", "--force-route", "3"), 2, "experts 0 to 2"),
        (("{}/split", "--backend", "onnxruntme"), 2, "did you mean 'onnxruntime'"),
        (("{}/split", "--device", "gpu"), 2, "--device is 'gpu'"),
        (("{}/split", "--csv", "{}"), 2, "is a folder; name a file"),
        (("{}/split", "--csv", "{}/x", "--md", "{}/x"), 2, "named by two of"),
    ],
)
def test_bad_input_is_one_line(made: Path, args: tuple[str, ...], code: int, says: str) -> None:
    result = bench(*(arg.format(made) for arg in args))
    assert result.exit_code == code
    (line,) = result.stderr.splitlines()
    assert line.startswith("vmoe-bench: ")
    assert says in line
    assert not result.stdout


def test_a_baseline_of_another_clip_is_refused(made: Path, tmp_path: Path) -> None:
    other = tiny.write(tmp_path / "o", ClipSpec(frames=8, height=32, width=32), experts=1)
    result = bench(made / "split", "--baseline", other)
    assert result.exit_code == 1
    assert "takes clips of 8x32x32, the bundle 4x32x32" in result.stderr


def test_neither_torch_nor_onnx_is_imported(made: Path) -> None:
    code = (
        "import sys\n"
        "from vmoe.runtime.bench.cli import main\n"
        f"main([{str(made / 'split')!r}, *{FAST!r}, '-q'], standalone_mode=False)\n"
        "print([name for name in ('torch', 'onnx') if name in sys.modules], file=sys.stderr)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr.splitlines()[-1] == "[]"

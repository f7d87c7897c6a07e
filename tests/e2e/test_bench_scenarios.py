"""vmoe-bench with several scenarios, sweeps and baselines; bundles that fail in the midst of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from tests import bundles as tiny
from tests.plans import built
from tests.tensorrt_fake import Fake
from vmoe import bundle as bundles
from vmoe import checkpoint, output
from vmoe.clips import ClipSpec
from vmoe.models import ModelSettings, build
from vmoe.runtime.bench import context
from vmoe.runtime.bench.cli import main
from vmoe.runtime.engine import Engine

FAST = tiny.fast(3)


@pytest.fixture
def path(tmp_path: Path, spec: ClipSpec) -> Path:
    return tiny.write(tmp_path / "split", spec)


def bench(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def read(result: Result, code: int = 0) -> dict[str, Any]:
    assert result.exit_code == code, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    schema = json.loads((files("vmoe.runtime.bench") / "schema.json").read_text())
    jsonschema.validate(found, schema, jsonschema.Draft202012Validator)
    return found


def with_twin(path: Path) -> Path:
    """Put a small twin into a bundle, as vmoe-export does; it need not answer as the parts do."""
    of = bundles.read(path)
    settings = ModelSettings("r3d18", 0.05, of.experts, len(of.labels))
    held = checkpoint.Checkpoint(build(settings, of.spec).eval(), of.labels)
    checkpoint.save(held, path / bundles.TWIN)
    manifest = json.loads((path / bundles.MANIFEST).read_text())
    manifest["twin"] = {"file": bundles.TWIN, "sha256": bundles.sha256(path / bundles.TWIN)}
    output.write_json(path / bundles.MANIFEST, manifest)
    return path


def breaking(monkeypatch: pytest.MonkeyPatch, when: Callable[[int, int], bool], error: Any) -> None:
    """Let the engine fail, told how many clips it is given and how often it was called."""
    infer, calls = Engine.infer, [0]

    def broken(self: Engine, clips: Any, force_route: Any = None) -> Any:
        calls[0] += 1
        if when(len(clips), calls[0]):
            raise error
        return infer(self, clips, force_route)

    monkeypatch.setattr(Engine, "infer", broken)


# ---- scenarios and sweeps


def test_every_scenario_in_one_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "cores", lambda: 2)
    found = read(
        bench(path, "--scenario", "single,multi,offline,stream", "--batch", "2,4", "--streams",
              "1,2", *FAST[:2], "--duration", "0.6", "--warmup", "0", "--threads", "1,all",
              "--json", "--force-route", "all")
    )  # fmt: skip
    rows = found["rows"]
    assert found["settings"]["threads"] == [1, 2]
    shapes = {(r["scenario"], r["batch"], r["streams"], r["threads"]) for r in rows}
    assert shapes == {
        (scenario, batch, streams, threads)
        for threads in (1, 2)
        for scenario, batch, streams in (
            ("single", 1, 1), ("multi", 1, 1), ("multi", 2, 2), ("offline", 2, 1),
            ("offline", 4, 1), ("stream", 1, 1), ("stream", 1, 2),
        )
    }  # fmt: skip
    forms = [
        r["form"] for r in rows if (r["scenario"], r["batch"], r["threads"]) == ("single", 1, 1)
    ]
    assert forms[0] == "free"
    assert forms[-1] == "all experts"
    for row in rows:
        assert row["why"] is None
        assert row["clips_per_s"] > 0
        assert (row["stream"] is not None) == (row["scenario"] == "stream")
    streams = [row for row in rows if row["scenario"] == "stream"]
    assert all(row["stream"]["windows"] == row["latency_ms"]["n"] for row in streams)
    assert all(row["stream"]["hop_s"] == pytest.approx(0.2) for row in streams)
    assert [(made["threads"], made["scenario"]) for made in found["certificates"]] == [
        (1, "single"), (2, "single"),
    ]  # fmt: skip
    said = {verdict["name"] for verdict in found["verdicts"]}
    assert said & {"keeps up", "dropped"}
    assert found["context"]["during"]["seconds"] > 0


def test_stream_alone_has_no_certificate_and_takes_the_threads_that_decoding_leaves(
    path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "r.json"
    result = bench(path, "--scenario", "stream", "--duration", "0.3", "--warmup", "0", "--out", out)
    assert result.exit_code == 0, result.stderr
    assert "scenario stream" in result.stdout
    (row,) = json.loads(out.read_text())["rows"]
    assert row["threads"] >= 1
    assert (row["form"], row["cpu_ms"]) == ("free", None)
    assert len(row["samples_ms"]["wall"]) == row["stream"]["windows"]
    assert json.loads(out.read_text())["certificates"] == []


# ---- the twin as a baseline


def test_the_twin_eager_and_compiled_are_baselines(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ = torch.nn.Module.compile
    compiled: list[dict[str, Any]] = []

    def quickly(self: torch.nn.Module, **how: Any) -> None:
        """Trace, but generate no code: that takes a compiler, and a minute."""
        compiled.append(how)
        compile_(self, backend="eager", **how)

    monkeypatch.setattr(torch.nn.Module, "compile", quickly)
    result = bench(with_twin(path), "--baseline", "torch", "--baseline", "torch-compile", *FAST,
                   "--json")  # fmt: skip
    found = read(result)
    rows = [(r["bundle"], r["form"], r["backend"]) for r in found["rows"]]
    assert rows[-2:] == [("torch", "free", "torch"), ("torch-compile", "free", "torch")]
    assert compiled == [{"dynamic": False}] * 4  # the router and three experts
    baselines = [against["baseline"] for against in found["certificates"][0]["against"]]
    assert baselines == ["torch", "torch-compile"]


def test_the_model_as_everybody_exports_it_is_a_baseline(
    path: Path, tmp_path: Path, spec: ClipSpec
) -> None:
    naive = tiny.write(tmp_path / "naive", spec, lowering="dense")
    found = read(bench(path, "--baseline", naive, *FAST, "--json"))
    assert [r["form"] for r in found["rows"] if r["bundle"] == "naive"] == ["free"]
    (against,) = found["certificates"][0]["against"]
    assert (against["baseline"], against["dense"]) == ("naive", False)


def test_a_bundle_without_its_twin_says_why_it_is_no_baseline(path: Path) -> None:
    result = bench(path, "--baseline", "torch", *FAST, "--json")
    found = read(result, 1)
    last = found["rows"][-1]
    assert (last["bundle"], last["backend"], last["latency_ms"]) == ("torch", "torch", None)
    assert "does not carry its twin" in last["why"]
    assert "vmoe-bench: 1 of 10 rows failed; each says why." in result.stderr
    twice = bench(path, "--baseline", "torch", "--baseline", "torch")
    assert twice.exit_code == 2
    assert "--baseline torch is given twice" in twice.stderr


def test_a_folder_of_that_name_is_a_bundle(
    tmp_path: Path, spec: ClipSpec, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write(tmp_path / "torch", spec, experts=1)
    monkeypatch.chdir(tmp_path)
    found = read(bench(path, "--baseline", "./torch", *FAST, "--json"))
    assert found["rows"][-1]["backend"] == "onnxruntime"


# ---- what fails in the midst of it


def test_a_corrupt_bundle_has_a_row_and_the_rest_goes_on(
    path: Path, tmp_path: Path, spec: ClipSpec
) -> None:
    bad = tiny.write(tmp_path / "bad", spec)
    (bad / "expert1.onnx").write_bytes(b"no graph")
    page, rows = tmp_path / "r.md", tmp_path / "r.csv"
    result = bench(bad, path, *FAST, "--json", "--md", page, "--csv", rows)
    found = read(result, 1)
    first, *others = found["rows"]
    assert (first["bundle"], first["form"]) == ("bad", "free")
    assert "expert1.onnx" in first["why"]
    assert [row["bundle"] for row in others] == ["split"] * 9
    assert [about["name"] for about in found["bundles"]] == ["split"]
    assert "bad: cannot be loaded, the rest goes on: " in result.stderr
    assert "1 of 10 rows failed" in result.stderr.splitlines()[-1]
    assert "expert1.onnx" in page.read_text()
    assert "expert1.onnx" in rows.read_text()
    alone = bench(bad, *FAST)
    assert alone.exit_code == 1
    assert not alone.stdout
    assert "expert1.onnx" in alone.stderr.splitlines()[-1]


def test_a_batch_that_fails_has_a_row_and_the_rest_goes_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(monkeypatch, lambda clips, _: clips == 8, RuntimeError("out of memory\nat 8"))
    result = bench(path, "--scenario", "offline", "--batch", "4,8", *FAST, "--json")
    found = read(result, 1)
    failed = [row for row in found["rows"] if row["why"] is not None]
    assert [(row["batch"], row["form"]) for row in failed] == [(8, "free"), (8, "route 0")]
    assert {row["why"] for row in failed} == {"RuntimeError: out of memory at 8"}
    assert found["certificates"][0]["why"] is None
    assert "split free, batch 8: failed: RuntimeError: out of memory at 8" in result.stderr


def test_a_stream_that_fails_has_a_row(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, lambda clips, _: True, RuntimeError("gone"))
    found = read(bench(path, "--scenario", "stream", "--duration", "0.2", *FAST[4:], "--json"), 1)
    (row,) = found["rows"]
    assert (row["scenario"], row["why"]) == ("stream", "RuntimeError: gone")


# ---- a run that is cut short


def test_ctrl_c_gives_what_was_measured_so_far(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, lambda _, call: call == 60, KeyboardInterrupt())
    result = bench(path, "--iterations", "1000", *FAST[2:], "--scenario", "single,stream", "--json")
    found = read(result, 130)
    assert found["interrupted"]
    assert {row["scenario"] for row in found["rows"]} == {"single"}
    lengths = {row["latency_ms"]["n"] for row in found["rows"]}
    assert len(lengths) == 1
    assert 1 <= lengths.pop() < 20
    assert "interrupted; what was measured until then stands above." in result.stderr


def test_ctrl_c_before_anything_was_measured_gives_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(monkeypatch, lambda _, call: call == 1, KeyboardInterrupt())
    result = bench(path, *FAST)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "vmoe-bench: interrupted."
    assert not result.stdout


@pytest.mark.parametrize("at", [2, 5])
def test_ctrl_c_in_a_stream_keeps_its_windows(
    path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    from vmoe.runtime.bench.watch import Watch

    looks = [0]

    def look(self: Watch) -> None:
        looks[0] += 1
        if looks[0] == at:  # once for the beginning, then after each label; the first warms up
            raise KeyboardInterrupt

    monkeypatch.setattr(Watch, "look", look)
    result = bench(path, "--scenario", "stream", "--duration", "60", *FAST[4:], "--json")
    if at == 2:
        assert result.exit_code == 130
        assert result.stderr.splitlines()[-1] == "vmoe-bench: interrupted."
        assert not result.stdout
        return
    (row,) = read(result, 130)["rows"]
    assert 1 <= row["stream"]["windows"] <= 3


# ---- a GPU's own times, on a planted driver


@pytest.mark.parametrize("bindings", ["10.3"], indirect=True)
def test_a_backend_that_tells_where_time_goes(trt: Fake, path: Path, tmp_path: Path) -> None:
    plans = built(bundles.read(path))
    how = ("--force-route", "free", *FAST, "--json")
    (row,) = read(bench(plans, *how))["rows"]
    # The planted clock ticks once an event: each copy, and each of the two parts' work, is 1 ms.
    assert row["device_ms"]["device_ms"] == 2
    assert row["device_ms"]["h2d_ms"] == 1
    (alone,) = read(bench(plans, "--no-include-transfers", *how))["rows"]
    assert alone["latency_ms"]["median"] == 2
    assert alone["device_ms"]["d2h_ms"] == 2
    assert np.isfinite(alone["cpu_ms"]["median"])


@pytest.mark.parametrize("bindings", ["10.3"], indirect=True)
def test_cuda_graphs_can_be_left_out(trt: Fake, path: Path, gpu: Any) -> None:
    plans = built(bundles.read(path))
    for flag, graphs in ((), True), (("--cuda-graph",), True), (("--no-cuda-graph",), False):
        before = gpu.launches
        read(bench(plans, *flag, "--force-route", "free", *FAST, "--json"))
        assert (gpu.launches > before) is graphs


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--cuda-graph",
         "--cuda-graph: onnxruntime runs on the CPU here, which has no CUDA graphs. Leave it out."),
        ("--no-include-transfers",
         "--no-include-transfers: backend onnxruntime, which runs split, does not tell copies from "
         "work; tensorrt does. Leave it out."),
    ],
)  # fmt: skip
def test_what_a_cpu_cannot_do_is_a_usage_error(path: Path, flag: str, says: str) -> None:
    result = bench(path, flag, *FAST)
    assert result.exit_code == 2
    assert result.stderr == f"vmoe-bench: {says}\n"
    assert bench(path, "--include-transfers", "--no-cuda-graph", *FAST).exit_code == 0


def test_a_backend_without_cuda_graphs_is_a_usage_error(path: Path) -> None:
    result = bench(with_twin(path), "--cuda-graph", "--backend", "torch", *FAST)
    assert result.exit_code == 2
    assert result.stderr == (
        "vmoe-bench: --cuda-graph: backend torch runs no CUDA graphs. Leave it out.\n"
    )

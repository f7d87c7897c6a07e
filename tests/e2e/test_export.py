"""vmoe-export as a user runs it."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import onnx
import pytest
from click.testing import CliRunner, Result

import vmoe
from tests.twins import SPEC, random_clips
from vmoe import bundle as bundles
from vmoe import checkpoint, latest
from vmoe.__main__ import main as vmoe_command
from vmoe.checkpoint import Checkpoint
from vmoe.data.camera_motion import LABELS
from vmoe.errors import VmoeError
from vmoe.export.cli import main
from vmoe.export.onnx import from_twin
from vmoe.export.plan import ExportSettings, plan
from vmoe.export.written import write
from vmoe.models import ModelSettings, build
from vmoe.runtime import load, served

SCHEMA = json.loads(Path(vmoe.__file__).with_name("bundle.schema.json").read_text())
COMMAND = [sys.executable, "-m", "vmoe.export.cli"]
ROOT = Path(__file__).resolve().parents[2]
FAST = ["--verify-clips", "8", "--robust-clips", "0", "--gate-sparsity", "1000"]
LOOSE = [  # weights are random: what is tested is what is said
    "--gate-parity", "1", "--gate-parity-mean", "1", "--gate-clean", "100", "--gate-robust", "100",
    "--gate-sparsity", "100", "--verify-clips", "8", "--robust-clips", "4",
]  # fmt: skip


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def last_line(result: Result) -> str:
    return result.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def exported(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Return what the command makes of the tiny checkpoint in a fresh process and folder."""
    cwd = tmp_path_factory.mktemp("cwd")
    (cwd / "expert0.data").write_text("a file of the user's that happens to be called so")
    done = subprocess.run(
        [*COMMAND, str(tiny_checkpoint), "--name", "tiny", "--gate-sparsity", "1000",
         "--triton-repo", "models"],
        cwd=cwd, capture_output=True, text=True, check=False, env=_environment(),
    )  # fmt: skip
    return cwd / "runs/export/tiny-split", done


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_it_says_where_the_bundle_is_how_good_and_what_next(
    exported: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = exported
    assert done.returncode == 0, done.stderr
    said = done.stderr
    assert "bundle: runs/export/tiny-split" in said
    assert "next: vmoe-run runs/export/tiny-split --camera 0" in said
    assert "next: vmoe-attack runs/export/tiny-split" in said
    assert "next: vmoe-bench runs/export/tiny-split" in said
    assert "less than its dense counterpart" in said
    assert "Warning" not in said, "the exporter's talk got through"
    assert "torch" not in said
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row.split()[1] for row in rows[2:]] == ["router", *(f"expert{i}" for i in range(4))]
    assert all(row.rstrip(" |").endswith("ok") for row in rows[2:])
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_with_a_repository_the_new_bundle_is_served_and_the_next_commands_say_how(
    exported: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    path, done = exported
    folder = path.parents[2] / "models"
    assert f"next: tritonserver --model-repository {folder}" in done.stderr
    assert f"{Path('runs/export/tiny-split')} --server localhost:8000" in done.stderr
    assert (folder / "tiny" / str(served.version(bundles.read(path))) / "model.py").is_file()


def test_the_same_twin_gives_the_same_bytes(
    exported: tuple[Path, subprocess.CompletedProcess[str]], tiny_bundle: Path
) -> None:
    folder, _ = exported
    names = {path.name for path in tiny_bundle.iterdir()}
    assert {path.name for path in folder.iterdir()} == names
    for name in names - {bundles.REPORT}:  # it holds seconds
        assert (folder / name).read_bytes() == (tiny_bundle / name).read_bytes(), name


def test_nothing_in_it_names_a_place_of_this_machine(tiny_bundle: Path) -> None:
    places = [str(ROOT), str(Path.home()), str(tiny_bundle.parent), sys.prefix, "site-packages",
              "stack_trace", 'File "']  # fmt: skip
    for path in tiny_bundle.iterdir():
        data = path.read_bytes()
        assert not [place for place in places if place.encode() in data], path.name


def test_the_manifest_fits_its_schema_and_the_report_says_what_was_measured(
    tiny_bundle: Path, tiny_checkpoint: Path
) -> None:
    manifest = json.loads((tiny_bundle / bundles.MANIFEST).read_text())
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(manifest, SCHEMA)
    jsonschema.validate({**manifest, "of_a_later_version": 1}, SCHEMA)
    for broken in ({"schema_version": 2}, {"lowering": "magic"}, {"labels": []}, {"twin": {}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**manifest, **broken}, SCHEMA)
    read = bundles.read(tiny_bundle)
    assert read.twin == {"sha256": bundles.sha256(tiny_checkpoint), "file": "twin.safetensors"}
    assert set(read.versions) == {"vmoe", "torch", "onnx", "onnxscript", "opset"}
    report = read.report()
    assert report["parity"]["clips"] == 64
    assert report["route"]["agreement_pct"] == 100
    assert sum(report["route"]["clips_per_expert"]) == 64
    assert min(report["route"]["clips_per_expert"]) > 0
    assert all(gate["ok"] for gate in report["gates"])
    assert report["flops_per_clip"]["saved"] > 0.6
    assert set(report["seconds"]) == {"clips", "onnx", "write", "check"}
    assert report["versions"]["onnxruntime"]


def test_if_as_json_without_its_twin_then_its_counterpart_in_its_place(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = Path("runs/one")
    plan = [small, "--lowering", "if", "--out", out]
    first = run(*plan, "--no-twin", "--json", "--opset", "18", *FAST)
    assert first.exit_code == 0, first.stderr
    said = json.loads(first.stdout)
    assert said["bundle"] == str(out)
    assert said["lowering"] == "if"
    assert {path.name for path in out.iterdir()} == {
        "moe.onnx", "moe.data", "vmoe.json", "report.json",
    }  # fmt: skip
    manifest = json.loads((out / bundles.MANIFEST).read_text())
    jsonschema.validate(manifest, SCHEMA)
    assert manifest["model"]["name"] == "small"
    assert "file" not in manifest["twin"]
    assert manifest["versions"]["opset"] == "18"
    assert onnx.load(out / "moe.onnx", load_external_data=False).opset_import[0].version == 18
    assert latest.bundle(None)[0] == out
    with load(out, threads=1) as engine:
        got = engine.infer(random_clips(3), force_route=1)
    assert got.logits.shape == (3, 2)
    assert list(got.route) == [1, 1, 1]
    second = run(*plan)
    assert second.exit_code == 2
    assert last_line(second).endswith("exists. Choose another --out, or say --overwrite.")
    shutil.copytree(out, "runs/before")
    third = run(*plan, "--counterpart", "--overwrite", *FAST)
    assert third.exit_code == 0, third.stderr
    assert "random weights: for latency only" in third.stderr
    assert f"vmoe-bench BUNDLE --baseline {out}" in third.stderr
    check_counterpart(out)


def check_counterpart(out: Path) -> None:
    read = bundles.read(out)
    assert read.extra == {"weights": "random"}
    assert read.model["name"] == "small-dense"
    assert (read.model["experts"], read.model["width"]) == (1, 0.2)
    assert read.report()["weights"] == "random"
    assert "file" not in read.twin
    jsonschema.validate(json.loads((out / bundles.MANIFEST).read_text()), SCHEMA)
    with load(out, threads=1) as engine:
        got = engine.infer(random_clips(3))
    assert not got.scores.any()
    assert got.scores.shape == (3, 1)
    assert not got.route.any()
    assert latest.bundle(None)[0] == Path("runs/before"), "random weights would be served"


def test_a_dense_model_has_no_counterpart(tmp_path: Path) -> None:
    dense = tmp_path / "dense.safetensors"
    twin = build(ModelSettings("r3d18", 0.1, 1, 2), SPEC).eval()
    checkpoint.save(Checkpoint(twin, ("left", "right")), dense)
    result = run(dense, "--counterpart", "--dry-run")
    assert result.exit_code == 2
    assert "this model is dense already" in last_line(result)
    plain = run(dense, "--dry-run", "--json")
    assert json.loads(plain.stdout)["parts"] == ["expert0"]


def test_what_a_gate_refuses_is_kept_as_rejected_with_its_report(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = Path("runs/x")
    (tmp_path / "runs/x.rejected").mkdir(parents=True)  # of the last time: replaced
    plan = ["--out", out, "--gate-parity", "1e-12", "--bisect", "--optimize", "none"]
    result = run(small, *plan, *FAST)
    assert result.exit_code == 3
    line = last_line(result)
    assert line.startswith("vmoe-export: refused: max |d logits| is ")
    assert "must be at most" in line
    assert "is kept as runs/x.rejected." in line
    assert line.endswith("If you can live with it, say so with --gate-parity.")
    assert "gate route: route agreement 100 % >= 100 %: ok" in result.stderr
    said = bundles.read(out.with_name("x.rejected")).report()["bisect"]
    assert said["part"] in ("router", "expert0", "expert1")
    assert f"bisect: {said['part']} breaks in {said['block']}, at " in result.stderr
    assert [path.name for path in out.parent.iterdir()] == ["x.rejected"]
    kept = bundles.read(out.with_name("x.rejected"))
    gates = kept.report()["gates"]
    assert [gate["gate"] for gate in gates if not gate["ok"]] == ["parity", "parity"]
    assert latest.bundle(None)[0] == latest.SHIPPED, "a refused bundle would be served"
    shown = CliRunner().invoke(vmoe_command, ["inspect", "runs/x.rejected"])
    assert "REFUSED" in shown.stdout
    assert said["said"] in shown.stdout.splitlines()
    (out.with_name("x.rejected") / "mine").mkdir()
    again = run(small, "--out", out, "--gate-parity", "1e-12")
    assert again.exit_code == 2
    assert "x.rejected is or holds more than a bundle" in last_line(again)


def test_int8_in_one_file_says_what_it_is_and_is_the_same_bytes_again(tmp_path: Path) -> None:
    path = tmp_path / "moves.safetensors"
    twin = build(ModelSettings("r3d18", 0.1, 2, len(LABELS)), SPEC, seed=1).eval()
    checkpoint.save(Checkpoint(twin, LABELS, {"data": "camera-motion"}), path)
    plan = ["--lowering", "plugin", "--int8", "--calib-clips", "16", "--calib-adv", "0.25", *LOOSE]
    first = run(path, "--out", tmp_path / "a", "--json", *plan)
    assert first.exit_code == 0, first.stderr
    said = json.loads(first.stdout)
    found = said["precision"]["moe"]
    assert found["asked"] == found["found"] == {"fp32": 4, "int8": said_int8(found)}
    ran = said["backends"]["onnxruntime"]["runs_as"]["moe"]
    assert ran["int8"] == said_int8(found)
    assert said["calibration"] == {
        "data": "camera-motion", "split": "train", "calib_clips": 16, "calib_adv": 0.25,
        "int8_form": "u8s8",
    }  # fmt: skip
    assert said["optimize"]["form"] == "joined"
    assert said["backends"]["onnxruntime"]["ok"] is True
    assert set(said["robust"]) == {"pgd 8/255"}
    read = bundles.read(tmp_path / "a")
    jsonschema.validate(json.loads((read.path / bundles.MANIFEST).read_text()), SCHEMA)
    assert read.parts["moe"].precision == {"asked": "fp32+int8", "found": "fp32+int8"}
    assert read.parts["moe"].layers == found["found"]
    assert not read.others, "no kernel routes int8"
    assert "no file for TensorRT: --lowering plugin has no routed" in first.stderr
    second = run(path, "--out", tmp_path / "b", *plan)
    assert second.exit_code == 0, second.stderr
    for file in (tmp_path / "a").iterdir():
        if file.name != bundles.REPORT:
            assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    shown = CliRunner().invoke(vmoe_command, ["inspect", str(tmp_path / "a")]).stdout
    for text in ("fp32+int8", "sparsity:", "calibration: data camera-motion",
                 "export took, in seconds", "runs int8 as", "| onnxruntime"):  # fmt: skip
        assert text in shown, text


def said_int8(found: dict[str, dict[str, int]]) -> int:
    return found["found"]["int8"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--int8", "--fp16"], "--fp16 and --int8 exclude each other: choose one."),
        (["--keep-fp32", "("], "--keep-fp32 is for --fp16, --bf16 or --int8"),
        (["--int8", "--keep-fp32", "layer9"], "matches none of the twin's"),
        (["--int8"], "does not say what it was trained on: name clips of its training split"),
        (["--int8", "--calib", "{}/empty"], "--calib: "),
        (["--int8", "--calib", "{}/empty", "--dry-run"], "--calib: {}/empty has 0 folders"),
        (["--int8", "--keep-fp32", "layer9", "--dry-run"], "matches none of the twin's"),
        (["--calib-clips", "3"], "--calib-clips is for --int8"),
        (["--form", "online"], "no online form"),
        (["--form", "online", "--dry-run"], "no online form"),
        (["--out", "{}/empty"], "exists. Choose another --out"),
        (["--robust", "{}/empty"], "no adversarial clips"),
        (["--robust", "{}/empty", "--dry-run"], "no adversarial clips"),
    ],
)
def test_a_plan_that_cannot_be_is_one_line(
    small: Path, flags: list[str], says: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    out = [] if "--out" in flags else ["--out", tmp_path / "x"]
    result = run(small, *(flag.format(tmp_path) for flag in flags), *out, *FAST)
    assert result.exit_code in (1, 2)
    assert says.format(tmp_path) in last_line(result)
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_checkpoint_that_changes_while_it_is_exported_is_refused(
    small: Path, tmp_path: Path
) -> None:
    path = tmp_path / "last.safetensors"
    shutil.copy(small, path)
    planned = plan(path, ExportSettings())
    twin = build(ModelSettings("r3d18", 0.1, 2, 2), SPEC, seed=9).eval()
    checkpoint.save(Checkpoint(twin, ("left", "right")), path)
    (tmp_path / "x").mkdir()
    parts = from_twin(planned.checkpoint.twin, 20)
    with pytest.raises(VmoeError, match="has changed since it was read"):
        write(planned, parts, tmp_path / "x")


def test_without_onnx_runtime_it_says_what_to_install_before_any_work(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else real(name)
    )
    result = run(small, "--out", tmp_path / "x", *FAST)
    assert result.exit_code == 5
    assert last_line(result).startswith("vmoe-export: onnxruntime is not installed: pip install")
    assert "clips" not in result.stderr.replace("--verify-clips", ""), "it began"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told_before_any_work(
    small: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    result = run(small, "--out", tmp_path / "file" / "x")
    assert result.exit_code == 1
    assert "cannot write" in last_line(result)
    assert len(result.stderr.splitlines()) == 1


def test_a_full_disk_leaves_nothing(small: Path, tmp_path: Path) -> None:
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)); "
        "from vmoe.export.cli import main; main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, str(small), "--out", str(tmp_path / "x")],
        capture_output=True, text=True, check=False, env=_environment(),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert f"cannot write {tmp_path / 'x'}: File too large. Nothing was left half-written." in line
    assert not list(tmp_path.iterdir())


def test_dry_run_shows_the_plan_and_writes_nothing(small: Path, tmp_path: Path) -> None:
    result = run(small, "--lowering", "if", "--out", tmp_path / "x", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    planned = json.loads(result.stdout)
    assert planned["parts"] == ["moe"]
    assert planned["out"] == str(tmp_path / "x")
    assert planned["precision"] == "fp32"
    assert planned["gates"] == {
        "parity": 1e-4, "parity_mean": 2e-5, "route_pct": 100.0, "clean_points": 1.0,
        "robust_pct": 2.0, "sparsity": 1.3,
    }  # fmt: skip
    plain = run(small, "--dry-run")
    assert "parts: router, expert0, expert1" in plain.stdout
    assert "out: runs/export/small-split" in plain.stdout
    assert not list(tmp_path.iterdir())
    assert run(small, "--out", small.parent, "--dry-run").exit_code == 2


def bad_pickle(folder: Path) -> Path:
    path = folder / "model.pt"
    path.write_bytes(pickle.dumps({"weights": [1, 2, 3]}))
    return path


def bad_text(folder: Path) -> Path:
    path = folder / "model.safetensors"
    path.write_text("this is no checkpoint")
    return path


def bad_missing(folder: Path) -> Path:
    return folder / "nowhere.safetensors"


def bad_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def bad_header(folder: Path) -> Path:
    """Write a checkpoint that says nothing of the clips it takes."""
    path = folder / "model.safetensors"
    twin = build(ModelSettings("tsm", 0.1, 2, 2), SPEC)
    checkpoint.save(Checkpoint(twin, ("left", "right")), path)
    tensors, header = checkpoint.read_tensors(path)
    del header["clip"]
    checkpoint.write_tensors(tensors, header, path)
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (bad_header, "is no vmoe checkpoint: its header has no 'clip'"),
        (bad_pickle, "is a pickle, which can run code when it is read"),
        (bad_text, "is damaged or no safetensors file"),
        (bad_missing, "cannot read checkpoint"),
        (bad_folder, "holds no checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(
    make: object, says: str, tmp_path: Path
) -> None:
    assert callable(make)
    result = run(make(tmp_path), "--out", tmp_path / "x")
    assert result.exit_code == 1
    assert says in last_line(result)
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lowering", "iff"], "did you mean 'if'?"),
        (["--opset", "12"], "--opset is 12; it must be at least 18"),
        (["--opset", "99"], "--opset is 99; it must be at most 23"),
        (["--name", "../up"], "--name is '../up'; use letters"),
        (["--gate-route", "200"], "--gate-route is 200.0; it must be at most 100"),
        (["--verify-data", "camera-motoin"], "did you mean 'camera-motion'?"),
    ],
)
def test_flags_that_make_no_sense_are_usage_errors(
    small: Path, flags: list[str], says: str, tmp_path: Path
) -> None:
    result = run(small, "--out", tmp_path / "x", *flags)
    assert result.exit_code == 2
    assert says in last_line(result)
    assert not list(tmp_path.iterdir())


def test_help_has_three_examples() -> None:
    text = run("--help").stdout
    assert text.split("Examples:")[1].count("vmoe-export") == 3


def test_the_twin_inside_exports_to_the_same_bundle(tiny_bundle: Path) -> None:
    result = run(tiny_bundle, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["name"] == "tiny"

"""vmoe-attack as a user runs it: on a checkpoint, on a bundle, and with bad input."""

from __future__ import annotations

import csv
import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from tests import videos
from tests.twins import SPEC, lively
from vmoe import adversarial, checkpoint
from vmoe.attacks.cli import main
from vmoe.bundle import sha256
from vmoe.checkpoint import Checkpoint
from vmoe.clips import ClipSpec
from vmoe.data import DataSettings, open_data
from vmoe.data._videos import VideoClips
from vmoe.data.camera_motion import LABELS

QUICK = ["--n", "6", "--steps", "2", "--device", "cpu", "--no-sanity"]
NOISE = ["--attack", "noise", "--n", "6", "--device", "cpu", "--no-sanity"]
FROZEN = ["--route-grad", "frozen"]


def write_twin(
    path: Path, seed: int = 0, spec: ClipSpec = SPEC, labels: tuple[str, ...] = LABELS
) -> Path:
    twin = lively(classes=len(labels), seed=seed, spec=spec)
    checkpoint.save(Checkpoint(twin, labels), path)
    return path


@pytest.fixture
def twin(tmp_path: Path) -> Path:
    return write_twin(tmp_path / "mine.safetensors")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*args: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def refused(*args: str | Path, code: int = 2) -> str:
    """Return the one line that refuses a command line; nothing may have been written."""
    before = sorted(Path().rglob("*"))
    lines = run(*args, code=code).stderr.strip().splitlines()
    assert sorted(Path().rglob("*")) == before
    talk = [line for line in lines if line.startswith("vmoe-attack: ")]
    assert len(talk) == 1
    assert lines[-1] == talk[0]
    return talk[0]


def test_checkpoint(twin: Path) -> None:
    result = run(twin, *QUICK, *FROZEN, "--attack", "pgd,tlga-r,j-tlga", "--eps", "1,2/255")
    lines = result.stdout.splitlines()
    assert lines[0] == f"target: {twin}"
    assert "eps 1/255 (0.0039), 1 grey levels; 2/255 (0.0078), 2 grey levels" in result.stdout
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert rows == 2 * ["attack", "--------", "pgd", "tlga-r", "j-tlga", "worst-of"]
    assert lines[-1] == f"next: vmoe-export {twin}"
    report = json.loads(Path("runs/attack/mine/report.json").read_text())
    assert {row["linf"] for row in report["rows"] if row["part"] == "router"} == {1, 2}
    assert report["n"] == 6
    assert all(row["robust"]["hits"] <= row["clean"]["hits"] for row in report["rows"])
    assert "| worst-of | twin" in Path("runs/attack/mine/report.md").read_text()


def test_bundle_side_by_side_and_replay(tiny_bundle: Path) -> None:
    flags = ["--attack", "pgd,tlga-r", "--eps", "2", "--save-adv", "clips", "--out", "one",
             "--mode", "transfer"]  # fmt: skip
    result = run(tiny_bundle, *QUICK, *FROZEN, *flags)
    assert "engine: " in result.stdout
    assert "FOREIGN" not in result.stdout
    first = json.loads(Path("one/report.json").read_text())
    assert [(row["attack"], row["model"]) for row in first["rows"]] == [
        ("pgd", "twin"), ("pgd", "engine"), ("tlga-r", "twin"), ("tlga-r", "engine"),
    ]  # fmt: skip
    clean, *attacked = first["agreement"]
    assert clean["route"]["hits"] == clean["said"]["hits"] == 6
    for row in attacked:  # a faithful export: what breaks the twin breaks the engine
        assert row["only_twin"] == row["only_engine"] == 0
        assert row["route"]["hits"] == 6

    replayed = run(tiny_bundle, "--load-adv", "clips", "--json", "--out", "two")
    again = json.loads(replayed.stdout)
    for a, b in zip(first["rows"], again["rows"], strict=True):
        for key in ("robust", "success", "flips", "linf", "route_kept"):
            assert a[key] == b[key]
    assert again["clips"]["index"] == first["clips"]["index"]
    assert json.loads(Path("two/report.json").read_text()) == again
    assert "clips of camera-motion test, as saved" in replayed.stderr


def test_foreign_twin_is_named(tiny_bundle: Path) -> None:
    Path("other").mkdir()
    write_twin(Path("other/best.safetensors"), seed=3)
    flags = ["--twin", "other", "--attack", "pgd", "--eps", "1", "--queries", "60"]
    result = run(tiny_bundle, *QUICK, *FROZEN, *flags)
    assert "FOREIGN: the engine was exported from another twin" in result.stdout
    report = json.loads(next(Path("runs/attack").glob("*/report.json")).read_text())
    assert report["twin"]["foreign"] is True


def test_bundle_without_its_twin(tiny_bundle: Path) -> None:
    flags = ["--attack", "pgd-r", "--eps", "1", "--mode", "transfer", "--save-adv", "clips"]
    run(tiny_bundle, *QUICK, *flags)
    shutil.copytree(tiny_bundle, "bare")
    manifest = json.loads(Path("bare/vmoe.json").read_text())
    del manifest["twin"]["file"]
    Path("bare/vmoe.json").write_text(json.dumps(manifest))
    Path("bare/twin.safetensors").unlink()
    assert "carries no twin to attack: name one with --twin" in refused("bare", code=1)
    replayed = json.loads(run("bare", "--load-adv", "clips", "--json").stdout)
    assert [row["model"] for row in replayed["rows"]] == ["engine"]
    assert replayed["twin"] is None
    flags = ["--mode", "query", "--attack", "noise", "--n", "4", "--eps", "8"]
    asked = json.loads(run("bare", *flags, "--json", "--out", "asked").stdout)
    (row,) = asked["rows"]
    assert (row["mode"], row["made_on"], row["model"]) == ("query", "engine", "engine")
    assert row["backwards_total"] == 0


def test_newest_of_runs_is_taken_and_every_run_has_a_folder_of_its_own(twin: Path) -> None:
    Path("runs/train/first").mkdir(parents=True)
    shutil.copy(twin, "runs/train/first/best.safetensors")
    flags = ["--n", "4", *FROZEN, "--attack", "fgsm", "--eps", "1", "--no-sanity"]
    result = run(*flags)
    best = "runs/train/first/best.safetensors"
    assert result.stdout.startswith(f"target: {best} (the newest under runs/)\n")
    again = run("runs/train/first", *flags)
    assert "report: runs/attack/first-2/report.md" in again.stdout
    assert Path("runs/attack/first/report.json").is_file()


def test_dry_run_attacks_nothing(twin: Path) -> None:
    planned = json.loads(run(twin, *QUICK, "--dry-run", "--json").stdout)
    assert (planned["n"], planned["data"]) == (6, "camera-motion test")
    assert {each["steps"] for row in planned["settings"] for each in row["each"]} == {2}
    result = run(twin, *QUICK, "--dry-run")
    assert "threat model: L-infinity, eps 8/255 (0.0314), 8 grey levels" in result.stdout
    assert not Path("runs").exists()


def test_a_dense_model_is_attacked_as_one(tmp_path: Path) -> None:
    dense = tmp_path / "dense.safetensors"
    checkpoint.save(Checkpoint(lively(experts=1, classes=len(LABELS)), LABELS), dense)
    report = json.loads(run(dense, *QUICK, "--json", "-q").stdout)
    assert [row["attack"] for row in report["rows"]] == ["pgd", "j-tlga"]
    assert [len(row["each"]) for row in report["settings"]] == [1, 1]
    said = refused(dense, *QUICK, "--attack", "pgd,tlga-r", "--dry-run")
    assert "tlga-r attacks a router, and this model is dense" in said


def test_config_file_and_seed(twin: Path) -> None:
    Path("run.toml").write_text('attack = ["pgd-r"]\neps = "1/255"\nn = 4\nsteps = 1\n')
    result = run(
        twin, "--config", "run.toml", "--n", "3", "--seed", "5", "--json", "-q", "--no-sanity"
    )
    report = json.loads(result.stdout)
    assert (report["n"], report["seed"], len(report["rows"])) == (3, 5, 1)
    how = report["settings"][0]["each"][0]
    assert (how["steps"], how["seed"], how["eps"]) == (1, 5, 1 / 255)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--attack", "tlga"], "unknown attack 'tlga': did you mean 'tlga-r'?"),
        (["--eps", "strong"], "eps 'strong' is not a number"),
        (["--eps", "8,"], "eps '' is not a number"),
        (["--eps", "-1"], "eps '-1' is negative"),
        (["--eps", "300"], "is above 1"),
        (["--attack", "pgd", "--gamma1", "2"], "--gamma1 has no effect: none of pgd takes it"),
        (["--attack", "pgd-r", "--route-grad", "soft"], "--route-grad has no effect"),
        (["--route-grad", "sof"], "did you mean 'soft'?"),
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--n", "0"], "--n is 0; it must be at least 1"),
        (["--n", "5000"], "--n is 5000; camera-motion test has 2000 clips"),
        (["--data", "camera-moton"], "did you mean 'camera-motion'?"),
        (["--split", "tset"], "did you mean 'test'?"),
        (["--temporal", "never"], "--temporal"),
        (["--twin", "other.safetensors"], "is a checkpoint, a twin itself"),
        (["--device", "tpu"], "--device tpu is unknown; give auto, cpu or cuda:N"),
        (["--attack", "tla-e", "--expert", "4", "--dry-run"], "this model has experts 0 to 3"),
        (["--attack", "misroute", "--to-expert", "9", "--dry-run"], "--to-expert is 9; this model"),
        (
            ["--attack", "frame-sparse", "--touched-frames", "90", "--dry-run"],
            "--touched-frames is 90; a clip of this model has 4",
        ),
        (["--eps", "0"], "--eps is 0.0; it must be above 0"),
        (["--eps", "2.0"], "eps '2.0' could mean two things"),
        (["--norm", "l2", "--eps", "8"], "with --norm l2 write a length with its point"),
        (["--eps", "300.5", "--norm", "l2"], "--eps is 300.5; with --norm l2 it must be at most 1"),
        (["--norm", "l3"], "'l3'. Known: linf, l2"),
        (["--preset", "papr"], "did you mean 'paper'?"),
        (["--resume"], "--resume goes on with the run in a folder; name it with --out"),
        (["--resume", "--out", "x"], "x cannot be resumed: no run was begun there"),
        (["--resume", "--overwrite", "--out", "x"], "--resume and --overwrite exclude each other"),
    ],
)
def test_flag_that_cannot_be_used(twin: Path, flags: list[str], why: str) -> None:
    assert why in refused(twin, *flags)


def test_flags_that_exclude_each_other(twin: Path) -> None:
    said = refused(twin, "--load-adv", "clips", "--eps", "8")
    assert "--eps has no effect: --load-adv clips replays clips as they are" in said
    for flag in (["--curve"], ["--preset", "paper"], ["--resume"]):
        said = refused(twin, "--load-adv", "clips", *flag)
        assert f"{flag[0]} has no effect: --load-adv clips replays clips as they are" in said
    said = refused(twin, "--load-adv", "clips", "--save-adv", "more")
    assert "--save-adv and --load-adv exclude each other" in said


def test_outputs_that_exist_are_refused_before_any_work(twin: Path) -> None:
    Path("kept").mkdir()
    Path("kept/report.json").write_text("mine")
    assert "kept/report.json exists" in refused(twin, "--out", "kept")
    Path("kept.md").write_text("mine")
    assert "kept.md exists" in refused(twin, "--md", "kept.md")
    assert "kept exists. Choose another --save-adv" in refused(twin, "--save-adv", "kept")
    assert "kept.md is a file" in refused(twin, "--out", "kept.md")
    run(twin, *QUICK, "--attack", "pgd-r", "--out", "kept", "--md", "kept.md", "--overwrite")
    assert json.loads(Path("kept/report.json").read_text())["n"] == 6
    assert Path("kept.md").read_text() == Path("kept/report.md").read_text()


def test_target_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot read checkpoint none.safetensors" in refused("none.safetensors", code=1)
    Path("old.pt").write_bytes(pickle.dumps({"weights": 1}))
    assert "is a pickle, which can run code" in refused("old.pt", code=1)
    Path("torn.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    assert "torn.safetensors" in refused("torn.safetensors", code=1)
    Path("empty").mkdir()
    assert "not a bundle" in refused("empty", code=1)


def test_damaged_bundle(tiny_bundle: Path) -> None:
    shutil.copytree(tiny_bundle, "broken")
    data = bytearray(Path("broken/router.onnx").read_bytes())
    data[100] ^= 1
    Path("broken/router.onnx").write_bytes(data)
    assert "router.onnx has changed since export" in refused("broken", code=1)


def test_twin_that_does_not_fit_the_bundle(tiny_bundle: Path) -> None:
    smaller = write_twin(Path("smaller.safetensors"), spec=ClipSpec(4, 0.1, 32, 24))
    assert "has clips of width 24, bundle" in refused(tiny_bundle, "--twin", smaller)
    others = ("up", "down")
    stranger = write_twin(Path("stranger.safetensors"), labels=others)
    said = refused(tiny_bundle, "--twin", stranger)
    assert "has labels up, down (2)" in said


def test_saved_clips_that_do_not_fit(twin: Path) -> None:
    assert "cannot read none/manifest.json" in refused(twin, "--load-adv", "none", code=1)
    run(twin, *QUICK, "--attack", "pgd-r", "--save-adv", "clips")
    for changed, why in (
        (ClipSpec(4, 0.1, 32, 24), "clips has clips of width 32, other.safetensors of 24: make"),
        (ClipSpec(4, 0.5, 32, 32), "clips has clips of spacing_s 0.1, other.safetensors of 0.5"),
    ):
        other = write_twin(Path("other.safetensors"), spec=changed)
        assert why in refused(other, "--load-adv", "clips")
    others = write_twin(Path("others.safetensors"), labels=("up", "down"))
    assert "clips has labels static, " in refused(others, "--load-adv", "clips")


def test_saved_clips_beyond_their_budget_are_refused(twin: Path) -> None:
    run(twin, *QUICK, "--attack", "pgd-r", "--save-adv", "clips")
    saved = adversarial.load(Path("clips"))
    (made,) = saved.attacked
    beyond = dataclasses.replace(made, eps=7 / 255)
    adversarial.save(dataclasses.replace(saved, attacked=(beyond,)), Path("beyond"))
    said = refused(twin, "--load-adv", "beyond")
    assert "clips of pgd-r at eps 7/255 (0.0275) change by 8 grey levels, more than 7" in said


SEQUENCE = r"seq\d+"


def test_a_folder_is_split_as_the_twin_was_trained(tmp_path: Path) -> None:
    """Two takes of each sequence: alone, they would fall into different splits."""
    where = tmp_path / "videos"
    for label in ("hug", "kick"):
        (where / label).mkdir(parents=True)
        for sequence in range(24):
            for take in range(2):
                name = f"{label}_seq{sequence:02d}_{take}.avi"
                videos.write(where / label / name, frames=8)
    recipe = {"clips": {"group": SEQUENCE}}
    twin = lively(classes=2)
    checkpoint.save(Checkpoint(twin, ("hug", "kick"), recipe), Path("grouped.safetensors"))
    flags = ["--data", where, "--n", "6", "--attack", "pgd-r", "--steps", "1", "--eps", "1"]
    shown = run("grouped.safetensors", *flags, "--out", "one").stdout
    assert f"videos test, 6 clips, groups {SEQUENCE!r}" in shown

    def judged(*more: str) -> set[str]:
        run("grouped.safetensors", *flags, *more, "--out", "two", "--overwrite")
        index = json.loads(Path("two/report.json").read_text())["clips"]["index"]
        return {tested.files[i][0].name for i in index}

    def opened(split: str, group: str) -> VideoClips:
        data = open_data(str(where), split, SPEC, DataSettings(group=group))
        assert isinstance(data, VideoClips)
        return data

    def sequences(names: Iterable[str]) -> set[str]:
        return {name.split("_")[1] for name in names}

    trained = sequences(path.name for path, _ in opened("train", SEQUENCE).files)
    tested = opened("test", SEQUENCE)
    flags[3] = str(len(tested))
    assert not sequences(judged()) & trained
    tested = opened("test", "")
    flags[3] = str(len(tested))
    assert sequences(judged("--group", "")) & trained


def test_an_output_that_cannot_be_written_is_refused_before_any_work(twin: Path) -> None:
    for flag in ("--out", "--md", "--save-adv"):
        said = refused(twin, flag, "/proc/x", code=1)
        assert "cannot write /proc/x: " in said
        assert "Nothing was left half-written" in said


def limited(most: int, *flags: str | Path) -> str:
    """Run a command line where no file can be larger than some bytes; return its last line."""
    code = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most})); "
        "from vmoe.attacks.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_a_full_disk_leaves_nothing_half_written(twin: Path) -> None:
    line = limited(1024, twin, *QUICK, "--attack", "pgd-r", "--out", "one")
    assert "cannot write" in line
    assert "one/parts/run.json" in line
    assert line.endswith("File too large. Nothing was left half-written.")
    assert [path for path in Path().rglob("*") if path.is_file()] == [twin.relative_to(Path.cwd())]


def test_a_disk_that_fills_up_costs_nothing_that_was_finished(twin: Path) -> None:
    flags = [*QUICK, "--attack", "pgd-r", "--save-adv", "clips", "--out", "one"]
    line = limited(20_000, twin, *flags)
    assert "one/parts/batch00000-row000.npz: File too large" in line
    assert sorted(p.name for p in Path("one/parts").iterdir()) == [
        "batch00000-clean.npz", "run.json",
    ]  # fmt: skip
    assert not Path("clips").exists()
    result = run("--resume", "--out", "one")
    assert "resumed: 1 parts are there" in result.stderr
    assert adversarial.load(Path("clips")).attacked[0].attack == "pgd-r"
    assert not Path("one/parts").exists()


def test_nan_is_refused_with_the_clip_s_number(twin: Path) -> None:
    held = checkpoint.load(twin)
    assert held.twin.router is not None
    with torch.no_grad():
        for parameter in held.twin.router.parameters():
            parameter.fill_(torch.nan)
    checkpoint.save(held, Path("nan.safetensors"))
    said = run("nan.safetensors", *QUICK, "--out", "one", code=1).stderr.strip().splitlines()[-1]
    index = json.loads(run(twin, *NOISE, "--json").stdout)["clips"]["index"]
    assert said.startswith(f"vmoe-attack: clip {index[0]}: the twin answers NaN")
    assert not Path("one").exists()


def test_l2(twin: Path) -> None:
    flags = ["--norm", "l2", "--attack", "pgd,pgd-r", "--eps", "0.5,2.0", "--save-adv", "clips"]
    result = run(twin, *QUICK, *FROZEN, *flags)
    said = "threat model: L2 over the 12288 values of a clip, eps 0.5 (1.15 grey levels RMS); 2.0"
    assert said in result.stdout
    assert "eps 2.0: L2 of a whole clip, on uint8 clips" in result.stdout
    report = json.loads(Path("runs/attack/mine/report.json").read_text())
    assert report["threat_model"]["norm"] == "l2"
    for row in report["rows"]:
        assert row["radius"] is None
        assert row["l2"] <= row["eps"] + 1e-6
    assert report["rows"][-1]["l2"] > 1  # of 2.0, rounded towards the clean clip
    assert Path("clips/4-pgd-r-l2-2.npz").is_file()
    again = json.loads(run(twin, "--load-adv", "clips", "--json", "--out", "two").stdout)
    for a, b in zip(report["rows"], again["rows"], strict=True):
        assert [a[k] for k in ("norm", "robust", "l2")] == [b[k] for k in ("norm", "robust", "l2")]


def test_curve(twin: Path) -> None:
    run(twin, *NOISE, "--curve", "--out", "one")
    report = json.loads(Path("one/report.json").read_text())
    assert [round(255 * row["eps"]) for row in report["rows"]] == [1, 2, 4, 8, 16]
    assert Path("one/curve.png").read_bytes().startswith(b"\x89PNG")
    drawn = Path("one/curve.svg").read_text()
    assert drawn.count("<svg") == 1
    assert "![robust accuracy against eps](curve.png)" in Path("one/report.md").read_text()
    rows = list(csv.DictReader(Path("one/report.csv").read_text().splitlines()))
    assert len(rows) == len(report["rows"]) + len(report["worst_of"])
    for row, held in zip(rows, report["rows"], strict=False):
        assert (row["attack"], float(row["eps"])) == (held["attack"], held["eps"])
        assert float(row["robust"]) == held["robust"]["share"]
        assert int(row["robust_hits"]) == held["robust"]["hits"]


def test_curve_without_matplotlib_is_refused_before_any_work(twin: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None; "
        "from vmoe.attacks.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, str(twin), *QUICK, "--curve", "--out", "one"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert done.stderr.strip().endswith("is not installed: pip install 'vmoe[plot]'")
    assert not Path("one").exists()


def test_early_stop_is_off_where_clips_are_for_others(twin: Path, tiny_bundle: Path) -> None:
    def stops(*flags: str | Path) -> tuple[bool, str | None]:
        report = json.loads(run(*flags, *QUICK, "--attack", "pgd-r", "--json").stdout)
        return report["settings"][0]["each"][0]["early_stop"], report["early_stop"]

    assert stops(twin) == (True, None)
    on, why = stops(tiny_bundle)
    assert not on
    assert "as an engine judges, too: a first success lies on the twin's boundary" in str(why)
    on, why = stops(twin, "--save-adv", "clips")
    assert not on
    assert "as the clips are saved" in str(why)
    assert stops(tiny_bundle, "--early-stop") == (True, None)


def test_preset_stands_under_config_and_flags(twin: Path) -> None:
    Path("run.toml").write_text("lam = 0.5\n")
    flags = ["--attack", "tla-r", "--preset", "paper", "--config", "run.toml", "--beta", "0.5"]
    report = json.loads(run(twin, *QUICK, *flags, "--json").stdout)
    how = report["settings"][0]["each"][0]
    assert (how["lip"], how["lam"], how["beta"]) == ("quotient", 0.5, 0.5)
    assert report["preset"] == "paper"


def test_sanity_stands_in_every_report(twin: Path) -> None:
    flags = ["--attack", "pgd", "--steps", "1", "--n", "3", "--eps", "1", "--device", "cpu"]
    result = run(twin, *flags)
    report = json.loads(Path("runs/attack/mine/report.json").read_text())
    assert [each["number"] for each in report["sanity"]["checks"]] == list(range(1, 15))
    assert report["sanity"]["n"] == 3
    assert "no sign" not in report["sanity"]["verdict"]  # three clips cannot tell
    for text in (result.stdout, Path("runs/attack/mine/report.md").read_text()):
        assert "sanity of the attacks, on 3 clips, eps 1/255 (0.0039)" in text
        assert report["sanity"]["verdict"] in text


def test_what_was_not_checked_or_is_no_test_is_said(twin: Path) -> None:
    result = run(twin, *NOISE, "--eps", "1", "--split", "train")
    report = json.loads(Path("runs/attack/mine/report.json").read_text())
    assert report["sanity"] is None
    assert report["unchecked"] == "--no-sanity was given"
    for text in (result.stdout, Path("runs/attack/mine/report.md").read_text()):
        assert "NOT CHECKED: the checks of the attacks themselves were left out: --no-" in text
        assert "6 clips (NOT A TEST: twins are trained on this split)" in text


def test_interrupted_while_it_is_checked_says_how_to_go_on(
    twin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmoe.attacks.sanity.check", raises(KeyboardInterrupt()))
    said = run(twin, *NOISE[:-1], "--eps", "1", "--out", "cut", code=130).stderr
    assert "what is finished is kept; to go on: vmoe-attack --out cut --resume" in said
    assert said.splitlines()[-1] == "vmoe-attack: interrupted."


def raises(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_sanity_takes_clips_until_enough_are_right(
    twin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmoe.attacks.run.SANITY_CLIPS", 1)
    flags = ["--attack", "fgsm", "--n", "40", "--eps", "1", "--device", "cpu", "--json"]
    report = json.loads(run(twin, *flags).stdout)
    clips = report["clips"]
    said = zip(clips["clean"]["twin"]["said"], clips["label"], strict=True)
    right = [number for number, (a, b) in enumerate(said, 1) if a == b]
    assert len(right) > 1, "the twin must have clips to lose"
    assert right[0] <= report["sanity"]["n"] < right[1]


def test_budget_below_one_grey_level_is_named(twin: Path) -> None:
    said = run(twin, *NOISE, "--eps", "0.003").stdout
    assert "L-infinity, eps 0.765/255 (0.0030), 0 grey levels: uint8 clips cannot be chan" in said


def test_names_with_underscores_are_the_same_attack(twin: Path) -> None:
    report = json.loads(run(twin, *QUICK, "--attack", "pgd_r,pgd-r", "--json").stdout)
    assert [row["attack"] for row in report["rows"]] == ["pgd-r"]


def test_what_it_was_made_with_is_recorded(twin: Path) -> None:
    report = json.loads(run(twin, *NOISE, "--seed", "3", "--json").stdout)
    assert {"vmoe", "torch", "numpy", "python", "device", "threads"} <= report["versions"].keys()
    assert report["twin"]["sha256"] == sha256(twin)
    assert report["seed"] == report["settings"][0]["each"][0]["seed"] == 3
    text = Path("runs/attack/mine/report.md").read_text()
    assert f"seed 3; vmoe {report['vmoe']}, torch {torch.__version__}" in text


def test_data_with_labels_that_the_model_does_not_know() -> None:
    others = write_twin(Path("others.safetensors"), labels=("up", "down"))
    said = refused(others, "--n", "2")
    assert "has the label 'static', which the model does not know; it knows up, down" in said


def test_help_has_three_examples_and_the_command_is_installed() -> None:
    command = [str(Path(sys.executable).parent / "vmoe-attack"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.count("\n    vmoe-attack ") == 3
    for flag in ("--gamma1", "--route-grad", "--load-adv", "--lip", "--expert"):
        assert flag in shown

"""vmoe-train as a user runs it."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from tests.twins import small
from tests.videos import write
from vmoe import checkpoint
from vmoe.models.experts import tsm
from vmoe.train import cli as train_cli
from vmoe.train import loop, router_start
from vmoe.train import state as states
from vmoe.train.cli import main

SMALL = [
    "--arch", "tsm", "--width", "0.1", "--frames", "4", "--size", "32", "--clips", "20",
    "--val-clips", "10", "--test-clips", "10", "--batch", "10", "--val-steps", "1",
    "--report-steps", "1", "--quiet",
]  # fmt: skip


def train(*arguments: str) -> Result:
    return CliRunner().invoke(main, [*SMALL, *arguments])


def weights(path: Path) -> dict[str, np.ndarray]:
    tensors, _ = checkpoint.read_tensors(path)
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def test_standard_trains_and_says_what_to_do_next(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = [a for a in SMALL if a != "--quiet"]
    result = CliRunner().invoke(
        main, [*arguments, "--method", "standard", "--epochs", "2", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert f"next: vmoe-export {out / 'best.safetensors'}" in result.output
    assert "saved" in result.output  # the FLOPs against the dense counterpart
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"loss_whole", "clean", "robust", "share0", "gradients", "wait_share"} <= set(rows[0])
    assert float(rows[0]["tflops"]) > 0
    report = json.loads((out / "report.json").read_text())
    assert report["recipe"]["run"]["method"] == "standard"
    assert "one_frame_repeated_is_static" in report["evidence"]
    robust = report["robust"]
    assert robust["worst_of"]["hits"] <= robust["attacks"][0]["robust"]["hits"]
    assert robust["attacks"][0]["robust"]["hits"] <= robust["clean"]["hits"]
    assert (out / "report.md").read_text().startswith("# ")
    held = checkpoint.load(out / "best.safetensors")
    assert held.labels[0] == "static"
    assert held.recipe["run"]["method"] == "standard"


def test_resumed_is_what_an_uninterrupted_run_gives_bit_for_bit(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    method = ["--method", "j-tlat", "--steps", "1", "--epochs", "3", "--no-report"]
    assert train(*method, "--out", str(whole)).exit_code == 0
    killed = subprocess.Popen(
        [sys.executable, "-m", "vmoe.train.cli", *method, "--out", str(parts), *SMALL],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (parts / "state.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert (parts / "state.safetensors").exists()
    result = train("--out", str(parts), "--no-report", "--resume")  # it knows its own recipe
    assert result.exit_code == 0, result.output
    for name in ("last.safetensors", "state.safetensors"):
        one, two = weights(whole / name), weights(parts / name)
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[key], two[key]) for key in one), name
    assert not list(parts.glob(".*")), "a half-written file was left"


def test_interrupted_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(*arguments: Any) -> None:
        kept(*arguments)
        raise KeyboardInterrupt

    kept = train_cli._keep
    monkeypatch.setattr(train_cli, "_keep", keep)
    out = tmp_path / "cut"
    result = train("--method", "standard", "--epochs", "2", "--no-report", "--out", str(out))
    assert result.exit_code == 130
    assert f"to go on: vmoe-train --out {out} --resume" in result.stderr.replace("\n", " ")


def test_resume_of_another_recipe_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["--method", "standard", "--epochs", "1", "--no-report", "--out", str(out)]
    assert train(*arguments).exit_code == 0
    for flag, value, then in (("--lr", "0.5", "lr 0.003"), ("--arch", "r3d18", "arch tsm")):
        result = train(*arguments, flag, value, "--resume")
        assert result.exit_code == 1
        assert f"was trained otherwise ({then} then, {value} now" in result.output
    for flag, value in (("--seed", "7"), ("--init-from", "other.safetensors")):
        result = train("--out", str(out), "--resume", flag, value)
        assert result.exit_code == 2
        assert f"{flag} {value}" in result.output, result.output


def test_a_training_is_named_by_its_folder_or_is_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    nowhere = train("--resume")
    assert nowhere.exit_code == 2
    assert "no training stands under runs/: name its folder with --out" in nowhere.output
    arguments = [a for a in SMALL if a != "--quiet"]
    method = ["--method", "standard", "--epochs", "1", "--no-report", *arguments]
    for more in ([], ["--init-from", "runs/train/standard-tsm", "--out", "runs/train/second"]):
        result = CliRunner().invoke(main, [*method, *more])
        assert result.exit_code == 0, result.output
    assert "router and 4 experts from runs/train/standard-tsm/best.safetensors" in result.output
    newest = CliRunner().invoke(main, ["--resume", "--no-report"])
    assert newest.exit_code == 0, newest.output
    assert "training: runs/train/second (the newest under runs/)" in newest.output
    assert "resumed after epoch 1" in newest.output


def test_a_state_of_another_making_is_refused(tmp_path: Path) -> None:
    state = loop.start(small(1), loop.LoopSettings())
    states.save(state, {"method": "at-m"}, tmp_path)
    result = train("--resume", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "holds no run of vmoe-train (its recipe has no 'run')" in result.output


def test_an_l2_budget_is_what_is_trained_validated_and_reported(tmp_path: Path) -> None:
    out = tmp_path / "run"
    method = ["--method", "at-s", "--norm", "l2", "--steps", "1", "--epochs", "1"]
    result = train(*method, "--eps", "1.5", "--out", str(out))
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    assert (report["robust"]["norm"], report["robust"]["eps"]) == ("l2", 1.5)
    assert {attack["norm"] for attack in report["robust"]["attacks"]} == {"l2"}
    assert report["recipe"]["loop"]["val_eps"] == 1.5
    text = (out / "report.md").read_text()
    assert "Robust accuracy in %, L2 1.5, 1 steps" in text
    assert "flips" not in text  # one network has no routes,
    assert "Experts receive" not in text  # and no experts


def test_experts_begin_as_copies_of_a_single_expert(tmp_path: Path) -> None:
    one, four = tmp_path / "one", tmp_path / "four"
    method = ["--method", "standard", "--epochs", "1", "--no-report"]
    assert train(*method, "--experts", "1", "--out", str(one)).exit_code == 0
    begin = str(one / "last.safetensors")
    result = train(*method, "--init-from", begin, "--lr", "1e-12", "--out", str(four))
    assert result.exit_code == 0, result.output
    mixed, single = weights(four / "last.safetensors"), weights(one / "last.safetensors")
    name = "experts.{}.1.layer1.0.conv1.weight"
    for i in range(4):
        np.testing.assert_allclose(mixed[name.format(i)], single[name.format(0)], atol=1e-8)
    for dry in ([], ["--dry-run"]):
        other = train(*method, "--init-from", begin, "--arch", "r3d18", "--out",
                      str(tmp_path / "x"), *dry)  # fmt: skip
        assert other.exit_code == 2
        assert "has arch tsm; what is trained here has r3d18" in other.output.replace("\n", " ")


def test_collapsed_routing_is_said_with_what_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_start, "spread", lambda twin, data: None)
    arguments = [a for a in SMALL if a != "--quiet"]
    result = CliRunner().invoke(
        main,
        ["--method", "standard", "--epochs", "1", "--balance", "0", "--lr", "1e-9", "--no-report",
         "--out", str(tmp_path / "run"), *arguments],
    )  # fmt: skip
    assert "routing collapses" in result.output  # fresh weights: one expert takes all clips
    assert "--balance" in result.output


def test_dry_run_shows_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = train("--method", "j-tlat", "--dry-run", "--out", str(out))
    assert result.exit_code == 0
    assert "method.gamma1 = 1.0" in result.output
    assert "method.eps = 8/255 (0.0314)" in result.output
    assert not out.exists()


PLANS = [
    (["--method", "at-m", "--eps", "4/255"], "recipe: at-m, eps 4/255 (0.0157)  out:"),
    (["--method", "at-m", "--eps", "4/255"], "loop.val_eps = 4/255 (0.0157)"),
    (["--method", "at-m", "--eps", "4", "--val-eps", "2"], "loop.val_eps = 2/255 (0.0078)"),
    (["--method", "at-m", "--norm", "l2", "--eps", "1.0"], "loop.val_eps = 1.0"),
    (["--method", "standard"], "loop.val_eps = 8/255 (0.0314)"),
    (["--method", "oud-m"], "of the dense counterpart: 42% more"),
    (["--width", "0.01"], "--width 0.01 is so small that every layer has the fewest channels"),
    (["--arch", "tsm-online"], "cannot be served frame by frame: a frame sees 8 before it."),
]


@pytest.mark.parametrize(("arguments", "line"), PLANS)
def test_what_the_plan_says(arguments: list[str], line: str) -> None:
    talking = [a for a in SMALL if a != "--quiet"]
    result = CliRunner().invoke(main, [*talking, *arguments, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert line in result.output


BAD = [
    (["--eps", "eight"], 2, "eps 'eight' is not a number"),
    (["--method", "j-tlt"], 2, "did you mean 'j-tlat'?"),
    (["--arch", "r3d"], 2, "did you mean 'r3d18'?"),
    (
        ["--method", "standard", "--gamma1", "2"],
        2,
        "--method standard: it is of j-tlat, j-tlat-plu",
    ),
    (["--norm", "l2"], 2, "--norm l2 has no --eps of its own: give it, as a length"),
    (["--method", "at-s", "--balance", "2"], 2, "--balance is of a router, and --method at-s"),
    (["--epochs", "0"], 2, "--epochs is 0; it must be at least 1"),
    (["no/such/folder"], 2, "no/such/folder"),
    (["camera-moton"], 2, "did you mean 'camera-motion'?"),
    (["--device", "cuda:9"], 2, "--device cuda:9 cannot be used here"),
    (["--method", "j-tlat", "--experts", "1"], 2, "--experts 2 or more"),
    (["--init-from", str(Path(__file__).parent)], 1, "holds no checkpoint: neither a bundle's"),
    (["--init-from", "missing.safetensors"], 1, "cannot read checkpoint missing.safetensors"),
    (["--init-from", "missing.safetensors", "--dry-run"], 1, "Name a checkpoint of vmoe-train"),
    (["--resume"], 1, "run does not exist: there is no run to go on with. Look under runs/."),
    (["--budget", "1", "--epochs", "3"], 2, "--budget and --epochs both end the training"),
    (["--norm", "linf", "--eps", "1.5"], 2, "eps"),
    (["--method", "at-d", "--experts", "1"], 2, "trains the dense counterpart of a mixture"),
    (["--mean", "0.4,0.5"], 2, "mean is (0.4, 0.5); it must be 3 numbers (RGB)"),
    (["--std", "0.2,0,0.2"], 2, "--std is 0.0; it must be above 0"),
    (["--arch", "slowfast", "--frames", "3"], 2, "slowfast takes clips of 4 frames or more"),
]


@pytest.mark.parametrize(("arguments", "code", "line"), BAD)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], code: int, line: str) -> None:
    result = train(*arguments, "--out", str(tmp_path / "run"))
    assert result.exit_code == code, result.output
    assert line in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    result = train("--out", str(tmp_path))
    assert result.exit_code == 2
    assert "exists. Choose another --out, or go on with --resume." in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_a_pickle_with_code_in_it_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (exec, ("raise SystemExit('code was run')",))

    torch.save({"a": torch.zeros(1), "b": Evil()}, tmp_path / "old.pt")
    result = train("--init-from", str(tmp_path / "old.pt"), "--out", str(tmp_path / "run"))
    assert result.exit_code == 1
    assert "holds exec, which is no tensor and could run code when it is read" in result.output
    assert not (tmp_path / "run").exists()


def test_experts_begin_with_the_weights_of_another_library(tmp_path: Path) -> None:
    state = tsm.build(0.1, 400).state_dict()
    held = {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}
    torch.save(held, tmp_path / "theirs.pth")
    arguments = [a for a in SMALL if a != "--quiet"]
    result = CliRunner().invoke(
        main,
        ["--method", "standard", "--epochs", "1", "--no-report", "--lr", "1e-12", "--out",
         str(tmp_path / "run"), "--init-from", str(tmp_path / "theirs.pth"),
         "--mean", "0.485,0.456,0.406", *arguments],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "fresh: the classifier (400 labels there, 10 here), the router" in said
    last = tmp_path / "run" / "last.safetensors"
    assert checkpoint.load(last).twin.spec.mean == (0.485, 0.456, 0.406)
    found = weights(last)
    for i in range(4):
        np.testing.assert_allclose(found[f"experts.{i}.1.conv1.weight"], state["conv1.weight"],
                                   atol=1e-8)  # fmt: skip


@pytest.mark.slow
def test_real_clips_of_a_folder_are_learnt_from(real_data: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [
        str(real_data / "ut_interaction" / "train"), "--group", r"seq\d+", "--method", "standard",
        "--experts", "1", "--arch", "tsm", "--width", "0.1", "--frames", "8", "--spacing", "0.1",
        "--size", "48", "--epochs", "2", "--val-clips", "0", "--val-steps", "0",
        "--test-clips", "0",
        "--out", str(tmp_path / "run"),
    ])  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert len(report["labels"]) == 6
    assert report["evidence"] is None  # camera-motion's evidence is of camera-motion alone


def test_a_data_set_without_test_split_is_refused_before_the_first_epoch(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for label in ("a", "b"):
            for i in range(4):
                path = tmp_path / "data" / split / label / f"{i}.avi"
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path, frames=20, fps=10)
    arguments = ["--method", "standard", "--experts", "1", "--epochs", "1"]
    result = train(str(tmp_path / "data"), *arguments, "--out", str(tmp_path / "run"))
    assert result.exit_code == 2
    assert "test" in result.output
    assert not (tmp_path / "run").exists()

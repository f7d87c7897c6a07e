"""benchmarks/reproduce.py: what it compares is comparable, and its arithmetic."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from vmoe import output, registry
from vmoe.errors import SettingError
from vmoe.train import loop
from vmoe.train.planned import RECIPES

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import reproduce
import reproduce_tables
import tasks


def cell(method: str, seed: int, worst: list[int]) -> dict[str, Any]:
    names = ("clean", "fgsm", "pgd", "apgd_ce", "apgd_margin", "tlga_r", "j_tlga", "worst_of")
    ones = [1] * len(worst)
    return {
        "method": method, "seed": seed, "hits": {**dict.fromkeys(names, ones), "worst_of": worst},
        "gflops": 1.0, "lips_r": 2.0, "flips": {"tlga-r": 0.25}, "margin": 1.0, "train_flops": 1e12,
        "grads": 10, "seconds": 5.0, "corrupted": dict.fromkeys(reproduce.CORRUPTIONS, ones),
        "experts": {"shares": [0.5, 0.5], "fixed_route": [{"share": 1.0}, {"share": 0.5}],
                    "oracle_route": {"share": 1.0}},
        "machine": dict.fromkeys(reproduce_tables.MACHINE, "here"),
    }  # fmt: skip


@pytest.mark.parametrize("size", [tasks.QUICK, tasks.Size(), tasks.LARGE])
def test_every_method_has_as_many_trials_and_each_can_be_trained_by(size: tasks.Size) -> None:
    assert set(reproduce.TRIALS) == set(reproduce.METHODS) == set(registry.names(RECIPES))
    for method in reproduce.METHODS:
        trials = reproduce.TRIALS[method][: size.trials]
        assert len(trials) == size.trials
        module = registry.load(RECIPES, method, "recipe")
        for trial in trials:
            module.Settings(**trial.recipe)
            loop.LoopSettings(**trial.loop)


def test_variants_change_a_method_that_there_is() -> None:
    for method, trial in reproduce.VARIANTS.values():
        best = reproduce.TRIALS[method][0]
        registry.load(RECIPES, method, "recipe").Settings(**{**best.recipe, **trial.recipe})


def test_a_row_is_the_mean_over_seeds() -> None:
    row = reproduce_tables.row_of([cell("at-m", 0, [1, 0, 0, 0]), cell("at-m", 1, [1, 1, 1, 0])])
    assert row["worst_of"] == 50.0
    assert row["worst_of_se"] == pytest.approx(25.0)
    assert row["flips"] == 25.0
    assert row["fixed_route"] == [100.0, 50.0]


def test_a_gap_is_paired_by_seed_and_its_interval_holds_it() -> None:
    rng = np.random.default_rng(0)
    theirs = [cell("at-m", seed, rng.integers(0, 2, 50).tolist()) for seed in (0, 1)]
    ours = [cell("j-tlat", seed, [1] * 50) for seed in (0, 1, 2)]
    found = reproduce_tables.gap(ours, theirs)
    assert found["seeds"] == 2
    assert found["low"] < found["points"] < found["high"]
    mean = np.mean([100 - 100 * np.mean(one["hits"]["worst_of"]) for one in theirs])
    assert found["points"] == pytest.approx(mean)
    same = reproduce_tables.gap(theirs, theirs)
    assert (same["points"], same["low"], same["high"]) == (0.0, 0.0, 0.0)


def test_every_seed_has_test_clips_of_its_own_whichever_others_are_made(tmp_path: Path) -> None:
    size = tasks.Size(train=6, val=2, test=2)
    held = {}
    for folder, seeds in (("all", [0, 1, 4]), ("some", [4])):
        tasks.prepare("camera-motion", tmp_path / folder, size, seeds, 1)
        for seed in seeds:
            task = tasks.open_task("camera-motion", tmp_path / folder, seed, size, None, "cpu")
            held[folder, seed] = np.asarray(task.test.clips)
    assert np.array_equal(held["all", 4], held["some", 4])
    every = np.concatenate([held["all", seed] for seed in (0, 1, 4)])
    assert len(np.unique(every.reshape(6, -1), axis=0)) == 6


def test_a_recording_of_ut_interaction_is_in_one_part_alone(tmp_path: Path) -> None:
    where = tmp_path / "ut"
    for number in range(1, 11):
        for name in ("kick", "push"):
            path = where / name / f"seq{number:02}_{name}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    tests = []
    for fold in range(tasks.FOLDS):
        place = tasks._links(tmp_path / f"fold{fold}", fold, where)
        parts = {
            part: {path.name[:5] for path in (place / part).glob("*/*")}
            for part in ("train", "val", "test")
        }
        assert not parts["train"] & parts["test"]
        assert not parts["val"] & (parts["train"] | parts["test"])
        tests.append(parts["test"])
    assert len(set.union(*tests)) == sum(len(test) for test in tests) == 10


BAD = [
    (["--methods", "j-tlt"], "unknown method 'j-tlt': did you mean 'j-tlat'?"),
    (["--data", "camera"], "'camera': did you mean 'camera-motion'?"),
    (["--data", "ut-interaction"], "--data ut-interaction needs --ut FOLDER, of its classes."),
    (["--seeds", "0,x"], "'x' is not a valid integer"),
    (["--quick", "--large"], "--quick and --large are two sizes: give one of them."),
    (["--jobs", "0"], "0 is not in the range x>=1"),
    (["--device", "cuda:9"], "--device cuda:9 cannot be used here"),
    (["--tables-only"], "holds no cell of these methods and seeds: leave --tables-only out."),
    (["--out", "table.txt"], "results are .json or .md"),
]


@pytest.mark.parametrize(("arguments", "line"), BAD)
def test_bad_input_is_one_line(arguments: list[str], line: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(reproduce.main, [*arguments, "--folder", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert line in result.output
    assert not (tmp_path / "run").exists()


def test_tables_of_what_there_is(tmp_path: Path) -> None:
    for method, seed in (("at-m", 0), ("j-tlat", 0), ("j-tlat", 1)):
        path = tmp_path / "cells" / f"{method}-{seed}.json"
        output.write_json(path, cell(method, seed, [1, 0, 1, 0]))
    result = CliRunner().invoke(reproduce.main, ["--tables-only", "--folder", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "Worst-of: points ahead" in result.output


def test_settings_are_of_all_trials_or_of_none(tmp_path: Path) -> None:
    run = reproduce.Run("camera-motion", tmp_path, tasks.Size(), "cpu", camera=tmp_path)
    output.write_json(tmp_path / "all" / "trials" / "at-m-0" / "worth.json", {"worth": 0.25})
    with pytest.raises(SettingError, match="lacks a trial of at-m: make it first"):
        run.best(0, "at-m")
    output.write_json(tmp_path / "all" / "trials" / "at-m-1" / "worth.json", {"worth": 0.5})
    assert run.best(0, "at-m") == reproduce.TRIALS["at-m"][1]

"""Parts of a run: kept, gone on with, and shared, they gather to what one run would have said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.twins import lively, random_clips
from vmoe.attacks import parts
from vmoe.attacks.evaluate import Evaluation, Job, evaluate, job, plan
from vmoe.attacks.judge import of_twin
from vmoe.attacks.outcomes import Arrays, Parts, key
from vmoe.attacks.parts import PartFiles
from vmoe.errors import OutputError, SettingError, VmoeError

N, BATCH = 5, 2
CLIPS = random_clips(N)
LABEL = np.arange(N) % 4


def work(**changed: object) -> Job:
    twin = lively()
    rows = plan(["pgd", "pgd-r"], [1 / 255], ["frozen", "soft"], steps=2)
    judges = {"twin": of_twin(twin), "engine": of_twin(lively(seed=1))}
    given = {"batch": BATCH, "keep_clips": True, **changed}
    return job(twin, CLIPS, LABEL, rows, judges, **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole() -> Evaluation:
    twin = lively()
    judges = {"twin": of_twin(twin), "engine": of_twin(lively(seed=1))}
    rows = plan(["pgd", "pgd-r"], [1 / 255], ["frozen", "soft"], steps=2)
    return evaluate(twin, CLIPS, LABEL, rows, judges, batch=BATCH, keep_clips=True)


def assert_same(one: Evaluation, other: Evaluation) -> None:
    """Hold two evaluations against each other, bit for bit, but for their seconds."""
    assert (one.label == other.label).all()
    for model in one.clean:
        for a, b in zip(one.clean[model], other.clean[model], strict=True):
            assert (a == b).all()
    for a, b in zip(one.outcomes, other.outcomes, strict=True):
        assert a.row == b.row
        assert (a.linf, a.l2) == (b.linf, b.l2)
        for name in ("forwards", "backwards", "dead", "clips"):
            assert (getattr(a, name) == getattr(b, name)).all()
        for model in a.seen:
            first, second = a.seen[model], b.seen[model]
            for x, y in zip((*first.seen, *first[1:]), (*second.seen, *second[1:]), strict=True):
                assert np.array_equal(x, y, equal_nan=x.dtype.kind == "f")


@pytest.fixture
def files(tmp_path: Path) -> PartFiles:
    return parts.begin(tmp_path / "out", {"--n": N}, {})


class KilledError(Exception):
    """What stands for the end of a process."""


class Cut(dict[str, Arrays]):
    """Parts of a process that ends when it has written some."""

    def __init__(self, held: Parts, left: int) -> None:
        super().__init__()
        self.held, self.left = held, left

    def __contains__(self, name: object) -> bool:
        return name in self.held

    def __setitem__(self, name: str, arrays: Arrays) -> None:
        if not self.left:
            raise KilledError
        self.left -= 1
        self.held[name] = arrays


@pytest.mark.parametrize("every", [1, 2, 5])
def test_killed_again_and_again_it_comes_to_the_same(
    files: PartFiles, whole: Evaluation, every: int
) -> None:
    deaths = 0
    for _ in range(20):
        try:
            work().fill(Cut(files, every))
            break
        except KilledError:
            deaths += 1
    assert deaths == (9 - 1) // every  # three batches, as they are and under two rows
    assert_same(work().gather(files), whole)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_shared_by_processes_in_any_order(files: PartFiles, whole: Evaluation, world: int) -> None:
    for rank in reversed(range(world)):
        work().fill(files, (rank, world))
    assert not any(work().missing(files, range(3)).values())
    assert_same(work().gather(files), whole)


def test_a_share_is_whole_batches_and_nobody_else_s(files: PartFiles) -> None:
    work().fill(files, (1, 2))
    assert sorted(files) == [key(1, -1), key(1, 0), key(1, 1)]
    assert work().missing(files, range(3)) == {0: [-1, 0, 1], 1: [], 2: [-1, 0, 1]}


def test_a_part_comes_back_without_loss(files: PartFiles) -> None:
    arrays = {"a": np.arange(3), "b.c": np.array([np.nan, 1.5]), "clips": CLIPS, "one": np.array(2)}
    files["x"] = arrays
    assert list(files) == ["x"]
    again = files["x"]
    assert again.keys() == arrays.keys()
    for name, value in arrays.items():
        assert again[name].dtype == value.dtype
        assert np.array_equal(again[name], value, equal_nan=value.dtype.kind == "f")
    del files["x"]
    assert "x" not in files
    assert len(files) == 0


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda _: b"", lambda b: b"no" + b[2:]])
def test_a_part_that_cannot_be_read_is_as_good_as_missing(
    files: PartFiles, damage: Callable[[bytes], bytes], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    files["x"] = {"a": np.arange(3)}
    path = tmp_path / "out/parts/x.npz"
    path.write_bytes(damage(path.read_bytes()))
    assert "x" not in files
    assert "is damaged" in caplog.text


def test_pickles_inside_are_not_read(files: PartFiles, tmp_path: Path) -> None:
    np.savez(tmp_path / "out/parts/x.npz", a=np.array([print], dtype=object))
    assert "x" not in files


def test_a_changed_setting_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    parts.begin(out, {"--n": 5, "--eps": (0.1, 0.2), "--group": None}, {})
    parts.go_on(out, {"--n": 5, "--eps": [0.1, 0.2], "--group": None})
    for run, why in (
        ({"--n": 6, "--eps": [0.1, 0.2], "--group": None}, "--n: 5; this one has 6"),
        ({"--n": 5, "--eps": [0.1], "--group": None}, "--eps: 0.1,0.2; this one has 0.1"),
        ({"--n": 5, "--eps": [0.1, 0.2]}, None),
        ({"--n": 5, "--eps": [0.1, 0.2], "--group": None, "new": 1}, "new: none; this one has 1"),
        ({"--n": 5, "--eps": [0.1, 0.2], "--group": "x"}, "--group: none; this one has x"),
    ):
        if why is None:
            parts.go_on(out, run)
            continue
        with pytest.raises(SettingError, match=why):
            parts.go_on(out, run)


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no run was begun there"):
        parts.command_of(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(SettingError, match="its run is finished"):
        parts.command_of(tmp_path)
    (tmp_path / "parts").mkdir()
    for text, why in (("{", "cannot read"), ("[]", "is damaged"), ('{"run": {}}', "is damaged")):
        (tmp_path / "parts/run.json").write_text(text)
        with pytest.raises(VmoeError, match=why):
            parts.command_of(tmp_path)


def test_a_run_that_finished_nothing_leaves_nothing(tmp_path: Path) -> None:
    held = parts.begin(tmp_path / "out", {}, {})
    held["x"] = {"a": np.arange(3)}
    parts.abandon(tmp_path / "out")
    assert parts.begun(tmp_path / "out")
    del held["x"]
    parts.abandon(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_begin_clears_what_another_run_left(tmp_path: Path) -> None:
    parts.begin(tmp_path, {"a": 1}, {})["x"] = {"a": np.arange(3)}
    held = parts.begin(tmp_path, {"a": 2}, {"flags": {}})
    assert list(held) == []
    assert json.loads((tmp_path / "parts/run.json").read_text())["run"] == {"a": 2}


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="cannot write"):
        parts.begin(tmp_path / "out", {}, {})

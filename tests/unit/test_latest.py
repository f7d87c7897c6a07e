"""What a command works on where the user names nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmoe import latest
from vmoe.errors import VmoeError


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def touch(path: str, at: int) -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("x")
    os.utime(file, (at, at))
    os.utime(file.parent, (at, at))
    return file


def test_what_is_named_is_taken() -> None:
    assert latest.bundle(Path("mine")) == (Path("mine"), "bundle: mine")
    assert latest.checkpoint(Path("a.safetensors"))[0] == Path("a.safetensors")


def test_the_newest_training() -> None:
    touch("runs/train/old/state.safetensors", 100)
    touch("runs/train/new/state.safetensors", 200)
    touch("runs/train/begun/best.safetensors", 300)
    found = latest.training(None)
    assert found == (Path("runs/train/new"), "training: runs/train/new (the newest under runs/)")
    assert latest.training(Path("mine")) == (Path("mine"), "training: mine")


def test_the_newest_bundle() -> None:
    touch("runs/export/old/vmoe.json", 100)
    touch("runs/export/new/vmoe.json", 200)
    touch("runs/export/.half.x1/vmoe.json", 300)
    path, line = latest.bundle(None)
    assert path == Path("runs/export/new")
    assert line == "bundle: runs/export/new (the newest under runs/)"


def test_the_newest_checkpoint() -> None:
    touch("runs/train/b/best.safetensors", 100)
    touch("runs/train/a/best.safetensors", 50)
    touch("runs/train/a/last.safetensors", 300)
    touch("runs/train/.c.x1/best.safetensors", 300)
    path, line = latest.checkpoint(None)
    assert path == Path("runs/train/b/best.safetensors")
    assert line == "checkpoint: runs/train/b/best.safetensors (the newest under runs/)"


def test_a_folder_stands_for_the_checkpoint_in_it() -> None:
    twin = touch("bundle/twin.safetensors", 1)
    best = touch("run/best.safetensors", 1)
    assert latest.checkpoint(Path("bundle"))[0] == twin
    assert latest.checkpoint(Path("run"))[0] == best
    Path("empty").mkdir()
    with pytest.raises(VmoeError, match="empty holds no checkpoint"):
        latest.checkpoint(Path("empty"))


def test_the_newest_target_is_either() -> None:
    best = touch("runs/train/b/best.safetensors", 100)
    assert latest.target(None) == (best, f"target: {best} (the newest under runs/)")
    touch("runs/export/new/vmoe.json", 200)
    assert latest.target(None)[0] == Path("runs/export/new")
    assert latest.target(Path("runs/train/b"))[0] == best
    assert latest.target(Path("runs/export/new"))[0] == Path("runs/export/new")


def test_else_what_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latest, "SHIPPED", tmp_path / "camera-motion")
    for find in (latest.bundle, latest.checkpoint, latest.target):
        with pytest.raises(VmoeError, match=r"ships no model .* name a path"):
            find(None)
    twin = touch("camera-motion/twin.safetensors", 1)
    assert latest.bundle(None) == (
        tmp_path / "camera-motion",
        "bundle: camera-motion (the one that ships)",
    )
    assert latest.checkpoint(None)[0] == tmp_path / twin
    assert latest.checkpoint(None)[1] == "checkpoint: camera-motion (the one that ships)"

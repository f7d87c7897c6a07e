"""Checkpoints: what comes back is what went in, and nothing but safetensors is read."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vmoe import checkpoint
from vmoe.checkpoint import Checkpoint
from vmoe.clips import ClipSpec
from vmoe.errors import OutputError, SettingError, VmoeError
from vmoe.models import ModelSettings, VideoMoE, build
from vmoe.settings import to_mapping

SETTINGS = ModelSettings(arch="tsm", width=0.125, experts=2, classes=3)
LABELS = ("a", "b", "c")


@pytest.fixture(scope="module")
def twin() -> VideoMoE:
    made = build(SETTINGS, ClipSpec(frames=4, height=32, width=32, mean=(0.1, 0.2, 0.3)), seed=3)
    with torch.no_grad():
        made.train()(torch.rand(6, 3, 4, 32, 32))  # statistics of their own
    return made.eval()


@pytest.fixture
def path(twin: VideoMoE, tmp_path: Path) -> Path:
    recipe, results = {"method": "at-m", "eps": 8 / 255}, {"clean": 0.5}
    checkpoint.save(Checkpoint(twin, LABELS, recipe, results), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def header(twin: VideoMoE, **changed: Any) -> dict[str, Any]:
    values = {
        "model": to_mapping(twin.settings),
        "clip": to_mapping(twin.spec),
        "labels": list(LABELS),
    }
    return values | changed


def test_round_trip(twin: VideoMoE, path: Path) -> None:
    found = checkpoint.load(path)
    assert found.labels == LABELS
    assert found.recipe == {"method": "at-m", "eps": 8 / 255}
    assert found.results == {"clean": 0.5}
    assert (found.twin.settings, found.twin.spec) == (twin.settings, twin.spec)
    assert not found.twin.training
    state = found.twin.state_dict()
    assert state.keys() == twin.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in twin.state_dict().items())
    clip = torch.rand(3, 3, 4, 32, 32)
    with torch.no_grad():
        assert torch.equal(found.twin(clip).logits, twin(clip).logits)


def test_the_same_bytes_twice(twin: VideoMoE, path: Path, tmp_path: Path) -> None:
    checkpoint.save(checkpoint.load(path), tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


def test_saving_leaves_the_twin_as_it_is(twin: VideoMoE, path: Path) -> None:
    assert not twin.training
    assert all(p.requires_grad for p in twin.parameters())


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('code was run')",))


def test_a_pickle_is_refused_before_it_is_read(tmp_path: Path) -> None:
    torch.save({"weight": Evil()}, tmp_path / "zip.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Evil()))
    torch.save({"weight": Evil()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "named.safetensors").write_bytes(pickle.dumps(Evil(), protocol=4))
    for path in tmp_path.iterdir():
        with pytest.raises(VmoeError, match=r"is a pickle, which can run code .*save_file") as e:
            checkpoint.load(path)
        assert e.value.exit_code == 1


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(VmoeError, match=r"cannot read checkpoint .*No such file"):
        checkpoint.load(tmp_path / "none.safetensors")
    with pytest.raises(VmoeError, match="holds no checkpoint: neither a bundle's twin nor"):
        checkpoint.load(tmp_path)


def test_a_folder_stands_for_the_checkpoint_in_it(path: Path) -> None:
    path.rename(path.with_name("best.safetensors"))
    assert checkpoint.load(path.parent).labels
    assert not checkpoint.is_pickle(path.parent)


def test_another_kind_of_file_is_told_what_to_name(tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("# no checkpoint")
    with pytest.raises(VmoeError, match=r"no safetensors file: .* Name a checkpoint of vmoe-train"):
        checkpoint.load(tmp_path / "report.md")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_that_was_cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(VmoeError, match="is damaged or no safetensors file") as e:
        checkpoint.load(path)
    assert "\n" not in str(e.value)


def test_weights_of_others(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(VmoeError, match="holds weights but no vmoe header"):
        checkpoint.load(path)
    save_file({"weight": torch.zeros(2)}, path, {"vmoe": "{"})
    with pytest.raises(VmoeError, match="is damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": {"arch": "tsm", "width": 0.25, "experts": 2, "classes": 3}}, "does not fit"),
        ({"model": {"arch": "tsm", "width": 0.125, "experts": 3, "classes": 3}}, "does not fit"),
        ({"model": {"arch": "r3d18", "width": 0.125, "experts": 2, "classes": 3}}, "does not fit"),
        ({"model": {"arch": "tsn"}}, "can read: unknown expert family .*'tsn': did you mean 'tsm'"),
        ({"model": {"depth": 3}}, "can read: unknown key in the header 'depth'"),
        ({"model": 3}, "can read"),
        ({"clip": {"frames": 0}}, "can read: --frames is 0"),
        ({"labels": ["a"]}, "has 1 labels for 3 classes"),
        ({"labels": None}, "can read"),
    ],
)
def test_a_wrong_architecture(
    twin: VideoMoE, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.write_tensors(twin.state_dict(), header(twin, **changed), path)
    with pytest.raises(VmoeError, match=message) as e:
        checkpoint.load(path)
    assert e.value.exit_code == 1


@pytest.mark.parametrize("key", ["model", "clip", "labels"])
def test_a_header_without_a_key(twin: VideoMoE, tmp_path: Path, key: str) -> None:
    values = header(twin)
    del values[key]
    checkpoint.write_tensors(twin.state_dict(), values, tmp_path / "a")
    with pytest.raises(VmoeError, match=f"its header has no '{key}'"):
        checkpoint.load(tmp_path / "a")


def test_a_place_that_cannot_be_written(twin: VideoMoE, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        checkpoint.save(Checkpoint(twin, LABELS), tmp_path / "file" / "a.safetensors")


def test_devices() -> None:
    assert checkpoint.device("cpu") == torch.device("cpu")
    assert checkpoint.device("auto").type in ("cpu", "cuda")
    for name in ("gpu", "cpu:x", "meta", "mps", "cuda:", ""):
        with pytest.raises(SettingError, match=f"--device {name} is unknown; give auto, cpu or"):
            checkpoint.device(name)
    with pytest.raises(SettingError, match="--device cuda:99 cannot be used here"):
        checkpoint.device("cuda:99")


@pytest.mark.parametrize("start", [b"\x80", b"PK"])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "a.safetensors"
    wanted = int.from_bytes(start, "little") if len(start) == 2 else 0x180
    checkpoint.write_tensors({}, {"pad": ""}, path)
    padding = wanted - int.from_bytes(path.read_bytes()[:8], "little")
    checkpoint.write_tensors({}, {"pad": "x" * padding}, path)
    assert path.read_bytes().startswith(start)
    assert checkpoint.read_tensors(path)[1]["pad"] == "x" * padding

"""The OpenVINO backend: what it is told, and what it says when it cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests import bundles
from vmoe import bundle as reader
from vmoe.bundle import Part
from vmoe.clips import ClipSpec
from vmoe.errors import BundleError, EngineMismatchError, SettingError
from vmoe.runtime import load
from vmoe.runtime.engines import BackendSettings, openvino

pytest.importorskip("openvino")


@pytest.fixture
def path(tmp_path: Path, spec: ClipSpec) -> Path:
    return bundles.write(tmp_path / "b", spec, lowering="if")


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_precision_are_what_was_said(path: Path, threads: int) -> None:
    backend = openvino.open(BackendSettings(path, "cpu", threads))
    compiled, _ = backend.compiled(path / "moe.onnx")
    assert compiled.get_property("INFERENCE_NUM_THREADS") == threads
    assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"


def test_an_input_with_a_default_can_be_given_and_left_out(path: Path, spec: ClipSpec) -> None:
    run = openvino.open(BackendSettings(path)).load(reader.read(path).parts["moe"])
    clips = bundles.plain_clips(spec, (255, 9, 0))
    assert run({"clip": clips})["route"].tolist() == [2]
    assert run({"clip": clips, "force_route": np.asarray(1)})["route"].tolist() == [1]
    assert run({"clip": clips})["route"].tolist() == [2]


def test_answers_are_not_overwritten_by_the_next_run(path: Path, spec: ClipSpec) -> None:
    one, other = bundles.plain_clips(spec, (0, 10, 0), (255, 200, 0))
    with load(path, "openvino") as engine:
        first = engine.infer(one[None])
        before = first.logits.copy()
        engine.infer(other[None])
    assert np.array_equal(first.logits, before)


def test_it_runs_on_the_cpu_only(path: Path) -> None:
    with pytest.raises(SettingError, match=r"--device is 'cuda:0'; backend openvino runs on the"):
        load(path, "openvino", "cuda:0")


def as_written(part: Part, folder: Path) -> Part:
    """Return a part as a manifest would have it that was written for the files as they are."""
    return replace(part, hashes={name: reader.sha256(folder / name) for name in part.hashes})


def test_a_graph_that_is_none_gives_one_line(path: Path) -> None:
    part = reader.read(path).parts["moe"]
    (path / "moe.onnx").write_bytes(b"\x08garbage" * 20)
    part = as_written(part, path)
    with pytest.raises(BundleError, match=r"moe\.onnx: openvino cannot load it: Model can't") as e:
        openvino.open(BackendSettings(path)).load(part)
    assert "\n" not in str(e.value)


def test_a_graph_with_other_ports_is_refused(path: Path, tmp_path: Path, spec: ClipSpec) -> None:
    part = reader.read(path).parts["moe"]
    split = bundles.write(tmp_path / "split", spec)
    (path / "moe.onnx").write_bytes((split / "router.onnx").read_bytes())
    part = as_written(part, path)
    with pytest.raises(EngineMismatchError, match=r"moe\.onnx has inputs \['clip'\].*'route'"):
        openvino.open(BackendSettings(path)).load(part)

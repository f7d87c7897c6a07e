"""The backend tensorrt: what it refuses before it loads, and every refusal while it runs."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import bundles
from tests.cuda_fake import CUresult, Driver
from tests.plans import built
from tests.tensorrt_fake import WHY, Fake
from vmoe import bundle as reader
from vmoe import cli
from vmoe.clips import ClipSpec
from vmoe.errors import (
    BundleError,
    CorruptBundleError,
    EngineMismatchError,
    MissingDependencyError,
    SettingError,
)
from vmoe.export.tensorrt.settings import BuildSettings
from vmoe.runtime import load
from vmoe.runtime.engines import BackendSettings, _cuda, _plan
from vmoe.runtime.engines import tensorrt as backend
from vmoe.runtime.engines._cuda import Gpu, GpuFacts

ONE = pytest.mark.parametrize("bindings", ["10.3"], indirect=True)


@pytest.fixture
def path(trt: Fake, tmp_path: Path, spec: ClipSpec) -> Path:
    """Return a bundle of plans that was built here."""
    return built(reader.read(bundles.write(tmp_path / "onnx", spec)))


def changed(path: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change a part's entry in the manifest."""
    manifest = json.loads((path / "vmoe.json").read_text())
    change(manifest["parts"][name])
    (path / "vmoe.json").write_text(json.dumps(manifest))
    return path


def clips_of(path: Path, *reds: int) -> Any:
    return bundles.plain_clips(reader.read(path).spec, *[(red, 100, 0) for red in reds])


@ONE
def test_a_plan_that_was_not_built_here_is_not_loaded_but_with_trust(trt: Fake, path: Path) -> None:
    for noted in (cli.cache_folder() / "plans").iterdir():
        noted.unlink()
    trt.calls.clear()
    why = r"router\.plan is a TensorRT plan that was not built here.*only with --trust\. Build it"
    with pytest.raises(EngineMismatchError, match=why):
        load(path)
    assert "Runtime.deserialize_cuda_engine" not in [name for name, _ in trt.calls]
    load(path, trust=True).close()


@ONE
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tensorrt": "10.9.0"}, "TensorRT 10.9.0, not 10.3.0"),
        ({"tensorrt": "10.9", "version_compatible": True}, "TensorRT 10.9 or newer, not 10.3.0"),
        ({"capability": "9.0", "gpu": "NVIDIA H100"},
         "compute capability 9.0, not 8.7 (NVIDIA Test)"),
        ({"gpu": "Orin"}, "Orin, not NVIDIA Test"),
        ({"system": "linux-sparc"}, "linux-sparc, not linux-"),
        ({"tensorrt": "9.1", "gpu": "Orin"}, "TensorRT 9.1, not 10.3.0; Orin, not NVIDIA Test"),
    ],
)  # fmt: skip
def test_another_version_or_gpu_is_told_before_anything_is_deserialised(
    trt: Fake, path: Path, change: dict[str, Any], said: str
) -> None:
    changed(path, "router", lambda part: part["plan"].update(change))
    trt.calls.clear()
    with pytest.raises(
        EngineMismatchError, match=rf"router\.plan was built for.*{re.escape(said)}"
    ):
        load(path)
    assert "Runtime.deserialize_cuda_engine" not in [name for name, _ in trt.calls]


def test_what_may_run_elsewhere_may() -> None:
    was = _plan.Built("10.3.0", "12.6", "s", "Orin", "8.7", (), (1, 1, 8), 3, "none", False, "")
    gpu = GpuFacts("H100", "9.0", "13.0", 1)

    def refused(was: _plan.Built, version: str, gpu: GpuFacts) -> bool:
        part = reader.Part("a.plan", "plan", {}, (), (), {})
        try:
            _plan.check_machine(part, was, _plan.Machine(version, "s", gpu))
        except EngineMismatchError:
            return True
        return False

    same = gpu._replace(capability="8.7")
    assert not refused(was, "10.3.0", same._replace(name="Orin"))
    assert refused(was, "10.3.0", same)
    assert not refused(replace(was, hardware=_plan.SAME_CAPABILITY), "10.3.0", same)
    assert refused(replace(was, hardware=_plan.SAME_CAPABILITY), "10.3.0", gpu)
    assert not refused(replace(was, hardware=_plan.AMPERE_PLUS), "10.3.0", gpu)
    turing = gpu._replace(capability="7.5")
    assert refused(replace(was, hardware=_plan.AMPERE_PLUS), "10.3.0", turing)
    newer = replace(was, version_compatible=True, hardware=_plan.AMPERE_PLUS)
    assert not refused(newer, "10.16.1.11", gpu)
    assert refused(newer, "10.2.0", gpu)


@ONE
@pytest.mark.parametrize(
    "change",
    [
        lambda part: part.pop("plan"),
        lambda part: part.update(plan=3),
        lambda part: part["plan"].pop("gpu"),
        lambda part: part["plan"].update(more=1),
        lambda part: part["plan"].update(level="3"),
        lambda part: part["plan"].update(batch=[1, 9, 8]),
        lambda part: part["plan"].update(batch=[1, True, 8]),
        lambda part: part["plan"].update(tensorrt="new"),
        lambda part: part["plan"].update(weights="/etc/passwd"),
        lambda part: part["plan"].update(flags=["STRIP_PLAN"]),
        lambda part: part["plan"].update(flags=["STRIP_PLAN"], weights="expert1.plan"),
    ],
)
def test_a_manifest_that_does_not_say_what_it_was_built_with(
    path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    changed(path, "expert1", change)
    with pytest.raises(BundleError, match=r"expert1\.plan: the manifest does not say what it was"):
        load(path)


def test_every_refusal_while_it_runs_is_one_line_with_its_words(
    trt: Fake, gpu: Driver, path: Path
) -> None:
    refusals = [
        ("Runtime.deserialize_cuda_engine", None, "router.plan: TensorRT cannot load it"),
        ("ICudaEngine.create_execution_context", None, "router.plan: create_execution_context"),
        ("IExecutionContext.set_optimization_profile_async", False,
         "router.plan: set_optimization_profile_async"),
        ("IExecutionContext.set_input_shape", False, "router.plan: set_input_shape"),
        ("IExecutionContext.infer_shapes", ["clip"], "router.plan: infer_shapes (clip)"),
        ("IExecutionContext.infer_shapes", RuntimeError("infer_shapes error code: -1"),
         "router.plan: infer_shapes failed"),
        ("IExecutionContext.set_tensor_address", False, "router.plan: set_tensor_address(clip)"),
        ("IExecutionContext.execute_async_v3", False, "router.plan: execute_async_v3"),
    ]  # fmt: skip
    for call, answer, said in refusals:
        trt.answers = {call: answer}
        with pytest.raises(BundleError, match=re.escape(said)) as e, load(path) as engine:
            engine.infer(clips_of(path, 0))
        assert "\n" not in str(e.value)
        assert WHY in str(e.value)
        assert gpu.left() == {}
    trt.answers = {"Runtime": None}
    with pytest.raises(EngineMismatchError, match="TensorRT: Runtime cannot be made"):
        load(path)
    assert gpu.left() == {}


@ONE
def test_without_a_cuda_graph_it_runs_as_well_and_says_so_once(
    gpu: Driver, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for call in ("cuStreamBeginCapture", "cuGraphInstantiate"):
        gpu.fail = {call: CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED}
        caplog.clear()
        with caplog.at_level(logging.WARNING, "vmoe.runtime"), load(path) as engine:
            for _ in range(2):
                assert engine.infer(clips_of(path, 0, 255)).route.tolist() == [0, 2]
        assert gpu.launches == 0
        assert caplog.text.count("router.plan, batch 2: runs without a CUDA graph: CUDA: cu") == 1
        assert "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" in caplog.text
        assert gpu.left() == {}


@ONE
def test_each_batch_size_is_captured_once_and_clips_are_uploaded_once(
    gpu: Driver, path: Path
) -> None:
    with load(path, all_parts=True) as engine:
        for n in (1, 2, 3, 4, 5, 8):
            engine.infer(clips_of(path, *[0] * n))
        captured = gpu.calls.count("cuStreamBeginCapture")
        assert captured == 2 * 4  # router and expert 0, at 1, 2, 4, 8
        gpu.calls.clear()
        launches = gpu.launches
        for n in (1, 2, 3, 4, 5, 8):
            engine.infer(clips_of(path, *[0] * n))
        assert gpu.calls.count("cuStreamQuery") == 12  # one a part
        assert "cuStreamSynchronize" not in gpu.calls
    assert gpu.launches == launches + 12
    assert "cuStreamBeginCapture" not in gpu.calls
    assert "cuMemAlloc" not in gpu.calls
    # all clips go to one expert: what was uploaded for the router serves it
    assert gpu.calls.count("cuMemcpyHtoDAsync") == 6


@ONE
def test_the_hosts_waits_ask_for_a_while_and_then_sleep(
    gpu: Driver, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(path, all_parts=True) as engine:
        engine.infer(clips_of(path, 0))
        gpu.busy = 3
        gpu.calls.clear()
        assert engine.infer(clips_of(path, 255)).route.tolist() == [2]
        assert gpu.calls.count("cuStreamQuery") % 4 == 0
        assert "cuStreamSynchronize" not in gpu.calls
        monkeypatch.setattr(_cuda, "SPIN_S", -1.0)
        gpu.calls.clear()
        assert engine.infer(clips_of(path, 0)).route.tolist() == [0]
        assert gpu.calls.count("cuStreamQuery") == gpu.calls.count("cuStreamSynchronize") == 2
        gpu.fail = {"cuStreamQuery": CUresult.CUDA_ERROR_ILLEGAL_ADDRESS}
        why = r"^CUDA: cuStreamQuery failed: CUDA_ERROR_ILLEGAL_ADDRESS\.$"
        with pytest.raises(EngineMismatchError, match=why):
            engine.infer(clips_of(path, 0))
        gpu.fail = {}


@ONE
@pytest.mark.parametrize("graphs", [True, False])
def test_what_calls_take_is_told_where_somebody_asks(gpu: Driver, path: Path, graphs: bool) -> None:
    if not graphs:
        gpu.fail = {"cuStreamBeginCapture": CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED}
    with load(path, all_parts=True) as engine:
        engine.infer(clips_of(path, 0))
        assert engine.last_times() == (0, 0, 0, 0)
        assert "cuEventRecordWithFlags" not in gpu.calls
        assert engine.time_calls()
        for _ in range(2):  # the first captures its graphs anew; of these runs nothing is told
            engine.infer(clips_of(path, 0))
            times = engine.last_times()
            assert times is not None
            # of the fake, two events that follow each other are a millisecond apart
            assert (times.h2d_ms, times.device_ms, times.d2h_ms) == (1, 2, 2)
            assert times.enqueue_ms > 0
        assert engine.last_times() == (0, 0, 0, 0)
    assert gpu.left() == {}


@ONE
def test_a_larger_plan_enlarges_the_arena_that_all_share(
    trt: Fake, gpu: Driver, path: Path
) -> None:
    with load(path) as engine:
        assert engine.infer(clips_of(path, 0)).route.tolist() == [0]
        trt.arena *= 3  # the next expert needs more
        for reds in ((255,), (0,), (128, 255)):
            wanted = [round(red / 127) for red in reds]
            assert engine.infer(clips_of(path, *reds)).route.tolist() == wanted
        sizes = [held.nbytes for held in gpu.live["memory"].values()]
        assert sizes.count(trt.arena) == 1
        assert trt.arena // 3 not in sizes


@ONE
def test_an_arena_that_cannot_grow_stays_as_it_was(trt: Fake, gpu: Driver, path: Path) -> None:
    with load(path) as engine:
        assert engine.infer(clips_of(path, 0)).route.tolist() == [0]
        trt.arena *= 3
        gpu.fail = {"cuMemAlloc": CUresult.CUDA_ERROR_OUT_OF_MEMORY}
        with pytest.raises(EngineMismatchError, match="cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEM"):
            engine.infer(clips_of(path, 255))
        trt.arena //= 3
        gpu.fail = {}
        assert engine.infer(clips_of(path, 0)).route.tolist() == [0]
    assert gpu.left() == {}


@ONE
def test_the_first_error_is_what_is_seen(gpu: Driver, path: Path) -> None:
    with pytest.raises(EngineMismatchError, match="cuGraphLaunch failed"), load(path) as engine:  # noqa: PT012
        engine.infer(clips_of(path, 0))
        gpu.fail = dict.fromkeys(("cuGraphLaunch", "cuStreamSynchronize", "cuGraphExecDestroy",
                                  "cuMemFree"), CUresult.CUDA_ERROR_NO_DEVICE)  # fmt: skip
        engine.infer(clips_of(path, 0))
    assert not gpu.live["host"], "what can be freed is"
    assert not gpu.live["context"]


@ONE
def test_clips_that_others_replaced_on_the_device_are_uploaded_again(path: Path) -> None:
    manifest = reader.read(path)
    opened = backend.open(BackendSettings(path, "cuda:0", bundle=manifest))
    run = opened.load(manifest.parts["router"])
    first, second = opened.put(clips_of(path, 0)), opened.put(clips_of(path, 255))
    for put, best in ((first, 0), (second, 2), (first, 0)):
        assert run({"clip": put})["scores"].argmax() == best
    assert run({"clip": clips_of(path, 255)})["scores"].argmax() == 2  # numpy as well
    with pytest.raises(EngineMismatchError, match=r"router\.plan does not run: clips are uint8 \["):
        run({"clip": opened.put(np.zeros((1, 2, 3, 4, 3), np.uint8))})
    opened.close()
    opened.close()


@ONE
def test_a_plan_that_changed_or_is_another_one_is_not_run(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(path)
    (path / "expert1.plan").write_bytes((path / "expert0.plan").read_bytes())
    with pytest.raises(CorruptBundleError, match=r"changed since it was loaded: expert1\.plan"):
        engine.load_parts(["expert1"])
    with monkeypatch.context() as patch:
        patch.setattr(backend, "check_part", lambda *_: None)  # it changes right behind the check
        with pytest.raises(CorruptBundleError, match=r"changed while expert1\.plan was loaded"):
            engine.load_parts(["expert1"])
    engine.close()
    changed(path, "expert1", lambda part: part["sha256"].update(
        {"expert1.plan": reader.sha256(path / "expert1.plan")}
    ))  # fmt: skip
    changed(path, "router", lambda part: part["outputs"][0].update(dtype="int64"))
    why = r"router\.plan has the inputs and outputs clip UINT8 \[N, 4, 32, 32, 3\], scores FLOAT"
    with pytest.raises(EngineMismatchError, match=rf"{why} \[N, 3\]; the manifest says.*INT64"):
        load(path)


@ONE
def test_parts_that_take_different_batches_are_told(path: Path) -> None:
    changed(path, "expert0", lambda part: part["plan"].update(batch=[1, 1, 2]))
    with load(path) as engine, pytest.raises(EngineMismatchError, match="takes at most 2 clips at"):
        engine.infer(clips_of(path, 0, 0, 0))


@pytest.mark.parametrize(
    ("n", "least", "most", "size"),
    [(1, 1, 8, 1), (2, 1, 8, 2), (3, 1, 8, 4), (5, 1, 8, 8), (5, 1, 6, 6), (1, 2, 8, 2),
     (9, 1, 16, 16), (1, 3, 3, 3)],
)  # fmt: skip
def test_the_batch_that_clips_are_run_with(n: int, least: int, most: int, size: int) -> None:
    assert _plan.bucket(n, least, most) == size


@ONE
def test_a_device_that_is_no_gpu_or_is_not_here(path: Path) -> None:
    with pytest.raises(EngineMismatchError, match="no backend here reads them"):
        load(path, device="cpu")
    with pytest.raises(SettingError, match="--device is 'cpu'; TensorRT runs on a GPU only"):
        load(path, "tensorrt", "cpu")
    with pytest.raises(SettingError, match="--device is cuda:3; here are 1 GPUs, from cuda:0 on"):
        load(path, "tensorrt", "cuda:3")


@ONE
def test_what_is_missing_is_named(
    trt: Fake, gpu: Driver, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.fail = {"cuInit": CUresult.CUDA_ERROR_NO_DEVICE}
    why = r"no NVIDIA driver or GPU answers here \(CUDA: cuInit failed: CUDA_ERROR_NO_DEVICE\)"
    with pytest.raises(MissingDependencyError, match=why):
        load(path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cuda", None)
        patch.setitem(sys.modules, "cuda.bindings", None)
        patch.delitem(sys.modules, "cuda.bindings.driver")
        assert backend.why_unavailable() == (
            "cuda-python is not installed: pip install 'vmoe[tensorrt]'."
        )
        with pytest.raises(MissingDependencyError, match="cuda-python is not installed"):
            Gpu()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match=r"tensorrt is not installed: pip install"):
        load(path)


@ONE
def test_a_tensorrt_whose_libraries_are_missing(
    trt: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt")
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match=r"cannot be imported: libnvinfer\.so\.10: no"):
        backend.module()


def test_a_note_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING, "vmoe.runtime"):
        _plan.note(["0" * 64])
    assert "cannot be written" in caplog.text
    assert "say --trust" in caplog.text


@ONE
def test_stripped_and_version_compatible_plans_load(path: Path, tmp_path: Path) -> None:
    source = reader.read(tmp_path / "onnx")
    for settings in (BuildSettings(strip=True), BuildSettings(version_compatible=True)):
        other = built(source, settings, f"other-{settings.strip}")
        with load(other) as engine:
            assert engine.infer(clips_of(path, 255)).route.tolist() == [2]

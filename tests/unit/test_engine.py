"""The engine: route, group, run, scatter, force; against bundles known in closed form."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import vmoe.runtime
from tests import bundles
from vmoe import bundle as reader
from vmoe.clips import ClipSpec
from vmoe.errors import (
    BundleError,
    CorruptBundleError,
    EngineMismatchError,
    MissingDependencyError,
    SettingError,
    UnknownNameError,
)
from vmoe.runtime import Engine, load
from vmoe.runtime.engines import onnxruntime as onnxruntime_backend

COLOURS = ((0, 200, 0), (255, 100, 3), (128, 0, 0), (10, 9, 8), (250, 255, 0))
ROUTE = [0, 2, 1, 0, 2]


@pytest.fixture(scope="module", params=["split", "if", "dense"])
def path(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, spec: ClipSpec
) -> Path:
    """Return a bundle of each lowering, three experts."""
    return bundles.write(tmp_path_factory.mktemp("b") / "b", spec, lowering=request.param)


def test_answers_are_those_of_the_closed_form(path: Path, spec: ClipSpec) -> None:
    clips = bundles.plain_clips(spec, *COLOURS)
    scores, logits = bundles.expected(clips, 3)
    with load(path) as engine:
        got = engine.infer(clips)
    assert got.route.tolist() == ROUTE
    assert (got.route.dtype, got.logits.dtype, got.scores.dtype) == (
        np.int64,
        np.float32,
        np.float32,
    )
    np.testing.assert_allclose(got.scores, scores, atol=1e-5)
    np.testing.assert_allclose(got.logits, logits[np.arange(5), ROUTE], atol=1e-4)


@pytest.mark.parametrize("force", [1, [2, 1, 0, 1, 0]])
def test_a_forced_route_is_taken(path: Path, spec: ClipSpec, force: int | list[int]) -> None:
    clips = bundles.plain_clips(spec, *COLOURS)
    scores, logits = bundles.expected(clips, 3)
    with load(path) as engine:
        got = engine.infer(clips, force_route=force)
    wanted = np.broadcast_to(force, 5)
    assert got.route.tolist() == wanted.tolist()
    np.testing.assert_allclose(got.logits, logits[np.arange(5), wanted], atol=1e-4)
    np.testing.assert_allclose(got.scores, scores, atol=1e-5)  # still what the router says


def test_run_all_gives_every_expert(path: Path, spec: ClipSpec) -> None:
    clips = bundles.plain_clips(spec, *COLOURS)
    with load(path, all_parts=True) as engine:
        np.testing.assert_allclose(engine.run_all(clips), bundles.expected(clips, 3)[1], atol=1e-4)


def test_no_clips_give_no_answers(path: Path, spec: ClipSpec) -> None:
    with load(path) as engine:
        got = engine.infer(np.zeros((0, *spec.shape), np.uint8))
    assert (got.logits.shape, got.scores.shape, got.route.shape) == ((0, 3), (0, 3), (0,))


@pytest.mark.parametrize("force", [3, -1, [0, 1]])
def test_an_expert_that_does_not_exist_is_refused(
    path: Path, spec: ClipSpec, force: object
) -> None:
    with load(path) as engine, pytest.raises(SettingError, match="force_route"):
        engine.infer(bundles.plain_clips(spec, *COLOURS), force_route=force)  # type: ignore[arg-type]


def test_wrong_clips_are_refused_by_shape(path: Path, spec: ClipSpec) -> None:
    with load(path) as engine:
        with pytest.raises(SettingError, match=r"clips are uint8 \[1, 5, 32, 32, 3\].*\[N, 4, 32"):
            engine.infer(np.zeros((1, 5, 32, 32, 3), np.uint8))
        with pytest.raises(SettingError, match="clips are float32"):
            engine.infer(np.zeros((1, *spec.shape), np.float32))  # type: ignore[arg-type]


def test_closing_twice_is_fine_and_a_closed_engine_says_so(path: Path, spec: ClipSpec) -> None:
    engine = load(path)
    engine.close()
    engine.close()
    with pytest.raises(SettingError, match="closed"):
        engine.infer(bundles.plain_clips(spec, (0, 0, 0)))


def test_ties_go_to_the_lowest_expert(tmp_path: Path, spec: ClipSpec) -> None:
    with load(bundles.write(tmp_path / "b", spec, experts=2)) as engine:
        clips = bundles.plain_clips(spec, (51, 0, 0), (204, 0, 0))
        mixed = np.concatenate([clips[:, :2]] * 2, axis=1)
        mixed[0, 2:], mixed[1, 2:] = clips[1, 0], clips[0, 0]  # mean red is 127.5 in both
        assert engine.infer(mixed).route.tolist() == [0, 0]


def test_split_runs_each_routed_expert_once_and_loads_no_other(
    tmp_path: Path, spec: ClipSpec
) -> None:
    with load(bundles.write(tmp_path / "b", spec)) as engine:
        assert set(engine._runs) == {"router"}
        engine.infer(bundles.plain_clips(spec, (0, 0, 0), (255, 0, 0), (0, 9, 9)))
        assert set(engine._runs) == {"router", "expert0", "expert2"}
        ran: list[tuple[str, int]] = []
        for name, run in dict(engine._runs).items():
            engine._runs[name] = _counted(name, run, ran)
        engine.infer(bundles.plain_clips(spec, (0, 0, 0), (255, 0, 0), (0, 9, 9)))
    assert ran == [("router", 3), ("expert0", 2), ("expert2", 1)]


@pytest.mark.parametrize("lost", [False, True])
def test_an_expert_that_changed_since_the_bundle_was_loaded_is_not_parsed(
    lost: bool, tmp_path: Path, spec: ClipSpec
) -> None:
    clips = bundles.plain_clips(spec, (0, 0, 0), (255, 0, 0))  # expert 0, expert 2
    folder = bundles.write(tmp_path / "b", spec)
    with load(folder) as engine:
        engine.infer(clips[:1])
        if lost:
            (folder / "expert2.onnx").unlink()
        else:  # as `vmoe-export --overwrite` does: a graph that would run as well
            shutil.copy(folder / "expert1.onnx", folder / "expert2.onnx")
        for _ in range(2):
            with pytest.raises(CorruptBundleError, match=r"b changed since it was loaded: expert2"):
                engine.infer(clips)
        assert engine.infer(clips[:1]).route.tolist() == [0], "what was loaded before goes on"


def test_closing_waits_for_a_backend_without_holding_up_the_others(
    tmp_path: Path, spec: ClipSpec
) -> None:
    engine = load(bundles.write(tmp_path / "b", spec))
    backend = engine._backend
    done = threading.Event()

    class Slow:
        load, put = backend.load, backend.put

        def close(self) -> None:
            assert done.wait(10), "nobody else could take the lock"
            backend.close()

    engine._backend = Slow()
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._closed:
        time.sleep(0.001)
    with pytest.raises(SettingError, match="this engine is closed"):
        engine.load_parts(["expert1"])
    done.set()
    closing.join(10)
    assert not closing.is_alive()


def _counted(name, run, ran):  # type: ignore[no-untyped-def]
    def counted(inputs):  # type: ignore[no-untyped-def]
        ran.append((name, len(inputs["clip"])))
        return run(inputs)

    return counted


@pytest.mark.parametrize("lowering", ["split", "if"])
def test_a_model_without_a_router(tmp_path: Path, spec: ClipSpec, lowering: str) -> None:
    with load(bundles.write(tmp_path / "b", spec, experts=1, lowering=lowering)) as engine:
        got = engine.infer(bundles.plain_clips(spec, *COLOURS))
    assert got.route.tolist() == [0] * 5
    assert got.scores.shape == (5, 1)
    if lowering == "split":
        assert not got.scores.any()


@pytest.mark.parametrize("lowering", ["split", "dense"])
def test_a_fixed_batch_is_filled_and_cut(tmp_path: Path, spec: ClipSpec, lowering: str) -> None:
    clips = bundles.plain_clips(spec, *COLOURS)
    with load(bundles.write(tmp_path / "b", spec, lowering=lowering, batch=2)) as engine:
        got = engine.infer(clips)
    assert got.route.tolist() == ROUTE
    np.testing.assert_allclose(
        got.logits, bundles.expected(clips, 3)[1][np.arange(5), ROUTE], atol=1e-4
    )


def test_one_part_alone(tmp_path: Path, spec: ClipSpec) -> None:
    clips = bundles.plain_clips(spec, *COLOURS)
    with load(bundles.write(tmp_path / "b", spec)) as engine:
        np.testing.assert_allclose(
            engine.run_part("router", clips)["scores"], bundles.expected(clips, 3)[0], atol=1e-5
        )
        with pytest.raises(UnknownNameError, match="did you mean 'expert2'"):
            engine.run_part("expert22", clips)


def test_a_manifest_that_was_read_can_be_loaded(path: Path) -> None:
    with load(reader.read(path)) as engine:
        assert (engine.bundle.path, engine.backend_name) == (path, "onnxruntime")


def test_backend_and_device_are_checked(path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'onnxruntime'"):
        load(path, backend="onnxruntim")
    with pytest.raises(SettingError, match="--device is 'gpu'"):
        load(path, device="gpu")
    for threads in (0, 1000):
        with pytest.raises(SettingError, match=f"--threads is {threads}; it must be from 1 to 256"):
            load(path, threads=threads)


def test_without_a_backend_it_says_what_to_install(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "openvino", None)
    ort = r"onnxruntime is not installed: pip install 'vmoe\[cpu\]' or 'vmoe\[gpu\]'\."
    ov = r"openvino is not installed: pip install 'vmoe\[openvino\]'\."
    for backend, why in (("auto", f"{ort} {ov}"), ("onnxruntime", ort), ("openvino", ov)):
        with pytest.raises(MissingDependencyError, match=f"^{why}$"):
            load(path, backend=backend)


def test_cuda_is_refused_where_onnxruntime_has_none(path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(MissingDependencyError, match=r"--device cuda:0: .* has no CUDA: pip"):
        load(path, device="cuda:0")


def test_cuda_that_no_library_is_there_for_is_told(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime makes a session on the CPU then, and says nothing."""
    ort = pytest.importorskip("onnxruntime")
    there = [onnxruntime_backend.CUDA, onnxruntime_backend.CPU]
    monkeypatch.setattr(ort, "get_available_providers", lambda: there)

    def on_cpu(_: object, file: Path, options: object) -> object:
        return ort.InferenceSession(str(file), options, providers=[onnxruntime_backend.CPU])

    monkeypatch.setattr(onnxruntime_backend.OnnxRuntime, "_session", on_cpu)
    why = r"--device cuda:0: onnxruntime cannot use it here: .* missing \(pip install 'onnxruntime-"
    with pytest.raises(MissingDependencyError, match=why):
        load(path, "onnxruntime", "cuda:0")


def test_cuda_libraries_are_looked_for_without_a_word_on_stdout(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    found: list[str] = []

    def preload() -> None:
        found.append("called")
        print("Failed to load libcublas.so.13")

    with caplog.at_level(logging.DEBUG, "vmoe.runtime"):
        onnxruntime_backend.find_cuda(SimpleNamespace(preload_dlls=preload))
        onnxruntime_backend.find_cuda(SimpleNamespace())  # before 1.21
    assert found == ["called"]
    assert capsys.readouterr().out == ""
    assert "onnxruntime: Failed to load libcublas.so.13" in caplog.text


def test_a_format_that_nothing_reads_is_named(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "b"
    shutil.copytree(path, copy)
    manifest = copy / "vmoe.json"
    manifest.write_text(manifest.read_text().replace('"format": "onnx"', '"format": "tape"'))
    with pytest.raises(EngineMismatchError, match="parts in tape; no backend"):
        load(copy)
    with pytest.raises(EngineMismatchError, match="backend onnxruntime reads onnx"):
        load(copy, backend="onnxruntime")


def test_a_graph_that_is_none_gives_one_line(tmp_path: Path, spec: ClipSpec) -> None:
    path = bundles.write(tmp_path / "b", spec)
    _replace_part(path, "router.onnx", b"\x08garbage" * 20)
    with pytest.raises(BundleError, match=r"router\.onnx: onnxruntime cannot load it") as e:
        load(path)
    assert "\n" not in str(e.value)


def test_a_graph_with_other_ports_is_refused(tmp_path: Path, spec: ClipSpec) -> None:
    path = bundles.write(tmp_path / "b", spec)
    _replace_part(path, "router.onnx", (path / "expert0.onnx").read_bytes())
    with pytest.raises(EngineMismatchError, match=r"router\.onnx has inputs .*'logits'.*'scores'"):
        load(path)


def test_a_changed_byte_is_refused(tmp_path: Path, spec: ClipSpec) -> None:
    path = bundles.write(tmp_path / "b", spec)
    data = bytearray((path / "expert1.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "expert1.onnx").write_bytes(data)
    with pytest.raises(CorruptBundleError, match=r"expert1\.onnx has changed since export"):
        load(path)


def _replace_part(path: Path, file: str, data: bytes) -> None:
    """Put other bytes in a part's place, with their right hash in the manifest."""
    old = reader.sha256(path / file)
    (path / file).write_bytes(data)
    manifest = path / "vmoe.json"
    manifest.write_text(manifest.read_text().replace(old, reader.sha256(path / file)))


def test_public_names_are_sorted_and_there() -> None:
    assert vmoe.runtime.__all__ == sorted(vmoe.runtime.__all__)
    assert all(hasattr(vmoe.runtime, name) for name in vmoe.runtime.__all__)
    assert vmoe.runtime.Engine is Engine
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        vmoe.runtime.lod  # noqa: B018

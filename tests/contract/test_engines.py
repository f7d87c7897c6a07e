"""What every backend promises; a new file of runtime/engines/ is tested with no edit here."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import bundles
from tests.twins import random_clips
from vmoe import bundle as reader
from vmoe import registry
from vmoe.batches import to_tensor
from vmoe.checkpoint import load as load_checkpoint
from vmoe.clips import ClipSpec
from vmoe.errors import BundleError, CorruptBundleError, SettingError
from vmoe.export import ExportSettings, export
from vmoe.runtime import load
from vmoe.runtime.engine import ENGINES
from vmoe.runtime.engines import SERVER, BackendSettings

ONNX_BACKENDS = [
    name
    for name in registry.names(ENGINES)
    if "onnx" in registry.load(ENGINES, name, "backend").FORMATS
]


HERE = [  # a server's backend is tested with one, in test_triton.py
    name
    for name in registry.names(ENGINES)
    if SERVER not in registry.load(ENGINES, name, "backend").FORMATS
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, spec: ClipSpec) -> Path:
    return bundles.write(tmp_path_factory.mktemp("b") / "b", spec)


@pytest.fixture(params=ONNX_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Return each backend that reads ONNX and can run here."""
    name: str = request.param
    _skip_without(name)
    return name


def _skip_without(name: str) -> None:
    why = registry.load(ENGINES, name, "backend").why_unavailable()
    if why:
        pytest.skip(why)


@pytest.fixture(scope="module", params=["split", "if"])
def exported(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return a bundle that was made of a twin, and carries it."""
    if request.param == "split":
        return tiny_bundle
    path = tmp_path_factory.mktemp("if") / "tiny-if"
    export(tiny_checkpoint, path, ExportSettings(lowering="if", gate_sparsity=1e3))
    return path


@pytest.mark.parametrize("name", HERE)
def test_it_agrees_with_the_twin(name: str, exported: Path, tiny_checkpoint: Path) -> None:
    _skip_without(name)
    clips = random_clips(6)
    twin = load_checkpoint(tiny_checkpoint).twin
    with torch.no_grad():
        wanted = twin(to_tensor(clips), "frozen")
        every = twin.run_all(to_tensor(clips)).numpy()
    forced = [3, 0, 1, 2, 3, 0]
    with load(exported, backend=name, device="cpu", threads=1) as engine:
        assert engine.backend_name == name
        got, sent = engine.infer(clips), engine.infer(clips, forced)
        alone = [engine.infer(clips[:n], [i] * n) for i, n in enumerate((6, 2, 1, 6))]
    assert got.route.tolist() == wanted.route.tolist()
    assert len(set(got.route.tolist())) > 1
    assert (got.logits.dtype, got.scores.dtype, got.route.dtype) == ("f4", "f4", "i8")
    np.testing.assert_allclose(got.scores, wanted.scores, atol=1e-4)
    np.testing.assert_allclose(got.logits, wanted.logits, atol=1e-4)
    assert sent.route.tolist() == forced
    np.testing.assert_allclose(sent.logits, every[np.arange(6), forced], atol=1e-4)
    for i, one in enumerate(alone):  # ... and nothing is left of a call before
        np.testing.assert_allclose(one.logits, every[: len(one.logits), i], atol=1e-4)


@pytest.mark.parametrize("name", registry.names(ENGINES))
def test_a_backend_says_what_it_reads_and_whether_it_can(name: str) -> None:
    module = registry.load(ENGINES, name, "backend")
    assert module.__doc__
    assert module.FORMATS
    assert module.DEVICES
    assert set(module.DEVICES) <= {"cpu", "cuda"}
    assert module.why_unavailable() is None or module.why_unavailable().endswith(".")


def test_it_agrees_with_the_closed_form(backend: str, path: Path, spec: ClipSpec) -> None:
    clips = bundles.plain_clips(spec, (0, 200, 0), (255, 100, 3), (128, 0, 0))
    scores, logits = bundles.expected(clips, 3)
    with load(path, backend=backend, device="cpu") as engine:
        got = engine.infer(clips)
    assert got.route.tolist() == [0, 2, 1]
    np.testing.assert_allclose(got.scores, scores, atol=1e-5)
    np.testing.assert_allclose(got.logits, logits[np.arange(3), got.route], atol=1e-4)


def test_what_was_put_can_be_run_by_every_part(backend: str, path: Path, spec: ClipSpec) -> None:
    manifest = reader.read(path)
    opened = registry.load(ENGINES, backend, "backend").open(BackendSettings(path, "cpu", 1))
    clips = bundles.plain_clips(spec, (51, 200, 0))
    put = opened.put(clips)
    for name, part in manifest.parts.items():
        output = "scores" if name == "router" else "logits"
        assert opened.load(part)({"clip": put})[output].shape == (1, 3)
    opened.close()
    opened.close()


def test_a_part_that_changed_since_the_bundle_was_read_is_not_parsed(
    backend: str, tmp_path: Path, spec: ClipSpec
) -> None:
    manifest = reader.read(bundles.write(tmp_path / "b", spec))
    opened = registry.load(ENGINES, backend, "backend").open(BackendSettings(manifest.path, "cpu"))
    shutil.copy(manifest.path / "expert1.onnx", manifest.path / "expert2.onnx")
    opened.load(manifest.parts["expert1"])
    with pytest.raises(CorruptBundleError, match=r"b changed since it was loaded: expert2"):
        opened.load(manifest.parts["expert2"])


def test_a_wrong_shape_is_refused_by_name(backend: str, path: Path, spec: ClipSpec) -> None:
    with (
        load(path, backend=backend) as engine,
        pytest.raises(SettingError, match="clips are uint8"),
    ):
        engine.infer(np.zeros((1, 2, 3, 4, 3), np.uint8))
    # past the engine's own check, the backend's error is one line too
    opened = registry.load(ENGINES, backend, "backend").open(BackendSettings(path, "cpu", 1))
    run = opened.load(reader.read(path).parts["router"])
    with pytest.raises(BundleError, match=r"router\.onnx does not run") as e:
        run({"clip": np.zeros((1, 2, 3, 4, 3), np.uint8)})
    assert "\n" not in str(e.value)

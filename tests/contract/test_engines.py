"""What every backend promises; a new file of runtime/engines/ is tested with no edit here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests import bundles
from vmoe import bundle as reader
from vmoe import registry
from vmoe.clips import ClipSpec
from vmoe.errors import BundleError, SettingError
from vmoe.runtime import load
from vmoe.runtime.engine import ENGINES
from vmoe.runtime.engines import BackendSettings

ONNX_BACKENDS = [
    name
    for name in registry.names(ENGINES)
    if "onnx" in registry.load(ENGINES, name, "backend").FORMATS
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, spec: ClipSpec) -> Path:
    return bundles.write(tmp_path_factory.mktemp("b") / "b", spec)


@pytest.fixture(params=ONNX_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Return each backend that reads ONNX and can run here."""
    name: str = request.param
    why = registry.load(ENGINES, name, "backend").why_unavailable()
    if why:
        pytest.skip(why)
    return name


@pytest.mark.parametrize("name", registry.names(ENGINES))
def test_a_backend_says_what_it_reads_and_whether_it_can(name: str) -> None:
    module = registry.load(ENGINES, name, "backend")
    assert module.__doc__
    assert module.FORMATS
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

"""What is exported is valid for others: it runs without vmoe, and says what the twin says.

A part whose form is for another engine (the plugin's second file) is checked by onnx alone.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tests.twins import SPEC, random_clips
from vmoe import bundle as bundles
from vmoe import registry
from vmoe.batches import to_tensor
from vmoe.checkpoint import Checkpoint
from vmoe.export import ExportSettings, graphs, optimize, pipeline
from vmoe.export.onnx import Parts, from_twin
from vmoe.export.pipeline import LOWERINGS, Plan
from vmoe.models import ModelSettings, VideoMoE, build

OPSET = 20
LABELS = ("a", "b", "c")

# Runs every graph of a folder on the clips beside it, and writes what they answer.
ALONE = """
import importlib.util, sys
from pathlib import Path
import numpy as np
import onnxruntime

assert importlib.util.find_spec("vmoe") is None, "vmoe can be imported here"
folder, names = Path(sys.argv[1]), sys.argv[2:]
clip = np.load(folder / "clip.npy")
for name in names:
    session = onnxruntime.InferenceSession(
        str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
    outputs = [port.name for port in session.get_outputs()]
    answers = dict(zip(outputs, session.run(outputs, {"clip": clip})))
    np.savez(folder / f"{name}.npz", **answers)
assert not [name for name in sys.modules if name.split(".")[0] in ("vmoe", "torch", "onnx")]
"""


@functools.cache
def exported() -> tuple[VideoMoE, Parts]:
    twin = build(ModelSettings("r3d18", 0.1, 2, len(LABELS)), SPEC, seed=4).eval()
    return twin, from_twin(twin, OPSET)


def alone(folder: Path, names: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """Run parts in a process that has onnxruntime and numpy, and not the installed vmoe."""
    import onnxruntime

    site = Path(onnxruntime.__file__).parents[1]
    found = folder / "site"
    found.mkdir()
    for path in site.iterdir():  # all that is installed, but for the links to this checkout
        if "vmoe" not in path.name and path.suffix != ".pth":
            (found / path.name).symlink_to(path)
    run = f"import sys; sys.path.insert(0, {str(found)!r})\n{ALONE}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", run, str(folder), *names],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {name: dict(np.load(folder / f"{name}.npz")) for name in names}


@pytest.mark.parametrize("form", ["none", "direct", "joined", "winograd"])
@pytest.mark.parametrize("lowering", registry.names(LOWERINGS))
def test_every_part_of_every_lowering_and_form(lowering: str, form: str, tmp_path: Path) -> None:
    twin, plain = exported()
    experts, choice = optimize.choose(plain.experts, form)
    assert choice.form == form
    settings = ExportSettings(lowering=lowering, optimize=form)
    plan = Plan(Checkpoint(twin, LABELS), None, "t", settings)
    bundle = pipeline.write(plan, Parts(plain.router, experts), tmp_path)
    clips = random_clips(3, seed=1)
    np.save(tmp_path / "clip.npy", clips)
    for path in tmp_path.glob("*.onnx"):
        onnx.checker.check_model(path, full_check=path.stem in bundle.parts)
        model = onnx.load(path, load_external_data=False)
        assert {o.domain: o.version for o in model.opset_import}[""] == OPSET
        for scope in graphs.walk(model.graph):
            assert not any(node.doc_string or node.metadata_props for node in scope.node)
    answers = alone(tmp_path, list(bundle.parts))
    with torch.no_grad():
        clip = to_tensor(clips)
        scores, logits = twin.scores(clip).numpy(), twin.run_all(clip).numpy()
    route = scores.argmax(axis=1)
    for name, got in answers.items():
        if "scores" in got:
            assert np.allclose(got["scores"], scores, atol=1e-4)
        if name == "moe":
            assert np.array_equal(got["route"], route)
            assert np.allclose(got["logits"], logits[np.arange(3), route], atol=1e-4)
        elif name.startswith("expert"):
            i = int(name.removeprefix("expert"))
            assert np.allclose(got["logits"], logits[:, i], atol=1e-4)


@pytest.mark.parametrize("form", ["direct", "winograd"])
def test_a_form_that_is_named_gives_the_same_bytes(form: str, tmp_path: Path) -> None:
    twin, plain = exported()
    settings = ExportSettings(optimize=form)
    plan = Plan(Checkpoint(twin, LABELS), None, "t", settings)
    for name in ("a", "b"):
        experts, _ = optimize.choose(plain.experts, form)
        (tmp_path / name).mkdir()
        pipeline.write(plan, Parts(plain.router, experts), tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert bundles.MANIFEST in files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_auto_measures_what_there_is_and_takes_the_fastest() -> None:
    _, plain = exported()
    experts, choice = optimize.choose(plain.experts, "auto")
    assert set(choice.cpu_ms) == {"none", "direct", "winograd"}
    assert choice.form == optimize.fastest(choice.cpu_ms)
    assert max(choice.difference.values()) <= optimize.PARITY
    named, _ = optimize.choose(plain.experts, choice.form)
    assert [e.SerializeToString() for e in experts] == [e.SerializeToString() for e in named]
    json.dumps(choice.to_report())


def test_the_fastest_is_taken_and_of_a_tie_the_one_that_does_the_least() -> None:
    assert optimize.fastest({"none": 3, "direct": 1, "winograd": 2}) == "direct"
    assert optimize.fastest({"none": 1, "direct": 3, "winograd": 2}) == "none"
    assert optimize.fastest({"none": 2, "direct": 1, "winograd": 1.09}) == "winograd"
    assert optimize.fastest({"none": 2, "direct": 1, "winograd": 1.11}) == "direct"


def test_a_form_that_computes_something_else_is_never_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vmoe.errors import SettingError

    _, plain = exported()
    monkeypatch.setattr(optimize, "PARITY", 0.0)
    with pytest.raises(SettingError, match="--optimize winograd changes the logits by"):
        optimize.choose(plain.experts, "winograd")
    experts, choice = optimize.choose(plain.experts, "auto")
    assert choice.form == "none"
    assert experts == plain.experts

"""What some lowerings promise beside what all do: the plugin's two files, dense's selection."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.twins import SPEC, lively, random_clips
from vmoe import bundle as bundles
from vmoe.checkpoint import Checkpoint
from vmoe.errors import CorruptBundleError, SettingError
from vmoe.export import graphs
from vmoe.export.lowerings import dense, if_, plugin
from vmoe.export.onnx import Parts
from vmoe.export.pipeline import ExportSettings, Plan, write
from vmoe.runtime import load

LABELS = ("a", "b", "c")
EXPERTS = 3


def mean_of(answer: str, weight: np.ndarray) -> ModelProto:
    """Return a graph of the clip's mean colour times a matrix: an expert that needs no tracing."""
    initializers = [
        numpy_helper.from_array(np.array([1, 2, 3], np.int64), "axes"),
        numpy_helper.from_array(np.float32(255), "white"),
        numpy_helper.from_array(weight.astype(np.float32), "module.1.fc.weight"),
    ]
    nodes = [
        helper.make_node("Cast", ["clip"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["sum"], keepdims=0),
        helper.make_node("Div", ["sum", "white"], ["mean"]),
        helper.make_node("MatMul", ["mean", "module.1.fc.weight"], [answer]),
    ]
    for node in nodes:
        node.name = node.op_type
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "part", [info("clip", TensorProto.UINT8, ["N", *SPEC.shape])],
        [info(answer, TensorProto.FLOAT, ["N", weight.shape[1]])], initializers,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def parts(seed: int = 0, classes: int = 512) -> Parts:
    """Return a router that takes the brightest colour, and experts of enough weights to map."""
    rng = np.random.default_rng(seed)
    experts = [mean_of("logits", rng.standard_normal((3, classes))) for _ in range(EXPERTS)]
    return Parts(mean_of("scores", np.eye(3)), experts)


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle of the lowering plugin."""
    path = tmp_path_factory.mktemp("plugin")
    labels = tuple(f"label{i}" for i in range(512))
    held = Checkpoint(lively(EXPERTS, 512), labels)
    write(Plan(held, None, "t", ExportSettings(lowering="plugin")), parts(), path)
    return path


def node_of(model: ModelProto) -> onnx.NodeProto:
    (node,) = [node for node in model.graph.node if node.domain == "vmoe"]
    return node


def test_one_node_is_the_dispatch_and_both_files_call_it_alike(folder: Path) -> None:
    whole = onnx.load(folder / "moe.onnx")
    alone = onnx.load(folder / "moe-tensorrt.onnx")
    for model in (whole, alone):
        node = node_of(model)
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert attributes == {
            "plugin_namespace": b"vmoe", "plugin_version": b"1", "experts": EXPERTS,
        }  # fmt: skip
        assert node.op_type.startswith("Experts_")
        assert ("vmoe", 1) in {(o.domain, o.version) for o in model.opset_import}
        assert list(node.output) == ["logits"]
    assert node_of(whole).op_type == node_of(alone).op_type
    onnx.checker.check_model(folder / "moe.onnx", full_check=True)
    onnx.checker.check_model(folder / "moe-tensorrt.onnx", full_check=True)


def test_the_function_holds_the_weights_inside_its_branches_outside_of_the_file(
    folder: Path,
) -> None:
    model = onnx.load(folder / "moe.onnx", load_external_data=False)
    (function,) = model.functions
    assert (function.domain, function.name) == ("vmoe", node_of(model).op_type)
    assert set(function.attribute) == {"plugin_namespace", "plugin_version", "experts"}
    assert list(node_of(model).input) == list(function.input) == ["clip", "expert"]
    held = [t for scope in graphs.scopes(model) for t in scope.initializer if "fc" in t.name]
    names = sorted(t.name for t in held[1:])
    assert names == [f"expert{i}/module.1.fc.weight" for i in range(EXPERTS)]
    assert all(t.data_location == TensorProto.EXTERNAL for t in held[1:])
    assert (folder / "moe.onnx").stat().st_size < 3 * 512 * 4 * EXPERTS


def test_tensorrts_file_has_no_function_and_the_weights_as_inputs(folder: Path) -> None:
    model = onnx.load(folder / "moe-tensorrt.onnx")
    assert not model.functions
    assert list(node_of(model).input) == [
        "clip", "expert", "experts/white", "experts/module.1.fc.weight",
    ]  # fmt: skip
    held = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    wanted = [
        numpy_helper.to_array(next(t for t in e.graph.initializer if "fc" in t.name))
        for e in parts().experts
    ]
    assert np.array_equal(held["experts/module.1.fc.weight"], np.stack(wanted))
    with pytest.raises(Exception, match="is not a registered function/op"):
        session(folder / "moe-tensorrt.onnx")


def test_the_manifest_lists_it_apart_and_no_backend_loads_it(folder: Path) -> None:
    read = bundles.read(folder)
    assert list(read.parts) == ["moe"]
    assert list(read.others) == ["tensorrt"]
    assert read.others["tensorrt"].file == "moe-tensorrt.onnx"
    clips = random_clips(5)
    with load(folder, "onnxruntime", threads=1) as engine:
        got = engine.infer(clips)
    mean = clips.mean(axis=(1, 2, 3)) / 255
    assert list(got.route) == list(mean.argmax(axis=1))
    assert len(set(got.route)) > 1
    path = folder / "moe-tensorrt.onnx"
    before = path.read_bytes()
    path.write_bytes(before[:-1] + b"!")
    try:
        with pytest.raises(CorruptBundleError, match=r"moe-tensorrt.onnx has changed since export"):
            bundles.read(folder)
    finally:
        path.write_bytes(before)


def test_two_models_never_share_an_operator() -> None:
    names = [plugin.op_type(parts(seed).experts) for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]


def test_experts_of_different_graphs_have_no_stacked_weights() -> None:
    router, experts = parts()
    other = mean_of("logits", np.zeros((3, 7)))
    with pytest.raises(SettingError, match=r"'module.1.fc.weight' is not of one shape in all"):
        plugin.others(router, [experts[0], other])
    assert plugin.others(None, experts[:1]) == {}


def test_dense_selects_and_lets_nothing_of_other_experts_through(tmp_path: Path) -> None:
    router, experts = parts(classes=4)
    experts[1] = mean_of("logits", np.full((3, 4), np.nan))
    lowered = {
        "dense": dense.lower(router, experts)["moe"],
        "if": if_.lower(router, experts)["moe"],
        "plugin": plugin.lower(router, experts)["moe"],
    }
    clips = random_clips(12, seed=4)
    found = {}
    for name, model in lowered.items():
        onnx.save(model, tmp_path / f"{name}.onnx")
        found[name] = session(tmp_path / f"{name}.onnx").run(None, {"clip": clips})
    route = found["if"][2]
    assert set(route) == {0, 1, 2}
    for logits, scores, chosen in found.values():
        assert np.array_equal(chosen, route)
        assert np.array_equal(np.isnan(logits).all(axis=1), route == 1)
        assert np.array_equal(scores, found["if"][1])
        assert np.allclose(logits[route != 1], found["if"][0][route != 1], atol=1e-6)


def test_its_file_runs_where_vmoe_is_not_installed(folder: Path) -> None:
    code = (
        "import sys; sys.modules['vmoe'] = None\n"
        "import numpy as np, onnxruntime as ort\n"
        f"s = ort.InferenceSession({str(folder / 'moe.onnx')!r}, "
        "providers=['CPUExecutionProvider'])\n"
        f"out = s.run(None, {{'clip': np.full((2, *{SPEC.shape}), 9, np.uint8)}})\n"
        "print([list(o.shape) for o in out])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[[2, 512], [2, 3], [2]]", done.stderr

"""Precision: asked, made, and found; calibration on the training split; what cannot be exported."""

from __future__ import annotations

import copy
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from torch import Tensor, nn

from tests import videos
from tests.experts import LABELS, clips_for, plain, small_twin, twin_of
from tests.twins import SPEC, random_clips
from vmoe.attacks.straight import Straight
from vmoe.batches import to_tensor
from vmoe.checkpoint import Checkpoint
from vmoe.data import DataSettings, open_data
from vmoe.errors import SettingError
from vmoe.export import calibration, half, layers, lowerable, optimize, pipeline, precision
from vmoe.export.calibration import CalibrationSettings
from vmoe.export.pipeline import graphs
from vmoe.export.plan import ExportSettings, Plan
from vmoe.export.precision import PrecisionSettings
from vmoe.export.quantise import quantise
from vmoe.models import ModelSettings, build


def answer(model: ModelProto, clips: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: np.ndarray = session.run(None, {"clip": clips})[0]
    return found


def off(model: ModelProto, reference: np.ndarray, clips: np.ndarray) -> float:
    return float(np.abs(answer(model, clips) - reference).max() / np.abs(reference).max())


def run_as(model: ModelProto, folder: Path) -> dict[str, int]:
    """Return what ONNX Runtime's own optimised graph runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return layers.runs_as(onnx.load(options.optimized_model_filepath))


@pytest.mark.parametrize("asked", ["fp16", "bf16"])
def test_half_experts_keep_a_float_router_and_float_doors(asked: str) -> None:
    twin, settings = small_twin(), PrecisionSettings(**{asked: True})
    parts = half.export(twin, settings, 20)
    assert parts.router is not None
    assert precision.prove(parts.router, "router", settings).found == {"fp32": 4}
    for i, expert in enumerate(parts.experts):
        proof = precision.prove(expert, f"expert{i}", settings)
        assert proof.found == proof.asked == {asked: 7}
        assert not proof.differs
        assert proof.tensors[asked] >= 7
        assert expert.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
        assert expert.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
        assert "BatchNormalization" not in {node.op_type for node in expert.graph.node}
    weights = [
        next(t for t in e.graph.initializer if t.name.endswith("fc.weight")).raw_data
        for e in parts.experts
    ]
    assert weights[0] != weights[1], "all experts have the weights of one"
    if asked == "fp16":  # no backend of a CPU here runs bf16
        clips = random_clips(2)
        for expert, whole in zip(parts.experts, plain("small").experts, strict=True):
            assert 0 < off(expert, answer(whole, clips), clips) < 0.01


def test_layers_kept_in_fp32_are_islands_and_other_experts_have_none() -> None:
    settings = PrecisionSettings(fp16=True, keep_fp32=r"experts\.1\.1\.(fc|layer2)")
    parts = half.export(small_twin(), settings, 20)
    assert parts.router is not None
    found = [precision.prove(e, f"expert{i}", settings) for i, e in enumerate(parts.experts)]
    assert [proof.found for proof in found] == [{"fp16": 7}, {"fp16": 3, "fp32": 4}]
    assert not any(proof.differs for proof in found)
    router = precision.prove(parts.router, "router", settings)
    assert router.found == router.asked == {"fp16": 4}, "the router was not kept"
    clips = random_clips(2)
    assert off(parts.experts[1], answer(plain("small").experts[1], clips), clips) < 0.01


def test_what_is_not_as_asked_is_named() -> None:
    settings = PrecisionSettings(int8=True, keep_fp32="fc")
    proof = precision.prove(plain("small").experts[1], "expert1", settings)
    assert proof.asked == {"fp32": 1, "int8": 6}
    assert proof.found == {"fp32": 7}
    assert len(proof.differs) == 6
    assert proof.differs[0] == "experts.1.1.stem.0 (fp32)"


@pytest.mark.parametrize(
    ("op", "stored", "found"),
    [("Cast", np.float16, "fp32"), ("Cast", np.float32, "fp32"), ("Mul", np.float32, "fp32")],
)
def test_a_layer_is_what_it_computes_in_wherever_its_weights_come_from(
    op: str, stored: type, found: str
) -> None:
    weights = [numpy_helper.from_array(np.ones((4, 2), stored), "module.fc.weight")]
    inputs, to = ["module.fc.weight"], {"to": TensorProto.FLOAT}
    if op == "Mul":
        weights.append(numpy_helper.from_array(np.ones(1, stored), "scale"))
        inputs, to = ["scale", *inputs], {}
    nodes = [
        onnx.helper.make_node(op, inputs, ["w"], **to),
        onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="fc"),
        onnx.helper.make_node("MatMul", ["x", "x"], ["z"]),  # of the clip alone: no layer
    ]
    x = onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4])
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [x], [], weights))
    held = [(layer.place, layer.precision) for layer in layers.of_model(model, "expert0")]
    assert held == [("experts.0.fc", found)]


@pytest.mark.parametrize(
    ("family", "form"),
    [("tsm", "none"), ("small", "none"), ("small", "joined"), ("small", "direct")],
)
def test_int8_is_run_as_int8_by_onnx_runtime(family: str, form: str, tmp_path: Path) -> None:
    settings = PrecisionSettings(int8=True)
    reference = plain(family).experts[0]
    lowered = optimize.lower(reference, form) or reference
    clips = clips_for(family, 16, 2)
    made = quantise(lowered, "expert0", clips, settings)
    onnx.checker.check_model(made, full_check=True)
    proof = precision.prove(made, "expert0", settings)
    assert set(proof.found) == {"int8"}
    assert not proof.differs
    places = {layer.place for layer in layers.of_model(made, "expert0")}
    assert places == {layer.place for layer in layers.of_model(reference, "expert0")}
    ran = run_as(made, tmp_path)
    assert ran == {"int8": proof.found["int8"]}, "a layer is computed in float"
    assert off(made, answer(reference, clips), clips) < 0.15
    onnx.save(made, tmp_path / "made.onnx")  # what attacks take their gradients from
    straight = Straight(tmp_path / "made.onnx")(to_tensor(clips)).detach().numpy()
    assert off(made, straight, clips) < 0.02
    again = quantise(lowered, "expert0", clips, settings)
    assert again.SerializeToString(deterministic=True) == made.SerializeToString(deterministic=True)


def test_the_report_says_which_form_was_asked_and_a_form_for_others_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipeline, "from_twin", lambda *_: plain("tsm"))
    held = Checkpoint(twin_of("tsm"), LABELS, {"data": "camera-motion"})

    def choice(settings: ExportSettings) -> tuple[str, str]:
        made = graphs(Plan(held, None, "t", settings)).choice
        return made.asked, made.form

    assert choice(ExportSettings(optimize="winograd")) == ("winograd", "none")
    said = "--optimize winograd is not for these experts: they stay as exported"
    assert caplog.messages == [said]
    assert choice(ExportSettings(int8=True, calib_clips=1)) == ("auto", "none")  # it ships as flat
    assert choice(ExportSettings(int8=True, calib_clips=1, optimize="none")) == ("none", "none")
    assert caplog.messages == [said]


def test_s8s8_is_symmetric_as_tensorrt_reads_it() -> None:
    settings = PrecisionSettings(int8=True, int8_form="s8s8")
    made = quantise(plain("small").experts[0], "expert0", random_clips(8, 2), settings)
    held = {tensor.name: tensor for tensor in made.graph.initializer}
    pairs = [n for n in made.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    count = Counter(node.op_type for node in pairs)
    assert count["QuantizeLinear"] == count["DequantizeLinear"] >= 2 * 7
    for node in pairs:
        zero = held[node.input[2]]
        assert zero.data_type == TensorProto.INT8
        assert not numpy_helper.to_array(zero).any()
    assert set(precision.prove(made, "expert0", settings).found) == {"int8"}
    u8s8 = PrecisionSettings(int8=True)
    other = quantise(plain("small").experts[0], "expert0", random_clips(8, 2), u8s8)
    kinds = {t.data_type for t in other.graph.initializer}
    assert {TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32} <= kinds


def test_int8_keeps_what_is_to_stay_fp32_and_never_saturates_a_logit() -> None:
    settings = PrecisionSettings(int8=True, keep_fp32=r"\.fc$|conv1")
    whole = plain("tsm").experts[0]
    proof = precision.prove(
        quantise(whole, "expert0", clips_for("tsm", 4), settings), "expert0", settings
    )
    assert proof.found == proof.asked == {"fp32": 10, "int8": 11}
    assert not proof.differs
    every = PrecisionSettings(int8=True, keep_fp32="experts")
    assert quantise(whole, "expert0", clips_for("tsm", 4), every) is whole
    dark = np.zeros_like(clips_for("tsm", 4))  # ranges that say nothing of what comes
    made = quantise(whole, "expert0", dark, PrecisionSettings(int8=True))
    after = [n for n in made.graph.node if whole.graph.output[0].name in n.output]
    assert [node.op_type for node in after] == ["Gemm"], "logits are rounded"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"fp16": True, "int8": True}, "--fp16 and --int8 exclude each other: choose one."),
        ({"fp16": True, "bf16": True}, "--fp16 and --bf16 exclude each other"),
        ({"keep_fp32": "fc"}, "--keep-fp32 is for --fp16, --bf16 or --int8"),
        ({"int8": True, "keep_fp32": "fc("}, "--keep-fp32 is 'fc(', no regular expression"),
        ({"int8_form": "s8s8"}, "--int8-form is for --int8"),
        ({"int8": True, "int8_form": "u8u8"}, "unknown --int8-form 'u8u8'"),
        ({"calib_clips": 5}, "--calib-clips is for --int8"),
        ({"calib": "x", "calib_adv": 0.5}, "--calib and --calib-adv is for --int8"),
        ({"int8": True, "optimize": "winograd"}, "--optimize winograd is not for --int8"),
        ({"fp16": True, "optimize": "direct"}, "--optimize direct is not for --fp16"),
        ({"form": "online", "int8": True}, "--form online is for --lowering split in fp32"),
    ],
)  # fmt: skip
def test_settings_that_exclude_each_other_say_so(settings: dict[str, object], says: str) -> None:
    with pytest.raises(SettingError, match=re.escape(says)):
        ExportSettings(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        ("fcc", "--keep-fp32 'fcc' matches none of the twin's 46 layers; they are called router.1"),
        (".", "--keep-fp32 '.' keeps all 46 layers: nothing is left for --int8."),
    ],
)
def test_an_expression_that_keeps_nothing_or_everything_is_refused(keep: str, says: str) -> None:
    tsm = build(ModelSettings("tsm", 0.1, 2, 3), SPEC)
    with pytest.raises(SettingError, match=re.escape(says)):
        precision.check(tsm, PrecisionSettings(int8=True, keep_fp32=keep))
    dense = build(ModelSettings("tsm", 0.1, 1, 3), SPEC)
    precision.check(dense, PrecisionSettings(int8=True))  # which has no router to keep


def write_videos(folder: Path) -> Path:
    for split in ("train", "val", "test"):
        for label in ("hug", "kick"):
            (folder / split / label).mkdir(parents=True)
            for i in range(3):
                name = f"{split}_{label}_{i}.avi"
                videos.write(folder / split / label / name, frames=8 + i)
    return folder


def held(data: str | None, labels: tuple[str, ...] = ("hug", "kick")) -> Checkpoint:
    twin = build(ModelSettings("tsm", 0.1, 2, len(labels)), SPEC).eval()
    return Checkpoint(twin, labels, {} if data is None else {"data": data})


def test_calibration_clips_are_of_the_training_split(tmp_path: Path) -> None:
    data = str(write_videos(tmp_path / "data"))
    opened = open_data(data, "train", SPEC, DataSettings(augment=("none",)))
    wanted = [opened[i][0] for i in range(len(opened))]
    found = calibration.clips_for(held(data), CalibrationSettings(), 0)
    assert len(found) == 6
    assert np.array_equal(found, np.stack(wanted))
    few = calibration.clips_for(held(None), CalibrationSettings(calib=data, calib_clips=4), 0)
    assert np.array_equal(few, np.stack(wanted[:4]))
    rendered = open_data("camera-motion", "train", SPEC, DataSettings(clips=3))
    found = calibration.clips_for(held("camera-motion"), CalibrationSettings(calib_clips=3), 0)
    assert np.array_equal(found, np.stack([rendered[i][0] for i in range(3)]))


def test_a_share_of_the_calibration_is_adversarial(tmp_path: Path) -> None:
    data = str(write_videos(tmp_path / "data"))
    clean = calibration.clips_for(held(data), CalibrationSettings(), 0)
    settings = CalibrationSettings(calib_adv=0.5)
    ckpt = held(data)
    ckpt.recipe["method"] = {"eps": 3 / 255}
    mixed = calibration.clips_for(ckpt, settings, 0)
    moved = np.abs(mixed.astype(int) - clean).max(axis=(1, 2, 3, 4))
    assert not moved[:3].any()
    assert set(moved[3:]) - {0} == {3}, "what the twin has wrong as it is may stay as it is"
    assert np.array_equal(mixed, calibration.clips_for(ckpt, settings, 0))
    with pytest.raises(SettingError, match="--calib-adv attacks clips of known labels"):
        calibration.clips_for(held(data, ("x", "y")), settings, 0)


def test_the_test_split_is_refused_under_any_name(tmp_path: Path) -> None:
    data = write_videos(tmp_path / "data")
    for split in ("test", "val"):
        settings = CalibrationSettings(calib=str(data / split))
        says = f"is the {split} split: figures are measured on it. Calibrate on the training split"
        with pytest.raises(SettingError, match=says):
            calibration.clips_for(held(str(data)), settings, 0)
    elsewhere = tmp_path / "innocent"
    elsewhere.mkdir()
    (elsewhere / "train").symlink_to(data / "test")
    (elsewhere / "val").symlink_to(data / "val")
    settings = CalibrationSettings(calib=str(elsewhere))
    with pytest.raises(SettingError, match=r"6 of its 6 clips are of the test split of .*data"):
        calibration.clips_for(held(str(data)), settings, 0)
    copied = tmp_path / "copied"
    shutil.copytree(data / "test", copied / "train")
    shutil.copytree(data / "val", copied / "val")
    with pytest.raises(SettingError, match="6 of its 6 clips are of the test split"):
        calibration.clips_for(held(str(data)), CalibrationSettings(calib=str(copied)), 0)
    alone = tmp_path / "alone" / "test"
    shutil.copytree(data / "train", alone)
    with pytest.raises(SettingError, match="is the test split"):
        calibration.clips_for(held(None), CalibrationSettings(calib=str(alone)), 0)


@pytest.mark.parametrize("said", ["gone", None])
def test_clips_that_cannot_be_compared_are_warned_of(
    said: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = str(write_videos(tmp_path / "data"))
    with caplog.at_level("WARNING", "vmoe.export"):
        assert len(calibration.clips_for(held(said), CalibrationSettings(calib=data), 0)) == 6
    assert "whether the twin is tested on these clips is not known" in caplog.text


def test_calibration_without_clips_or_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="has 0 folders of videos"):
        calibration.clips_for(held(None), CalibrationSettings(calib=str(tmp_path)), 0)
    with pytest.raises(SettingError, match="does not say what it was trained on: name clips"):
        calibration.clips_for(held(None), CalibrationSettings(), 0)


class Transform(nn.Module):
    """A layer that ONNX has no operator for."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0e(x) * torch.linalg.matrix_exp(x[..., :4, :4].contiguous()).sum()


def test_a_layer_that_cannot_be_exported_is_named_with_its_place() -> None:
    twin = copy.deepcopy(small_twin())
    for expert in twin.experts:
        expert[1].layer2.relu = Transform()
    plan = Plan(Checkpoint(twin, LABELS), None, "t", ExportSettings())
    says = r"experts\.0\.1\.layer2\.relu \(Transform\) cannot be exported to ONNX: .*\. Replace"
    with pytest.raises(SettingError, match=says):
        graphs(plan)


def test_a_pre_block_outside_of_router_and_experts_is_refused_by_name() -> None:
    twin = build(ModelSettings("tsm", 0.1, 2, 3), SPEC).eval()
    lowerable.check(twin)
    twin.denoise = nn.Conv3d(3, 3, 1)
    with pytest.raises(SettingError, match=r"twin's denoise \(Conv3d\) stands outside of router"):
        lowerable.check(twin)
    del twin.denoise
    twin.denoiser = None
    lowerable.check(twin)
    twin.denoiser = nn.Sequential(nn.Conv3d(3, 3, 1))
    with pytest.raises(SettingError, match=r"\(denoiser, Sequential, of --method oud-m\); no low"):
        lowerable.check(twin)


def test_the_twin_is_as_it_was() -> None:
    """Half precision and adversarial calibration are made of copies."""
    twin = small_twin()
    before = {name: t.clone() for name, t in twin.state_dict().items()}
    with torch.no_grad():
        says = twin.run_all(to_tensor(random_clips(2)))
        half.export(twin, PrecisionSettings(fp16=True), 20)
        assert torch.equal(says, twin.run_all(to_tensor(random_clips(2))))
    assert all(torch.equal(before[name], t) for name, t in twin.state_dict().items())
    assert all(t.dtype == before[name].dtype for name, t in twin.state_dict().items())

"""Frames unrolled, taps joined, temporal Winograd: the same answer, and what it saves."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper

from tests.graphs import Writer, clips_for, experts_of, optimised, run, weight_bytes
from vmoe.export import costs, graphs, optimize
from vmoe.export.passes import join_taps, temporal_winograd, unroll_frames

PASSES = (unroll_frames, join_taps, temporal_winograd)
ROUNDING = 2e-6  # of float32, as a share of the largest value


def copy(model: ModelProto) -> ModelProto:
    made = ModelProto()
    made.CopyFrom(model)
    return made


def assert_same(model: ModelProto, made: ModelProto) -> None:
    onnx.checker.check_model(made, full_check=True)
    clips = clips_for(model)
    before, after = run(model, clips), run(made, clips)
    assert before.shape == after.shape
    assert np.abs(before - after).max() <= ROUNDING * max(1, np.abs(before).max())


def unrolled(model: ModelProto, how: ModuleType) -> ModelProto:
    made = copy(model)
    assert how.apply(made.graph), "it is left as it is"
    return made


@st.composite
def networks(draw: st.DrawFn) -> ModelProto:
    """Draw two convolutions with what may stand around them, every frame of the end seen."""
    frames = draw(st.integers(1, 9))
    write = Writer(frames, 8, seed=draw(st.integers(0, 99)))
    channels = draw(st.sampled_from([2, 16]))
    x = write.conv(write.pixels(), 3, channels, (1, 3, 3), bias=True, pads=[0, 1, 1] * 2)
    if draw(st.booleans()):
        x = write.node("Relu", x)
    taps = draw(st.integers(1, 4))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    pads = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    reach = dilation * (taps - 1) + 1
    count = (frames + sum(pads) - reach) // stride + 1
    assume(count >= 1)
    starts = [t * stride - pads[0] for t in range(count)]
    assume(all(any(0 <= s + k * dilation < frames for k in range(taps)) for s in starts))
    group = draw(st.sampled_from([1, 2]))
    plane = draw(st.sampled_from([1, 3]))
    y = write.conv(
        x, channels, channels, (taps, plane, plane), bias=draw(st.booleans()), group=group,
        strides=[stride, 1, 1], dilations=[dilation, 1, 1],
        pads=[pads[0], plane // 2, plane // 2, pads[1], plane // 2, plane // 2],
    )  # fmt: skip
    around = draw(st.sampled_from(["nothing", "itself", "projection"]))
    if around == "itself" and count == frames:
        y = write.node("Add", *draw(st.permutations([x, y])))
    elif around == "projection" and count == -(-frames // stride):
        other = write.conv(x, channels, channels, (1, 1, 1), strides=[stride, 1, 1])
        y = write.node("Add", *draw(st.permutations([other, y])))
    return write.model(write.frames_apart(write.node("Relu", y), count, channels))


@pytest.mark.parametrize("how", PASSES, ids=lambda how: how.__name__.rsplit(".", 1)[1])
@settings(max_examples=12, deadline=None)
@given(model=networks())
def test_any_kernel_stride_padding_and_residual_gives_the_same(
    how: ModuleType, model: ModelProto
) -> None:
    assert_same(model, unrolled(model, how))


@settings(max_examples=15, deadline=None)
@given(
    frames=st.integers(1, 13), inner=st.sampled_from([16, 32]), outer=st.sampled_from([16, 32]),
    stride=st.sampled_from([1, 2]), residual=st.booleans(), bias=st.booleans(),
)  # fmt: skip
def test_winograd_tiles_of_any_number_of_frames_give_the_same(
    frames: int, inner: int, outer: int, stride: int, residual: bool, bias: bool
) -> None:
    write = Writer(frames, 6)
    x = write.conv(write.pixels(), 3, inner, (1, 1, 1))
    y = write.conv(x, inner, outer, (3, 3, 3), pads=[1] * 6, strides=[1, stride, stride], bias=bias)
    if residual:
        y = write.node(
            "Add", y, write.conv(x, inner, outer, (1, 1, 1), strides=[1, stride, stride])
        )
    model = write.model(write.frames_apart(write.node("Relu", y), frames, outer))
    made = unrolled(model, temporal_winograd)
    assert_same(model, made)
    if frames > 1 and stride == 1 and inner == outer == 32:
        plain = unrolled(model, unroll_frames)
        assert costs.flops(made) < costs.flops(plain)


@pytest.mark.parametrize(("frames", "kernels"), [(2, 2), (4, 6), (6, 8), (9, 13)])
def test_winograd_of_pixels_mixes_a_tiles_frames_in_one_product(frames: int, kernels: int) -> None:
    write = Writer(frames, 10)
    x = write.conv(
        write.pixels(), 3, 32, (3, 7, 7), pads=[1, 3, 3] * 2, strides=[1, 2, 2], bias=True
    )
    model = write.model(write.frames_apart(write.node("Relu", x), frames, 32))
    made = unrolled(model, temporal_winograd)
    assert_same(model, made)
    held = {tensor.name: tuple(tensor.dims) for tensor in made.graph.initializer}
    shapes = [
        held[node.input[1]] for node in made.graph.node
        if node.op_type == "Conv"
    ]  # fmt: skip
    assert sum(shape[2:] == (7, 7) for shape in shapes) == kernels
    assert sum(shape[0] == 18 for shape in shapes) == frames // 4


@pytest.mark.parametrize(("frames", "convolutions"), [(1, 1), (2, 3), (3, 6), (4, 6), (8, 12)])
def test_winograd_multiplies_as_often_as_it_says(frames: int, convolutions: int) -> None:
    write = Writer(frames, 6)
    x = write.conv(write.pixels(), 3, 32, (1, 1, 1))
    y = write.conv(x, 32, 32, (3, 3, 3), pads=[1] * 6)
    made = unrolled(write.model(write.head(y, 32)), temporal_winograd)
    kernels = [
        node for node in made.graph.node
        if node.op_type == "Conv" and helper.get_node_attr_value(node, "kernel_shape") == [3, 3]
    ]  # fmt: skip
    assert len(kernels) == convolutions


def test_winograd_is_left_out_where_its_sums_cost_more_than_it_saves() -> None:
    write = Writer(8, 6)
    x = write.conv(write.pixels(), 3, 16, (1, 1, 1))
    model = write.model(write.head(write.conv(x, 16, 16, (3, 1, 1), pads=[1, 0, 0] * 2), 16))
    plain, spared = unrolled(model, unroll_frames), unrolled(model, temporal_winograd)
    assert plain.graph.SerializeToString() == spared.graph.SerializeToString()


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("count_pad", [0, 1])
def test_pools_over_time_space_and_padding_give_the_same(op: str, count_pad: int) -> None:
    write = Writer(5, 9)
    x = write.conv(write.pixels(), 3, 4, (1, 1, 1))
    extra = {} if op == "MaxPool" else {"count_include_pad": count_pad}
    pads = {"kernel_shape": [3, 2, 2], "pads": [1, 1, 0, 1, 0, 1]}
    x = write.node(op, x, **pads, strides=[2, 2, 1], **extra)
    x = write.node(op, x, kernel_shape=[2, 1, 1], strides=[1, 1, 1])
    model = write.model(write.frames_apart(x, 2, 4))
    for how in PASSES:
        assert_same(model, unrolled(model, how))


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_pools_of_opset_18_stay_of_opset_18(op: str) -> None:
    write = Writer(5, 9)
    x = write.conv(write.pixels(), 3, 4, (1, 1, 1))
    x = write.node(op, x, kernel_shape=[2, 2, 2], strides=[1, 1, 1])
    model = write.model(write.frames_apart(x, 4, 4))
    model.opset_import[0].version = 18
    for how in PASSES:
        assert_same(model, unrolled(model, how))


def test_layers_that_choose_join_and_scale_frames_give_the_same() -> None:
    write = Writer(8, 4)
    x = write.conv(write.pixels(), 3, 4, (3, 1, 1), pads=[1, 0, 0] * 2)
    slow = write.node(
        "Slice", x, *(write.constant([v], np.int64) for v in (0, 2**62, 2, 4))
    )  # every fourth frame
    some = write.node("Gather", x, write.constant([5, 0], np.int64), axis=2)
    both = write.node("Concat", slow, some, axis=1)
    gate = write.node("ReduceMean", both, write.constant([-1, -2, -3], np.int64), keepdims=1)
    gated = write.node("Mul", both, write.node("Sigmoid", gate))
    long = write.node("Concat", gated, both, axis=-3)
    scaled = write.node("Sub", write.constant(1), write.node("HardSwish", long))
    clipped = write.node("Clip", scaled, write.constant(-0.5), "")
    norm = [write.constant(v) for v in (np.arange(8) + 1, np.ones(8), np.zeros(8), np.full(8, 2))]
    out = write.node("BatchNormalization", clipped, *norm)
    mean = write.node("GlobalAveragePool", out)
    both = write.node("Concat", write.frames_apart(out, 4, 8), write.node("Flatten", mean), axis=1)
    model = write.model(both)
    for how in PASSES:
        assert_same(model, unrolled(model, how))


def unknown(kind: str) -> ModelProto:
    """Return a network with one layer that is not known, or not in this way."""
    write = Writer(4, 4)
    x = write.conv(write.pixels(), 3, 4, (3, 1, 1), pads=[1, 0, 0] * 2)
    if kind == "layer":
        x = write.node("Softmax", x, axis=2)
    elif kind == "constant over time":
        x = write.node("Mul", x, write.constant(np.ones((1, 1, 4, 1, 1))))
    elif kind == "rounds up":
        x = write.node("MaxPool", x, kernel_shape=[1, 3, 3], strides=[1, 2, 2], ceil_mode=1)
    elif kind == "mean over time alone":
        x = write.node("ReduceMean", x, write.constant([2], np.int64), keepdims=1)
    elif kind == "time as channels":
        to = write.constant([-1, 4, 1, 8, 8], np.int64)
        x = write.node("Reshape", x, to)
    elif kind == "padding alone":
        x = write.conv(x, 4, 4, (1, 1, 1), pads=[1, 0, 0, 0, 0, 0])
    elif kind == "pads by itself":
        x = write.conv(x, 4, 4, (3, 1, 1), auto_pad="SAME_UPPER")
    elif kind == "backwards":
        x = write.node("Slice", x, *(write.constant([v], np.int64) for v in (3, -9, 2, -1)))
    elif kind == "cut in space":
        x = write.node("Slice", x, *(write.constant([v], np.int64) for v in (0, 2, 3, 1)))
    elif kind == "weights from outside":
        weight = write.node("Identity", write.constant(np.ones((4, 4, 1, 1, 1))))
        x = write.node("Conv", x, weight)
    return write.model(write.node("Reshape", x, write.constant([1, -1], np.int64)))


KINDS = ["layer", "constant over time", "rounds up", "mean over time alone", "time as channels",
         "padding alone", "pads by itself", "backwards", "cut in space",
         "weights from outside"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_is_not_known_leaves_the_graph_as_it_is(kind: str) -> None:
    model = unknown(kind)
    for how in PASSES:
        made = copy(model)
        assert not how.apply(made.graph)
        assert made.SerializeToString() == model.SerializeToString()


def test_a_free_number_of_frames_leaves_the_graph_as_it_is() -> None:
    write = Writer(4, 4)
    model = write.model(write.head(write.conv(write.pixels(), 3, 4, (1, 1, 1)), 4))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "T"
    assert not unroll_frames.apply(copy(model).graph)


def expert(arch: str) -> ModelProto:
    return experts_of(arch, 0.25, 2, 4)[1][0]


@pytest.mark.parametrize("form", ["direct", "joined", "winograd"])
@pytest.mark.parametrize("arch", ["r3d18", "r2plus1d18", "slowfast"])
def test_a_real_expert_gives_the_same_in_every_form(arch: str, form: str) -> None:
    model = expert(arch)
    made = optimize.lower(model, form)
    assert made is not None
    assert_same(model, made)
    assert run(made, clips_for(model, 5)).shape == (5, 4), "the batch is not free any more"
    assert graphs.ports(made.graph.input) == graphs.ports(model.graph.input)
    again = optimize.lower(model, form)
    assert again is not None
    assert again.SerializeToString() == made.SerializeToString()


def test_what_the_forms_save_on_a_real_expert(tmp_path: Path) -> None:
    plain = expert("r3d18")
    direct, winograd = (optimize.lower(plain, form) for form in ("direct", "winograd"))
    assert direct is not None
    assert winograd is not None
    nominal, less, least = (costs.flops(model) for model in (plain, direct, winograd))
    assert less < 0.80 * nominal, "taps in the padding are computed"  # 4 frames: a fifth and more
    assert least < 0.85 * less
    weights = [weight_bytes(model.graph) for model in (plain, direct)]
    assert weights[1] < 0.85 * weights[0], "weights that no frame needs are kept"
    found = optimised(plain, tmp_path)
    assert not [kind for kind in found if kind.startswith("nchwc")]
    for model in (direct, winograd):
        found = optimised(model, tmp_path)
        assert not found["Conv"] + found["FusedConv"], "a convolution is outside of the fast layout"
        assert not found["Relu"], "a Relu is not fused"
        mixed = sum(node.op_type == "Concat" for node in winograd.graph.node)  # tiles of pixels
        assert found["nchwc.ReorderOutput"] == 1 + mixed * (model is winograd)
        assert not found["nchwc.ReorderInput"]
    found = optimised(direct, tmp_path)
    assert found["Add"] == 1, "a tap or a residual is added by itself"  # that to the pixels
    plain_sums = sum(node.op_type == "Add" for node in direct.graph.node) - 1
    assert found["nchwc.Conv+"] == plain_sums


def test_a_graph_of_frames_as_a_batch_is_not_unrolled() -> None:
    model = expert("tsm")
    for form in ("direct", "joined", "winograd"):
        assert optimize.lower(model, form) is None
    flat = optimize.lower(model, "flat")
    assert flat is not None
    assert_same(model, flat)
    moved = [sum(n.op_type == "Transpose" for n in m.graph.node) for m in (model, flat)]
    assert moved == [2, 1]
    first = next(node for node in flat.graph.node if node.op_type == "Transpose")
    types = {v.name: v.type.tensor_type.elem_type
             for v in onnx.shape_inference.infer_shapes(flat).graph.value_info}  # fmt: skip
    assert types[first.output[0]] == TensorProto.UINT8
    assert optimize.lower(expert("r3d18"), "flat") is None

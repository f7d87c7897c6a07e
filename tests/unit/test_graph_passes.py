"""Graph passes and what graphs are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import GraphProto, TensorProto, helper
from onnx.numpy_helper import from_array, to_array

from tests.graphs import Writer, clips_for, optimised, run, session, weight_bytes
from vmoe import registry
from vmoe.bundle import Port
from vmoe.export import graphs, optimize
from vmoe.export.passes import (
    annotate_batch,
    cast_first,
    flat_pixels,
    fold_scaling,
    fold_stride,
    join_taps,
    pad_channels,
    share_ranges,
    sink_initializers,
    strip_metadata,
    unroll_frames,
    widen_scaling,
)


def nested() -> GraphProto:
    """Return y = x + w or x - w, each w inside its branch."""
    value = helper.make_tensor_value_info

    def branch(op: str) -> GraphProto:
        weight = from_array(np.ones(3, np.float32), f"w{op}")
        node = helper.make_node(op, ["x", f"w{op}"], [f"y{op}"])
        return helper.make_graph(
            [node], op, [], [value(f"y{op}", TensorProto.FLOAT, ["N", 3])], [weight]
        )

    branches = {"else_branch": branch("Sub"), "then_branch": branch("Add")}  # sorted by onnx
    node = helper.make_node("If", ["go"], ["y"], **branches)
    inputs = [value("x", TensorProto.FLOAT, ["N", 3]), value("go", TensorProto.BOOL, [])]
    return helper.make_graph([node], "outer", inputs, [value("y", TensorProto.FLOAT, ["N", 3])])


def spoiled() -> GraphProto:
    graph = nested()
    inner = graph.node[0].attribute[0].g
    for thing in (graph, inner, graph.node[0], inner.node[0], graph.input[0], inner.initializer[0]):
        thing.doc_string = "File /home/somebody/model.py"
        entry = thing.metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.stack_trace", "File /home/somebody/model.py"
    graph.node[0].attribute[0].doc_string = "/home/somebody"
    return graph


def test_strip_metadata_clears_branches_too_and_nothing_else() -> None:
    graph = spoiled()
    assert strip_metadata.apply(graph)
    assert graph.SerializeToString() == nested().SerializeToString()
    assert not strip_metadata.apply(graph), "it says that it changed a graph that was clean"


LISTS = (optimize.EXPORTED, *optimize.FORMS.values(), optimize.ONLINE, optimize.QUANTISED,
         optimize.RANGED, optimize.LOWERED, optimize.TENSORRT)  # fmt: skip


@pytest.mark.parametrize("name", registry.names("vmoe.export.passes"))
def test_every_pass_is_in_a_list_keeps_a_graph_valid_and_settles(name: str) -> None:
    apply = registry.load("vmoe.export.passes", name, "pass").apply
    assert any(apply in passes for passes in LISTS)
    graph = spoiled()
    apply(graph)
    assert not apply(graph), "a second time it still finds something to do"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)


def test_renamed_reaches_branches_and_leaves_the_original_alone() -> None:
    graph = nested()
    made = graphs.renamed(graph, "a/", {"x": "clip"})
    assert [value.name for value in made.input] == ["clip", "a/go"]
    inner = made.node[0].attribute[0].g
    assert list(inner.node[0].input) == ["clip", "a/wSub"]
    assert inner.initializer[0].name == "a/wSub"
    assert graph.SerializeToString() == nested().SerializeToString()


def test_walk_and_weight_bytes_tell_branches_from_the_graph_around_them() -> None:
    graph = nested()
    assert [scope.name for scope in graphs.walk(graph)] == ["outer", "Sub", "Add"]
    assert [weight_bytes(scope) for scope in graphs.walk(graph)] == [0, 12, 12]


def test_ports_have_free_sizes_as_none() -> None:
    assert graphs.ports(nested().input) == (
        Port("x", "float32", (None, 3)),
        Port("go", "bool", ()),
    )


def copy(model: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    return made


def assert_same(model: onnx.ModelProto, made: onnx.ModelProto) -> None:
    onnx.checker.check_model(made, full_check=True)
    clips = clips_for(model)
    before, after = run(model, clips), run(made, clips)
    assert np.abs(before - after).max() <= 2e-6 * max(1, np.abs(before).max())


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["Add", "Sub", "Mul", "Div"]), st.booleans()),
                min_size=2, max_size=5))  # fmt: skip
def test_fold_scaling_gives_the_same_in_two_steps(steps: list[tuple[str, bool]]) -> None:
    write = Writer(2, 4)
    x = write.node("Cast", "clip", to=TensorProto.FLOAT)
    for op, first in steps:
        value = write.constant(write.rng.uniform(0.5, 2, (1, 1, 1, 1, 3)))
        x = write.node(op, value, x) if first and op != "Div" else write.node(op, x, value)
    model = write.model(write.node("Reshape", x, write.constant([-1, 96], np.int64)))
    made = copy(model)
    changed = fold_scaling.apply(made.graph)
    assert changed == ([op for op, _ in steps] != ["Mul", "Add"])
    assert ops(made) == ["Cast", "Mul", "Add", "Reshape", "Identity"]
    assert_same(model, made)
    assert not fold_scaling.apply(made.graph)


def test_fold_scaling_leaves_what_is_read_twice_and_what_is_no_constant() -> None:
    write = Writer(2, 4)
    x = write.node("Cast", "clip", to=TensorProto.FLOAT)
    half = write.node("Div", x, write.constant(2))
    less = write.node("Sub", half, write.constant(1))
    both = write.node("Mul", less, half)
    inverse = write.node("Div", write.constant(1), write.node("Add", both, write.constant(9)))
    model = write.model(write.node("Reshape", inverse, write.constant([-1, 96], np.int64)))
    made = copy(model)
    assert not fold_scaling.apply(made.graph)
    assert made.SerializeToString() == model.SerializeToString()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([4, 16, 20, 33]), min_size=2, max_size=4), st.booleans())
def test_pad_channels_gives_the_same_in_multiples_of_16(widths: list[int], bias: bool) -> None:
    write = Writer(3, 6)
    x, inner = write.pixels(), 3
    for width in widths:
        x = write.conv(x, inner, width, (1, 3, 3), pads=[0, 1, 1] * 2, bias=bias)
        y = write.conv(write.node("Relu", x), width, width, (3, 1, 1), pads=[1, 0, 0] * 2)
        x, inner = write.node("MaxPool", write.node("Add", x, y), kernel_shape=[1, 2, 2]), width
    model = write.model(write.head(write.conv(x, inner, 20, (1, 1, 1)), 20))
    made = copy(model)
    assert pad_channels.apply(made.graph) == any(width % 16 for width in widths)
    assert_same(model, made)
    held = {t.name: t.dims for t in made.graph.initializer}
    counts = [held[n.input[1]][0] for n in made.graph.node if n.op_type == "Conv"]
    assert not any(count % 16 for count in counts[:-1])
    assert counts[-1] == 20, "the head is no convolution, and reads 20 channels"
    assert not pad_channels.apply(made.graph)


@pytest.mark.parametrize("between", ["Sigmoid", "Split", "group", "constant"])
def test_pad_channels_leaves_channels_that_another_layer_reads(between: str) -> None:
    write = Writer(2, 6)
    x = write.conv(write.pixels(), 3, 20, (1, 1, 1))
    if between == "group":
        x = write.conv(x, 20, 20, (1, 3, 3), group=20)
    elif between == "constant":
        x = write.node("Add", x, write.constant(1))
    elif between == "Split":
        x = write.node("Concat", x, x, axis=0)
    else:
        x = write.node(between, x)  # it makes 0.5 of 0
    model = write.model(write.head(write.conv(x, 20, 16, (1, 1, 1)), 16))
    assert not pad_channels.apply(copy(model).graph)


def test_pad_channels_lets_all_convolutions_into_the_fast_layout(tmp_path: Path) -> None:
    write = Writer(2, 6)
    x = write.conv(write.pixels(), 3, 17, (1, 3, 3))
    x = write.conv(write.node("Relu", x), 17, 16, (1, 3, 3))
    model = write.model(write.head(x, 16))
    made = copy(model)
    pad_channels.apply(made.graph)
    before, after = copy(model), copy(made)
    for one in (before, after):
        assert unroll_frames.apply(one.graph)
    assert optimised(before, tmp_path)["Conv"] == 2
    found = optimised(after, tmp_path)
    assert (found["Conv"], found["nchwc.Conv"] + found["nchwc.Conv+"]) == (0, 4)


def outside() -> onnx.ModelProto:
    """Return an If of two convolutions in an If, all weights in the outermost graph."""
    value = helper.make_tensor_value_info
    rng = np.random.default_rng(0)
    weights = [from_array(rng.normal(size=(16, 16, 3, 3)).astype(np.float32), f"w{i}")
               for i in range(3)]  # fmt: skip

    def branch(i: int) -> GraphProto:
        node = helper.make_node("Conv", ["x", f"w{i}"], [f"y{i}"], kernel_shape=[3, 3])
        more = helper.make_node("Add", [f"y{i}", "shared"], [f"z{i}"])
        return helper.make_graph(
            [node, more], f"b{i}", [], [value(f"z{i}", TensorProto.FLOAT, None)]
        )

    def choice(low: GraphProto, high: GraphProto, out: str) -> onnx.NodeProto:
        return helper.make_node("If", ["go"], [out], then_branch=low, else_branch=high)

    inner = helper.make_graph([choice(branch(0), branch(1), "i")], "inner", [],
                              [value("i", TensorProto.FLOAT, None)])  # fmt: skip
    graph = helper.make_graph(
        [choice(inner, branch(2), "y")], "outer",
        [value("x", TensorProto.FLOAT, ["N", 16, 8, 8]), value("go", TensorProto.BOOL, [])],
        [value("y", TensorProto.FLOAT, ["N", 16, 6, 6])],
        [*weights, from_array(np.ones((1, 16, 1, 1), np.float32), "shared")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def first_layer(
    write: Writer, kernel: tuple[int, int, int], pads: list[int], strides: list[int]
) -> onnx.ModelProto:
    """Return a model of one convolution over the pixels, scaled in two steps."""
    x = write.conv(write.pixels(), 3, 16, kernel, pads=pads, strides=strides, bias=True)
    model = write.model(write.head(write.node("Relu", x), 16))
    fold_scaling.apply(model.graph)
    return model


@settings(max_examples=12, deadline=None)
@given(
    st.integers(2, 3), st.integers(2, 5), st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.lists(st.integers(0, 3), min_size=4, max_size=4),
)  # fmt: skip
def test_fold_stride_gives_the_same_without_one(
    stride: int, blocks: int, size: tuple[int, int], pads: list[int]
) -> None:
    write = Writer(3, stride * blocks)
    kernel = tuple(min(k, stride * blocks) for k in size)
    top, left, bottom, right = pads
    model = first_layer(write, (3, *kernel), [1, top, left, 1, bottom, right], [2, stride, stride])
    made = copy(model)
    if not fold_stride.apply(made.graph):  # the image does not begin or end with whole blocks
        assert made.SerializeToString() == model.SerializeToString()
        return
    assert not fold_stride.apply(made.graph)
    assert_same(model, made)
    assert join_taps.apply(made.graph)
    assert_same(model, made)


def test_fold_stride_is_for_the_stem_of_a_residual_network() -> None:
    model = first_layer(Writer(4, 16), (3, 7, 7), [1, 3, 3] * 2, [1, 2, 2])
    made = copy(model)
    assert fold_stride.apply(made.graph)
    assert_same(model, made)
    conv = next(node for node in made.graph.node if node.op_type == "Conv")
    said = {a.name: helper.get_attribute_value(a) for a in conv.attribute}
    assert said["kernel_shape"] == [3, 4, 4]
    assert said["strides"] == [1, 1, 1]
    assert said["pads"] == [1, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("why", ["stride", "uneven", "sizes", "free", "dilation", "pixels"])
def test_fold_stride_leaves_other_layers(why: str) -> None:
    write = Writer(2, 9 if why == "sizes" else 8)
    x = write.pixels()
    more = {"dilations": [1, 2, 2]} if why == "dilation" else {}
    strides = {"stride": [1, 1, 1], "uneven": [1, 2, 1]}.get(why, [1, 2, 2])
    y = write.conv(x, 3, 16, (1, 3, 3), pads=[0, 1, 1] * 2, strides=strides, **more)
    y = write.head(y, 16)
    if why == "pixels":
        y = write.node("Add", y, write.head(write.conv(x, 3, 16, (1, 1, 1)), 16))
    model = write.model(y)
    if why == "free":
        model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"
    fold_scaling.apply(model.graph)
    assert not fold_stride.apply(copy(model).graph)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 4), st.integers(3, 9), st.integers(1, 3), st.booleans())
def test_pixels_that_are_moved_as_bytes_or_cast_first_are_the_same(
    frames: int, size: int, kernel: int, flat: bool
) -> None:
    write = Writer(frames, size)
    x = write.node("Transpose", write.pixels(), perm=[0, 2, 1, 3, 4])
    x = write.node("Reshape", x, write.constant([-1, 3, size, size], np.int64))
    x = write.node("Relu", write.conv(x, 3, 8, (kernel, kernel), bias=True))
    x = write.node("ReduceMean", x, write.constant([2, 3], np.int64), keepdims=0)
    model = write.model(write.node("Reshape", x, write.constant([-1, 8 * frames], np.int64)))
    fold_scaling.apply(model.graph)
    made = copy(model)
    if flat:
        assert flat_pixels.apply(made.graph)
        assert_same(model, made)
    assert cast_first.apply(made.graph)
    assert ops(made)[0] == "Cast"
    assert ops(made).count("Cast") == 1
    assert_same(model, made)


@pytest.mark.parametrize("shared", [False, True])
def test_widen_scaling_gives_the_same_pixels_by_whole_rows(shared: bool) -> None:
    write = Writer(3, 8)
    x = write.conv(write.pixels(), 3, 16, (3, 3, 3), pads=[1] * 6)
    model = write.model(write.head(write.node("Relu", x), 16))
    fold_scaling.apply(model.graph)
    unroll_frames.apply(model.graph)
    if shared:  # a layer that needs the constant as it is
        scale = next(t.name for t in model.graph.initializer if t.name.endswith("/scale"))
        model.graph.node.append(helper.make_node("Relu", [scale], ["other"]))
    made = copy(model)
    assert widen_scaling.apply(made.graph)
    assert not widen_scaling.apply(made.graph)
    shapes = {t.name: t.dims for t in made.graph.initializer if t.name.endswith(("scale", "shift"))}
    assert sorted(map(list, shapes.values())) == [
        [1, 3, 1, 1, 1 if shared else 8], [1, 3, 1, 1, 8],
    ]  # fmt: skip
    clips = clips_for(model)
    assert np.array_equal(run(model, clips), run(made, clips))


def test_widen_scaling_knows_how_wide_an_image_of_blocks_is() -> None:
    model = first_layer(Writer(3, 8), (3, 3, 3), [1] * 6, [1, 2, 2])
    assert fold_stride.apply(model.graph)
    assert unroll_frames.apply(model.graph)
    made = copy(model)
    assert widen_scaling.apply(made.graph)
    shapes = [list(t.dims) for t in made.graph.initializer if t.name.endswith("shift/blocks")]
    assert shapes == [[1, 12, 1, 1, 4]]
    clips = clips_for(model)
    assert np.array_equal(run(model, clips), run(made, clips))


def quantised(low: float, high: float) -> onnx.ModelProto:
    """Return two convolutions of values that are joined, int8, with ranges of their own."""
    rng = np.random.default_rng(0)
    node, ranges = helper.make_node, {"a": (0.0, high), "b": (low, 1.0), "y": (low, high)}
    held, nodes = {"wz": np.zeros(16, np.int8), "none": np.zeros(16, np.int32)}, []

    def pair(name: str) -> None:
        low, high = ranges[name]
        held[f"{name}s"] = np.float32((high - low) / 255)
        held[f"{name}z"] = np.uint8(round(-low / (high - low) * 255))
        around = [f"{name}s", f"{name}z"]
        nodes.append(node("QuantizeLinear", [name, *around], [f"{name}q"]))
        nodes.append(node("DequantizeLinear", [f"{name}q", *around], [f"{name}d"]))

    def conv(of: str, inner: int) -> None:
        held[f"w{of}"] = rng.integers(-127, 128, (16, inner, 1, 1), np.int8)
        held[f"w{of}s"] = rng.uniform(0.001, 0.002, 16).astype(np.float32)
        bias = held[f"{of}s"] * held[f"w{of}s"]
        held[f"b{of}"], held[f"b{of}s"] = rng.integers(-9999, 9999, 16, np.int32), bias
        nodes.append(node("DequantizeLinear", [f"w{of}", f"w{of}s", "wz"], [f"w{of}d"], axis=0))
        nodes.append(node("DequantizeLinear", [f"b{of}", f"b{of}s", "none"], [f"b{of}d"], axis=0))
        nodes.append(node("Conv", [f"{of}d", f"w{of}d", f"b{of}d"], [f"out_{of}"]))

    pair("a")
    pair("b")
    nodes.append(node("Concat", ["ad", "bd"], ["y"], axis=1))
    pair("y")
    conv("a", 4)
    conv("y", 8)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "int8", [value(x, TensorProto.FLOAT, ["N", 4, 6, 6]) for x in "ab"],
        [value(f"out_{x}", TensorProto.FLOAT, ["N", 16, 6, 6]) for x in "ay"],
        [from_array(np.asarray(v), name) for name, v in held.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_share_ranges_gives_what_is_joined_one_range_and_keeps_what_it_means() -> None:
    model = quantised(-0.5, 3.0)
    made = copy(model)
    assert share_ranges.apply(made.graph)
    assert not share_ranges.apply(made.graph)
    onnx.checker.check_model(made, full_check=True)
    held = {t.name: to_array(t) for t in made.graph.initializer}
    pairs = [node for node in made.graph.node if node.op_type == "QuantizeLinear"]
    (scale,) = {held[node.input[1]].item() for node in pairs}
    assert scale == pytest.approx(3.5 / 255, rel=0.005)
    assert {held[node.input[2]].item() for node in pairs} == {36}
    for conv in (node for node in made.graph.node if node.op_type == "Conv"):
        inner = [next(n for n in made.graph.node if name in n.output) for name in conv.input]
        x, weight, bias = (held[node.input[1]] for node in inner)
        assert np.allclose(bias, x * weight)
    rng = np.random.default_rng(1)
    clips = {"a": rng.uniform(0, 3, (2, 4, 6, 6)), "b": rng.uniform(-0.5, 1, (2, 4, 6, 6))}
    given = {name: x.astype(np.float32) for name, x in clips.items()}
    for before, after in zip(
        session(model).run(None, given), session(made).run(None, given), strict=True
    ):
        assert np.abs(before - after).max() < 0.02 * np.abs(before).max()


def test_share_ranges_writes_a_bias_that_layers_share_for_each_scale() -> None:
    model = quantised(-0.5, 3.0)
    nodes, held = model.graph.node, model.graph.initializer
    first = next(to_array(t) for t in held if t.name == "wys")
    held.append(from_array(first * np.float32(1.5), "other"))  # weights of the same bias
    nodes.append(helper.make_node("DequantizeLinear", ["wy", "other", "wz"], ["wod"], axis=0))
    nodes.append(helper.make_node("Conv", ["yd", "wod", "byd"], ["out_o"]))
    model.graph.output.append(copy_as(model.graph.output[1], "out_o"))
    made = copy(model)
    assert share_ranges.apply(made.graph)
    onnx.checker.check_model(made, full_check=True)
    zeros = {name: np.zeros((1, 4, 6, 6), np.float32) for name in "ab"}  # the bias alone is left
    for before, after in zip(
        session(model).run(None, zeros), session(made).run(None, zeros), strict=True
    ):
        assert np.allclose(before, after, rtol=1e-3, atol=1e-4)


def copy_as(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    made = onnx.ValueInfoProto()
    made.CopyFrom(value)
    made.name = name
    return made


@pytest.mark.parametrize("high", [1.0, 9.0], ids=["one already", "far apart"])
def test_share_ranges_leaves_ranges(high: float) -> None:
    assert not share_ranges.apply(copy(quantised(0.0, high)).graph)


def test_share_ranges_leaves_what_is_stored_and_what_is_of_two_kinds() -> None:
    model = quantised(-0.5, 3.0)
    stored = helper.make_node("DequantizeLinear", ["sevens", "as", "az"], ["stored"])
    model.graph.node.append(stored)
    model.graph.initializer.append(from_array(np.full(3, 7, np.uint8), "sevens"))
    model.graph.output.append(helper.make_tensor_value_info("stored", TensorProto.FLOAT, [3]))
    made = copy(model)
    assert share_ranges.apply(made.graph)
    assert stored in made.graph.node
    zero = next(t for t in model.graph.initializer if t.name == "bz")
    zero.CopyFrom(from_array(np.array(0, np.int8), "bz"))
    assert not share_ranges.apply(model.graph)


def test_sink_initializers_moves_each_into_the_branch_that_alone_reads_it(tmp_path: Path) -> None:
    model = outside()
    made = copy(model)
    assert sink_initializers.apply(made.graph)
    assert not sink_initializers.apply(made.graph)
    onnx.checker.check_model(made, full_check=True)
    held = {scope.name: [t.name for t in scope.initializer] for scope in graphs.walk(made.graph)}
    assert held == {
        "outer": ["shared"], "inner": [], "b0": ["w0"], "b1": ["w1"], "b2": ["w2"],
    }  # fmt: skip
    x = np.random.default_rng(1).normal(size=(2, 16, 8, 8)).astype(np.float32)
    for go in (True, False):
        inputs = {"x": x, "go": np.asarray(go)}
        before, after = (session(m).run(None, inputs)[0] for m in (model, made))
        assert np.abs(before - after).max() <= 1e-4
    assert optimised(model, tmp_path)["nchwc.Conv"] == 0
    assert optimised(made, tmp_path)["nchwc.Conv"] == 3


def gathered() -> onnx.ModelProto:
    """Return a sum over two frames of the clips that go to expert 1, if there is one."""
    value = helper.make_tensor_value_info
    rng = np.random.default_rng(0)
    weights = [from_array(rng.normal(size=(16, 16, 3, 3)).astype(np.float32), f"w{i}")
               for i in range(2)]  # fmt: skip
    node = helper.make_node
    conv = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    block = [
        node("Gather", ["x", "rows"], ["some"], axis=0),
        node("Split", ["some"], ["frame0", "frame1"], axis=1, num_outputs=2),
        node("Conv", ["frame0", "w0"], ["a"], **conv),
        node("Conv", ["frame1", "w1"], ["b"], **conv),
        node("Add", ["a", "b"], ["c"]), node("Relu", ["c"], ["yes"]),
    ]  # fmt: skip
    yes = helper.make_graph(block, "yes", [], [value("yes", TensorProto.FLOAT, None)], weights)
    no = helper.make_graph([node("Identity", ["none"], ["no"])], "no", [],
                           [value("no", TensorProto.FLOAT, None)])  # fmt: skip
    nodes = [
        node("Equal", ["route", "one"], ["is_one"]), node("NonZero", ["is_one"], ["at"]),
        node("Reshape", ["at", "flat"], ["rows"]), node("Size", ["rows"], ["n"]),
        node("Greater", ["n", "zero"], ["any"]),
        node("If", ["any"], ["y"], then_branch=yes, else_branch=no),
    ]  # fmt: skip
    ints = [from_array(np.asarray(v, np.int64), name)
            for name, v in (("one", 1), ("flat", [-1]), ("zero", 0))]  # fmt: skip
    graph = helper.make_graph(
        nodes, "outer",
        [value("x", TensorProto.FLOAT, ["N", 32, 8, 8]), value("route", TensorProto.INT64, ["N"])],
        [value("y", TensorProto.FLOAT, [None, 16, 8, 8])],
        [*ints, from_array(np.zeros((0, 16, 8, 8), np.float32), "none")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_annotate_batch_lets_a_sum_over_a_gathered_batch_be_fused(tmp_path: Path) -> None:
    model = gathered()
    made = copy(model)
    assert annotate_batch.apply(made.graph)
    assert not annotate_batch.apply(made.graph)
    onnx.checker.check_model(made, full_check=True)
    x = np.random.default_rng(1).normal(size=(3, 32, 8, 8)).astype(np.float32)
    for route in ([1, 0, 1], [0, 0, 0]):
        inputs = {"x": x, "route": np.asarray(route)}
        before, after = (session(m).run(None, inputs)[0] for m in (model, made))
        assert before.shape == after.shape
        assert np.allclose(before, after, atol=1e-4)
    assert optimised(model, tmp_path)["nchwc.Conv+"] == 0
    found = optimised(made, tmp_path)
    assert (found["nchwc.Conv+"], found["Relu"]) == (1, 0)

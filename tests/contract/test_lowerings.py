"""What every lowering promises: the twin's answer, for any number of experts, batch and route."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import GraphProto

from tests.graphs import experts_of, session, weight_bytes
from tests.twins import SPEC, lively, random_clips
from vmoe import registry
from vmoe.batches import to_tensor
from vmoe.checkpoint import Checkpoint
from vmoe.export import ExportSettings, graphs, pipeline
from vmoe.export.lowerings import plugin
from vmoe.export.onnx import Parts, trace
from vmoe.export.pipeline import LOWERINGS, Plan
from vmoe.models import ModelSettings, VideoMoE, build
from vmoe.runtime import Engine, load

FAMILIES = ("r3d18", "tsm")
MORE_FAMILIES = (
    "r2plus1d18",
    "slowfast",
)  # by two experts alone: graphs are all alike to lowerings
MOST = 5
LABELS = ("a", "b", "c", "d")


@functools.cache
def router_of(experts: int) -> tuple[torch.nn.Module | None, onnx.ModelProto | None]:
    """Return a router that sends noise to several experts, and its graph."""
    twin = lively(experts, len(LABELS))
    if twin.router is None:
        return None, None
    return twin.router, trace([twin.router], "scores", SPEC.shape, 20)[0]


def made(family: str, experts: int) -> tuple[VideoMoE, Parts]:
    """Return a twin and its graphs, of parts that were traced once."""
    width, most = (0.1, MOST) if family in FAMILIES else (0.25, 2)
    modules, expert_graphs = experts_of(family, width, most, len(LABELS))
    router, router_graph = router_of(experts)
    twin = build(ModelSettings(family, width, experts, len(LABELS)), SPEC)
    twin.router = router
    twin.experts = torch.nn.ModuleList(modules[:experts])
    return twin.eval(), Parts(router_graph, expert_graphs[:experts])


@pytest.fixture(
    scope="module",
    params=[
        (lowering, family, experts)
        for family in (*FAMILIES, *MORE_FAMILIES)
        for experts in ((1, 2, 4, MOST) if family in FAMILIES else (2,))
        for lowering in registry.names(LOWERINGS)
    ],
    ids=lambda p: f"{p[0]}-{p[1]}-{p[2]}",
)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[VideoMoE, Engine, Path]]:
    """Yield a twin, its bundle as an engine, and its folder."""
    lowering, family, experts = request.param
    twin, parts = made(family, experts)
    plan = Plan(Checkpoint(twin, LABELS), None, "t", ExportSettings(lowering=lowering))
    folder = tmp_path_factory.mktemp("lowered")
    pipeline.write(plan, parts, folder)
    with load(folder, threads=1) as engine:
        yield twin, engine, folder


def answers(twin: VideoMoE, clips: np.ndarray, route: np.ndarray | None = None) -> list[np.ndarray]:
    """Return logits, scores and route of the twin, the route as forced."""
    clip = to_tensor(clips)
    with torch.no_grad():
        scores = twin.scores(clip)
        chosen = scores.argmax(dim=1) if route is None else torch.from_numpy(route)
        return [v.numpy() for v in (twin.run_routed(clip, chosen), scores, chosen)]


def agree(engine: Engine, twin: VideoMoE, clips: np.ndarray, route: np.ndarray | None) -> None:
    got = engine.infer(clips, None if route is None else route.tolist())
    logits, scores, chosen = answers(twin, clips, route)
    assert np.array_equal(got.route, chosen)
    assert got.scores.shape == scores.shape
    assert np.abs(got.scores - scores).max() <= 1e-4 * max(1, np.abs(scores).max())
    assert np.abs(got.logits - logits).max() <= 1e-4 * np.abs(logits).max()


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_it_answers_as_the_twin_does(case: tuple[VideoMoE, Engine, Path], batch: int) -> None:
    twin, engine, _ = case
    clips = random_clips(batch, seed=11)
    agree(engine, twin, clips, None)
    if batch == 7 and len(twin.experts) > 1:
        assert len(set(engine.infer(clips).route)) > 1, "this test saw one expert alone"


def test_forced_routes_are_followed(case: tuple[VideoMoE, Engine, Path]) -> None:
    twin, engine, _ = case
    clips = random_clips(5, seed=12)
    for i in range(len(twin.experts)):
        agree(engine, twin, clips[:1], np.full(1, i))
    agree(engine, twin, clips, np.arange(5) % len(twin.experts))


def test_its_graphs_are_valid_and_the_manifest_says_what_they_are(
    case: tuple[VideoMoE, Engine, Path],
) -> None:
    _, engine, folder = case
    for part in engine.bundle.parts.values():
        onnx.checker.check_model(folder / part.file, full_check=True)
        graph = onnx.load(folder / part.file, load_external_data=False).graph
        assert graphs.ports(graph.input) == part.inputs
        assert graphs.ports(graph.output) == part.outputs
        assert part.inputs[0].dtype == "uint8"
        assert part.inputs[0].shape == (None, *SPEC.shape)
        kinds = {node.op_type for scope in graphs.walk(graph) for node in scope.node}
        assert "BatchNormalization" not in kinds, "a normalisation was not folded"
        assert part.precision == {"asked": "fp32", "found": "fp32"}
        assert {(folder / file).stat().st_mode & 0o444 for file in part.hashes} == {0o444}


def test_the_very_nodes_that_tensorrt_gets_answer_as_the_twin_does(
    case: tuple[VideoMoE, Engine, Path],
) -> None:
    twin, engine, folder = case
    routes = engine.bundle.lowering == "plugin" and len(twin.experts) > 1
    assert set(engine.bundle.others) == ({"tensorrt"} if routes else set())
    if not routes:
        return
    model = onnx.load(folder / engine.bundle.others["tensorrt"].file)
    doors = {node.op_type for node in model.graph.node if "clip" in node.input}
    assert doors == {"Cast"}, "TensorRT moves no bytes"
    nodes = [node for node in model.graph.node if node.domain == "vmoe"]
    layers = Counter(type(module) for module in twin.experts[0].modules())
    assert Counter(node.op_type for node in nodes) == {
        "VmoeTopK": 1, "RoutedConv3d": layers[torch.nn.Conv3d] + layers[torch.nn.Conv2d],
        "RoutedLinear": layers[torch.nn.Linear],
    }  # fmt: skip
    for node in nodes:  # parsers look at the type alone, and then by these attributes
        assert not onnx.defs.has(node.op_type)
        said = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (said["plugin_namespace"], said["plugin_version"]) == (b"vmoe", b"1")
    plain = plugin.with_functions(model, len(twin.experts))
    assert list(plain.graph.node) == list(model.graph.node)
    inferred = onnx.shape_inference.infer_shapes(plain).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in inferred.value_info}
    assert onnx.TensorProto.INT64 not in {kinds.get(n) for node in nodes for n in node.input}
    clips = random_clips(5, seed=11)
    run = session(plain)
    logits, scores, route = run.run(None, {"clip": clips})
    wanted = answers(twin, clips)
    assert np.array_equal(route, wanted[2])
    assert np.abs(scores - wanted[1]).max() <= 1e-4 * max(1, np.abs(scores).max())
    assert np.abs(logits - wanted[0]).max() <= 1e-4 * np.abs(wanted[0]).max()
    last = np.full(5, len(twin.experts) - 1)
    (forced,) = run.run(["logits"], {"clip": clips, "force_route": last[:1].reshape(())})
    assert np.abs(forced - answers(twin, clips, last)[0]).max() <= 1e-4 * np.abs(forced).max()


def leaves(graph: GraphProto) -> list[GraphProto]:
    inner = list(graphs.subgraphs(graph))
    return [leaf for sub in inner for leaf in leaves(sub)] or [graph]


@pytest.mark.parametrize("experts", range(2, MOST + 1))
def test_if_has_each_experts_weights_inside_its_own_loop_and_no_graph_around_it(
    experts: int,
) -> None:
    _, parts = made("r3d18", experts)
    graph = registry.load(LOWERINGS, "if", "lowering").lower(*parts)["moe"].graph
    found = leaves(graph)
    assert parts.router is not None
    assert [weight_bytes(leaf) for leaf in found] == [
        weight_bytes(expert.graph) for expert in parts.experts
    ]
    around = [s for s in graphs.walk(graph) if not any(s is leaf for leaf in found)]
    outside = sum(weight_bytes(scope) for scope in around)
    assert outside <= weight_bytes(parts.router.graph) + 64
    depth = max(path_length(graph, leaf) for leaf in found)
    assert depth == 1  # every level more is checked and inferred once more
    names = [o for scope in graphs.walk(graph) for node in scope.node for o in node.output if o]
    assert len(names) == len(set(names)), "one name means two values"


def path_length(graph: GraphProto, leaf: GraphProto) -> int:
    if graph is leaf:
        return 0
    below = [path_length(inner, leaf) for inner in graphs.subgraphs(graph)]
    return min((1 + n for n in below if n >= 0), default=-(10**6))


def test_if_goes_to_the_lowest_index_on_ties_and_follows_force_route_left_out(
    tmp_path: Path,
) -> None:
    twin, parts = made("r3d18", 4)
    router = parts.router
    assert router is not None
    tied = onnx.ModelProto()
    tied.CopyFrom(router)
    for tensor in tied.graph.initializer:
        if tuple(tensor.dims) in ((4, 16), (4,)):
            tensor.raw_data = bytes(len(tensor.raw_data))
    plan = Plan(Checkpoint(twin, LABELS), None, "t", ExportSettings(lowering="if"))
    pipeline.write(plan, Parts(tied, parts.experts), tmp_path)
    with load(tmp_path, threads=1) as engine:
        got = engine.infer(random_clips(3))
    assert not got.scores.any()
    assert list(got.route) == [0, 0, 0]

"""Tiny real bundles whose answers are known in closed form; written with onnx.helper.

The mean of a clip's red pixels, of T*H*W values, decides everything:

    scores[m]  = -|red / 255 - m / max(1, M - 1)|    so red 0 goes to expert 0, 255 to the last
    logits[k]  = 10 * expert + k * green / 255       so the largest label is K - 1, if any green
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from vmoe import bundle as bundles
from vmoe import opencv, output
from vmoe.adversarial import AdversarialClips, Attacked
from vmoe.bundle import Bundle, Part, Port
from vmoe.clips import Clips, ClipSpec

LABELS = ("still", "moving", "waving")
BLACK, GREEN, RED = (
    (0, 0, 0),
    (0, 200, 0),
    (255, 0, 0),
)  # answered still, waving; still, by the last
STILL, WAVING = 0, 2
OPSET, IR = 18, 10


def expected(clips: Clips, experts: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return scores [N, M] and each expert's logits [N, M, K], as the graphs compute them."""
    mean = clips.astype(np.float64).mean(axis=(1, 2, 3)) / 255
    scores = -np.abs(mean[:, :1] - np.arange(experts) / max(1, experts - 1))
    k = np.arange(len(LABELS))
    logits = 10.0 * np.arange(experts)[None, :, None] + (mean[:, 1:2] * k)[:, None, :]
    return (scores if experts > 1 else np.zeros((len(clips), 1))), logits


def plain_clips(spec: ClipSpec, *colours: tuple[int, int, int]) -> Clips:
    """Return one clip of a single colour for each colour, uint8 [N, T, H, W, 3]."""
    return np.stack([np.full(spec.shape, colour, np.uint8) for colour in colours])


def attacked_clips(spec: ClipSpec, *attacked: Attacked, **more: Any) -> AdversarialClips:
    """Return four clips that a bundle answers rightly, and what attacks made of them."""
    made = AdversarialClips(
        spec, LABELS, plain_clips(spec, GREEN, GREEN, BLACK, RED),
        (WAVING, WAVING, STILL, STILL), (0, 1, 2, 3), attacked,
        {"data": "tiny test", "twin_sha256": "0" * 64, "engines": {}},
    )  # fmt: skip
    return dataclasses.replace(made, **more)


def attack(spec: ClipSpec, name: str, *colours: tuple[int, int, int], **more: Any) -> Attacked:
    """Return what an attack made of those clips, at eps 8/255 unless told otherwise."""
    eps = more.pop("eps", 8 / 255)
    return Attacked(name, eps, [], plain_clips(spec, *colours), **more)


def coloured_videos(where: Path) -> Path:
    """Write a folder of videos of two classes; a bundle gets 3 of the 4 of the split test right."""
    cv2 = opencv.quiet()
    for split in ("train", "test"):
        for label, colour in (("still", BLACK), ("waving", GREEN)):
            (where / split / label).mkdir(parents=True)
            for name, shown in (("a", colour), ("b", GREEN)):
                file = str(where / split / label / f"{name}.avi")
                fourcc = cv2.VideoWriter_fourcc(*"MJPG")
                writer = cv2.VideoWriter(file, cv2.CAP_FFMPEG, fourcc, 10, (32, 32))
                for _ in range(8):
                    writer.write(np.full((32, 32, 3), shown[::-1], np.uint8))
                writer.release()
    return where


def write(
    path: Path,
    spec: ClipSpec,
    *,
    experts: int = 3,
    lowering: str = "split",
    batch: int | None = None,
) -> Path:
    """Write a bundle; `batch` fixes N in the graphs."""
    graphs = _split(experts) if lowering == "split" else {"moe": _moe(experts, lowering)}
    with output.whole_folder(path) as folder:
        parts = {name: _write_part(folder, name, g, spec, batch) for name, g in graphs.items()}
        made = Bundle(
            path=folder,
            model={
                "name": "tiny",
                "arch": "tsm",
                "width": 0.125,
                "experts": experts,
                "classes": len(LABELS),
            },
            spec=spec,
            labels=LABELS,
            lowering=lowering,
            parts=parts,
            twin={"sha256": "0" * 64},
            versions={"vmoe": "0", "onnx": onnx.__version__},
        )
        bundles.write_manifest(made, folder)
    return path


class _Graph:
    """Nodes, constants, inputs and outputs of one part."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.outputs: list[tuple[str, int, list[int | str]]] = []
        self.overridable: list[onnx.ValueInfoProto] = []

    def add(self, op: str, *inputs: str, out: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [out], **attributes))
        return out

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        if name not in {c.name for c in self.constants}:
            self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def mean(self, channel: int) -> str:
        """Return the name of one channel's mean over a clip, [N, 1], in [0, 1]."""
        if "means" not in {o for n in self.nodes for o in n.output}:
            self.add("Cast", "clip", out="float", to=TensorProto.FLOAT)
            axes = self.constant("axes", np.array([1, 2, 3], np.int64))
            self.add("ReduceMean", "float", axes, out="sums", keepdims=0)
            self.add("Div", "sums", self.constant("255", np.float32(255)), out="means")
        if f"mean{channel}" not in {o for n in self.nodes for o in n.output}:
            which = self.constant(f"channel{channel}", np.array([channel], np.int64))
            self.add("Gather", "means", which, out=f"mean{channel}", axis=1)
        return f"mean{channel}"


def _scores(g: _Graph, experts: int) -> str:
    places = np.arange(experts, dtype=np.float32) / max(1, experts - 1)
    g.add("Sub", g.mean(0), g.constant("places", places), out="away")
    g.add("Abs", "away", out="far")
    return g.add("Neg", "far", out="scores")


def _logits(g: _Graph, expert: int, out: str) -> str:
    k = g.constant("k", np.arange(len(LABELS), dtype=np.float32))
    g.add("Mul", g.mean(1), k, out=f"green_k{expert}")
    return g.add(
        "Add", f"green_k{expert}", g.constant(f"e{expert}", np.float32(10 * expert)), out=out
    )


def _split(experts: int) -> dict[str, _Graph]:
    graphs = {}
    if experts > 1:
        graphs["router"] = router = _Graph()
        _scores(router, experts)
        router.outputs = [("scores", TensorProto.FLOAT, ["N", experts])]
    for i in range(experts):
        graphs[f"expert{i}"] = expert = _Graph()
        _logits(expert, i, "logits")
        expert.outputs = [("logits", TensorProto.FLOAT, ["N", len(LABELS)])]
    return graphs


def _moe(experts: int, lowering: str) -> _Graph:
    """Route in the graph: force_route >= 0 wins; then select, or one If for each expert."""
    g = _Graph()
    _scores(g, experts)
    forced = g.constant("force_route", np.array(-1, np.int64))
    g.overridable = [helper.make_tensor_value_info(forced, TensorProto.INT64, [])]
    g.add("ArgMax", "scores", out="free", axis=1, keepdims=0)
    g.add("GreaterOrEqual", forced, g.constant("zero", np.array(0, np.int64)), out="is_forced")
    g.add("Where", "is_forced", forced, "free", out="route")
    g.mean(1)
    for i in range(experts):
        at = g.constant(f"i{i}", np.array(i, np.int64))
        g.add("Equal", "route", at, out=f"is{i}")
        if lowering == "if":
            _branch(g, i)
        else:
            _logits(g, i, f"logits{i}")
        g.add("Unsqueeze", f"is{i}", g.constant("one", np.array([1], np.int64)), out=f"row{i}")
        g.add("Cast", f"row{i}", out=f"weight{i}", to=TensorProto.FLOAT)
        g.add("Mul", f"logits{i}", f"weight{i}", out=f"share{i}")
    g.add("Sum", *(f"share{i}" for i in range(experts)), out="logits")
    g.outputs = [
        ("logits", TensorProto.FLOAT, ["N", len(LABELS)]),
        ("scores", TensorProto.FLOAT, ["N", experts]),
        ("route", TensorProto.INT64, ["N"]),
    ]
    return g


def _branch(g: _Graph, expert: int) -> None:
    """Run an expert only where some clip of the batch goes to it; else give zeros."""
    g.add("Cast", f"is{expert}", out=f"int{expert}", to=TensorProto.INT64)
    g.add("ReduceMax", f"int{expert}", out=f"max{expert}", keepdims=0)
    g.add("Cast", f"max{expert}", out=f"any{expert}", to=TensorProto.BOOL)
    k = g.constant("k", np.arange(len(LABELS), dtype=np.float32))
    info = helper.make_tensor_value_info
    branches = {}
    for name, offset in (("then_branch", 10.0 * expert), ("else_branch", 0.0)):
        out = f"{name}{expert}"
        nodes = [
            helper.make_node("Mul", ["mean1", k], [f"{out}_k"]),
            helper.make_node("Add", [f"{out}_k", f"{out}_e"], [out]),
        ]
        constant = numpy_helper.from_array(np.float32(offset), f"{out}_e")
        shape = ["N", len(LABELS)]
        branches[name] = helper.make_graph(
            nodes, out, [], [info(out, TensorProto.FLOAT, shape)], [constant]
        )
    g.add("If", f"any{expert}", out=f"logits{expert}", **branches)


def fast(iterations: int) -> tuple[str, ...]:
    """Return flags of a vmoe-bench that calls each form so often, and is done."""
    return (
        "--iterations", str(iterations), "--duration", "0", "--warmup", "0", "--threads", "1",
        "--power", "none",
    )  # fmt: skip


def _write_part(folder: Path, name: str, g: _Graph, spec: ClipSpec, batch: int | None) -> Part:
    info = helper.make_tensor_value_info
    clip = info("clip", TensorProto.UINT8, [batch or "N", *spec.shape])
    outputs = [
        info(o, kind, [batch if batch and size == "N" else size for size in shape])
        for o, kind, shape in g.outputs
    ]
    graph = helper.make_graph(g.nodes, name, [clip, *g.overridable], outputs, g.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    onnx.checker.check_model(model)
    file = folder / f"{name}.onnx"
    onnx.save(model, file)
    types = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64"}
    return Part(
        file=file.name,
        format="onnx",
        hashes={file.name: bundles.sha256(file)},
        inputs=(Port("clip", "uint8", (batch, *spec.shape)),),
        outputs=tuple(
            Port(o, types[kind], tuple(batch if size == "N" else size for size in shape))
            for o, kind, shape in g.outputs
        ),
        precision={"asked": "fp32", "found": "fp32"},
    )

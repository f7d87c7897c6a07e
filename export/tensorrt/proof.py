"""What a plan's layers compute in, as the engine inspector says, against what was asked.

A layer is one with weights, as in the ONNX, or a plugin; TensorRT joins some and renames all, so
that shares are compared, not names. Where a layer does not say what its weights are, its first
input counts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from vmoe.export.gates import Gate

TOLERANCE = 0.05  # of the share: joining two layers of one kind moves it
LEAST = 0.001  # of the layers: one of them at least, however few were asked
KINDS = (  # in the inspector's words, the narrow ones first: `Half` is in none of them
    ("bf16", r"bf16|bfloat"),
    ("fp8", r"fp8|e4m3"),
    ("int8", r"int8"),
    ("fp16", r"half|fp16|float16"),
    ("fp32", r"float|fp32"),
)
NO_WORK = ("reformat", "noop", "constant", "shuffle", "shape_call", "signal", "wait")
WORK = re.compile(r"conv|gemm|matrixmultiply|matmul|fully|plugin", re.IGNORECASE)


def layers(inspected: Mapping[str, Any]) -> dict[str, int]:
    """Count a plan's layers with weights by what they compute in; `unknown` where it is not said.

    Args:
        inspected: the engine inspector's JSON, of verbosity DETAILED.
    """
    found = Counter(_precision(layer) for layer in _working(inspected))
    return dict(sorted(found.items()))


def _working(inspected: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    held = inspected.get("Layers")
    for layer in held if isinstance(held, list) else []:
        if not isinstance(layer, Mapping):  # a name alone: the plan was built without details
            continue
        kind = str(layer.get("LayerType", ""))
        if kind.lower().startswith(NO_WORK):
            continue
        weights = layer.get("Weights")
        weighs = isinstance(weights, Mapping) and weights.get("Count", 0)
        if weighs or WORK.search(f"{kind} {layer.get('ParameterType', '')}"):
            yield layer


def _precision(layer: Mapping[str, Any]) -> str:
    weights = layer.get("Weights")
    texts = [str(weights.get("Type", ""))] if isinstance(weights, Mapping) else []
    inputs = layer.get("Inputs")
    for given in inputs[:1] if isinstance(inputs, list) else []:
        if isinstance(given, Mapping):
            texts += [str(given.get(key, "")) for key in ("Format/Datatype", "Datatype", "Format")]
    for text in texts:
        for name, words in KINDS:
            if re.search(words, text, re.IGNORECASE):
                return name
    return "unknown"


def gates(part: str, asked: Mapping[str, int], found: Mapping[str, int]) -> list[Gate]:
    """Judge a plan: of each precision, at least the share of layers that the ONNX has, and one.

    Of float32 beside others one layer is enough: what is kept in it is little, and is joined.

    Args:
        part: its name.
        asked: layers of the ONNX in each precision.
        found: layers of the plan in each; none is a share of 0.
    """
    total, there = sum(asked.values()), sum(found.values())
    return [
        Gate("precision", f"{name} layers of {part}.plan", 100 * found.get(name, 0) / max(1, there),
             100 * (LEAST if name == "fp32" and len(asked) > 1
                    else max(LEAST, n / total - TOLERANCE)), " %", least=True)
        for name, n in asked.items()
    ]  # fmt: skip

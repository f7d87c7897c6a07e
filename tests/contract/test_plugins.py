"""TensorRT's plugins over its real bindings: each version makes of them what the others do."""

from __future__ import annotations

import json

from tests.bindings import Bindings

# Expressions and shapes are made by TensorRT's own library, which is a stub here.
ANSWERS = r"""
import gc, json
import numpy as np
import tensorrt as trt
from vmoe.runtime.plugins import nodes

class Expression(str):
    pass

class Expressions:
    def constant(self, value):
        return Expression(value)
    def operation(self, operation, left, right):
        return Expression(f"{operation.name}({left}, {right})")

def fields(collection):
    return {f.name: [f.type.name, np.array(f.data).tolist()] for f in collection}

CORE, BUILD, RUN = trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime
# What the bindings look for in Python, and throw without: nothing of it has a default.
DEMANDED = ("get_capability_interface", "clone", "get_output_data_types", "get_output_shapes",
            "supports_format_combination", "configure_plugin", "on_shape_change", "set_tactic",
            "enqueue", "attach_to_context", "get_fields_to_serialize")

# What C++ has of an object, past whatever Python put before the property.
def theirs(made, base, *names):
    return [getattr(base, name).fget(made) for name in names]

# What Python put before a property of the bases.
def hidden(made):
    held = {name for base in (CORE, BUILD, RUN) for name, value in vars(base).items()
            if isinstance(value, property)}
    ours = [cls for cls in type(made).__mro__ if not cls.__module__.startswith("tensorrt")]
    return sorted(held & {name for cls in ours for name in vars(cls)})

def answers(node):
    creator = nodes.creator(trt, node)
    values = {k: np.array(v, np.int32) + 1 for k, v in node.fields.items()}
    given, _held = nodes.fields_of(trt, values)
    built = creator.create_plugin("layer", given, trt.TensorRTPhase.BUILD)
    kept = built.get_fields_to_serialize()
    run = creator.create_plugin("layer", kept, trt.TensorRTPhase.RUNTIME).attach_to_context(None)
    inputs = [[Expression(f"x{i}") for i in range(5)], [Expression("n")],
              [Expression(f"w{i}") for i in range(6)], []]
    pairs = []
    for dtype in (trt.float32, trt.float16, trt.int8):
        for position in range(5):
            descs = [trt.DynamicPluginTensorDesc() for _ in range(5)]
            for at, desc in enumerate(descs):
                inner = desc.desc
                inner.type = trt.int32 if at == node.indices[0] else dtype
                inner.format = trt.TensorFormat.LINEAR
                desc.desc = inner
            pairs.append(run.supports_format_combination(position, descs, 4))
    return {
        "creator": [*theirs(creator, trt.IPluginCreatorV3One, "name", "plugin_version",
                            "plugin_namespace"),
                    fields(*theirs(creator, trt.IPluginCreatorV3One, "field_names"))],
        "plugin": [*theirs(run, CORE, "plugin_name", "plugin_version", "plugin_namespace"),
                   *theirs(run, BUILD, "num_outputs")],
        # The bindings keep addresses inside of what Python returned.
        "keeps": built._fields[0] is kept and len(built._fields[1]) == len(node.fields),
        "hidden": hidden(run) + hidden(creator),
        "lacks": [name for name in DEMANDED
                  if not any(name in vars(cls) for cls in (node, *node.__mro__))],
        "fields": [fields(kept), fields(run.get_fields_to_serialize())],
        "types": [t.name for t in run.get_output_data_types([trt.float16] * 4)],
        "shapes": run.get_output_shapes(inputs, [], Expressions()),
        "formats": pairs,
        "is": [isinstance(run, base) for base in (trt.IPluginV3, trt.IPluginV3OneCore,
                                                  trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)],
        "capabilities": all(run.get_capability_interface(kind) is run for kind in
                            trt.PluginCapabilityType.__members__.values()),
    }

# No Python can make an IDimensionExpr, so that its real list takes none of ours.
assert "IDimensionExpr]" in trt.DimsExprs.__init__.__doc__
trt.DimsExprs = list
found = {node.op_type: answers(node) for node in nodes.NODES}
for _ in range(20):  # plugins that are freed must not take the process with them
    nodes.plugin(trt, nodes.Linear)({}).clone()
gc.collect()
print(json.dumps(found))
"""

ALONG = "SUM(FLOOR_DIV(SUB(SUM(x{0}, 2), w{1}), 2), 1)"
FORMATS = [True, True, True, True, True] * 2 + [False, True] + [True] * 3


def test_classes_and_creators_answer_alike_on_every_version(bindings: Bindings) -> None:
    found = json.loads(bindings.run(ANSWERS))
    assert set(found) == {"VmoeTopK", "RoutedLinear", "RoutedConv3d"}
    for name, said in found.items():
        assert said["creator"][:3] == [name, "1", "vmoe"]
        assert said["plugin"][:3] == [name, "1", "vmoe"]
        assert said["fields"][0] == said["fields"][1], "a plan would give other attributes back"
        assert said["keeps"] is True
        assert said["is"] == [True] * 4
        assert said["capabilities"] is True
        assert said["hidden"] == [], "TensorRT would never see what is set"
        assert said["lacks"] == [], "TensorRT throws without it"
    topk, linear, conv = (found[n] for n in ("VmoeTopK", "RoutedLinear", "RoutedConv3d"))
    assert [said["plugin"][3] for said in (topk, linear, conv)] == [2, 1, 1]
    assert topk["types"] == ["HALF", "INT32"]
    assert topk["shapes"] == [["x0", "2"], ["x0", "2"]]
    assert topk["fields"][0] == {"k": ["INT32", [2]]}
    assert linear["shapes"] == [["x0", "w1"]]
    assert linear["formats"] == FORMATS
    assert conv["formats"] == FORMATS
    assert conv["types"] == ["HALF"]
    assert conv["shapes"] == [["x0", "w1", *(ALONG.format(2 + i, 3 + i) for i in range(3))]]
    assert conv["creator"][3] == {
        "strides": ["INT32", [1, 1, 1]], "pads": ["INT32", [0] * 6], "relu": ["INT32", [0]],
        "tf32": ["INT32", [0]],
    }  # fmt: skip
    assert conv["fields"][0]["strides"] == ["INT32", [2, 2, 2]]

"""A twin as ONNX: router and experts apart, and the passes over each.

Every part takes `clip` as an engine gets it, uint8 [N, T, H, W, 3]: moving the channels and
scaling to [0, 1] is in the graph, and so is the normalisation, which the twin's modules bring.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data
from torch import Tensor, nn

from vmoe import bundle as bundles
from vmoe.bundle import Part
from vmoe.models import VideoMoE

from . import graphs, optimize

log = logging.getLogger("vmoe.export")

OPSETS = (18, 23)  # what torch's exporter writes, and ONNX Runtime reads
EXTERNAL_BYTES = 1024  # from this size on, weights lie beside the graph, where they are mapped
ALIGN = 64  # bytes


class Parts(NamedTuple):
    """A twin's graphs, before a lowering joins them.

    Attributes:
        router: clip -> scores [N, M]; None of a model with one expert.
        experts: clip -> logits [N, K], each.
    """

    router: ModelProto | None
    experts: list[ModelProto]


class Door(nn.Module):
    """A module of the twin behind an engine's door: uint8 [N, T, H, W, 3] in."""

    def __init__(self, module: nn.Module) -> None:
        """Wrap a router or an expert."""
        super().__init__()
        self.module = module

    def forward(self, clip: Tensor) -> Tensor:
        """Return what the module says of the clip with pixels in [0, 1]."""
        answer: Tensor = self.module(clip.permute(0, 4, 1, 2, 3).float() / 255)
        return answer


def from_twin(twin: VideoMoE, opset: int) -> Parts:
    """Export router and experts, and run the passes over each.

    Args:
        twin: in eval mode, on the CPU.
        opset: version of the ONNX operators.
    """
    shape = twin.spec.shape
    router = None if twin.router is None else trace([twin.router], "scores", shape, opset)[0]
    return Parts(router, trace(list(twin.experts), "logits", shape, opset))


def trace(
    modules: Sequence[nn.Module], output: str, shape: tuple[int, ...], opset: int
) -> list[ModelProto]:
    """Export modules of one architecture, each from `clip`, uint8 [N, *shape], to one output."""
    doors = [Door(module).eval() for module in modules]
    clip = torch.zeros((2, *shape), dtype=torch.uint8)  # a batch of 1 would be taken as fixed
    free = ({0: torch.export.Dim("N")},)
    return trace_doors(doors, (clip,), ["clip"], [output], free, opset)


def trace_doors(
    doors: Sequence[nn.Module], inputs: tuple[Any, ...], given: list[str], answers: list[str],
    free: tuple[Any, ...], opset: int,
) -> list[ModelProto]:  # fmt: skip
    """Export modules of one architecture: traced once, then the weights of each put in.

    Tracing takes most of the time, and is the same for all; what the optimiser folds (batch
    normalisation into convolutions, for one) depends on the weights, so that it comes after.

    Args:
        doors: the modules, in eval mode.
        inputs: what the first is traced with.
        given: names of the inputs.
        answers: names of the outputs.
        free: the sizes of the inputs that are free, as torch.export's `dynamic_shapes`.
        opset: version of the ONNX operators.
    """
    import onnxscript.optimizer  # slow to import, and a plan alone (--dry-run) does not need it

    with quiet():
        program = torch.onnx.export(
            doors[0], inputs, dynamo=True, dynamic_shapes=free, input_names=given,
            output_names=answers, opset_version=opset, external_data=False, optimize=False,
            verbose=False,
        )  # fmt: skip
        assert program is not None
        traced = program.model_proto
        made = []
        for door in doors:
            model: ModelProto = onnxscript.optimizer.optimize(_with_weights(traced, door))
            made.append(_finish(model))
    return made


def _with_weights(traced: ModelProto, door: nn.Module) -> ModelProto:
    """Return a copy of a traced graph with another module's weights."""
    made = ModelProto()
    made.CopyFrom(traced)
    state = door.state_dict()
    for tensor in made.graph.initializer:
        if tensor.name in state:
            tensor.CopyFrom(numpy_helper.from_array(_array(state[tensor.name]), tensor.name))
    return made


def _array(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor's values; numpy has no bfloat16 of its own."""
    values = tensor.detach().cpu()
    if values.dtype != torch.bfloat16:
        return np.asarray(values.numpy())
    kind = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
    return np.asarray(values.view(torch.int16).numpy().view(kind))


def _finish(model: ModelProto) -> ModelProto:
    for apply in optimize.EXPORTED:
        apply(model.graph)
    return graphs.model(model.graph, model)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send what the exporter and its tools say to our log, for -v."""
    heard = _Forward()
    tools = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [(tool.handlers[:], tool.propagate) for tool in tools]
    try:
        for tool in tools:
            tool.handlers[:], tool.propagate = [heard], False
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for warning in caught:
            log.debug("%s: %s", warning.category.__name__, warning.message)
    finally:
        for tool, (handlers, propagate) in zip(tools, before, strict=True):
            tool.handlers[:], tool.propagate = handlers, propagate


class _Forward(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """Say a record of another logger in ours."""
        log.debug("%s: %s", record.name, record.getMessage())


def write_part(model: ModelProto, folder: Path, name: str) -> Part:
    """Write one part, NAME.onnx and its weights NAME.data; return it as the manifest has it.

    The weights of branches lie outside of the graph too: ONNX Runtime maps the file, so that only
    the experts that are routed to come into memory.
    """
    path, data = folder / f"{name}.onnx", folder / f"{name}.data"
    held = ModelProto()
    held.CopyFrom(model)
    with data.open("wb") as file:
        for scope in graphs.scopes(held):
            for tensor in scope.initializer:
                if len(tensor.raw_data) >= EXTERNAL_BYTES:
                    _put_outside(tensor, file, data.name)
    path.write_bytes(held.SerializeToString(deterministic=True))
    onnx.checker.check_model(path)  # by its path, so that the weights outside are looked at too
    return Part(
        file=path.name,
        format="onnx",
        hashes={file.name: bundles.sha256(file) for file in (path, data)},
        inputs=graphs.ports(model.graph.input),
        outputs=graphs.ports(model.graph.output),
        precision={},  # said by who proves it
    )


def _put_outside(tensor: TensorProto, file: BinaryIO, name: str) -> None:
    """Append a tensor's values to a file, and let the tensor point at them.

    onnx.save_model does this too, but leaves them where they fall (vector loads want ALIGN), for
    their owner's eyes only, and looks for a file of the same name in the working directory.
    """
    file.write(b"\0" * (-file.tell() % ALIGN))
    offset = file.tell()
    file.write(tensor.raw_data)
    set_external_data(tensor, name, offset, len(tensor.raw_data))
    tensor.ClearField("raw_data")

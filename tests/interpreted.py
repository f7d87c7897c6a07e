"""Run the routed kernels in Triton's interpreter, in a process of its own.

Triton decides when it is imported whether it interprets; hence a process. Standard input is a
pickle-free `.npz` of calls, standard output one of answers.

    python tests/interpreted.py calls.npz answers.npz
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from triton.runtime import interpreter

from vmoe.export.plugins import compiled, kernels
from vmoe.runtime.plugins.calls import Call

_patch = interpreter._patch_lang_tensor


def _patched(tensor: Any, scope: Any) -> None:
    """Let a loop begin at a computed number: Triton 3.6 asks numpy for what 2.4 refuses."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patched


def launch(call: Call) -> None:
    """Run one call on tensors, program after program."""
    variant = compiled.variants()[call.kernel]
    getattr(kernels, variant.kernel)[call.grid](*call.args, **variant.blocks)


def answers(calls: list[Call]) -> None:
    """Run calls in order; what they write stands in their tensors."""
    for call in calls:
        launch(call)


def main(source: str, target: str) -> None:
    """Answer what lies in a file: `calls` in JSON, in which a string names a tensor."""
    with np.load(source) as read:
        held: dict[str, torch.Tensor] = {
            name: torch.from_numpy(read[name]) for name in read.files if name != "calls"
        }
        asked: list[Any] = json.loads(str(read["calls"]))
    for kernel, grid, args in asked:
        launch(Call(kernel, tuple(grid), tuple(held.get(a, a) for a in args)))
    np.savez(target, **{name: tensor.numpy() for name, tensor in held.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])

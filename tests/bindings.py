"""TensorRT's own Python bindings, without TensorRT: what our code calls is held against them.

The wheels of the bindings are 1.3 MB each and come from PyPI; the libraries that they were linked
with, gigabytes, are three stubs of nine functions that answer null. Such bindings import, and show
every class, method, signature and enum of their version; they build and run nothing.

    def test_x(bindings):                     # once for each of VERSIONS
        bindings.run("import tensorrt as trt; print(trt.BuilderFlag.REFIT)")

Installed once for a session of tests, in a folder of its own; nothing of it is ever committed.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# JetPack 6; the first with ahead-of-time plugins; JetPack 7.2; the newest.
VERSIONS = {
    "10.3": "tensorrt_cu12_bindings==10.3.0",
    "10.9": "tensorrt_cu12_bindings==10.9.0.34",
    "10.16": "tensorrt_cu12_bindings==10.16.1.11",
    "11.4": "tensorrt_cu13_bindings==11.4.0.106",
}
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
STUB = """
#define NULL_FUNCTION(name) void *name(void) { return 0; }
NULL_FUNCTION(createInferBuilder_INTERNAL)
NULL_FUNCTION(createInferRuntime_INTERNAL)
NULL_FUNCTION(createInferRefitter_INTERNAL)
NULL_FUNCTION(createNvOnnxParser_INTERNAL)
NULL_FUNCTION(createNvOnnxParserRefitter_INTERNAL)
NULL_FUNCTION(getPluginRegistry)
NULL_FUNCTION(getBuilderPluginRegistry)
int initLibNvInferPlugins(void) { return 1; }
int getNvOnnxParserVersion(void) { return 0; }
"""
# As the package `tensorrt` does it: another name for the bindings.
ALIAS = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
PIP = ("--quiet", "--no-deps", "--only-binary", ":all:", "--timeout", "20", "--retries", "1")
SURFACE = Path(__file__).with_name("surface.py")


@dataclass(frozen=True)
class Bindings:
    """One version of the bindings, ready to be imported by a process of its own.

    Attributes:
        version: a key of VERSIONS.
        folder: what stands on PYTHONPATH; the stub libraries lie in its folder `lib`.
    """

    version: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a process that imports them: `env=` of subprocess."""
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join([str(self.folder), root, os.environ.get("PYTHONPATH", "")])
        libraries = str(self.folder / "lib")
        return {**os.environ, "PYTHONPATH": path, "LD_LIBRARY_PATH": libraries}

    def run(self, code: str, *arguments: str) -> str:
        """Run Python code in a process that can `import tensorrt`; return what it prints.

        Raises:
            AssertionError: it fails; with what it said on stderr.
        """
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"TensorRT {self.version}:\n{done.stderr}"
        return done.stdout

    def surface(self) -> dict[str, Any]:
        """Return every class, member, signature and enum: see `tests.surface`."""
        return _surface(self)


@functools.cache
def _surface(bindings: Bindings) -> dict[str, Any]:
    kept = bindings.folder / "surface.json"
    if not kept.exists():
        _appear(kept, bindings.run(SURFACE.read_text()))
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def _appear(path: Path, text: str) -> None:
    """Write a file that another process of the same tests may be writing as well."""
    mine = path.with_name(f"{path.name}.{os.getpid()}")
    mine.write_text(text)
    mine.replace(path)


def install(version: str, root: Path) -> Bindings:
    """Install one version below a folder, once; skip the test where that cannot be done."""
    folder = root / f"tensorrt-{version}"
    if not folder.exists():
        made = root / f"{folder.name}.{os.getpid()}"
        download([VERSIONS[version]], made)
        _compile(version, made / "lib")
        (made / "tensorrt.py").write_text(ALIAS)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(made)
    return Bindings(version, folder)


def download(wheels: list[str], folder: Path) -> None:
    """Install wheels, and nothing that they depend on, into a folder; skip where that fails."""
    if wheels[0] in _refused:  # offline: once is enough
        pytest.skip(_refused[wheels[0]])
    command = [sys.executable, "-m", "pip", "install", *PIP, "--target", str(folder), *wheels]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = f"{wheels[0]} cannot be installed here: {(said or ['pip failed'])[-1]}"
        _refused[wheels[0]] = why
        pytest.skip(why)


_refused: dict[str, str] = {}  # why, by wheel


def _compile(version: str, folder: Path) -> None:
    """Compile the libraries that the bindings ask for by name, each with all functions."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        shutil.rmtree(folder.parent, ignore_errors=True)
        pytest.skip("no C compiler here: TensorRT's bindings need stub libraries to import")
    folder.mkdir()
    major = version.partition(".")[0]
    for name in LIBRARIES:
        file = f"lib{name}.so.{major}"
        command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / file),
                   f"-Wl,-soname,{file}"]  # fmt: skip
        subprocess.run(command, input=STUB, text=True, check=True)

"""The real bindings of TensorRT and CUDA: what our code calls is there in every version.

What the builder and the backend do is driven over these signatures in tests/unit/test_trt_*.py;
here every name is looked for that the source says, whether a test comes by it or not.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bindings import VERSIONS, Bindings, download
from tests.cuda_fake import Driver

ROOT = Path(__file__).parents[2]
ENGINES = ROOT / "runtime/engines"
SOURCES = [
    *(ENGINES / name for name in ("tensorrt.py", "_loaded.py", "_plan.py", "_trt.py")),
    *sorted((ROOT / "export/tensorrt").glob("*.py")), ROOT / "runtime/plugins/nodes.py",
]  # fmt: skip
VALUES = {"__version__", "float32", "float16", "int32"}  # test_plugins.py runs them
CUDA_SOURCE = ROOT / "runtime/engines/_cuda.py"
LAUNCH_SOURCE = ROOT / "runtime/plugins/launch.py"
CUDA = ("cuda-bindings==12.9.4", "cuda-bindings==13.5.0")


def test_the_version_that_was_asked_for_is_imported(bindings: Bindings) -> None:
    wanted = VERSIONS[bindings.version].partition("==")[2]
    assert bindings.surface()["version"] == wanted


def chains(source: Path) -> Iterator[str]:
    """Yield what a source takes from `trt`: `BuilderFlag.REFIT`, `Builder`."""
    for node in ast.walk(ast.parse(source.read_text())):
        found = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if re.fullmatch(r"(?:(?:\w+\.)+_?)?trt(\.\w+)+", found):
            yield found.partition("trt.")[2]


def test_every_name_is_there(bindings: Bindings) -> None:
    surface = bindings.surface()
    names = {name for source in SOURCES for name in chains(source)}
    names = {name for name in names if name.partition(".")[0] not in VALUES}
    assert {"Builder", "OnnxParser", "Runtime", "LayerInformationFormat.JSON",
            "IPluginV3OneBuild", "DimensionOperation", "get_plugin_registry"} <= names  # fmt: skip
    for name in sorted(names):
        outer, _, last = name.rpartition(".")
        held = surface["classes"].get(outer, {"enum": {}, "members": {}})
        known = {*held["enum"], *held["members"]}
        known |= {*surface["classes"], *surface["functions"]} if not outer else set()
        found = last in known or name in surface["classes"]
        assert found, f"{bindings.version} has no {name}"


def test_a_builder_over_stubs_answers_that_there_is_none(bindings: Bindings) -> None:
    """The constructors give no None: they raise TypeError, which our code turns into a line."""
    said = bindings.run(
        "import tensorrt as trt\n"
        "from vmoe.runtime.engines._trt import logger\n"
        "log = logger(trt)\n"
        "log.log(trt.ILogger.Severity.ERROR, 'a\\n b.')\n"
        "print(log.said(), '|', log.said())\n"
        "for make in (trt.Builder, trt.Runtime):\n"
        "    try:\n        make(log)\n"
        "    except TypeError as e:\n        print(e)\n"
    )
    first, *others = said.splitlines()
    assert first == "a b | TensorRT says no more"
    assert len(others) == 2
    assert all("nullptr" in other for other in others)


def test_the_settings_that_are_checked_by_value_can_be_set(bindings: Bindings) -> None:
    """The types of the properties that the builder sets, as the bindings say them."""
    members = bindings.surface()["classes"]["IBuilderConfig"]["members"]
    for name in ("builder_optimization_level", "profiling_verbosity", "max_aux_streams",
                 "hardware_compatibility_level"):  # fmt: skip
        assert members[name]["writable"], f"{bindings.version}: {name}"


@pytest.fixture(scope="module", params=CUDA)
def cuda(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds one version of cuda-python's bindings."""
    folder = tmp_path_factory.mktemp("cuda")
    download([request.param, "cuda-pathfinder"], folder)
    return folder


LOOK = """
import json, sys
from cuda.bindings import driver
for line in sys.stdin.read().split():
    held = driver
    for name in line.split("."):
        held = getattr(held, name)
    print(line, "=", (held.__doc__ or "").strip().splitlines()[0] if callable(held) else "value")
"""


STARRED = {"*call.grid": 3}  # arguments behind a star


def cuda_calls(source: Path, by: str) -> dict[str, int]:
    """Return the functions of the driver that a source calls, and with how many arguments."""
    found = {}
    for node in ast.walk(ast.parse(source.read_text())):
        ours = isinstance(node, ast.Call) and ast.unparse(node.func) == by
        if ours and isinstance(node.args[0], ast.Constant):
            given = sum(STARRED.get(ast.unparse(argument), 1) for argument in node.args[1:])
            found[str(node.args[0].value)] = given
    listed = re.findall(r'\("(cu\w+)", [\w.]+\)[,\]]', source.read_text())  # steps of `close`
    freed = re.findall(r'_frees\.append\(\("(cu\w+)"', source.read_text())
    kept = re.findall(r"= driver\.(cu\w+),", source.read_text())  # and called with a stream
    bare = re.findall(r"\bdriver\.(cu\w+)\(None\)", source.read_text())
    return found | dict.fromkeys([*listed, *freed, *kept, *bare], 1)


def test_every_function_of_the_driver_takes_what_it_is_given(cuda: Path) -> None:
    ours, launched = cuda_calls(CUDA_SOURCE, "self.call"), cuda_calls(LAUNCH_SOURCE, "self._do")
    assert {"cuMemFree", "cuGraphLaunch", "cuDevicePrimaryCtxRelease", "cuStreamQuery",
            "cuEventElapsedTime"} <= set(ours)  # fmt: skip
    assert {"cuLaunchKernel", "cuFuncSetAttribute", "cuCtxGetId"} <= set(launched)
    calls = ours | launched
    kinds = re.findall(r"CU_\w+", CUDA_SOURCE.read_text() + LAUNCH_SOURCE.read_text())
    enums = {"CU_STREAM_NON": "CUstream_flags", "CU_STREAM_CAP": "CUstreamCaptureMode",
             "CU_DEVICE_ATT": "CUdevice_attribute",
             "CU_FUNC_ATTRI": "CUfunction_attribute", "CU_EVENT_DEFA": "CUevent_flags",
             "CU_EVENT_RECO": "CUevent_record_flags"}  # fmt: skip
    names = [*calls, *(f"{enums[kind[:13]]}.{kind}" for kind in kinds)]
    command = [sys.executable, "-c", LOOK]
    done = subprocess.run(command, input="\n".join(names), env={"PYTHONPATH": str(cuda)},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" = ", 1) for line in done.stdout.splitlines())
    assert set(said) == set(names)
    for name, given in calls.items():
        inside = said[name].partition("(")[2].rpartition(")")[0]
        assert len(inside.split(",")) * bool(inside.strip()) == given, said[name]
    for name, given in ours.items():
        fake = getattr(type(Driver()), name)
        assert fake.__code__.co_argcount - 1 == given, f"the fake's {name}"

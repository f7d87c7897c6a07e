"""TensorRT's plugins without TensorRT, and their launches through the real bindings of CUDA.

The driver is a stub of a few functions in C that writes down what reaches it. The same classes over
the real bindings of TensorRT: tests/contract/test_plugins.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vmoe.errors import EngineMismatchError, MissingDependencyError, SettingError
from vmoe.runtime.plugins import calls, launch, nodes
from vmoe.runtime.plugins import compiled as shipped
from vmoe.runtime.plugins.calls import Call

CONV = {"strides": (1, 2, 2), "pads": (1, 1, 1, 1, 1, 1), "relu": 1}
SHAPES = [(2, 256, 1, 4, 4), (2,), (4, 256, 256, 3, 3, 3), (4, 256)]


class Base:
    """What a plugin inherits."""


class Kind(Enum):
    INT32 = 1


class Registry:
    """TensorRT's list of creators."""

    def __init__(self, takes: bool = True) -> None:
        self.takes, self.held = takes, {}  # type: ignore[var-annotated]

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.held.get((name, version, namespace))

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.held[creator.name, creator.plugin_version, namespace] = creator
        return self.takes


def fake_trt(version: str = "10.3.0", registry: Registry | None = None) -> Any:
    """Return as much of TensorRT as the plugins use."""
    return SimpleNamespace(
        IPluginV3=Base, IPluginV3OneCore=type("Core", (), {}), IPluginV3OneBuild=type("B", (), {}),
        IPluginV3OneRuntime=type("R", (), {}), IPluginCreatorV3One=type("C", (), {}),
        __version__=version, float32="f32", float16="f16", int32="i32",
        TensorFormat=SimpleNamespace(LINEAR="linear", HWC="hwc"), PluginFieldType=Kind,
        PluginField=lambda name, data, kind: SimpleNamespace(name=name, data=data, type=kind),
        PluginFieldCollection=list, DimsExprs=list,
        DimensionOperation=SimpleNamespace(SUM="+", SUB="-", FLOOR_DIV="//"),
        get_plugin_registry=lambda: registry,
    )  # fmt: skip


def desc(dims: Any, kind: str = "f32", layout: str = "linear") -> Any:
    return SimpleNamespace(dims=dims, type=kind, format=layout)


def dynamic(dims: Any, kind: str = "f32", layout: str = "linear") -> Any:
    return SimpleNamespace(desc=desc(dims, kind, layout), max=dims)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Any]]]:
    """Yield what is prepared and launched, in order."""
    seen: list[tuple[str, Any]] = []

    def bind(call: Call) -> Callable[[int], None]:
        return lambda stream: seen.append((f"launch on {stream}", call))

    fake = SimpleNamespace(prepare=lambda name: seen.append(("prepare", name)), bind=bind)
    monkeypatch.setattr(launch, "shared", lambda: fake)
    return seen


def made(node: type[nodes.Node], **values: Any) -> Any:
    return nodes.plugin(fake_trt(), node)(values)


def test_an_enqueue_only_launches_what_the_shapes_had_prepared(
    launched: list[tuple[str, Any]],
) -> None:
    plugin = made(nodes.Convolution, **{**CONV, "strides": (1, 1, 1)})
    inputs = [desc(shape) for shape in SHAPES]
    plugin.on_shape_change(inputs, [])
    assert sorted(launched) == [("prepare", "finish_fp32"),
                                ("prepare", "routed_conv3d_fp32_small")]  # fmt: skip
    launched.clear()
    plugin.enqueue(inputs, [], [1, 2, 3, 4], [5], 6, 77)
    (first, conv), (second, finish) = launched
    assert first == second == "launch on 77"
    assert conv.args[:6] == (1, 2, 3, 4, 5, 6)
    assert finish.args[:4] == (6, 2, 4, 5)
    sizes = plugin.sizes(SHAPES[0], SHAPES[2])
    assert [conv, finish] == calls.routed_conv3d(sizes, 1, 2, 3, 4, 5, 6)
    assert sizes.relu
    launched.clear()
    plugin.enqueue(inputs, [], [1, 2, 3, 4], [5], 6, 78)
    assert launched == [("launch on 78", conv), ("launch on 78", finish)]
    launched.clear()
    plugin.enqueue(inputs, [], [1, 2, 3, 4], [50], 6, 78)
    assert launched[0][1].args[4] == 50, "tensors moved"
    halves = [desc(s, "f16") for s in SHAPES]
    plugin.on_shape_change(halves, [])
    launched.clear()
    plugin.enqueue(halves, [], [1, 2, 3, 4], [50], 6, 77)
    assert {call.kernel for _, call in launched} == {"routed_conv3d_fp16_small", "finish_fp16"}
    tf32 = made(nodes.Convolution, **CONV, tf32=1)
    launched.clear()
    tf32.enqueue(inputs, [], [1, 2, 3, 4], [5], 6, 77)
    assert launched[0][1].kernel == "routed_conv3d_tf32_small"


def test_the_other_two_launch_one_kernel_each(launched: list[tuple[str, Any]]) -> None:
    topk = made(nodes.TopK, k=np.array(2, np.int32))  # a number without axes, as some versions give
    topk.enqueue([desc((9, 4))], [], [1], [2, 3], 0, 5)
    linear = made(nodes.Linear, relu=1)
    given = [desc(s) for s in ((8, 256), (8,), (4, 10, 256), (4, 10))]
    linear.enqueue(given, [], [1, 2, 3, 4], [5], None, 5)
    assert [call for _, call in launched] == [
        Call("topk", (9, 1, 1), (1, 2, 3, 4, 2)),
        Call("routed_linear_fp32", (8, 1, 1), (1, 2, 3, 4, 5, 256, 10, 1)),
    ]


def test_the_workspace_is_enough_for_every_batch_of_the_profile() -> None:
    plugin = made(nodes.Convolution, **CONV)
    shape, weights = (8, *SHAPES[0][1:]), SHAPES[2]
    most = plugin.get_workspace_size([dynamic(shape), None, dynamic(weights)], [])
    every = [plugin.sizes((n, *shape[1:]), weights).workspace_bytes for n in range(1, 9)]
    assert most == max(every) > 0
    assert made(nodes.Linear).get_workspace_size([], []) == 0


def test_formats_are_linear_and_types_follow_the_first_input() -> None:
    conv = made(nodes.Convolution)

    def fits(plugin: Any, *tensors: Any) -> bool:
        return bool(plugin.supports_format_combination(len(tensors) - 1, tensors, 4))

    half, index = dynamic((1,), "f16"), dynamic((1,), "i32")
    assert fits(conv, half)
    assert fits(conv, half, index)
    assert fits(conv, half, index, half, half, half)
    assert not fits(conv, half, half)
    assert not fits(conv, index)
    assert not fits(conv, half, index, dynamic((1,)))
    assert not fits(conv, dynamic((1,), layout="hwc"))
    topk = made(nodes.TopK)
    assert fits(topk, dynamic((1, 4)), dynamic((1, 1)), index)
    assert not fits(topk, half), "near-ties of scores would flip in half precision"


@pytest.mark.parametrize(
    ("node", "values", "says"),
    [
        (nodes.Convolution, {"strides": (1, 2)}, r"RoutedConv3d has strides \[1, 2\]; it takes 3"),
        (nodes.Convolution, {"pads": (0, 1, 1, 0, 1, 2)}, r"has pads \[0, 1, 1, 0, 1, 2\]; those"),
        (nodes.TopK, {"k": (1, 2)}, r"VmoeTopK has k \[1, 2\]; it takes 1 number"),
    ],
)
def test_attributes_that_cannot_be_are_refused(
    node: type[nodes.Node], values: dict[str, Any], says: str
) -> None:
    with pytest.raises(SettingError, match=says):
        made(node, **values)


@pytest.mark.parametrize(("k", "experts"), [(1, 65), (3, 2), (0, 4)])
def test_more_experts_than_the_kernel_takes_are_refused(k: int, experts: int) -> None:
    with pytest.raises(SettingError, match=rf"k is {k} and there are {experts}. Use --low"):
        made(nodes.TopK, k=k).planned([desc((1, experts))])


def test_they_are_registered_once_and_a_refusal_is_told() -> None:
    registry = Registry()
    for _ in range(2):
        nodes.register(fake_trt(registry=registry))
    assert set(registry.held) == {
        (name, "1", "vmoe") for name in ("VmoeTopK", "RoutedLinear", "RoutedConv3d")
    }
    creator = registry.held["RoutedConv3d", "1", "vmoe"]
    assert [field.name for field in creator.field_names] == ["strides", "pads", "relu", "tf32"]
    assert all(field.data.dtype == np.int32 for field in creator.field_names)
    with pytest.raises(EngineMismatchError, match=r"TensorRT 11.4 refuses the plugin VmoeTopK"):
        nodes.register(fake_trt("11.4", Registry(takes=False)))


def test_before_10_9_plugins_are_never_freed() -> None:
    """Bindings of 10.3 crash some time after; see FREES_PLUGINS."""
    counts = {}
    for version in ("10.3.0", "10.9.0.34", "11.4.0"):
        plugin = nodes.plugin(fake_trt(version), nodes.Linear)({})
        counts[version] = sys.getrefcount(plugin)
    assert counts["10.3.0"] == counts["10.9.0.34"] + 1 == counts["11.4.0"] + 1


def test_a_call_of_another_kernels_arguments_is_refused() -> None:
    with pytest.raises(EngineMismatchError, match=r"kernel topk takes 5 arguments and was given 1"):
        launch.packed(Call("topk", (1, 1, 1), (1,)), shipped.kernel("topk", 87))


DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static int contexts = 7;  /* the number of the current one */
void another(void) { contexts++; }
static int params;  /* of the kernel that was found last */
static int fails(const char *name) {
    const char *wanted = getenv("STUB_FAILS");
    return wanted && !strcmp(wanted, name) ? 999 : 0;
}
int cuInit(unsigned flags) { return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return fails("cuCtxGetDevice"); }
int cuCtxGetId(void *context, unsigned long long *id) { *id = contexts; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = atoi(getenv(attribute == 75 ? "STUB_MAJOR" : "STUB_MINOR"));
    return 0;
}
int cuModuleLoadData(void **module, const char *image) {
    const char *at = strstr(image, ".entry");
    for (params = 0; at && *at != ')'; at++) params += !strncmp(at, ".param", 6);
    printf("[\"load\", %zu, %d]\n", strlen(image), params);
    *module = (void *)16;
    return fails("cuModuleLoadData");
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
    printf("[\"function\", \"%s\"]\n", name);
    *function = (void *)32;
    return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
    printf("[\"attribute\", %d, %d]\n", attribute, value);
    return 0;
}
int cuLaunchKernel(void *f, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned by,
                   unsigned bz, unsigned shared, void *stream, void **args, void **extra) {
    printf("[\"launch\", [%u, %u, %u], [%u, %u, %u], %u, %zu, [", x, y, z, threads, by, bz, shared,
           (size_t)stream);
    for (int i = 0; i < params; i++) printf("%s%d", i ? ", " : "", *(int *)args[i]);
    printf("]]\n");
    fflush(stdout);
    return fails("cuLaunchKernel");
}
#define GIVE(function) if (!strcmp(name, #function)) { *found = (void *)function; return 0; }
int cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long flags,
                        void *status) {
    GIVE(cuInit) GIVE(cuCtxGetDevice) GIVE(cuCtxGetId) GIVE(cuDeviceGetAttribute)
    GIVE(cuModuleLoadData) GIVE(cuModuleGetFunction) GIVE(cuFuncSetAttribute) GIVE(cuLaunchKernel)
    if (!strcmp(name, "cuGetProcAddress")) { *found = (void *)cuGetProcAddress_v2; return 0; }
    *found = 0;
    return 500;
}
int cuGetProcAddress(const char *name, void **found, int version, unsigned long flags) {
    return cuGetProcAddress_v2(name, found, version, flags, 0);
}
"""
LAUNCHES = """
import ctypes
from vmoe.runtime.plugins import calls, launch
made = launch.shared()
assert launch.shared() is made
ctypes.CDLL("libcuda.so.1").another()
assert launch.shared() is not made
for call in calls.topk(101, 102, 103, 9, 4, 2) * 2:
    made.launch(call, 77)
conv = calls.Conv3d(64, 64, (8, 56, 56), 64, (3, 3, 3), (1, 1, 1), (1, 1, 1))
made.prepare("routed_conv3d_fp16_wide")
for call in calls.routed_conv3d(conv, 1, 2, 3, 4, 5, 6, "fp16"):
    made.launch(call, 0)
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a CUDA driver that writes down what it is asked."""
    pytest.importorskip("cuda.bindings.driver", reason="not installed: pip install cuda-bindings")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here, for the stub of CUDA's driver")
    folder = tmp_path_factory.mktemp("driver")
    command = [compiler, "-shared", "-fPIC", "-w", "-x", "c", "-", "-o",
               str(folder / "libcuda.so.1")]  # fmt: skip
    subprocess.run(command, input=DRIVER, text=True, check=True)
    return folder


def run(driver: Path, code: str, **settings: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver), "PYTHONPATH": path,
                   "STUB_MAJOR": "8", "STUB_MINOR": "7", **settings}  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_arguments_reach_the_driver_as_the_kernel_declares_them(driver: Path) -> None:
    done = run(driver, LAUNCHES)
    assert done.returncode == 0, done.stderr
    seen = [json.loads(line) for line in done.stdout.splitlines()]
    topk = ["launch", [9, 1, 1], [32, 1, 1], 0, 77, [101, 102, 103, 4, 2]]
    assert seen[:4] == [["load", len(text("topk")) - 1, 5], ["function", "topk"], topk, topk]
    wide = shipped.kernel("routed_conv3d_fp16_wide", 87)
    loaded, found, *attribute, launched = seen[4:]
    assert loaded == ["load", len(text("routed_conv3d_fp16_wide")) - 1, 26]
    assert found == ["function", "routed_conv3d"]
    large = wide.shared_bytes > 48 * 1024
    assert attribute == ([["attribute", 8, wide.shared_bytes]] if large else [])
    assert launched[1:5] == [[196, 1, 64], [128, 1, 1], wide.shared_bytes, 0]
    assert launched[5] == [1, 2, 3, 4, 5, 6, 64, 8, 56, 56, 64, 8, 56, 56, 3, 3, 3, 1, 1, 1, 1, 1,
                           1, 0, 1, 54]  # fmt: skip


def text(name: str) -> bytes:
    return shipped.text(shipped.kernel(name, 87))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"STUB_FAILS": "cuCtxGetDevice"}, "CUDA's cuCtxGetDevice says"),
        ({"STUB_FAILS": "cuModuleLoadData"}, "CUDA's cuModuleLoadData says"),
        ({"STUB_FAILS": "cuLaunchKernel"}, "CUDA's cuLaunchKernel says CUDA_ERROR_UNKNOWN; see"),
        ({"STUB_MAJOR": "7"}, "this GPU's compute capability is 7.7"),
    ],
)
def test_what_the_driver_refuses_is_told(driver: Path, settings: dict[str, str], says: str) -> None:
    done = run(driver, LAUNCHES, **settings)
    assert done.returncode == 1
    assert says in done.stderr.splitlines()[-1]


def test_without_cuda_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingDependencyError, match=r"NVIDIA's driver and cuda-bindings: pip"):
        launch.shared()

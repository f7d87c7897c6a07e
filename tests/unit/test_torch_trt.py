"""Plans by torch-tensorrt, over the signature of the real one."""

from __future__ import annotations

import ast
import io
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests.bindings import download
from tests.tensorrt_fake import MAGIC, Fake
from tests.twins import SPEC, lively, random_clip, random_clips
from vmoe.checkpoint import Checkpoint
from vmoe.errors import MissingDependencyError, SettingError, VmoeError
from vmoe.export import ExportSettings
from vmoe.export.onnx import quiet
from vmoe.export.tensorrt import plans, torch_trt
from vmoe.export.tensorrt.settings import BuildSettings

WHEEL = "torch-tensorrt==2.14.0"
CALL = "convert_exported_program_to_serialized_trt_engine"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the real package, which is read and never imported: it wants torch."""
    folder = tmp_path_factory.mktemp("torch-trt")
    download([WHEEL], folder)
    return folder / "torch_tensorrt"


def taken(source: Path, file: str, name: str) -> list[str]:
    """Return the arguments of a function or of a class, as the source has them."""
    tree = ast.parse((source / file).read_text())
    found = next(n for n in ast.walk(tree)
                 if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name)  # fmt: skip
    if isinstance(found, ast.ClassDef):
        found = next(n for n in found.body if getattr(n, "name", "") == "__init__")
    assert isinstance(found, ast.FunctionDef)
    return [a.arg for a in (*found.args.args, *found.args.kwonlyargs)]


def fake(known: list[str], patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let `import torch_tensorrt` find one that writes the fake TensorRT's plans; return calls."""
    calls: list[dict[str, Any]] = []
    made = ModuleType("torch_tensorrt")

    def convert(exported_program: Any, **given: Any) -> bytes:
        calls.append(given)
        held = io.BytesIO()
        outputs = [given["output_binding_names"]]
        with quiet():
            program = torch.onnx.export(
                exported_program, (), None, dynamo=True, verbose=False,
                input_names=list(given["arg_input_binding_names"]), output_names=outputs,
            )  # fmt: skip
        assert program is not None
        onnx.save_model(program.model_proto, held)
        profile = [given["arg_inputs"][0][k] for k in ("min_shape", "opt_shape", "max_shape")]
        head = json.dumps({"flags": [], "profile": {"clip": profile}}).encode()
        return MAGIC + len(head).to_bytes(4, "big") + head + held.getvalue()

    parameters = ", ".join(f"{name}=None" for name in known if name != "exported_program")
    scope: dict[str, Any] = {"convert": convert}
    exec(f"def call(exported_program, {parameters}):\n"
         "    given = {k: v for k, v in locals().items() if k != 'exported_program'}\n"
         "    return convert(exported_program, **given)", scope)  # fmt: skip
    debugger: Any = lambda **given: nullcontext(given)  # noqa: E731
    made.dynamo = SimpleNamespace(**{CALL: scope["call"], "Debugger": debugger})  # type: ignore[attr-defined]
    made.Input = dict  # type: ignore[attr-defined]
    made.Device = str  # type: ignore[attr-defined]
    made.__version__ = "2.14.0"  # type: ignore[attr-defined]
    made.__spec__ = SimpleNamespace(name="torch_tensorrt")  # type: ignore[assignment]
    patch.setitem(sys.modules, "torch_tensorrt", made)
    return calls


@pytest.mark.parametrize("bindings", ["11.4"], indirect=True)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_part_becomes_a_plan_of_the_same_runtime(
    trt: Fake, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake(taken(source, "dynamo/_compiler.py", CALL), monkeypatch)
    twin = lively()
    build = BuildSettings(opt_batch=2, workspace=64, hardware_compatible="ampere-plus")
    held = Checkpoint(twin, ("a", "b", "c", "d"))
    make = torch_trt.builder(held, ExportSettings(), build, trt, "cpu")
    with plans.here("auto", build).current():
        made = make("router")
    (given,) = calls
    assert (given["workspace_size"], given["hardware_compatible"]) == (64 << 20, True)
    assert given["disable_tf32"]
    assert given["require_full_compilation"]
    assert given["arg_inputs"][0]["max_shape"] == (8, *SPEC.shape)
    assert made.layers["Layers"]
    size = int.from_bytes(made.plan[len(MAGIC) : len(MAGIC) + 4], "big")
    import onnxruntime

    session = onnxruntime.InferenceSession(made.plan[len(MAGIC) + 4 + size :])
    (scores,) = session.run(["scores"], {"clip": random_clips(3, spec=SPEC)})
    with torch.no_grad():
        np.testing.assert_allclose(scores, twin.scores(random_clip(3, spec=SPEC)), atol=1e-4)
    monkeypatch.setattr(sys.modules["torch_tensorrt"], "Input", None)
    with pytest.raises(VmoeError, match=r"^expert0: torch-tensorrt finds no plan: 'NoneType' obj"):
        make("expert0")


@pytest.mark.parametrize("batch", [(3, 4, 6), (1, 1, 2), (3, 3, 3), (1, 1, 1)])
def test_the_example_batch_is_one_that_the_plan_takes(
    source: Path, monkeypatch: pytest.MonkeyPatch, batch: tuple[int, int, int]
) -> None:
    known = taken(source, "dynamo/_compiler.py", CALL)
    fake(known, monkeypatch)
    seen: list[int] = []

    class Mean(torch.nn.Module):
        def forward(self, clip: torch.Tensor) -> torch.Tensor:
            return clip.float().mean(dim=(1, 2, 3))

    export = torch.export.export

    def exported(door: torch.nn.Module, given: tuple[torch.Tensor], **more: Any) -> Any:
        seen.append(len(given[0]))
        return export(door, given, **more)

    monkeypatch.setattr(torch.export, "export", exported)
    module: Any = sys.modules["torch_tensorrt"]
    monkeypatch.setattr(module.dynamo, CALL, lambda *_, **__: b"plan")
    build = BuildSettings(min_batch=batch[0], opt_batch=batch[1], max_batch=batch[2])
    assert torch_trt._plan_of(module, Mean(), "scores", (2, 4, 4, 3), build, "cpu") == b"plan"
    assert batch[0] <= seen[0] <= batch[2]


def test_what_is_given_is_what_the_real_one_takes(source: Path) -> None:
    tree = ast.parse(Path(torch_trt.__file__).read_text())
    given = {
        ast.unparse(node.func): {k.arg for k in node.keywords}
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    }
    known = taken(source, "dynamo/_compiler.py", CALL)
    assert given["_convert(torch_trt)"] <= set(known)
    assert set(torch_trt.NAMES) <= set(known)
    debugger = taken(source, "dynamo/debug/_Debugger.py", "Debugger")
    assert given["torch_trt.dynamo.Debugger"] <= set(debugger)
    read = (source / "_Input.py").read_text()
    for name in ("shape", "min_shape", "opt_shape", "max_shape", "dtype", "name"):
        assert f'kwargs["{name}"]' in read
    metadata = next(source.parent.glob("torch_tensorrt-*/METADATA")).read_text()
    for pin in ("torch<2.15.0,>=2.14.0", "tensorrt-cu13<11.2.0,>=11.1.0"):
        assert f"Requires-Dist: {pin}" in metadata


def test_what_is_missing_or_does_not_go_together_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    why = r"torch-tensorrt is not installed: pip install 'torch-tensorrt==2\.14\.\*' \(it brings"
    with pytest.raises(MissingDependencyError, match=why):
        torch_trt.module()
    monkeypatch.delitem(sys.modules, "torch_tensorrt")
    (tmp_path / "torch_tensorrt.py").write_text("raise ImportError('undefined symbol: x')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        MissingDependencyError, match=r"with torch 2\S+ \(undefined symbol: x\): pip"
    ):
        torch_trt.module()
    fake(["arg_inputs"], monkeypatch)
    with pytest.raises(MissingDependencyError, match="cannot name a plan's inputs and outputs"):
        torch_trt.module()


@pytest.mark.parametrize(
    ("asked", "build", "said"),
    [
        (ExportSettings(int8=True), BuildSettings(), "--torch-trt is not for --int8"),
        (ExportSettings(), BuildSettings(strip=True), "--torch-trt is not for --strip"),
        (ExportSettings(), BuildSettings(timing_cache=Path("x")), "is not for --timing-cache"),
        (ExportSettings(), BuildSettings(hardware_compatible="same-compute-capability"),
         "knows no --hardware-compatible but ampere-plus"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_said_first(
    asked: ExportSettings, build: BuildSettings, said: str
) -> None:
    with pytest.raises(SettingError, match=said):
        torch_trt.check(asked, build)

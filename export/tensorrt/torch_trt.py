"""Plans by torch-tensorrt, from the twin's modules: a way around TensorRT's ONNX parser.

Where a plan of the ONNX answers otherwise than the twin, one made here tells whether the parser is
to blame. It is the same kind of plan, for the same runtime.

torch-tensorrt is built for one version of torch and of TensorRT each: 2.14, the first that names
the inputs and outputs of a plan, goes with torch 2.14 and TensorRT 11.1, and pip installs both. Its
plans are for that TensorRT alone. There is none for Jetson after 2.8.
"""

from __future__ import annotations

import importlib.util
import inspect
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vmoe.checkpoint import Checkpoint
from vmoe.errors import MissingDependencyError, SettingError, VmoeError
from vmoe.export import half
from vmoe.export.plan import ExportSettings
from vmoe.runtime.engines import _plan

from .builder import MIB, Made, inspected
from .settings import BuildSettings

FROM = "2.14"  # the first that takes NAMES
NAMES = ("arg_input_binding_names", "output_binding_names")
INSTALL = (
    f"pip install 'torch-tensorrt=={FROM}.*' (it brings torch {FROM} and TensorRT 11.1: each "
    "torch-tensorrt goes with one of both)."
)


class Door(nn.Module):
    """A module behind an engine's door: floats first, as TensorRT moves no bytes."""

    def __init__(self, module: nn.Module) -> None:
        """Wrap a router or an expert."""
        super().__init__()
        self.module = module

    def forward(self, clip: Tensor) -> Tensor:
        """Return what the module says of uint8 [N, T, H, W, 3]."""
        answer: Tensor = self.module(clip.float().permute(0, 4, 1, 2, 3) / 255)
        return answer


def check(settings: ExportSettings, build: BuildSettings) -> None:
    """Refuse what cannot be built this way, before any work.

    Raises:
        SettingError: int8, a lowering in one file, or an option that has no counterpart.
    """
    if settings.lowering != "split":
        raise SettingError(
            f"--torch-trt builds router and experts apart: leave --lowering {settings.lowering} "
            "out."
        )
    if settings.int8:
        raise SettingError("--torch-trt is not for --int8, whose ranges stand in the ONNX.")
    for name in ("strip", "timing_cache"):
        if getattr(build, name):
            flag = name.replace("_", "-")
            raise SettingError(f"--torch-trt is not for --{flag}: leave one of them out.")
    if build.hardware_compatible == _plan.SAME_CAPABILITY:
        raise SettingError("--torch-trt knows no --hardware-compatible but ampere-plus.")


def module() -> Any:
    """Import torch-tensorrt.

    Raises:
        MissingDependencyError: it is not installed, does not go with what is, or is too old.
    """
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise MissingDependencyError(f"torch-tensorrt is not installed: {INSTALL}")
    try:
        import torch_tensorrt
    except (ImportError, OSError, AttributeError, RuntimeError) as e:
        said = " ".join(str(e).split())[:200].rstrip(".")
        raise MissingDependencyError(
            f"torch-tensorrt cannot be imported with torch {torch.__version__} ({said}): {INSTALL}"
        ) from e
    taken = inspect.signature(_convert(torch_tensorrt)).parameters
    if not all(name in taken for name in NAMES):
        raise MissingDependencyError(
            f"torch-tensorrt {torch_tensorrt.__version__} cannot name a plan's inputs and outputs: "
            f"{INSTALL}"
        )
    return torch_tensorrt


def _convert(torch_trt: Any) -> Callable[..., bytes]:
    found: Callable[..., bytes] = torch_trt.dynamo.convert_exported_program_to_serialized_trt_engine
    return found


def builder(
    held: Checkpoint, settings: ExportSettings, build: BuildSettings, trt: Any, device: str
) -> Callable[[str], Made]:
    """Return what builds one part, by its name.

    Args:
        held: the twin.
        settings: its precision.
        build: how.
        trt: the module tensorrt, for the inspector.
        device: the GPU.
    """
    torch_trt = module()
    router, experts = half.modules(held.twin, settings)
    parts = {f"expert{i}": expert for i, expert in enumerate(experts)}
    if router is not None:
        parts["router"] = router

    def make(name: str) -> Made:
        door = Door(parts[name]).eval().to(device)
        output = "scores" if name == "router" else "logits"
        try:
            plan = _plan_of(torch_trt, door, output, held.twin.spec.shape, build, device)
        except VmoeError:
            raise
        except Exception as e:  # its errors share no base class but Exception
            said = " ".join(str(e).split())[:300].rstrip(".")
            raise VmoeError(f"{name}: torch-tensorrt finds no plan: {said}.") from e
        finally:
            door.to("cpu")
        return Made(plan, inspected(trt, plan, name, build), b"")

    return make


def _plan_of(
    torch_trt: Any, door: nn.Module, output: str, shape: tuple[int, ...], build: BuildSettings,
    device: str,
) -> bytes:  # fmt: skip
    least, best, most = build.batch
    rows = min(max(2, least), most)  # of one row, N would be taken as fixed
    clip = torch.zeros((rows, *shape), dtype=torch.uint8, device=device)
    free = None
    taken = torch_trt.Input(shape=(most, *shape), dtype=torch.uint8, name="clip")
    if least < most:
        free = ({0: torch.export.Dim("N", min=least, max=most)},)
        taken = torch_trt.Input(
            min_shape=(least, *shape), opt_shape=(best, *shape), max_shape=(most, *shape),
            dtype=torch.uint8, name="clip",
        )  # fmt: skip
    program = torch.export.export(door, (clip,), dynamic_shapes=free, strict=False)
    # What a layer computes in is only said of plans that are built under its debugger.
    with tempfile.TemporaryDirectory() as logs, torch_trt.dynamo.Debugger(
        log_level="error", engine_builder_monitor=False, logging_dir=logs
    ):  # fmt: skip
        return bytes(_convert(torch_trt)(
            program,
            arg_inputs=(taken,),
            arg_input_binding_names=("clip",),
            output_binding_names=output,
            device=torch_trt.Device(device),
            require_full_compilation=True,
            min_block_size=1,
            pass_through_build_failures=True,
            assume_dynamic_shape_support=True,
            max_aux_streams=0,
            disable_tf32=not build.tf32,
            optimization_level=build.opt_level,
            workspace_size=(build.workspace or 0) * MIB,
            version_compatible=build.version_compatible,
            hardware_compatible=build.hardware_compatible == _plan.AMPERE_PLUS,
            immutable_weights=True,
        ))  # fmt: skip

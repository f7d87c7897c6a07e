"""What a TensorRT build can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmoe.errors import SettingError
from vmoe.runtime.engines._plan import HARDWARE, NONE
from vmoe.settings import Settings, opt


@dataclass(frozen=True)
class BuildSettings(Settings):
    """How plans are built."""

    min_batch: int = opt(1, "least batch of a plan", at_least=1)
    opt_batch: int = opt(1, "batch that a plan is made fastest for", at_least=1)
    max_batch: int = opt(8, "largest batch; more clips are run in turns", at_least=1)
    workspace: int | None = opt(
        None, "MiB that a layer may take for itself [default: TensorRT's own, all there is; on a "
        "Jetson of 8 GB say 1024]", at_least=1,
    )  # fmt: skip
    opt_level: int = opt(
        3, "how hard to search for fast layers, 0 to 5; 0 makes no use of the timing cache",
        at_least=0, at_most=5,
    )  # fmt: skip
    timing_cache: Path | None = opt(
        None, "file of measured layers, read and written: the next build is faster and the same"
    )
    version_compatible: bool = opt(
        False, "let newer TensorRT run the plans; slower, and they bring code of their own"
    )
    hardware_compatible: str = opt(
        NONE, "other GPUs that may run the plans; slower", choices=HARDWARE
    )
    strip: bool = opt(
        False,
        "plans without weights: those of the ONNX beside them are put in when they are loaded",
    )
    torch_trt: bool = opt(
        False, "--trt by torch-tensorrt, around TensorRT's ONNX parser: a cross-check of it"
    )
    tf32: bool = opt(False, "let fp32 layers round their inputs to 10 bits, the router's too")

    def __post_init__(self) -> None:
        """Check that batches are in order."""
        super().__post_init__()
        if not self.min_batch <= self.opt_batch <= self.max_batch:
            raise SettingError(
                f"--min-batch {self.min_batch}, --opt-batch {self.opt_batch} and --max-batch "
                f"{self.max_batch} are not in order: each must be at least the one before."
            )

    @property
    def batch(self) -> tuple[int, int, int]:
        """The least, the best and the largest batch."""
        return self.min_batch, self.opt_batch, self.max_batch

"""Where a training begins: fresh weights, those of another checkpoint, or of another library."""

from __future__ import annotations

from pathlib import Path

from vmoe import checkpoint
from vmoe.errors import SettingError
from vmoe.models import VideoMoE
from vmoe.train import pretrained


def take_weights(twin: VideoMoE, path: Path) -> str:
    """Copy the weights of a file into a twin of the same experts; return what was taken.

    Raises:
        VmoeError: missing, damaged, or a pickle of more than tensors.
        SettingError: it does not fit; the message says what would.
    """
    tensors = pretrained.read(path)
    if tensors is not None:
        return pretrained.take(twin, tensors, path)
    return _take_checkpoint(twin, path)


def _take_checkpoint(twin: VideoMoE, path: Path) -> str:
    """Copy a checkpoint's weights.

    A model of one expert becomes every expert of a mixture ("sparse upcycling"): the experts
    learn to see first, with all of the data, and part when they are routed.

    Source: Komatsuzaki et al., "Sparse Upcycling", ICLR 2023.

    Raises:
        SettingError: other experts, labels or normalisation, or another number of experts (but
            one).
    """
    other = checkpoint.load(path).twin
    mine, theirs = twin.settings, other.settings
    for name in ("arch", "width", "classes"):
        if getattr(mine, name) != getattr(theirs, name):
            raise SettingError(
                f"--init-from {path} has {name} {getattr(theirs, name)}; what is trained here has "
                f"{getattr(mine, name)}. Begin with a checkpoint of that, or give another --arch, "
                "--width, --method or data."
            )
    for name in ("mean", "std"):
        if getattr(twin.spec, name) != getattr(other.spec, name):
            given = ",".join(f"{value:g}" for value in getattr(other.spec, name))
            raise SettingError(
                f"--init-from {path} was trained with --{name} {given}: give that too."
            )
    if theirs.experts not in (1, mine.experts):
        raise SettingError(
            f"--init-from {path} has {theirs.experts} experts; this model has {mine.experts}. "
            "Give the same --experts, or start from a model of 1 expert."
        )
    if twin.denoiser is not None and other.denoiser is not None:
        twin.denoiser.load_state_dict(other.denoiser.state_dict())
    for i, expert in enumerate(twin.experts):
        expert.load_state_dict(other.experts[i % theirs.experts].state_dict())
    if twin.router is not None and other.router is not None:
        twin.router.load_state_dict(other.router.state_dict())
        return f"router and {mine.experts} experts from {path}"
    return f"each of {mine.experts} experts from the one of {path}; a fresh router"

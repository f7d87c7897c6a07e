"""Checkpoints: weights in safetensors, and beside them settings and provenance as JSON.

No pickle: a file that could run code when it is read is refused before it is read.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmoe import __version__, latest, output
from vmoe.clips import ClipSpec
from vmoe.errors import MissingDependencyError, SettingError, VmoeError, nearest
from vmoe.models import ModelSettings, VideoMoE, build
from vmoe.settings import from_mapping, to_mapping

HEADER = "vmoe"
NAME = "Name a checkpoint of vmoe-train, the folder of a training, or a bundle."


@dataclass(frozen=True)
class Checkpoint:
    """A twin and what is known of it.

    Attributes:
        twin: in eval mode.
        labels: K names.
        recipe: data, method and settings that trained it.
        results: what was measured at the end of training.
    """

    twin: VideoMoE
    labels: tuple[str, ...]
    recipe: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """The regular expression that split the folder it was trained on; empty for none.

        Another group is another split, whose test clips may have been trained on.
        """
        return str(self._clips.get("group", ""))

    @property
    def fold(self) -> int:
        """The official split that it was trained on, where its data set has several; else 1.

        The test clips of another were trained on.
        """
        return int(self._clips.get("fold", 1))

    @property
    def _clips(self) -> dict[str, Any]:
        """How its data was opened; empty where the recipe does not say."""
        clips = self.recipe.get("clips")
        return clips if isinstance(clips, dict) else {}


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint whole.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    twin = checkpoint.twin
    header = {
        "version": __version__,
        "model": to_mapping(twin.settings),
        "clip": to_mapping(twin.spec),
        "labels": list(checkpoint.labels),
        "recipe": checkpoint.recipe,
        "results": checkpoint.results,
    }
    write_tensors(twin.state_dict(), header, path)


def load(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: its file; or a bundle or a training's folder, for the one in it.
        device: where the twin is put.

    Raises:
        VmoeError: missing, a pickle, damaged, or of another kind.
    """
    tensors, header = read_tensors(path)
    try:
        settings = from_mapping(ModelSettings, header["model"], "the header")
        spec = from_mapping(ClipSpec, header["clip"], "the header")
        labels = tuple(header["labels"])
        twin = build(settings, spec)
    except KeyError as e:
        raise VmoeError(f"{path} is no vmoe checkpoint: its header has no {e}.") from e
    except (AttributeError, TypeError, VmoeError) as e:
        raise VmoeError(f"{path} is no checkpoint that this vmoe can read: {e}") from e
    if len(labels) != settings.classes:
        raise VmoeError(f"{path} has {len(labels)} labels for {settings.classes} classes: damaged.")
    try:
        twin.load_state_dict(tensors)
    except RuntimeError as e:
        raise VmoeError(f"{path} does not fit its own architecture {settings}: damaged.") from e
    twin.to(device).eval()
    return Checkpoint(twin, labels, header.get("recipe", {}), header.get("results", {}))


def write_tensors(tensors: dict[str, Tensor], header: dict[str, Any], path: Path) -> None:
    """Write tensors and a JSON header, whole; the same bytes for the same values."""
    from safetensors.torch import save as serialise

    held = {name: t.detach().cpu().contiguous().clone() for name, t in sorted(tensors.items())}
    data = serialise(held, {HEADER: json.dumps(header, sort_keys=True)})
    with output.whole_file(path) as temporary:
        temporary.write_bytes(data)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and their JSON header.

    Raises:
        VmoeError: missing, a pickle, damaged, or without our header.
    """
    tensors, metadata = read_safetensors(path)
    try:
        return tensors, json.loads(metadata[HEADER])
    except KeyError as e:
        raise VmoeError(f"{path} holds weights but no vmoe header: no checkpoint of ours.") from e
    except ValueError as e:
        raise VmoeError(f"{path} is damaged or no safetensors file: {e}.") from e


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a safetensors file, whoever wrote it, and its metadata.

    Raises:
        VmoeError: missing, a pickle, or damaged.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as e:
        raise MissingDependencyError(
            "safetensors is not installed: pip install 'vmoe[train]'"
        ) from e
    path = latest.inside(path)
    if is_pickle(path):
        raise VmoeError(
            f"{path} is a pickle, which can run code when it is read; vmoe reads safetensors only. "
            "If you trust it: safetensors.torch.save_file(torch.load(PATH, weights_only=True), NEW)"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, ValueError) as e:
        advice = "Copy it again, whole." if path.suffix == ".safetensors" else NAME
        raise VmoeError(f"{path} is damaged or no safetensors file: {e}. {advice}") from e


def is_pickle(path: Path) -> bool:
    """Return whether torch.save or pickle wrote a file, by its first bytes.

    Raises:
        VmoeError: it cannot be read.
    """
    path = latest.inside(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as e:
        near = "." if path.exists() else nearest(str(path), latest.offered())
        raise VmoeError(f"cannot read checkpoint {path}: {e.strerror}{near} {NAME}") from e
    if start[8:] == b"{":  # safetensors: a length in 8 bytes, which may look like anything; JSON
        return False
    return start[:2] == b"PK" or start[:1] == b"\x80"


def device(name: str) -> torch.device:
    """Return a device by its name, auto, cpu or cuda:N; `auto` is CUDA where there is one.

    Raises:
        SettingError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise SettingError(f"--device {name} is unknown; give auto, cpu or cuda:N.")
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as e:
        raise SettingError(f"--device {name} cannot be used here; try auto or cpu.") from e
    return found

"""Adversarial clips on disk: what `vmoe-attack --save-adv` writes and others replay.

    manifest.json      the clip spec, labels, attacks, budgets, and the hash of every file
    clean.npz          clips uint8 [N, T, H, W, 3]
    1-pgd-8.npz, ...   the same clips under one attack at one budget (here 8/255; of L2,
                       1-pgd-l2-2.npz), numbered: the
                       names of two budgets may read the same

Lossless and without pickle. Hashes prove that nothing changed since the clips were made.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vmoe import __version__, output
from vmoe.bundle import sha256
from vmoe.clips import Clips, ClipSpec, check_clips
from vmoe.errors import SettingError, VmoeError
from vmoe.settings import from_mapping, to_mapping

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
CLEAN = "clean.npz"


@dataclass(frozen=True)
class Attacked:
    """Clips under one attack at one budget.

    Attributes:
        attack: its name.
        eps: budget, on pixels in [0, 1].
        settings: the attack's, one mapping for each route_grad that was tried.
        clips: uint8 [N, T, H, W, 3].
        norm: of the budget: linf or l2.
        mode: how they were made: transfer (on the twin), adaptive or query (on an engine).
        against: the engine's name; empty where they were made on the twin.
    """

    attack: str
    eps: float
    settings: list[dict[str, Any]]
    clips: Clips
    norm: str = "linf"
    mode: str = "transfer"
    against: str = ""

    def file(self, number: int) -> str:
        """Return the name of its file, as one of several."""
        size = f"{self.eps * 255:.6g}" if self.norm == "linf" else f"l2-{self.eps:.6g}"
        return f"{number}-{self.attack}-{size}.npz"


@dataclass(frozen=True)
class AdversarialClips:
    """Clean clips and what attacks made of them.

    Attributes:
        spec: the clips' spec.
        labels: K names.
        clean: uint8 [N, T, H, W, 3].
        label: index of each clip's label, N of them.
        index: number of each clip in its data set, N of them.
        attacked: one for each attack and budget.
        origin: where they are from: data, split, seed, the twin's sha256.
    """

    spec: ClipSpec
    labels: tuple[str, ...]
    clean: Clips
    label: tuple[int, ...]
    index: tuple[int, ...]
    attacked: tuple[Attacked, ...]
    origin: dict[str, Any] = field(default_factory=dict)


def refuse_existing(path: Path) -> None:
    """Raise SettingError for a folder that exists, before any work is done."""
    if path.exists():
        raise SettingError(f"{path} exists. Choose another --save-adv.")


def save(clips: AdversarialClips, path: Path) -> None:
    """Write a folder whole.

    Raises:
        SettingError: it exists.
        OutputError: the disk is full, or the folder cannot be written.
    """
    refuse_existing(path)
    with output.whole_folder(path) as folder:
        files = {attacked.file(i): attacked for i, attacked in enumerate(clips.attacked, 1)}
        hashes = {CLEAN: _write(folder / CLEAN, clips.clean)}
        hashes |= {file: _write(folder / file, a.clips) for file, a in files.items()}
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "vmoe": __version__,
            "clip": to_mapping(clips.spec),
            "labels": list(clips.labels),
            "label": list(clips.label),
            "index": list(clips.index),
            "attacked": [
                {
                    "attack": a.attack,
                    "norm": a.norm,
                    "mode": a.mode,
                    "against": a.against,
                    "eps": a.eps,
                    "settings": a.settings,
                    "file": file,
                }
                for file, a in files.items()
            ],
            "sha256": hashes,
            "origin": clips.origin,
        }
        output.write_json(folder / MANIFEST, manifest)


def load(path: Path) -> AdversarialClips:
    """Read a folder, and prove it whole.

    Raises:
        VmoeError: nothing there, another version, a part is missing or changed.
    """
    manifest = path / MANIFEST
    try:
        values = json.loads(manifest.read_text(encoding="utf-8"))
    except OSError as e:
        raise VmoeError(
            f"cannot read {manifest}: {e.strerror}: no adversarial clips. Make some: vmoe-attack "
            "TARGET --save-adv FOLDER."
        ) from e
    except (ValueError, RecursionError) as e:
        raise VmoeError(f"{manifest} is not JSON: {e}. Make the clips again.") from e
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise VmoeError(
            f"{manifest} has schema version {version}; this vmoe reads {SCHEMA_VERSION}. "
            "Make the clips again: vmoe-attack --save-adv."
        )
    try:
        return _parse(path, values)
    except (KeyError, TypeError, ValueError, AttributeError, SettingError) as e:
        why = f"key {e} is missing" if isinstance(e, KeyError) else str(e)
        raise VmoeError(f"{manifest} is damaged: {why}. Make the clips again.") from e


def _parse(path: Path, values: dict[str, Any]) -> AdversarialClips:
    spec = from_mapping(ClipSpec, values["clip"], MANIFEST)
    labels, label = tuple(map(str, values["labels"])), tuple(map(int, values["label"]))
    index = tuple(map(int, values["index"]))
    if not label or len(index) != len(label):
        raise ValueError(f"{len(label)} labels and {len(index)} indices")
    if not all(0 <= k < len(labels) for k in label):
        raise ValueError(f"a label is not one of {len(labels)}")

    def read(name: str) -> Clips:
        return _read(path, name, values["sha256"][name], len(label), spec)

    attacked = tuple(
        Attacked(
            str(a["attack"]), float(a["eps"]), list(a["settings"]), read(a["file"]),
            _norm(a.get("norm", "linf")),  # clips of before there was another
            str(a.get("mode", "transfer")), str(a.get("against", "")),
        )
        for a in values["attacked"]
    )  # fmt: skip
    origin = dict(values["origin"])
    return AdversarialClips(spec, labels, read(CLEAN), label, index, attacked, origin)


def _norm(name: Any) -> str:
    if name not in ("linf", "l2"):
        raise ValueError(f"norm is {name!r}, neither linf nor l2")
    return str(name)


def _write(path: Path, clips: Clips) -> str:
    np.savez_compressed(path, clips=clips)
    return sha256(path)


def _read(folder: Path, name: str, digest: str, n: int, spec: ClipSpec) -> Clips:
    path = folder / name
    if Path(name).name != name or name in (".", "..") or "\\" in name or path.is_symlink():
        raise VmoeError(f"{folder}: file {name!r} leaves its folder; refused.")
    if not path.is_file():
        raise VmoeError(f"{path} is missing. Make the clips again, or copy the folder whole.")
    if sha256(path) != digest:
        raise VmoeError(f"{path} has changed since it was made (sha256 differs). Refused.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            clips: Clips = arrays["clips"]
    except (OSError, ValueError, KeyError) as e:
        raise VmoeError(f"{path} holds no clips: {e}. Make them again.") from e
    check_clips(clips, spec)
    if len(clips) != n:
        raise ValueError(f"{name} has {len(clips)} clips for {n} labels")
    return clips

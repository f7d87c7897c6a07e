"""The clips that int8 takes its ranges from: of the training split, as the twin was trained.

Ranges taken from clips of the test split would have seen what the figures are measured on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vmoe import bundle as bundles
from vmoe.checkpoint import Checkpoint
from vmoe.clips import Clips
from vmoe.data import ClipData, DataSettings, open_data
from vmoe.data.camera_motion import LABELS as MOVES
from vmoe.data.folder import SPLIT_FOLDERS
from vmoe.errors import SettingError
from vmoe.settings import Settings, opt

from . import adversaries

log = logging.getLogger("vmoe.export")

BUILT_IN = "camera-motion"
STEPS = 10  # of PGD
EPS = 8 / 255  # of PGD, where the checkpoint was not trained under attack


@dataclass(frozen=True)
class CalibrationSettings(Settings):
    """Where the ranges of int8 come from."""

    calib: str | None = opt(
        None, "data set whose training split gives the ranges of --int8; default: the twin's own"
    )
    calib_clips: int = opt(128, "clips that give the ranges of --int8", at_least=1)
    calib_adv: float = opt(
        0.0, "share of them that PGD on the twin makes adversarial, at the budget of its training",
        at_least=0, at_most=1,
    )  # fmt: skip


def clips_for(held: Checkpoint, settings: CalibrationSettings, seed: int) -> Clips:
    """Return the clips of a calibration, uint8 [N, T, H, W, 3].

    Args:
        held: the twin, and what it was trained on.
        settings: which data, and how much of it.
        seed: of the attacks.

    Raises:
        SettingError: as `opened` says; clips that the twin is tested on, under whatever name; clips
            to be attacked that have no label of the twin's.
    """
    data, train = opened(held, settings)
    _refuse_tested(train, data, held)
    count = min(settings.calib_clips, len(train))
    taken = [train[i] for i in range(count)]
    clips = np.stack([clip for clip, _ in taken])
    few = round(settings.calib_adv * count)
    if few:
        which = np.arange(count - few, count)  # every class in turn, so that all are among them
        label = np.array([label for _, label in taken])[which]
        if train.labels != held.labels:
            raise SettingError(
                f"--calib-adv attacks clips of known labels, and {data} has other labels than the "
                "twin. Leave it out, or calibrate on what the twin was trained on."
            )
        made = adversaries.make(held.twin, clips[which], label, trained_eps(held), STEPS, seed)
        clips[which] = made
    return clips


def opened(held: Checkpoint, settings: CalibrationSettings) -> tuple[str, ClipData]:
    """Return what the clips of a calibration are taken from: its name, and its training split.

    Raises:
        SettingError: the data cannot be read, has no clip, or is called as another split.
    """
    data = settings.calib or trained_on(held)
    _refuse_test_split(data)
    try:
        return data, _open(data, "train", held, settings.calib_clips)
    except SettingError as e:
        raise SettingError(f"--calib: {e}") from e


def trained_on(held: Checkpoint) -> str:
    """Return the data set that a checkpoint says it was trained on.

    Raises:
        SettingError: it does not say.
    """
    said = held.recipe.get("data")
    if isinstance(said, str):
        return said
    if held.labels == MOVES:
        return BUILT_IN
    raise SettingError(
        "the checkpoint does not say what it was trained on: name clips of its training split "
        "with --calib DATA."
    )


def trained_eps(held: Checkpoint) -> float:
    """Return the budget that a twin was trained under, on pixels in [0, 1]; else 8/255."""
    method = held.recipe.get("method")
    said = method.get("eps") if isinstance(method, dict) else None
    return float(said) if isinstance(said, (int, float)) and 0 < said <= 1 else EPS


def _open(data: str, split: str, held: Checkpoint, clips: int) -> ClipData:
    clip_settings = held.recipe.get("clips")
    seed = clip_settings.get("seed", 0) if isinstance(clip_settings, dict) else 0
    how = DataSettings(
        clips=clips, group=held.group, seed=int(seed), fold=held.fold, augment=("none",)
    )
    return open_data(data, split, held.twin.spec, how)


def _refuse_test_split(data: str) -> None:
    """Refuse a folder that is called as another split, and holds no splits of its own."""
    path = Path(data.partition(":")[2] or data)
    if not path.is_dir():
        return
    split = SPLIT_FOLDERS.get(path.resolve().name)
    if split not in (None, "train") and not (path / "train").is_dir():
        raise SettingError(
            f"--calib {data} is the {split} split: figures are measured on it. Calibrate on the "
            f"training split: --calib {path.resolve().parent}, if it has a folder train."
        )


def _refuse_tested(opened: ClipData, data: str, held: Checkpoint) -> None:
    """Refuse files that the twin is tested on, under whatever name, copies of them included."""
    said = held.recipe.get("data")
    files = _files(opened)
    if not files or said == data:
        return
    try:
        tested = _files(_open(said, "test", held, 0)) if isinstance(said, str) else ()
    except SettingError as e:  # what it was trained on is not on this machine, or not from here
        log.warning("--calib %s: whether the twin is tested on these clips is not known: %s",
                    data, e)  # fmt: skip
        return
    if not isinstance(said, str):
        log.warning("--calib %s: whether the twin is tested on these clips is not known: its "
                    "checkpoint does not say what it was trained on", data)  # fmt: skip
    both = _same(files, tested)
    if both:
        raise SettingError(
            f"--calib {data}: {len(both)} of its {len(files)} clips are of the test split of "
            f"{said}, such as {both[0].name}. Calibrate on the training split: --calib {said}"
        )


def _same(files: Sequence[Path], others: Sequence[Path]) -> list[Path]:
    """Return the files whose bytes are those of another; only equal sizes are read."""
    sizes = {path.stat().st_size for path in files}
    hashes: dict[int, set[str]] = {}
    for path in others:
        size = path.stat().st_size
        if size in sizes:
            hashes.setdefault(size, set()).add(bundles.sha256(path))
    return [
        path
        for path in files
        if (size := path.stat().st_size) in hashes and bundles.sha256(path) in hashes[size]
    ]


def _files(opened: ClipData) -> Sequence[Path]:
    """Return the files that a data set's clips are cut from; none where they are rendered."""
    return [path.resolve() for path, _ in getattr(opened, "files", ())]

"""What the reproduction trains and tests on: camera-motion, and UT-Interaction by its recordings.

camera-motion's clips are rendered once for all cells: every seed has the same training clips, and
test clips of its own. UT-Interaction has too few clips for one test split: of each of three folds,
every third recording (`seqNN`, all the clips of which were filmed together) is the test, every
sixth the validation; the folder of a fold holds links to the user's files.
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cells import Held, Task, Turns

from vmoe import output
from vmoe.cli import log
from vmoe.clips import ClipSpec
from vmoe.data import DataSet, DataSettings, open_data
from vmoe.data.camera_motion import LABELS
from vmoe.errors import SettingError
from vmoe.models import ModelSettings

EPS = 4 / 255
SPEC = ClipSpec(8, 0.1, 64, 64)
ARCH, WIDTH, EXPERTS = "tsm", 0.125, 4
SEQUENCE = re.compile(r"seq\d+")
FOLDS = 3
PARTS = ("test", "train", "val", "test", "train", "train")  # of every six recordings


@dataclass(frozen=True)
class Size:
    """How much of everything; `quick` tells the direction.

    Attributes:
        train, val, test: clips of camera-motion; test of each seed.
        tflops: budget of a training; of a trial; of the standard start's epochs (camera-motion).
        steps: of the test's attacks.
        batch, attack_batch: clips that are trained on, and attacked, at a time.
        trials: how many of a method's settings are tried.
    """

    train: int = 6000
    val: int = 120
    test: int = 200
    tflops: float = 2.0
    trial_tflops: float = 0.8
    ut_tflops: float = 0.5
    start_epochs: int = 36
    steps: int = 10
    batch: int = 32
    attack_batch: int = 50
    trials: int = 2


QUICK = Size(200, 20, 20, 0.02, 0.02, 0.02, 1, 3)
LARGE = Size(12000, 400, 400, 8.0, 8.0, 2.0, 36, 20, 64, 200)


def camera_motion(folder: Path, seed: int, size: Size, device: str) -> Task:
    """Return camera-motion with the test clips of a seed, as `prepare` rendered them."""
    train = _rendered(folder, "train", size.train)
    test = _rendered(folder, f"test{seed}", size.test)
    model = ModelSettings(ARCH, WIDTH, EXPERTS, len(train.labels))
    turns, val = Turns(train, len(train) // 6), _rendered(folder, "val", size.val)
    budgets = (size.tflops, size.trial_tflops)
    return Task(
        "all", model, SPEC, turns, val, test, EPS, *budgets, size.steps, {"batch": size.batch},
        device, size.attack_batch,
    )  # fmt: skip


def prepare(data: str, folder: Path, size: Size, seeds: Sequence[int], workers: int) -> None:
    """Render what camera-motion's tasks take that is not there yet; each seed's own test clips."""
    if data != "camera-motion":
        return
    place = folder / "clips"
    _render(place / f"train-{size.train}.npy", "train", range(size.train), workers)
    _render(place / f"val-{size.val}.npy", "val", range(size.val), workers)
    for seed in seeds:
        mine = range(seed * size.test, (seed + 1) * size.test)
        _render(place / f"test{seed}-{size.test}.npy", "test", mine, workers)


def _render(path: Path, split: str, which: range, workers: int) -> None:
    label = path.with_stem(f"{path.stem}-label")
    if path.exists() and label.exists():
        return
    log.info("rendering %d clips of the %s split", len(which), split)
    data = open_data("camera-motion", split, SPEC, DataSettings(clips=which.stop))
    held = hold(data, workers, which.start)
    for place, array in ((label, held.label), (path, held.clips)):
        with output.whole_file(place) as temporary, temporary.open("wb") as file:
            np.save(file, array)


def _rendered(folder: Path, name: str, count: int) -> Held:
    """Return rendered clips, mapped into memory, so that processes share them."""
    clips = np.load(folder / f"{name}-{count}.npy", mmap_mode="r")
    return Held(clips, np.load(folder / f"{name}-{count}-label.npy"), LABELS)


def hold(data: DataSet, workers: int = 1, first: int = 0) -> Held:
    """Read a data set into memory from clip `first` on, by so many processes."""
    every = range(first, len(data))
    if workers == 1:
        items = [data[i] for i in every]
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            items = list(pool.map(data.__getitem__, every, chunksize=50))
    label = np.array([label for _, label in items], np.int64)
    return Held(np.stack([clip for clip, _ in items]), label, data.labels)


def ut_interaction(folder: Path, fold: int, size: Size, where: Path, device: str) -> Task:
    """Return a fold, 0 to 2, of UT-Interaction, a folder of whose classes is at `where`."""
    if fold not in range(FOLDS):
        raise SettingError(f"fold {fold} of UT-Interaction: there are 0 to {FOLDS - 1}.")
    place = _links(folder / f"fold{fold}", fold, where)
    train, val, test = (open_data(str(place), split, SPEC) for split in ("train", "val", "test"))
    model = ModelSettings(ARCH, WIDTH, EXPERTS, len(train.labels))
    budgets, how = (size.ut_tflops, size.ut_tflops), {"batch": 16}
    return Task(
        f"fold{fold}", model, SPEC, train, hold(val), hold(test), EPS, *budgets, size.steps, how,
        device, size.attack_batch,
    )  # fmt: skip


def _links(place: Path, fold: int, where: Path) -> Path:
    videos = sorted(where.glob("*/*.mp4"))
    found = {path: match[0] for path in videos if (match := SEQUENCE.search(path.name))}
    if not found:
        raise SettingError(f"{where} holds no <class>/*seqNN*.mp4: give UT-Interaction's folder.")
    sequences = sorted(set(found.values()))
    part = {name: PARTS[(i - fold) % len(PARTS)] for i, name in enumerate(sequences)}
    for path, sequence in found.items():
        link = place / part[sequence] / path.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(path.resolve())
    return place


def open_task(
    data: str, folder: Path, seed: int, size: Size, where: Path | None, device: str
) -> Task:
    """Return the task of a seed (or fold).

    Raises:
        SettingError: no such data.
    """
    if data == "camera-motion":
        return camera_motion(folder / "clips", seed, size, device)
    if data == "ut-interaction" and where is not None:
        return ut_interaction(folder / "folds", seed, size, where, device)
    raise SettingError(
        f"data {data!r}: give camera-motion, or ut-interaction with --ut FOLDER, of its classes."
    )

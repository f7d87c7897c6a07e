"""What is measured: loaded bundles, and clips for them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vmoe import bundle as bundles
from vmoe.bundle import Bundle
from vmoe.clips import Clips, ClipSpec
from vmoe.data._textures import picture
from vmoe.errors import EngineMismatchError, SettingError
from vmoe.runtime import engine as engines
from vmoe.runtime.engine import Engine

CALLS = 4  # different clips that the rounds take in turn


@dataclass(frozen=True)
class Subject:
    """One bundle of a run.

    Attributes:
        name: the folder's name, or its path where two folders have one name.
        engine: loaded, with every part.
        baseline: it was given as --baseline.
        clips: uint8 [CALLS * batch, T, H, W, 3]; rounds take `batch` of them in turn.
        batch: clips of one call.
    """

    name: str
    engine: Engine
    baseline: bool
    clips: Clips
    batch: int

    @property
    def bundle(self) -> Bundle:
        """The manifest."""
        return self.engine.bundle

    def of_round(self, number: int) -> Clips:
        """Return the clips of a round, uint8 [batch, T, H, W, 3]."""
        at = number % CALLS * self.batch
        return self.clips[at : at + self.batch]


def random_clips(spec: ClipSpec, n: int, seed: int) -> Clips:
    """Return clips of moving textures, uint8 [N, T, H, W, 3]; the same for the same seed.

    Each shows a picture of natural statistics through a window that moves at a speed of its own.
    """
    rng = np.random.default_rng(seed)
    clips = np.empty((n, *spec.shape), np.uint8)
    for clip in clips:
        shown = picture(rng, 2 * max(spec.height, spec.width), leaves=(20, 60))
        room = np.array([shown.shape[0] - spec.height, shown.shape[1] - spec.width])
        places = np.linspace(rng.uniform(0, room), rng.uniform(0, room), spec.frames)
        for frame, (top, left) in zip(clip, np.rint(places).astype(int), strict=True):
            frame[:] = shown[top : top + spec.height, left : left + spec.width]
    return clips


def open_all(
    stack: ExitStack,
    paths: Sequence[Path],
    baselines: Sequence[Path],
    *,
    backend: str,
    device: str,
    threads: int | None,
    batch: int,
    seed: int,
    server: str | None = None,
) -> list[Subject]:
    """Load bundles and baselines; `stack` closes them.

    Raises:
        BundleError: no bundle; or a baseline whose clips no bundle takes.
        SettingError: a bundle is given twice.
    """
    names = _names([*paths, *baselines])
    read = [bundles.read(path) for path in [*paths, *baselines]]
    _check_baselines(read[: len(paths)], read[len(paths) :])
    subjects = []
    for i, (name, bundle) in enumerate(zip(names, read, strict=True)):
        engine = engines.load(bundle, backend, device, threads, all_parts=True, server=server)
        stack.enter_context(engine)
        clips = random_clips(bundle.spec, CALLS * batch, seed)
        subjects.append(Subject(name, engine, i >= len(paths), clips, batch))
    return subjects


def _names(paths: Sequence[Path]) -> list[str]:
    folders = [path.resolve() for path in paths]
    for path, folder in zip(paths, folders, strict=True):
        if folders.count(folder) > 1:
            raise SettingError(f"{path} is given twice; what is compared must differ.")
    names = [folder.name for folder in folders]
    return [n if names.count(n) == 1 else str(p) for n, p in zip(names, paths, strict=True)]


def _check_baselines(read: Sequence[Bundle], baselines: Sequence[Bundle]) -> None:
    shapes = {bundle.spec.shape for bundle in read}
    for baseline in baselines:
        if baseline.spec.shape not in shapes:
            wanted = " or ".join(_clip(shape) for shape in sorted(shapes))
            raise EngineMismatchError(
                f"baseline {baseline.path} takes clips of {_clip(baseline.spec.shape)}, the bundle "
                f"{wanted}. Export the counterpart of the same checkpoint: vmoe-export CKPT "
                "--counterpart --out DIR"
            )


def _clip(shape: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape[:3])

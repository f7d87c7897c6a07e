"""What is measured: loaded bundles, and clips for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vmoe import bundle as bundles
from vmoe.bundle import Bundle
from vmoe.clips import Clips, ClipSpec
from vmoe.data._textures import picture
from vmoe.errors import BundleError, CorruptBundleError, EngineMismatchError, SettingError
from vmoe.runtime import engine as engines
from vmoe.runtime.engine import Engine

CALLS = 4  # different clips that the rounds take in turn
TORCH = "torch"
COMPILED = "torch-compile"
WORDS = (TORCH, COMPILED)  # baselines that are no folder


@dataclass(frozen=True)
class Wanted:
    """One bundle of a run, before it is loaded.

    Attributes:
        name: the folder's name, or its path where two folders have one name; or `torch`,
            `torch-compile`: the first bundle's own twin.
        bundle: the manifest; of a bundle that is damaged, the error that says how.
        baseline: it was given as --baseline.
        twin: it is run in the place of the bundle's parts.
    """

    name: str
    bundle: Bundle | BundleError
    baseline: bool
    twin: bool = False

    def read(self) -> Bundle:
        """Return the manifest.

        Raises:
            BundleError: it is damaged.
        """
        if isinstance(self.bundle, BundleError):
            raise self.bundle
        return self.bundle


@dataclass(frozen=True)
class How:
    """With what bundles are loaded.

    Attributes:
        backend: a file of runtime/engines, or auto; of a baseline `torch` it is torch.
        device: auto, cpu or cuda:N.
        server: HOST:PORT of a Triton server; None for none.
        cuda_graph: whether parts run as CUDA graphs; None is the backend's own choice.
    """

    backend: str = "auto"
    device: str = "auto"
    server: str | None = None
    cuda_graph: bool | None = None

    def load(self, wanted: Wanted, threads: int | None) -> Engine:
        """Load every part of a bundle.

        Raises:
            VmoeError: as `vmoe.runtime.engine.load`.
        """
        return engines.load(
            wanted.read(),
            TORCH if wanted.twin else self.backend,
            self.device,
            threads,
            all_parts=True,
            server=None if wanted.twin else self.server,
            compiled=wanted.twin and wanted.name == COMPILED,
            cuda_graph=None if wanted.twin else self.cuda_graph,
        )


@dataclass(frozen=True)
class Subject:
    """One bundle of a run.

    Attributes:
        name: the folder's name, or its path where two folders have one name.
        engine: loaded, with every part.
        baseline: it was given as --baseline.
        clips: uint8 [CALLS * largest batch, T, H, W, 3]; rounds take `batch` of them in turn.
        batch: clips of one call.
        threads: CPU threads of the engine; None is its own choice.
        reopen: loads it once more, with so many threads.
    """

    name: str
    engine: Engine
    baseline: bool
    clips: Clips
    batch: int
    threads: int | None = None
    reopen: Callable[[int], Engine] | None = None

    @property
    def bundle(self) -> Bundle:
        """The manifest."""
        return self.engine.bundle

    def at(self, batch: int) -> Subject:
        """Return it with so many clips in a call, no more than it was opened for."""
        return replace(self, batch=batch)

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


def wanted(paths: Sequence[Path], baselines: Sequence[Path | str]) -> list[Wanted]:
    """Read the manifests of bundles and baselines.

    What is no bundle is refused before any work; what is one, but damaged, when it is loaded.

    Args:
        paths: folders, at least one.
        baselines: folders; or `torch`, `torch-compile`: the twin that the first bundle carries.

    Raises:
        BundleError: no bundle; or a baseline whose clips no bundle takes.
        SettingError: a bundle is given twice.
    """
    folders = [Path(baseline) for baseline in baselines if str(baseline) not in WORDS]
    words = [str(baseline) for baseline in baselines if str(baseline) in WORDS]
    for word in words:
        if words.count(word) > 1:
            raise SettingError(f"--baseline {word} is given twice; what is compared must differ.")
    names = _names([*paths, *folders], taken=words)
    read = [_read(path) for path in [*paths, *folders]]
    _check_baselines(read[: len(paths)], read[len(paths) :])
    found = [
        Wanted(name, bundle, i >= len(paths))
        for i, (name, bundle) in enumerate(zip(names, read, strict=True))
    ]
    return [*found, *(Wanted(word, read[0], True, twin=True) for word in words)]


def open_one(
    stack: ExitStack, want: Wanted, how: How, threads: int | None, batch: int, seed: int
) -> Subject:
    """Load one bundle for calls of up to `batch` clips; `stack` closes it.

    Raises:
        VmoeError: as `vmoe.runtime.engine.load`.
    """
    engine = stack.enter_context(how.load(want, threads))
    clips = random_clips(engine.bundle.spec, CALLS * batch, seed)

    def reopen(threads: int) -> Engine:
        return how.load(want, threads)

    return Subject(want.name, engine, want.baseline, clips, batch, threads, reopen)


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
    """Load bundles and baselines, one after another; `stack` closes them.

    Raises:
        BundleError: no bundle; or a baseline whose clips no bundle takes.
        SettingError: a bundle is given twice.
    """
    how = How(backend, device, server)
    return [open_one(stack, want, how, threads, batch, seed) for want in wanted(paths, baselines)]


def _read(path: Path) -> Bundle | BundleError:
    try:
        return bundles.read(path)
    except (CorruptBundleError, EngineMismatchError) as e:
        return e


def _names(paths: Sequence[Path], taken: Sequence[str]) -> list[str]:
    folders = [path.resolve() for path in paths]
    for path, folder in zip(paths, folders, strict=True):
        if folders.count(folder) > 1:
            raise SettingError(f"{path} is given twice; what is compared must differ.")
    names = [*(folder.name for folder in folders), *taken]
    return [
        name if names.count(name) == 1 else str(folder if name in taken else path)
        for name, path, folder in zip(names, paths, folders, strict=False)
    ]


def _check_baselines(
    read: Sequence[Bundle | BundleError], baselines: Sequence[Bundle | BundleError]
) -> None:
    shapes = {bundle.spec.shape for bundle in read if isinstance(bundle, Bundle)}
    for baseline in baselines:
        if isinstance(baseline, Bundle) and shapes and baseline.spec.shape not in shapes:
            wanted = " or ".join(_clip(shape) for shape in sorted(shapes))
            raise EngineMismatchError(
                f"baseline {baseline.path} takes clips of {_clip(baseline.spec.shape)}, the bundle "
                f"{wanted}. Export the counterpart of the same checkpoint: vmoe-export CKPT "
                "--counterpart --out DIR"
            )


def _clip(shape: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape[:3])

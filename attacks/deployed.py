"""Transfer: clips made on the twin, replayed on what was deployed.

A bundle carries the twin that it was exported from; gradients come from there. Another twin may
stand in (`--twin`), and is then named as foreign: its clips say how far an attacker gets without
the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from vmoe import bundle as bundles
from vmoe import checkpoint
from vmoe.attacks.judge import Judge, of_twin
from vmoe.bundle import Bundle
from vmoe.checkpoint import Checkpoint
from vmoe.clips import ClipSpec
from vmoe.errors import BundleError, SettingError
from vmoe.runtime.engine import Engine, load


@dataclass(frozen=True)
class Target:
    """What is attacked: a twin, an engine, or both.

    Attributes:
        path: as the user named it.
        twin: where the gradients come from; None where only an engine replays saved clips.
        twin_path: its file.
        twin_sha256: its hash.
        foreign: the engine was exported from another twin.
        engine: what was deployed; None of a checkpoint.
        device: where the twin is.
    """

    path: Path
    twin: Checkpoint | None
    twin_path: Path | None
    twin_sha256: str
    foreign: bool
    engine: Engine | None
    device: torch.device

    @property
    def spec(self) -> ClipSpec:
        """The clips that it takes."""
        return self._any.spec if isinstance(self._any, Bundle) else self._any.twin.spec

    @property
    def labels(self) -> tuple[str, ...]:
        """The K names."""
        return self._any.labels

    @property
    def group(self) -> str:
        """The regular expression that split a folder when the twin was trained; empty for none."""
        return "" if self.twin is None else self.twin.group

    @property
    def fold(self) -> int:
        """The official split that the twin was trained on, where its data set has several."""
        return 1 if self.twin is None else self.twin.fold

    @property
    def _any(self) -> Bundle | Checkpoint:
        if self.engine is not None:
            return self.engine.bundle
        assert self.twin is not None  # `open_target` gives at least one
        return self.twin

    @property
    def judges(self) -> dict[str, Judge]:
        """The models that judge clips, by name."""
        judges: dict[str, Judge] = {}
        if self.twin is not None:
            judges["twin"] = of_twin(self.twin.twin, self.device)
        if self.engine is not None:
            judges["engine"] = self.engine.infer
        return judges

    def __enter__(self) -> Target:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.engine is not None:
            self.engine.close()


def open_target(
    path: Path, twin: Path | None = None, device: str = "auto", *, replay: bool = False
) -> Target:
    """Open a checkpoint, or a bundle with its twin.

    Args:
        path: a checkpoint's file, or a bundle's folder.
        twin: a checkpoint in place of the bundle's own twin.
        device: of twin and engine: auto, cpu or cuda:N.
        replay: clips are only replayed: a bundle without a twin will do.

    Raises:
        BundleError: a damaged bundle, or one without a twin where one is needed.
        SettingError: a twin that takes other clips, or gives other labels, than the bundle.
        VmoeError: a checkpoint that cannot be read.
    """
    where = checkpoint.device(device)
    if not path.is_dir():
        if twin is not None:
            raise SettingError(f"{path} is a checkpoint, a twin itself; --twin goes with a bundle.")
        read = checkpoint.load(path, where)
        return Target(path, read, path, bundles.sha256(path), False, None, where)
    bundle = bundles.read(path)
    file = twin or (path / bundle.twin["file"] if "file" in bundle.twin else None)
    if file is None and not replay:
        raise BundleError(f"{path} carries no twin to attack: name one with --twin CKPT.")
    made = None if file is None else checkpoint.load(file, where)
    digest = bundle.twin.get("sha256", "") if file is None else bundles.sha256(file)
    if made is not None and file is not None:
        same_clips(
            (f"twin {file}", made.twin.spec, made.labels),
            (f"bundle {bundle.path}", bundle.spec, bundle.labels),
            "choose a twin of the same clips and labels",
        )
    foreign = digest != bundle.twin.get("sha256")
    engine = load(bundle, device=device)
    return Target(path, made, file, digest, foreign, engine, where)


Takes = tuple[str, ClipSpec, tuple[str, ...]]  # what something is called; its clips and labels


def same_clips(ours: Takes, theirs: Takes, advice: str) -> None:
    """Refuse a twin or saved clips whose clip spec or labels are not the target's.

    Raises:
        SettingError: names the first difference, then the advice.
    """
    (what, spec, labels), (whose, its_spec, its_labels) = ours, theirs
    # mean and std are applied inside of the model: they may differ
    for name in ("frames", "spacing_s", "height", "width", "resize", "interpolation"):
        one, other = getattr(spec, name), getattr(its_spec, name)
        if one != other:
            raise SettingError(f"{what} has clips of {name} {one}, {whose} of {other}: {advice}.")
    if labels != its_labels:
        raise SettingError(
            f"{what} has labels {_few(labels)}, {whose} has {_few(its_labels)}: {advice}."
        )


def _few(labels: tuple[str, ...]) -> str:
    return ", ".join(labels[:4]) + (", ..." if len(labels) > 4 else f" ({len(labels)})")

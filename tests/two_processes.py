"""Trains a tiny twin in float64 under torchrun, or alone; what it ends with goes into a file.

In float64, so that an attack's sign steps do not turn the last bit of a sum into a whole step.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from vmoe import batches, checkpoint, registry
from vmoe.attacks import ranks
from vmoe.clips import ClipSpec
from vmoe.data import DataSettings, open_data
from vmoe.loading import Loader
from vmoe.models import ModelSettings, build
from vmoe.train import loop, router_start, together
from vmoe.train.planned import RECIPES
from vmoe.train.state import State

METHODS = ("j-tlat", "aat-m")  # every pass, every term, and one that takes both sides
STATISTICS = {"j-tlat": "batch", "aat-m": "running"}
_to_tensor = batches.to_tensor


def environment() -> dict[str, str]:
    """Return the environment to run this file in: it imports what the tests import."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def double(clips, device="cpu"):  # type: ignore[no-untyped-def]
    return _to_tensor(clips, device).double()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    batches.to_tensor = double
    here, spec = ranks.here(), ClipSpec(2, 0.1, 16, 16)
    train = open_data("camera-motion", "train", spec, DataSettings(clips=14))
    val = open_data("camera-motion", "val", spec, DataSettings(clips=10))
    with together.joined(here, torch.device("cpu")):
        for method in METHODS:
            module = registry.load(RECIPES, method, "recipe")
            settings = module.Settings(steps=2)
            how = loop.LoopSettings(
                epochs=1, batch=6, val_steps=1, ema=0.9, clip_norm=0.5, on_collapse="warn",
                bn=STATISTICS[method],
            )  # fmt: skip
            twin = build(ModelSettings("tsm", 0.1, 3, 10), spec, 1).double()
            router_start.spread(twin, train)
            state = loop.start(twin, how)
            recipe = loop.Recipe(lambda done, m=module, s=settings: m.walks(s, done))
            share = (here.rank, here.world)
            with Loader(train, how.batch, share=share) as loader:
                for _ in loop.run(state, recipe, loader, val, how, here):
                    pass
            if here.first:
                keep(state, folder / f"{method}-{here.world}.safetensors")


def keep(state: State, path: Path) -> None:
    """Write weights, their average, and what was logged, but for how long it took."""
    tensors = {f"twin.{name}": t for name, t in state.twin.state_dict().items()}
    tensors |= {f"kept.{name}": t for name, t in state.kept.state_dict().items()}
    row = {k: v for k, v in state.rows[-1].items() if k not in ("epoch_s", "train_s", "wait_share")}
    checkpoint.write_tensors(tensors, row, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

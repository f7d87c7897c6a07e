"""The models of benchmarks/attacks.py, from scratch: vmoe-train's own commands, and one router.

Four come from vmoe-train on camera-motion (TSM-R18 experts of width 0.125, clips 8x64x64). The
fifth, `fragile`, is made to have a small router margin, since none of those has one: the experts
of `at-m` as they are, and its router, whose last layer is set, not trained (`refit`), to look where
clips hardly differ and a perturbation still reaches. It is artificial, and says so by its name.
"""

from __future__ import annotations

import dataclasses
import logging
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vmoe import checkpoint
from vmoe.batches import to_tensor
from vmoe.data import DataSettings, open_data
from vmoe.errors import VmoeError
from vmoe.models import VideoMoE

log = logging.getLogger("vmoe")

TRAIN = "camera-motion --arch tsm --width 0.125 --no-report --val-clips 150 "
AT = "--eps 4/255 --val-eps 4/255 "
COMMANDS = {
    "narrow": "--experts 1 --method standard --clips 6000 --epochs 5 --val-steps 0",
    "standard": "--method standard --clips 3000 --epochs 2 --lr 1e-3 --val-steps 0",
    "narrow-at": "--experts 1 --method at-m --clips 4000 --epochs 3 " + AT,
    "at-m": "--method at-m --clips 2500 --epochs 2 --lr 2e-3 " + AT,
    "balanced": "--method at-m --balance 3 --clips 2500 --epochs 2 --lr 2e-3 " + AT,
    "j-tlat": "--method j-tlat --clips 2000 --epochs 3 --lr 2e-3 " + AT,
}
INIT_FROM = {"standard": "narrow", "narrow-at": "narrow", "at-m": "narrow-at",
             "balanced": "narrow-at", "j-tlat": "narrow-at"}  # fmt: skip
MODELS = ("standard", "at-m", "balanced", "fragile", "j-tlat")
CLIPS, BATCH = 600, 50  # from which the features' variance is taken
DEAD = 1e-5  # a direction of less variance, as a share of the largest, is dead


def train(folder: Path, seed: int) -> dict[str, Path]:
    """Train what a folder does not hold yet; return the checkpoints by name.

    Raises:
        VmoeError: vmoe-train failed.
    """
    for name, options in COMMANDS.items():
        out = folder / name
        if (out / "best.safetensors").is_file():
            continue
        line = f"{TRAIN}{options} --seed {seed}"
        if name in INIT_FROM:
            line += f" --init-from {folder / INIT_FROM[name] / 'best.safetensors'}"
        words = [*shlex.split(line), "--out", str(out)]
        log.info("vmoe-train %s", shlex.join(words))
        main = "from vmoe.train.cli import main; main()"
        if subprocess.run([sys.executable, "-c", main, *words], check=False).returncode:
            raise VmoeError(f"vmoe-train did not finish {name}.")
    paths = {name: folder / name / "best.safetensors" for name in MODELS}
    if not paths["fragile"].is_file():
        fragile(paths["at-m"], paths["fragile"], seed)
    return paths


def fragile(source: Path, path: Path, seed: int) -> None:
    """Set the router of a checkpoint to a small margin, and save it."""
    held = checkpoint.load(source)
    refit(held.twin, seed)
    recipe = {**held.recipe, "router": f"last layer set to a small margin, seed {seed}"}
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(dataclasses.replace(held, recipe=recipe, results={}), path)


def refit(twin: VideoMoE, seed: int) -> None:
    """Give the router scores of small margin: along the directions that hardly vary over clips.

    Its last layer takes as many directions of its features as there are experts, those of least
    variance over training clips (but for dead ones), each centred and scaled to variance 1.
    """
    assert isinstance(twin.router, nn.Sequential)
    *others, last = twin.router[1].children()
    assert isinstance(last, nn.Linear)
    features = nn.Sequential(twin.router[0], *others)
    data = open_data("camera-motion", "train", twin.spec, DataSettings(clips=CLIPS, seed=seed))
    clip = to_tensor(np.stack([data[i][0] for i in range(CLIPS)]))
    with torch.no_grad():
        seen = torch.cat([features(some) for some in clip.split(BATCH)]).double()
        variance, directions = torch.linalg.eigh(torch.cov(seen.T))
        alive = torch.nonzero(variance > DEAD * variance[-1]).flatten()[: len(twin.experts)]
        weight = (directions[:, alive] / variance[alive].sqrt()).T
        last.weight.copy_(weight)
        last.bias.copy_(-weight @ seen.mean(dim=0))

"""vmoe-attack: attack a twin, and what was deployed from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from vmoe import cli
from vmoe.attacks import flags as given_by
from vmoe.attacks import heap, presets, ranks, run
from vmoe.attacks.asked import Asked, as_before, compared
from vmoe.attacks.flags import RunSettings
from vmoe.attacks.topics import TOPICS


@cli.command(
    "vmoe-attack",
    "vmoe-attack runs/train/mine/best.safetensors --attack pgd,apgd-ce,j-tlga --curve",
    "vmoe-attack runs/export/fp32 --compare runs/export/int8 --n 100 --save-adv clips",
    "vmoe-attack runs/export/mine --video in.mp4 --save-adv out.mkv",
    topics=TOPICS,
)
@click.argument("target", type=click.Path(path_type=Path), nargs=-1)
@cli.options(RunSettings)
@given_by.every_method_option
@click.option("--preset", type=cli.NameType(presets.PRESETS), help="Named values, under flags.")
@click.option("--twin", type=click.Path(path_type=Path), help="Checkpoint to make the clips on.")
@click.option(
    "--compare", multiple=True, type=click.Path(path_type=Path),
    help="Another bundle of the same twin, attacked beside TARGET; give several, or --compare A B.",
)  # fmt: skip
@click.option("--save-adv", type=click.Path(path_type=Path), help="Folder for the clips made.")
@click.option("--load-adv", type=click.Path(path_type=Path), help="Replay the clips of a folder.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder. [default: runs/attack/NAME]")
@click.option("--md", type=click.Path(path_type=Path), help="Write the Markdown report here, too.")
@click.option("--curve", is_flag=True, help="Draw robust accuracy against eps (PNG and SVG).")
@click.option(
    "--sanity/--no-sanity", default=True, help="Check the attacks themselves. [default: on]"
)
@click.option(
    "--gate-robust", type=click.FloatRange(0, 100),
    help="Exit 3 where more clips, in per cent, are broken on an engine, on the twin by nothing.",
)  # fmt: skip
@click.option(
    "--codec", metavar="NAME:QUALITY",
    help="What clips go through before any model: h264:CRF (0-51), mjpeg:QUALITY (1-100), none.",
)  # fmt: skip
@click.option("--camera-size", metavar="WxH", help="Clips are coded at this camera's size.")
@click.option(
    "--eot", type=click.IntRange(1, 9), help="Of --codec: qualities that a gradient is the mean of."
)
@click.option(
    "--video", type=click.Path(path_type=Path),
    help="Perturb a whole video, every window that vmoe-run would cut; --save-adv OUT.mkv.",
)  # fmt: skip
@click.option("--to-label", help="Of --video: the label that its windows are to get.")
@click.option("--resume", is_flag=True, help="Go on where --out was interrupted.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier report.")
@click.option("--dry-run", is_flag=True, help="Show what would be done; attack nothing.")
@cli.seed_option
@cli.device_option
@cli.config_option
@cli.json_option
def main(**given: Any) -> None:
    """Attack TARGET: a checkpoint, or a bundle, through its twin and through its engine.

    Without TARGET: the newest of runs/, else the model that ships. A run that was interrupted goes
    on with --resume and its --out. Several processes share one, float32 results bit for bit:
    torchrun --nproc-per-node 4 --no-python -- vmoe-attack ... (the -- keeps --n from torchrun).
    """
    given["target"], given["compare"] = compared(given["target"], given["compare"])
    own = [field.name for field in dataclasses.fields(Asked) if field.name != "flags"]
    asked = Asked(**{name: given.pop(name) for name in own}, flags=given)
    asked.refuse_contradictions()
    heap.keep()
    run.attack(as_before(asked) if asked.resume else asked, ranks.here())


if __name__ == "__main__":
    main()

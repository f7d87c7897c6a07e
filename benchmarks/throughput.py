r"""How much of a training's time is the model's: vmoe-train's loop against bare passes.

    python benchmarks/throughput.py --quick
    python benchmarks/throughput.py --out benchmarks/results/throughput.json \
        --out benchmarks/results/throughput.md --overwrite

Bare is what adversarial training by PGD cannot do without: as many gradients with respect to the
clips and a forward pass of the result, then one update, on batches that are tensors already. The
model is the reproduction's, in one thread; its clips are random, which costs as much.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import figures
import numpy as np
import torch
from cells import Held
from figures import Figure
from tasks import ARCH, EXPERTS, SPEC, WIDTH
from torch import Tensor
from torch.nn.functional import cross_entropy

from vmoe import cli
from vmoe.attacks import heap
from vmoe.batches import Batch, batches
from vmoe.data.camera_motion import LABELS
from vmoe.loading import Loader
from vmoe.models import ModelSettings, VideoMoE, build
from vmoe.runtime.bench import context
from vmoe.train import loop
from vmoe.train.recipes import at_m

REACH = 0.9
CLIPS, BATCH, STEPS, ROUNDS = 640, 32, 3, 5
MODEL = ModelSettings(ARCH, WIDTH, EXPERTS, len(LABELS))


def figure(*, quick: bool = False) -> Figure:
    """Return CPU time of the bare passes over that of the loop: medians of interleaved rounds."""
    count, rounds = (CLIPS // 2, 1) if quick else (CLIPS, ROUNDS)
    drawn = np.random.default_rng(0)
    clips = drawn.integers(0, 256, (count, *SPEC.shape), dtype=np.uint8)
    data = Held(clips, np.arange(count) % len(LABELS), LABELS)
    ready = list(batches(data, BATCH))
    loops, bare = [], []
    for _ in range(rounds):
        loops.append(_cpu_s(lambda: _ours(data)))
        bare.append(_cpu_s(lambda: _bare(ready)))
    ratios = [b / a for a, b in zip(loops, bare, strict=True)]
    return Figure(
        "training_throughput", statistics.median(bare) / statistics.median(loops), "ratio", REACH,
        "higher", rounds, (max(ratios) - min(ratios)) / 2,
        more={"minima": min(bare) / min(loops), "ms_a_clip": 1000 * min(loops) / count},
    )  # fmt: skip


def _cpu_s(work: Callable[[], None]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def _ours(data: Held) -> None:
    how = loop.LoopSettings(epochs=1, batch=BATCH, val_steps=0)
    settings = at_m.Settings(steps=STEPS)
    state = loop.start(build(MODEL, SPEC), how)
    few = Held(data.clips[:2], data.label[:2], data.labels)
    with Loader(data, BATCH) as loader:
        recipe = loop.Recipe(lambda done: at_m.walks(settings, done))
        for _ in loop.run(state, recipe, loader, few, how):
            pass


def _bare(ready: list[Batch]) -> None:
    twin = build(MODEL, SPEC)
    optimiser = torch.optim.AdamW(twin.parameters(), lr=3e-3, weight_decay=1e-3)
    for batch in ready:
        clip = _attacked(twin.eval().requires_grad_(False), batch)
        twin.train().requires_grad_(True)
        optimiser.zero_grad(set_to_none=True)
        loss = cross_entropy(twin(clip).logits, batch.label)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 5.0)
        optimiser.step()


def _attacked(twin: VideoMoE, batch: Batch) -> Tensor:
    clip = batch.clip
    for _ in range(STEPS):
        at = clip.detach().requires_grad_()
        loss = cross_entropy(twin(at).logits, batch.label, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, at)
        clip = (at.detach() + 0.02 * gradient.sign()).clamp(0, 1)
    with torch.no_grad():
        twin(clip)
    return clip


@cli.command(
    "throughput.py",
    "python benchmarks/throughput.py --quick",
    "python benchmarks/throughput.py --json",
)
@click.option("--quick", is_flag=True, help="Under a minute; tells the direction.")
@figures.result_options
def main(quick: bool, out: tuple[Path, ...], overwrite: bool, as_json: bool) -> None:
    """Measure how much of a training's CPU time is the model's."""
    figures.check_files(out, overwrite=overwrite)
    torch.set_num_threads(1)
    heap.keep()  # as vmoe-train does
    machine = context.read()
    found = [figure(quick=quick)]
    figures.say(found, as_json=as_json)
    figures.write(out, "Training throughput", found, machine, {}, {})


if __name__ == "__main__":
    main()

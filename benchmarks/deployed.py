"""What an attack with the engine in the loop costs.

    adaptive_vs_bare_passes   CPU time of adaptive PGD-k, over k forward passes of the engine and k
                              forward and backward passes of where its gradients come from, the
                              engine's route forced; both on uint8 clips, in one batch. The attack
                              asks the engine k + 2 times: about the clean clip, about k points
                              that it steps from, and about the last
    adaptive_batched          CPU time of a clip in a batch, over that of a clip alone

Forms are interleaved; a value is the ratio of the medians, its spread half of the range of the
ratios of single rounds, and `minima` the ratio of the minima.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import figures
import numpy as np
import torch
from figures import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy

from vmoe import cli, latest
from vmoe.attacks import heap
from vmoe.attacks.deployed import How, Target, open_target
from vmoe.attacks.loop import as_found
from vmoe.attacks.methods import pgd
from vmoe.attacks.modes import Deployed, to_uint8
from vmoe.batches import to_tensor
from vmoe.runtime.bench import context

BARE, BATCHED = 1.1, 1.0  # what is to be reached
BATCH, STEPS, ROUNDS = 8, 20, 25
QUICK_STEPS, QUICK_ROUNDS = 5, 3


def bare(target: Target, model: Deployed, clip: Tensor, label: Tensor, steps: int) -> None:
    """Make the passes that adaptive PGD cannot do without."""
    (engine,), source = target.engines.values(), model.twin
    assert source is not None
    at = clip.clone()
    with as_found(model):
        for _ in range(steps):
            seen = engine.infer(to_uint8(at))
            at.requires_grad_()
            out = source(at, "straight-through", torch.from_numpy(seen.route))
            torch.autograd.grad(cross_entropy(out.logits, label, reduction="sum"), at)
            at = at.detach()


def times(forms: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Return the CPU seconds of each form, round by round, after one that warms up."""
    held: list[list[float]] = [[] for _ in forms]
    for number in range(rounds + 1):
        for form, took in zip(forms, held, strict=True):
            begin = time.process_time()
            form()
            if number:
                took.append(time.process_time() - begin)
    return held


def ratio(name: str, reach: float, ours: list[float], theirs: list[float], **more: float) -> Figure:
    """Return how much longer one form takes than another."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    value = statistics.median(ours) / statistics.median(theirs)
    more |= {"minima": min(ours) / min(theirs)}
    spread = (max(each) - min(each)) / 2
    return Figure(name, value, "ratio", reach, n=len(ours), spread=spread, more=more)


def measure(target: Target, steps: int, rounds: int) -> list[Figure]:
    """Measure both."""
    model = target.deployed(adaptive=True)["engine"].model
    drawn = np.random.default_rng(0)
    clip = to_tensor(drawn.integers(0, 256, (BATCH, *target.spec.shape), dtype=np.uint8))
    label = torch.arange(BATCH) % len(target.labels)
    how = pgd.Settings(steps=steps, early_stop=False, grid=True)

    def one_by_one() -> None:
        for i in range(BATCH):
            pgd.attack(model, clip[i : i + 1], label[i : i + 1], how)

    forms = [
        lambda: pgd.attack(model, clip, label, how),
        lambda: bare(target, model, clip, label, steps),
        one_by_one,
    ]  # fmt: skip
    ours, theirs, alone = times(forms, rounds)
    return [
        ratio("adaptive_vs_bare_passes", BARE, ours, theirs, k=steps, batch=BATCH),
        ratio("adaptive_batched", BATCHED, ours, alone, k=steps, batch=BATCH),
    ]


@cli.command(
    "deployed.py",
    "python benchmarks/deployed.py --quick",
    "python benchmarks/deployed.py --bundle runs/export/int8 --out deployed.md",
    "python benchmarks/deployed.py --out benchmarks/results/deployed.json",
)
@click.option("--bundle", type=click.Path(path_type=Path), help="[default: the one that ships]")
@click.option("--quick", is_flag=True, help="Under a minute; tells the direction.")
@figures.result_options
def main(
    bundle: Path | None, quick: bool, out: tuple[Path, ...], overwrite: bool, as_json: bool
) -> None:
    """Measure what an attack with the engine in the loop costs, beside its passes."""
    figures.check_files(out, overwrite=overwrite)
    heap.keep()  # as vmoe-attack does
    machine = context.read()
    steps, rounds = (QUICK_STEPS, QUICK_ROUNDS) if quick else (STEPS, ROUNDS)
    with open_target(bundle or latest.shipped(), How(device="cpu")) as target:
        (engine,) = target.engines.values()
        found = measure(target, steps, rounds)
        record = {"bundle": engine.bundle.path.name, "backend": engine.backend_name}
    figures.say(found, as_json=as_json)
    figures.write(out, "Attacks on what was deployed", found, machine, {}, record)


if __name__ == "__main__":
    main()

"""How much of a training's time is the model's: vmoe-train's loop against bare passes.

Bare is what adversarial training by PGD cannot do without: as many gradients with respect to the
clips and a forward pass of the result, then one update, on batches that are tensors already.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from cells import Held, Task, Turns
from figures import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy

from vmoe.batches import Batch, batches
from vmoe.loading import Loader
from vmoe.models import VideoMoE, build
from vmoe.train import loop
from vmoe.train.recipes import at_m

REACH = 0.9
CLIPS, BATCH, STEPS = 320, 32, 3


def figure(task: Task, rounds: int) -> Figure:
    """Return CPU time of the bare passes over that of the loop: medians of interleaved rounds."""
    data = task.train.of if isinstance(task.train, Turns) else task.test
    some = Held(data.clips[:CLIPS], data.label[:CLIPS], data.labels)
    ready = list(batches(some, BATCH))
    loops, bare = [], []
    for _ in range(rounds):
        loops.append(_cpu_s(lambda: _ours(task, some)))
        bare.append(_cpu_s(lambda: _bare(task, ready)))
    ratios = [b / a for a, b in zip(loops, bare, strict=True)]
    return Figure(
        "training_throughput", statistics.median(bare) / statistics.median(loops), "ratio", REACH,
        "higher", rounds, (max(ratios) - min(ratios)) / 2,
        more={"minima": min(bare) / min(loops), "ms_a_clip": 1000 * min(loops) / len(some)},
    )  # fmt: skip


def _cpu_s(work: Callable[[], None]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def _ours(task: Task, data: Held) -> None:
    how = loop.LoopSettings(epochs=1, batch=BATCH, val_steps=0)
    settings = at_m.Settings(steps=STEPS)
    state = loop.start(build(task.model, task.spec), how)
    few = Held(data.clips[:2], data.label[:2], data.labels)
    with Loader(data, BATCH) as loader:
        recipe = loop.Recipe(lambda done: at_m.walks(settings, done))
        for _ in loop.run(state, recipe, loader, few, how):
            pass


def _bare(task: Task, ready: list[Batch]) -> None:
    twin = build(task.model, task.spec)
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

"""Attacks against each other on one model, at the same number of gradient evaluations.

What is given is a budget of gradients per clip; what is spent (early stop leaves out clips that
are broken) is counted by hooks on the router and on every expert, so that a pass by route_grad
`all` or `soft`, which runs every expert, shows as what it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vmoe.attacks.methods import load
from vmoe.models import VideoMoE, flops

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Contestant:
    """One attack with its settings, or the worst of several.

    Attributes:
        name: in the table.
        attack: its name among the methods.
        given: gradients of the whole model for each clip.
        values: settings, `steps` among them.
        team: names of other contestants; then it is their worst per sample, and attacks nothing.
        extra: whether it stands outside of the equal budget, such as one that runs every expert
            at each of its gradients.
    """

    name: str
    attack: str
    given: int
    values: Mapping[str, Any] = field(default_factory=dict)
    team: tuple[str, ...] = ()
    extra: bool = False


class Spent(NamedTuple):
    """Passes per clip, forward and backward, through the router and through any expert.

    Attributes:
        gradients: of the whole model; by route_grad `all` and `soft` each runs every expert.
        gflops: of them all, per clip; a backward pass to the clip costs as much as a forward one.
        cpu_s: CPU time per clip.
    """

    router_forwards: float
    router_backwards: float
    expert_forwards: float
    expert_backwards: float
    gflops: float
    cpu_s: float
    gradients: float

    def __add__(self, other: object) -> Spent:
        """Add what another spent."""
        assert isinstance(other, Spent)
        return Spent(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Found:
    """What one contestant reached.

    Attributes:
        contestant: who.
        broken: which clips are wrong at the end, those that were wrong before included, [N].
        flipped: which changed their route, [N].
        spent: per clip.
    """

    contestant: Contestant
    broken: Bools
    flipped: Bools
    spent: Spent


class Clips(NamedTuple):
    """Clips of one model's data: float32 [N, 3, T, H, W], labels and indices, [N]."""

    clip: Tensor
    label: Tensor
    index: Tensor


def run(
    twin: VideoMoE, clips: Clips, contestants: Sequence[Contestant], *, eps: float, seed: int,
    batch: int, done: Callable[[str], None],
) -> list[Found]:  # fmt: skip
    """Let the contestants attack, in turn on each batch; judge them on the uint8 grid.

    Args:
        twin: in eval mode.
        clips: on the grid.
        contestants: teams after their members.
        eps: L-infinity budget, on pixels in [0, 1].
        seed: of the attacks.
        batch: clips attacked at once.
        done: told of each batch.
    """
    alone = [one for one in contestants if not one.team]
    parts: dict[str, list[tuple[Bools, Bools, Spent]]] = {one.name: [] for one in alone}
    n = len(clips.label)
    for start in range(0, n, batch):
        some = Clips(*(values[start : start + batch] for values in clips))
        for one in alone:
            parts[one.name].append(_attack(twin, some, one, eps=eps, seed=seed, n=n))
        done(f"{min(start + batch, n)} of {n} clips")
    found: dict[str, Found] = {}
    for one in contestants:
        if one.team:
            found[one.name] = _worst(one, [found[name] for name in one.team])
        else:
            broken, flipped, spent = zip(*parts[one.name], strict=True)
            total = sum(spent[1:], spent[0])
            found[one.name] = Found(one, np.concatenate(broken), np.concatenate(flipped), total)
    return list(found.values())


def _attack(
    twin: VideoMoE, clips: Clips, one: Contestant, *, eps: float, seed: int, n: int
) -> tuple[Bools, Bools, Spent]:
    """Attack one batch; what is spent is shared among all n clips."""
    method = load(one.attack)
    settings = method.Settings(eps=eps, seed=seed, grid=True, **one.values)
    cost = flops.count(twin)
    with counted(twin) as passes:
        begin = time.process_time()
        found = method.attack(twin, clips.clip, clips.label, settings, clips.index)
        seconds = time.process_time() - begin
    router = (passes["router_forwards"] + passes["router_backwards"]) * cost.router
    expert = (passes["expert_forwards"] + passes["expert_backwards"]) * cost.expert
    every = len(twin.experts) if one.values.get("route_grad") in ("all", "soft") else 1
    gradients = passes["expert_backwards"] / every
    spent = Spent(*(count / n for count in passes.values()), (router + expert) / n / 1e9,
                  seconds / n, gradients / n)  # fmt: skip
    with torch.no_grad():
        out = twin(found.adversarial, "frozen")
    broken: Bools = (out.logits.argmax(dim=1) != clips.label).numpy()
    return broken, (out.route != found.route_before).numpy(), spent


@contextmanager
def counted(twin: VideoMoE) -> Iterator[dict[str, int]]:
    """Count clips that go through the router and the experts, forth and back."""
    passes = dict.fromkeys(Spent._fields[:4], 0)
    hooks = []

    def watch(part: nn.Module, name: str) -> None:
        def forward(_module: Any, _inputs: Any, out: Tensor) -> None:
            passes[f"{name}_forwards"] += len(out)

        def backward(_module: Any, _inputs: Any, grads: Any) -> None:
            passes[f"{name}_backwards"] += len(grads[0])

        hooks.extend([part.register_forward_hook(forward),
                      part.register_full_backward_hook(backward)])  # fmt: skip

    if twin.router is not None:
        watch(twin.router, "router")
    for expert in twin.experts:
        watch(expert, "expert")
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def _worst(team: Contestant, members: Sequence[Found]) -> Found:
    broken = np.any([member.broken for member in members], axis=0)
    flipped = np.any([member.flipped for member in members], axis=0)
    spent = [member.spent for member in members]
    return Found(team, broken, flipped, sum(spent[1:], spent[0]))


# ---- statistics


class Share(NamedTuple):
    """A share, or a difference of two, and its standard error."""

    value: float
    error: float


def share(hits: Bools) -> Share:
    """Return a share of n and its standard error, sqrt(p (1 - p) / n)."""
    p = float(np.mean(hits))
    return Share(p, math.sqrt(p * (1 - p) / len(hits)))


def difference(one: Bools, other: Bools) -> Share:
    """Return by how much two shares of the same clips differ, and the paired standard error.

    The standard error of the mean of one - other, clip by clip: what both break says nothing.
    """
    gap = one.astype(float) - other
    return Share(float(gap.mean()), float(gap.std() / math.sqrt(len(gap))))

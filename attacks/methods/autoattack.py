"""AutoAttack for clips: the standard ensemble, then what knows of routes; the worst case counts.

APGD-CE, APGD-T, FAB and Square, in this order and with the settings of the public ensemble, each
on the clips that still stand; then, of a mixture, J-TLGA and J-TLGA-plus with each route_grad. The
first four follow the true derivative (route_grad `frozen`), as the public ensemble would.

Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020. The last stage is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmoe.attacks import losses
from vmoe.attacks.loop import AttackResult, BallSettings, as_found, check_clip, improves
from vmoe.attacks.methods import load, settings_of
from vmoe.cli import log
from vmoe.models import ROUTE_GRADS, VideoMoE
from vmoe.settings import opt, to_mapping

PART = "model"
STANDARD = ("apgd-ce", "apgd-t", "fab", "square")
ADAPTIVE = ("j-tlga", "j-tlga-plus")


@dataclass(frozen=True)
class Settings(BallSettings):
    """AutoAttack's settings; the defaults are those of the public ensemble."""

    steps: int = opt(100, "gradient steps, of each part and target", at_least=1)
    targets: int = opt(9, "other labels that are tried, the nearest first", at_least=1)
    queries: int = opt(5000, "what Square may ask the model about a clip", at_least=1)


class Stage(NamedTuple):
    """One part of the ensemble: its name, and the method with its settings."""

    name: str
    method: Any
    settings: BallSettings


def attack(
    twin: VideoMoE, clip: Tensor, label: Tensor, settings: Settings, indices: Tensor | None = None
) -> AttackResult:
    """Try every part; success: the label is wrong, by at least one.

    A clip that no part breaks is returned where max_{i != y} F_i - F_y is largest, which is the
    loss of the result. Passes are those of all parts, and one for each part to compare them.
    """
    clip = clip.detach()
    order = torch.arange(len(clip)) if indices is None else indices.cpu()
    check_clip(clip, order, settings)
    held: AttackResult | None = None
    at = torch.arange(len(clip), device=clip.device)
    for stage in stages(settings, len(twin.experts)):
        if held is not None and settings.early_stop:
            at = torch.nonzero(~held.success).flatten()
        if not len(at):
            break
        found = stage.method.attack(twin, clip[at], label[at], stage.settings, order[at.cpu()])
        found = _compared(twin, found, label[at])
        held = found if held is None else _worst(held, found, at)
        right = len(clip) - int(held.success.sum())
        log.info("autoattack: %d of %d clips right after %s", right, len(clip), stage.name)
    assert held is not None  # there are stages, and clips
    return held


def stages(settings: Settings, experts: int) -> Iterator[Stage]:
    """Yield the parts, in their order, for a model of so many experts."""
    shared = to_mapping(settings)
    for name in STANDARD:  # the public ensemble does not stretch Square's schedule
        yield _stage(name, name, {**shared, "route_grad": "frozen", "rescale": False})
    for name in ADAPTIVE if experts > 1 else ():
        for way in ROUTE_GRADS:
            yield _stage(f"{name} {way}", name, {**shared, "route_grad": way})


def _stage(title: str, name: str, values: dict[str, Any]) -> Stage:
    return Stage(title, load(name), settings_of(name, values))


def _compared(twin: VideoMoE, found: AttackResult, label: Tensor) -> AttackResult:
    """Return a result whose loss is the margin, as parts maximise losses of their own.

    What was only looked at as it is keeps a loss of -inf.
    """
    rows = torch.nonzero(found.loss > -torch.inf).flatten()
    if not len(rows):
        return found
    with as_found(twin), torch.no_grad():
        margin = losses.margin(twin(found.adversarial[rows], "frozen").logits, label[rows])
    loss, forwards = found.loss.clone(), found.forwards.clone()
    loss[rows], forwards[rows] = margin.to(loss), forwards[rows] + 1
    return found._replace(loss=loss, forwards=forwards)


def _worst(held: AttackResult, found: AttackResult, at: Tensor) -> AttackResult:
    """Return the worst of both for each sample, by success, then by loss; passes are summed.

    Args:
        held: of all samples, [B].
        found: of some.
        at: which, int64.
    """
    better = improves(found.success, found.loss, held.success[at], held.loss[at])
    rows = at[better]
    whole = AttackResult(*(each.clone() for each in held))
    for name in ("adversarial", "success", "loss", "route_after"):
        getattr(whole, name)[rows] = getattr(found, name)[better]
    for name in ("forwards", "backwards", "dead"):
        getattr(whole, name)[at] += getattr(found, name)
    return whole

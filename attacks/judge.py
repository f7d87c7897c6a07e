"""What a model says of uint8 clips, twin and engine alike, and what that is worth.

A twin and an engine are judged by the same function on the same clips, so that their figures
can stand side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from vmoe.attacks.loop import as_found
from vmoe.batches import to_tensor
from vmoe.clips import Clips
from vmoe.lipschitz import l_lip
from vmoe.models import VideoMoE
from vmoe.runtime.engine import Prediction

Bools = NDArray[np.bool_]
Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]


class Judge(Protocol):
    """A model as a function of uint8 clips; `Engine.infer` is one."""

    def __call__(self, clips: Clips, force_route: Sequence[int] | None = None) -> Prediction:
        """Answer uint8 [N, T, H, W, 3], freely routed or each clip by a given expert."""


def of_twin(twin: VideoMoE, device: torch.device | str = "cpu") -> Judge:
    """Return the twin as an engine would answer: hard top-1, in eval mode, no gradients."""

    def judge(clips: Clips, force_route: Sequence[int] | None = None) -> Prediction:
        with as_found(twin), torch.no_grad():
            clip = to_tensor(clips, device)
            scores = twin.scores(clip)
            route = scores.argmax(dim=1)
            if force_route is not None:
                route = torch.tensor(force_route, dtype=torch.int64, device=device)
            logits = twin.run_routed(clip, route)
        return Prediction(logits.cpu().numpy(), scores.cpu().numpy(), route.cpu().numpy())

    return judge


class Seen(NamedTuple):
    """What one model says of clips, clean or adversarial; one value for each clip.

    Attributes:
        said: index of the label that it gives, [N].
        route: the expert that answered, [N].
        gap: top-2 gap of the scores, [N]; 0 of a dense model.
        weakest: the expert of the lowest score, [N].
    """

    said: Ints
    route: Ints
    gap: Floats
    weakest: Ints


class SeenAttacked(NamedTuple):
    """What one model says of adversarial clips, beside `Seen`.

    Attributes:
        seen: as of clean clips.
        success: by the attack's own criterion, [N].
        kept: index of the label with the clean route kept, [N].
        l_lip_router: L_Lip of the router between clean and adversarial clip, [N]; NaN without a
            change.
        l_lip_model: the same of the whole model's logits, by the hard choice.
    """

    seen: Seen
    success: Bools
    kept: Ints
    l_lip_router: Floats
    l_lip_model: Floats


class Verdict(NamedTuple):
    """An attack's own criterion on clips as deployed: success [N], and cross-entropy [N]."""

    success: Bools
    loss: Floats


def look(answer: Prediction) -> Seen:
    """Return what of an answer is kept."""
    scores = np.sort(answer.scores, axis=1)
    gap = scores[:, -1] - scores[:, -2] if scores.shape[1] > 1 else np.zeros(len(scores))
    weakest = answer.scores.argmin(axis=1)
    return Seen(answer.logits.argmax(axis=1), answer.route, gap, weakest)


def rule(
    part: str, expert: int | None, judge: Judge, clips: Clips, label: Ints, route: Ints
) -> tuple[Verdict, Prediction]:
    """Judge clips by the criterion of what is attacked.

    Args:
        part: `model` (the label is wrong), `router` (the route has changed, or is the expert that
            was chosen), `expert` (that expert is wrong).
        expert: which; None where none was chosen.
        judge: the model.
        clips: uint8 [N, T, H, W, 3].
        label: [N].
        route: of the clean clips, [N].

    Returns:
        The verdict, and the model's free answer.
    """
    answer = judge(clips)
    if part == "router":
        if expert is None:
            return Verdict(answer.route != route, _cross_entropy(answer.scores, route)), answer
        goal = np.full_like(route, expert)
        return Verdict(answer.route == goal, -_cross_entropy(answer.scores, goal)), answer
    logits = answer.logits
    if part == "expert" and expert is not None:
        logits = judge(clips, [expert] * len(clips)).logits
    return Verdict(logits.argmax(axis=1) != label, _cross_entropy(logits, label)), answer


def l_lip_of(clean: Floats, moved: Floats, clips: Clips, adversarial: Clips) -> Floats:
    """Return L_Lip of a router or model between two sets of clips, [N]; NaN without a change.

    Args:
        clean: scores or logits of the clean clips, [N, M] or [N, K].
        moved: of the adversarial clips, the same shape.
        clips: clean, uint8 [N, T, H, W, 3].
        adversarial: the same shape.
    """
    answers = torch.from_numpy(clean), torch.from_numpy(moved)
    term: Floats = l_lip(*answers, to_tensor(clips), to_tensor(adversarial)).numpy()
    same = (clips == adversarial).all(axis=(1, 2, 3, 4))
    return np.where(same, np.nan, term)


def _cross_entropy(logits: Floats, target: Ints) -> Floats:
    shifted = logits - logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(shifted).sum(axis=1))
    return np.asarray(total - shifted[np.arange(len(target)), target])

"""What a trained model is worth, on the test split: accuracy, robustness, experts, evidence."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vmoe import report
from vmoe.attacks.evaluate import Evaluation, evaluate, plan
from vmoe.attacks.figures import figures, share, worst_of
from vmoe.attacks.judge import Ints, of_twin
from vmoe.batches import Held
from vmoe.checkpoint import Checkpoint
from vmoe.clips import Clips
from vmoe.data import ClipData
from vmoe.data.camera_motion import LABELS
from vmoe.models import VideoMoE, flops
from vmoe.models.moe import expert_shares
from vmoe.settings import format_eps, to_mapping
from vmoe.train import evidence

ATTACKS = ("pgd", "apgd-ce", "apgd-margin", "tlga-r", "j-tlga")
ON_DENSE = ATTACKS[:3]
NORMS = {"linf": "L-infinity", "l2": "L2"}
ROBUST_CLIPS = 200  # of the test split; the attacks take most of the time


def make(
    held: Checkpoint, data: ClipData, *, batch: int, steps: int, eps: float, norm: str = "linf"
) -> dict[str, Any]:
    """Measure a checkpoint.

    Args:
        held: the model.
        data: clips of the test split, which training never saw.
        batch: clips of a batch.
        steps: gradient steps of the attacks.
        eps: their budget, on pixels in [0, 1].
        norm: of the budget, linf or l2.

    Returns:
        As JSON holds it: `clean` and `experts` over all clips, `robust` over the first of them
        (every route_grad, judged on uint8 clips, as vmoe-attack does), `evidence` of
        camera-motion or None.
    """
    twin, seen = held.twin, Held(data)
    device = next(twin.parameters()).device
    clips = np.stack([seen[i][0] for i in range(len(seen))])
    label = np.array([seen[i][1] for i in range(len(seen))], dtype=np.int64)
    some = slice(0, ROBUST_CLIPS)
    attacks = ATTACKS if twin.router is not None else ON_DENSE
    rows = plan(attacks, [eps], steps=steps, norm=norm)
    judges = {"twin": of_twin(twin, device)}
    found = evaluate(twin, clips[some], label[some], rows, judges, batch=batch, device=device)
    cost = flops.count(twin)
    made = {
        "model": to_mapping(twin.settings),
        "clip": to_mapping(twin.spec),
        "labels": list(held.labels),
        "recipe": held.recipe,
        "validation": held.results.get("validation"),
        "parameters": sum(p.numel() for p in twin.parameters()),
        "flops": cost._asdict() | {"saved": cost.saved},
        **experts(twin, clips, label, batch, device),
        "robust": _robust(found, steps, eps, norm),
        "evidence": evidence.gather(twin, seen, batch) if held.labels == LABELS else None,
    }
    mapped: dict[str, Any] = report.plain(made)
    return mapped


def experts(
    twin: VideoMoE, clips: Clips, label: Ints, batch: int, device: torch.device
) -> dict[str, Any]:
    """Return clean accuracy, and what each expert receives and would reach on all clips alone."""
    judge, count = of_twin(twin, device), len(twin.experts)
    parts = [clips[start : start + batch] for start in range(0, len(clips), batch)]
    free = [judge(part) for part in parts]
    route = np.concatenate([answer.route for answer in free])
    said = np.concatenate([answer.logits.argmax(axis=1) for answer in free])
    alone = np.stack([
        np.concatenate([judge(p, [i] * len(p)).logits.argmax(axis=1) for p in parts])
        for i in range(count)
    ])  # fmt: skip
    right = np.equal(alone, label)
    return {
        "clean": share(np.equal(said, label)),
        "experts": {
            "shares": expert_shares(torch.from_numpy(route), count),
            "fixed_route": [share(row) for row in right],
            "oracle_route": share(right.any(axis=0)),
        },
    }


def _robust(found: Evaluation, steps: int, eps: float, norm: str) -> dict[str, Any]:
    worst = worst_of(found, eps, "twin")
    return {
        "eps": eps,
        "norm": norm,
        "steps": steps,
        "clean": worst["clean"],
        "attacks": [figures(found, outcome, "twin") for outcome in found.outcomes],
        "worst_of": worst["robust"],
        "margin": float(found.clean["twin"].gap.mean()),
    }


def markdown(found: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    model, robust = found["model"], found["robust"]
    cost = flops.Flops(**{part: found["flops"][part] for part in flops.Flops._fields})
    budget = f"{NORMS[robust['norm']]} {format_eps(robust['eps'], robust['norm'])}"
    lines = [
        f"# {found['recipe']['run']['method']} on {found['recipe']['data']}",
        "",
        f"{model['arch']}, width {model['width']:g}, {model['experts']} expert(s), "
        f"{found['parameters']} parameters, {cost.said}.",
        f"Clean accuracy on {found['clean']['n']} test clips: {_percent(found['clean'])} % "
        "(95 % interval).",
        "",
        f"Robust accuracy in %, {budget}, {robust['steps']} steps, "
        f"every route_grad, judged on uint8 clips, {robust['clean']['n']} test clips:",
        "",
        _attacks(robust, routed=model["experts"] > 1),
    ]
    if model["experts"] > 1:
        lines += ["", _experts(found["experts"])]
    if found["evidence"] is not None:
        seen = [
            [key.replace("_", " "), None if value is None else f"{100 * value:.1f}"]
            for key, value in found["evidence"].items()
        ]
        lines += ["", "Does it see motion? Shares in %:", "", report.table(seen, ["what", "%"])]
    return "\n".join([*lines, ""])


def _attacks(robust: dict[str, Any], *, routed: bool) -> str:
    """Return the table of attacks; a dense model has no route that could flip."""
    columns = ["attack", "accuracy", "flips %", "with the clean route"]
    rows = [["none (clean)", _percent(robust["clean"]), None, None]]
    rows += [
        [a["attack"], _percent(a["robust"]), f"{100 * a['flips']['share']:.1f}",
         _percent(a["route_kept"])]
        for a in robust["attacks"]
    ]  # fmt: skip
    rows.append(["worst of all, per clip", _percent(robust["worst_of"]), None, None])
    shown = len(columns) if routed else 2
    return report.table([row[:shown] for row in rows], columns[:shown])


def _experts(each: dict[str, Any]) -> str:
    fixed = ", ".join(_percent(one, interval=False) for one in each["fixed_route"])
    return (
        f"Experts receive {', '.join(f'{s:.0%}' for s in each['shares'])} of the clips; alone "
        f"they reach {fixed} %; an oracle that routes, "
        f"{_percent(each['oracle_route'], interval=False)} %."
    )


def _percent(held: dict[str, Any], *, interval: bool = True) -> str:
    return report.percent(held["hits"], held["n"], interval=interval)

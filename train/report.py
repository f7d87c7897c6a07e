"""What a trained model is worth, on the test split: accuracy, robustness, experts, evidence."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vmoe import report
from vmoe.attacks.evaluate import Evaluation, evaluate, plan
from vmoe.attacks.judge import of_twin
from vmoe.batches import Held
from vmoe.checkpoint import Checkpoint
from vmoe.data import ClipData
from vmoe.data.camera_motion import LABELS
from vmoe.models import VideoMoE, flops
from vmoe.models.moe import expert_shares
from vmoe.settings import format_eps, to_mapping
from vmoe.train import evidence

ATTACKS = ("pgd", "tlga-r", "j-tlga")
ROBUST_CLIPS = 200  # of the test split; the attacks take most of the time
EPS = 8 / 255


def make(held: Checkpoint, data: ClipData, batch: int, steps: int = 20) -> dict[str, Any]:
    """Measure a checkpoint.

    Args:
        held: the model.
        data: clips of the test split, which training never saw.
        batch: clips of a batch.
        steps: gradient steps of the attacks.

    Returns:
        As JSON holds it: `clean` and `experts` over all clips, `robust` over the first of them
        (every route_grad, judged on uint8 clips), `evidence` of camera-motion or None.
    """
    twin, seen = held.twin, Held(data)
    device = next(twin.parameters()).device
    clips = np.stack([seen[i][0] for i in range(len(seen))])
    label = np.array([seen[i][1] for i in range(len(seen))], dtype=np.int64)
    some = slice(0, ROBUST_CLIPS)
    rows = plan(ATTACKS if twin.router is not None else ("pgd",), [EPS], steps=steps)
    judges = {"twin": of_twin(twin, device)}
    found = evaluate(twin, clips[some], label[some], rows, judges, batch=batch, device=device)
    motion = held.labels == LABELS
    return {
        "model": to_mapping(twin.settings),
        "clip": to_mapping(twin.spec),
        "labels": list(held.labels),
        "recipe": held.recipe,
        "validation": held.results.get("validation"),
        "parameters": sum(p.numel() for p in twin.parameters()),
        "flops": _flops(twin),
        "clean": _share(of_twin(twin, device)(clips).logits.argmax(axis=1) == label),
        "experts": _experts(twin, clips, label, batch, device),
        "robust": _robust(found, steps),
        "evidence": evidence.gather(twin, seen, batch) if motion else None,
    }


def _flops(twin: VideoMoE) -> dict[str, Any]:
    cost = flops.count(twin)
    return {"clip": cost.moe, "router": cost.router, "dense": cost.dense, "saved": cost.saved}


def _share(hits: Any) -> dict[str, int]:
    return {"right": int(np.sum(hits)), "of": len(hits)}


def _experts(
    twin: VideoMoE, clips: Any, label: Any, batch: int, device: torch.device
) -> dict[str, Any]:
    """Return shares, the accuracy of each expert on all clips, and of an oracle that routes."""
    judge, count = of_twin(twin, device), len(twin.experts)
    starts = range(0, len(clips), batch)
    free = np.concatenate([judge(clips[s : s + batch]).route for s in starts])
    right = np.stack([
        np.concatenate([
            judge(part, [i] * len(part)).logits.argmax(axis=1)
            for part in (clips[s : s + batch] for s in starts)
        ]) == label
        for i in range(count)
    ])  # fmt: skip
    return {
        "shares": expert_shares(torch.from_numpy(free), count),
        "fixed_route": [_share(row) for row in right],
        "oracle_route": _share(right.any(axis=0)),
    }


def _robust(found: Evaluation, steps: int) -> dict[str, Any]:
    """Return each attack's accuracy and flips, and the worst of them per clip."""
    clean = found.clean["twin"]
    standing = clean.said == found.label
    rows, worst = [], standing.copy()
    for outcome in found.outcomes:
        seen = outcome.seen["twin"]
        stands = seen.seen.said == found.label
        worst &= stands
        rows.append({
            "attack": outcome.row.attack, **_share(stands),
            "flips": float((seen.seen.route != clean.route).mean()),
            "clean_route_kept": _share(seen.kept == found.label),
        })  # fmt: skip
    return {
        "eps": EPS, "steps": steps, "clean": _share(standing), "attacks": rows,
        "worst_of": _share(worst), "margin": float(clean.gap.mean()),
    }  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    run, model, robust = found["recipe"]["run"], found["model"], found["robust"]
    rows = [["none (clean)", _percent(robust["clean"]), None, None]]
    rows += [
        [a["attack"], _percent(a), f"{100 * a['flips']:.1f}", _percent(a["clean_route_kept"])]
        for a in robust["attacks"]
    ]
    rows.append(["worst of all, per clip", _percent(robust["worst_of"]), None, None])
    experts = found["experts"]
    shares = ", ".join(f"{share:.0%}" for share in experts["shares"])
    fixed = ", ".join(_percent(e, interval=False) for e in experts["fixed_route"])
    saved = found["flops"]["saved"]
    against = "" if saved is None else f", {saved:.0%} saved against the dense counterpart"
    lines = [
        f"# {run['method']} on {found['recipe']['data']}",
        "",
        f"{model['arch']}, width {model['width']:g}, {model['experts']} expert(s), "
        f"{found['parameters']} parameters, "
        f"{found['flops']['clip'] / 1e6:.4g} MFLOPs a clip{against}.",
        f"Clean accuracy on {found['clean']['of']} test clips: {_percent(found['clean'])} % "
        "(95 % interval).",
        "",
        f"Robust accuracy in %, L-infinity {format_eps(robust['eps'])}, {robust['steps']} steps, "
        f"every route_grad, judged on uint8 clips, {robust['clean']['of']} test clips:",
        "",
        report.table(rows, ["attack", "accuracy", "flips %", "with the clean route"]),
        "",
        f"Experts receive {shares} of the clips; alone they reach {fixed} %; "
        f"an oracle that routes, {_percent(experts['oracle_route'], interval=False)} %.",
    ]  # fmt: skip
    if found["evidence"] is not None:
        seen = [[k.replace("_", " "), f"{100 * v:.1f}"] for k, v in found["evidence"].items()]
        lines += ["", "Does it see motion? Shares in %:", "", report.table(seen, ["what", "%"])]
    return "\n".join([*lines, ""])


def _percent(share: dict[str, int], *, interval: bool = True) -> str:
    return report.percent(share["right"], share["of"], interval=interval)

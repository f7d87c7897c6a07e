"""What a run says of itself: the lines before it, what its result depends on, and its report."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vmoe
from vmoe import output
from vmoe.adversarial import AdversarialClips
from vmoe.attacks import tables
from vmoe.attacks.chosen import Chosen
from vmoe.attacks.deployed import Attackable, Target, identity
from vmoe.attacks.evaluate import Row
from vmoe.attacks.flags import RunSettings, values_of
from vmoe.attacks.grid import radius
from vmoe.bundle import Bundle
from vmoe.clips import ClipSpec
from vmoe.report import plain, to_csv
from vmoe.settings import format_eps, to_mapping

NO_TEST = {  # what is said of a split behind the number of its clips
    "train": " (NOT A TEST: twins are trained on this split)",
    "val": " (NOT A TEST: training chooses its best epoch by this split)",
}


def header(
    opened: Target, settings: RunSettings, rows: Sequence[Row], saved: AdversarialClips | None,
    early: str, engines: Mapping[str, Attackable],
) -> str:  # fmt: skip
    """Return what is attacked, on what, within what.

    Args:
        opened: what is attacked.
        settings: of the run.
        rows: the attacks.
        saved: clips that are replayed; None where they are made.
        early: what is to be said of early stop; empty for nothing.
        engines: what is attacked in the place of the twin.
    """
    spec, lines = opened.spec, []
    if opened.twin is not None:
        model = opened.twin.twin.settings
        lines.append(
            f"model: {model.arch}, width {model.width:g}, experts: {model.experts}, "
            f"{len(opened.labels)} labels, clips {spec.frames}x{spec.height}x{spec.width}, "
            f"a frame each {spec.spacing_s:g} s"
        )
        foreign = ", FOREIGN: the engine was exported from another twin" if opened.foreign else ""
        lines.append(f"twin: {opened.twin_path} (sha256 {opened.twin_sha256[:12]}{foreign})")
    for name, engine in opened.engines.items():
        bundle = engine.bundle
        how = engines[name].said if name in engines else "sees the clips made on the twin"
        lines.append(
            f"{'engine' if name == 'engine' else f'engine {name}'}: {bundle.path}, "
            f"{bundle.lowering}, {precision(bundle)}, on {engine.backend_name}: {how}"
        )
    if opened.channel is not None:
        lines.append(f"channel: {opened.channel}; every model judges what arrives")
    data = f"{settings.data} {settings.split}, {settings.n} clips{NO_TEST.get(settings.split, '')}"
    if settings.group:
        data += f", groups {settings.group!r}"
    if settings.fold not in (None, 1):
        data += f", fold {settings.fold}"
    if saved is not None:
        data = f"{len(saved.label)} clips of {saved.origin.get('data')}, as saved"
    lines += [f"data: {data}", made_by(rows), threat_model(rows, spec), *([early] if early else [])]
    return "\n".join(lines)


def precision(bundle: Bundle) -> str:
    """Return what a bundle's parts compute in, such as `fp32, int8`."""
    return ", ".join(sorted({part.precision.get("found", "?") for part in bundle.parts.values()}))


def made_by(rows: Sequence[Row]) -> str:
    """Return the attacks that are made, by how and on what."""
    by: dict[str, dict[str, None]] = {}
    for row in rows:
        by.setdefault(f"{row.mode} on {row.made_on}", {})[row.attack] = None
    return "attacks: " + "; ".join(f"{how}: {', '.join(names)}" for how, names in by.items())


def threat_model(rows: Sequence[Row], spec: ClipSpec) -> str:
    """Return within what clips may be changed: every budget in both forms."""
    norms = list(dict.fromkeys(row.norm for row in rows))
    said = []
    for norm in norms:
        budgets = dict.fromkeys(row.eps for row in rows if row.norm == norm)
        if norm == "linf":
            each = [f"{format_eps(eps)}, {_levels(radius(eps))}" for eps in budgets]
            said.append(f"L-infinity, eps {'; '.join(each)}")
        else:
            count = values_of(spec)
            each = [
                f"{format_eps(eps, norm)} ({255 * eps / count**0.5:.3g} grey levels RMS)"
                for eps in budgets
            ]
            said.append(f"L2 over the {count} values of a clip, eps {'; '.join(each)}")
    return f"threat model: {'; '.join(said)}; judged on uint8 clips"


def _levels(most: int) -> str:
    return f"{most} grey levels" if most else "0 grey levels: uint8 clips cannot be changed"


def context(device: torch.device) -> dict[str, Any]:
    """Return with what a result was made, as far as its last bits may depend on it."""
    return {
        "vmoe": vmoe.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }


def run_of(
    opened: Target, settings: RunSettings, rows: Sequence[Row], chosen: Chosen, keep_clips: bool
) -> dict[str, Any]:
    """Return everything that the parts of a run depend on, by names that a user knows."""
    return {
        "twin sha256": opened.twin_sha256,
        **{f"{name} sha256": identity(engine) for name, engine in opened.engines.items()},
        "channel": opened.channel and str(opened.channel),
        **{f"--{k.replace('_', '-')}": v for k, v in to_mapping(settings).items()},
        "--save-adv": keep_clips,
        "clips sha256": chosen.sha256,
        **{
            f"{name} of {_called(row)} at eps {format_eps(row.eps, row.norm)}, run {i}": value
            for row in rows
            for i, each in enumerate(row.settings, 1)
            for name, value in to_mapping(each).items()
        },
        **context(opened.device),
    }


def _called(row: Row) -> str:
    return f"{row.attack}, {row.mode} against {row.against}" if row.against else row.attack


def planned(
    opened: Target, settings: RunSettings, rows: Sequence[Row], saved: AdversarialClips | None,
    seed: int, early: str, preset: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Return what --dry-run would do, by the keys that the report has, too."""
    data, n = f"{settings.data} {settings.split}", settings.n
    if saved is not None:
        data, n = str(saved.origin.get("data")), len(saved.label)
    what = {"data": data, "n": n, "labels": list(opened.labels), "seed": seed}
    made: dict[str, Any] = plain({**_asked(opened, rows, early, preset), **what, **_how(rows)})
    return made


def report(
    opened: Target, chosen: Chosen, rows: Sequence[Row], seed: int, found: dict[str, Any],
    sanity: dict[str, Any] | None, early: str, preset: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Return the report as JSON holds it; `found` are its figures, as of `everything`."""
    return {
        **_asked(opened, rows, early, preset),
        "data": chosen.name,
        "clips_sha256": chosen.sha256,
        "n": len(chosen.label),
        "labels": list(opened.labels),
        "seed": seed,
        **_how(rows),
        "sanity": sanity,
        **found,
    }


def _asked(
    opened: Target, rows: Sequence[Row], early: str, preset: str | None
) -> dict[str, Any]:  # fmt: skip
    """Return what is attacked, by what, and within what."""
    twin = opened.twin
    return {
        "vmoe": vmoe.__version__,
        "versions": context(opened.device),
        "command": shlex.join(["vmoe-attack", *sys.argv[1:]]),
        "target": str(opened.path),
        "twin": twin and {
            "file": str(opened.twin_path), "sha256": opened.twin_sha256,
            "foreign": opened.foreign, "model": to_mapping(twin.twin.settings),
        },
        "engines": [
            {
                "name": name, "bundle": str(engine.bundle.path), "backend": engine.backend_name,
                "lowering": engine.bundle.lowering, "precision": precision(engine.bundle),
                "versions": engine.bundle.versions,
            }
            for name, engine in opened.engines.items()
        ],
        "threat_model": {"norm": rows[0].norm, "grid": "uint8"},
        "channel": opened.channel and {
            "codec": opened.channel.codec, "quality": opened.channel.quality,
            "camera": opened.channel.camera, "draws": opened.channel.draws,
        },
        "early_stop": early or None,
        "preset": preset,
    }  # fmt: skip


def _how(rows: Sequence[Row]) -> dict[str, Any]:
    """Return every setting of every run of each attack."""
    return {
        "settings": [
            {
                "attack": row.attack, "mode": row.mode, "made_on": row.made_on,
                "eps": row.eps, "each": [to_mapping(s) for s in row.settings],
            }
            for row in rows
        ],
    }  # fmt: skip


def write(report: dict[str, Any], text: str, folder: Path, md: Path | None) -> None:
    """Write report.json, report.csv and report.md, each whole; `md` gets the last, too."""
    output.write_text(folder / "report.csv", to_csv(tables.flat(report)))
    for path in (folder / "report.md", *([md] if md else [])):
        output.write_text(path, text)
    output.write_json(folder / "report.json", report)  # the last: with it, a run is finished

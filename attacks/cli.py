"""vmoe-attack: attack a twin, and what was deployed from it."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

import vmoe
from vmoe import adversarial, cli, latest, output, registry
from vmoe.adversarial import AdversarialClips, Attacked
from vmoe.attacks import tables
from vmoe.attacks.deployed import Target, open_target, same_clips
from vmoe.attacks.evaluate import METHODS, Evaluation, Row, evaluate, plan, replay
from vmoe.attacks.figures import everything
from vmoe.attacks.grid import linf, radius
from vmoe.clips import Clips, ClipSpec
from vmoe.data import DataSettings, open_data
from vmoe.errors import SettingError
from vmoe.models import ROUTE_GRADS
from vmoe.settings import Settings, format_eps, from_mapping, opt, to_mapping

log = cli.log
RUNS = Path("runs/attack")
CLIPS_SEED = 0  # which clips are taken: the same for every --seed, so that runs compare


@dataclass(frozen=True)
class RunSettings(Settings):
    """What the command itself takes."""

    data: str = opt("camera-motion", "camera-motion, a folder with a folder per class, NAME:/path")
    split: str = opt("test", "which part of the data", choices=("train", "val", "test"))
    group: str | None = opt(
        None, "regular expression that splits a folder; default: as the twin was trained"
    )
    n: int = opt(200, "how many clips", at_least=1)
    attack: tuple[str, ...] = opt(("pgd", "tlga-r", "j-tlga"), "attacks, with commas")
    eps: tuple[float, ...] = opt((8 / 255,), "L-infinity budgets, with commas: 8/255 or 8 or 0.03")
    route_grad: tuple[str, ...] = opt(
        ROUTE_GRADS, "how attacks on the whole model pass the hard choice; the worst counts",
        choices=ROUTE_GRADS,
    )  # fmt: skip
    batch: int = opt(16, "clips attacked at once", at_least=1)


@dataclass(frozen=True)
class Chosen:
    """The clips that are attacked.

    Attributes:
        clean: uint8 [N, T, H, W, 3].
        label: index among the model's labels, [N].
        index: number of each clip in its data set, [N].
        name: of data and split.
    """

    clean: Clips
    label: NDArray[np.int64]
    index: NDArray[np.int64]
    name: str


def _fields(cls: type[Settings]) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def _every_method_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give the command the options of all attacks, each once."""
    seen = _fields(RunSettings) | {"seed", "grid"}  # every clip of a report lies on the grid
    for name in registry.names(METHODS):
        cls = registry.load(METHODS, name, "attack").Settings
        function = cli.options(cls, skip=seen)(function)
        seen |= _fields(cls)
    return function


@cli.command(
    "vmoe-attack",
    "vmoe-attack runs/train/mine/best.safetensors --attack pgd,j-tlga --eps 8,12 --n 100",
    "vmoe-attack runs/export/mine --attack tlga-r --gamma1 2 --save-adv clips",
    "vmoe-attack runs/export/mine --load-adv clips --md robust.md",
)
@click.argument("target", type=click.Path(path_type=Path), required=False)
@cli.options(RunSettings)
@_every_method_option
@click.option("--twin", type=click.Path(path_type=Path), help="Checkpoint to make the clips on.")
@click.option("--save-adv", type=click.Path(path_type=Path), help="Folder for the clips made.")
@click.option("--load-adv", type=click.Path(path_type=Path), help="Replay the clips of a folder.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder. [default: runs/attack/NAME]")
@click.option("--md", type=click.Path(path_type=Path), help="Write the Markdown report here, too.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier report.")
@click.option("--dry-run", is_flag=True, help="Show what would be done; attack nothing.")
@cli.seed_option
@cli.device_option
@cli.config_option
@cli.json_option
def main(
    target: Path | None, twin: Path | None, save_adv: Path | None, load_adv: Path | None,
    out: Path | None, md: Path | None, overwrite: bool, dry_run: bool, seed: int, device: str,
    config: Path | None, as_json: bool, **flags: Any,
) -> None:  # fmt: skip
    """Attack TARGET: a checkpoint, or a bundle (its twin is attacked, its engine replays).

    Without TARGET: the newest of runs/, else the model that ships.
    """
    if save_adv is not None and load_adv is not None:
        raise SettingError("--save-adv and --load-adv exclude each other: make clips, or replay.")
    settings, rows = _plan(flags, seed, config, load_adv)
    path, which = latest.target(target)
    folder = _refuse_existing(path, out, md, save_adv, overwrite=overwrite)
    say = log.info if as_json else click.echo
    say(which)
    with open_target(path, twin, device, replay=load_adv is not None) as opened:
        if settings.group is None:
            settings = dataclasses.replace(settings, group=opened.group)
        saved = None if load_adv is None else _load(load_adv, opened)
        if saved is not None:
            rows = [row for row, _ in _rows_of(saved)]
        header = _header(opened, settings, rows, saved)
        say(header)
        if dry_run:
            return
        chosen, found = _run(opened, settings, rows, saved, keep_clips=save_adv is not None)
        if save_adv is not None:
            _save(save_adv, opened, chosen, found, seed)
    report = _report(opened, chosen, found, rows, seed)
    text = tables.markdown(report, f"{which}\n{header}")
    _write(report, text, folder, md)
    if as_json:
        cli.print_json(report)
    else:
        click.echo("\n" + tables.attacks(report) + "\n")
        click.echo(tables.agreement(report) or "no engine: TARGET is a checkpoint")
    _say_next(say, path, opened, folder, save_adv)


def _plan(
    flags: dict[str, Any], seed: int, config: Path | None, load_adv: Path | None
) -> tuple[RunSettings, list[Row]]:
    """Read the flags; refuse those that would have no effect."""
    given = {name for name, value in flags.items() if value is not None}
    settings = cli.resolve(RunSettings, flags, config)
    methods = [registry.load(METHODS, name, "attack").Settings for name in settings.attack]
    if load_adv is not None:
        strange = given - {"batch"}
        _refuse_flag(strange, f"--load-adv {load_adv} replays clips as they are")
        return settings, []
    known = _fields(RunSettings).union(*map(_fields, methods))
    _refuse_flag(given - known, f"none of {', '.join(settings.attack)} takes it")
    if "route_grad" in given and not any("route_grad" in _fields(cls) for cls in methods):
        _refuse_flag({"route_grad"}, f"none of {', '.join(settings.attack)} takes it")
    values = {k: v for k, v in flags.items() if v is not None and k not in _fields(RunSettings)}
    attacks = list(dict.fromkeys(settings.attack))
    eps, ways = dict.fromkeys(settings.eps), dict.fromkeys(settings.route_grad)
    return settings, plan(attacks, list(eps), list(ways), seed=seed, **values)


def _refuse_flag(strange: set[str], why: str) -> None:
    if strange:
        flag = "--" + min(strange).replace("_", "-")
        raise SettingError(f"{flag} has no effect: {why}; leave it out.")


def _refuse_existing(
    path: Path, out: Path | None, md: Path | None, save_adv: Path | None, *, overwrite: bool
) -> Path:
    """Refuse, before any work is done, outputs that exist or cannot be written.

    Returns:
        The folder of the report.
    """
    if save_adv is not None:
        adversarial.refuse_existing(save_adv)
        output.probe(save_adv)
    name = path.parent.name if path.name == "best.safetensors" else path.stem
    folder = out or _free(RUNS / name)
    for file in (folder / "report.json", folder / "report.md", *([md] if md else [])):
        if file.exists() and not overwrite:
            raise SettingError(f"{file} exists. Choose another --out or --md, or say --overwrite.")
        if file.is_dir():
            raise SettingError(f"{file} is a folder; choose another --out or --md.")
    if folder.is_file():
        raise SettingError(f"{folder} is a file; --out is a folder.")
    for place in (folder, *([md] if md else [])):
        output.probe(place)
    return folder


def _free(folder: Path) -> Path:
    """Return the folder, or the first of NAME-2, NAME-3 ... that does not exist."""
    at, number = folder, 2
    while at.exists():
        at, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return at


def _header(
    opened: Target, settings: RunSettings, rows: Sequence[Row], saved: AdversarialClips | None
) -> str:
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
    if opened.engine is not None:
        bundle = opened.engine.bundle
        lines.append(
            f"engine: {bundle.path}, {bundle.lowering}, on {opened.engine.backend_name}: "
            "sees the clips made on the twin"
        )
    data = f"{settings.data} {settings.split}, {settings.n} clips"
    if settings.group:
        data += f", groups {settings.group!r}"
    if saved is not None:
        data = f"{len(saved.label)} clips of {saved.origin.get('data')}, as saved"
    lines.append(f"data: {data}")
    budgets = "; ".join(
        f"{format_eps(eps)}, {radius(eps)} grey levels"
        for eps in dict.fromkeys(r.eps for r in rows)
    )
    lines.append(f"threat model: L-infinity, eps {budgets}; judged on uint8 clips")
    return "\n".join(lines)


def _choose(settings: RunSettings, spec: ClipSpec, labels: tuple[str, ...]) -> Chosen:
    """Take n clips of the data, the same for every seed; labels are matched by name."""
    how = DataSettings(group=settings.group or "")
    data = open_data(settings.data, settings.split, spec, how)
    name = f"{settings.data} {settings.split}"
    if settings.n > len(data):
        raise SettingError(f"--n is {settings.n}; {name} has {len(data)} clips.")
    strange = [label for label in data.labels if label not in labels]
    if strange:
        raise SettingError(
            f"{name} has the label {strange[0]!r}, which the model does not know; "
            f"it knows {', '.join(labels)}."
        )
    order = np.random.default_rng(CLIPS_SEED).permutation(len(data))
    index = np.sort(order[: settings.n]).astype(np.int64)
    taken = [data[int(i)] for i in cli.progress(index, "clips read", len(index))]
    label = np.array([labels.index(data.labels[k]) for _, k in taken], np.int64)
    return Chosen(np.stack([clip for clip, _ in taken]), label, index, name)


def _run(
    opened: Target, settings: RunSettings, rows: Sequence[Row], saved: AdversarialClips | None,
    *, keep_clips: bool,
) -> tuple[Chosen, Evaluation]:  # fmt: skip
    if saved is not None:
        label, index = np.array(saved.label, np.int64), np.array(saved.index, np.int64)
        chosen = Chosen(saved.clean, label, index, str(saved.origin.get("data")))
        attacked = _rows_of(saved)
        found = replay(saved.clean, label, attacked, opened.judges, batch=settings.batch)
        return chosen, found
    chosen = _choose(settings, opened.spec, opened.labels)
    assert opened.twin is not None  # open_target refuses a bundle without one
    found = evaluate(
        opened.twin.twin, chosen.clean, chosen.label, rows, opened.judges, index=chosen.index,
        batch=settings.batch, device=opened.device, keep_clips=keep_clips,
    )  # fmt: skip
    return chosen, found


def _load(path: Path, opened: Target) -> AdversarialClips:
    """Read saved clips; refuse those of another model, and those beyond their own budget."""
    saved = adversarial.load(path)
    same_clips(
        (f"{path}", saved.spec, saved.labels), (f"{opened.path}", opened.spec, opened.labels),
        "make the clips anew: vmoe-attack --save-adv",
    )  # fmt: skip
    for attacked in saved.attacked:
        found, most = linf(attacked.clips, saved.clean), radius(attacked.eps)
        if found > most:
            raise SettingError(
                f"{path}: clips of {attacked.attack} at eps {format_eps(attacked.eps)} change by "
                f"{found} grey levels, more than {most}: make the clips anew."
            )
    return saved


def _rows_of(saved: AdversarialClips) -> list[tuple[Row, Clips]]:
    rows = []
    for attacked in saved.attacked:
        method = registry.load(METHODS, attacked.attack, "attack")
        how = [from_mapping(method.Settings, each, "saved clips") for each in attacked.settings]
        row = Row(attacked.attack, method.PART, attacked.eps, tuple(how))
        rows.append((row, attacked.clips))
    return rows


def _save(path: Path, opened: Target, chosen: Chosen, found: Evaluation, seed: int) -> None:
    attacked = tuple(
        Attacked(
            outcome.row.attack, outcome.row.eps, [to_mapping(s) for s in outcome.row.settings],
            outcome.clips,
        )
        for outcome in found.outcomes
    )  # fmt: skip
    origin = {"data": chosen.name, "seed": seed, "twin_sha256": opened.twin_sha256}
    label, index = tuple(chosen.label.tolist()), tuple(chosen.index.tolist())
    clips = AdversarialClips(
        opened.spec, opened.labels, chosen.clean, label, index, attacked, origin
    )
    adversarial.save(clips, path)


def _report(
    opened: Target, chosen: Chosen, found: Evaluation, rows: Sequence[Row], seed: int
) -> dict[str, Any]:
    twin, engine = opened.twin, opened.engine
    return {
        "vmoe": vmoe.__version__,
        "command": shlex.join(["vmoe-attack", *sys.argv[1:]]),
        "target": str(opened.path),
        "twin": twin and {
            "file": str(opened.twin_path), "sha256": opened.twin_sha256,
            "foreign": opened.foreign, "model": to_mapping(twin.twin.settings),
        },
        "engine": engine and {
            "bundle": str(engine.bundle.path), "backend": engine.backend_name,
            "lowering": engine.bundle.lowering, "versions": engine.bundle.versions,
        },
        "threat_model": {"norm": "linf", "grid": "uint8"},
        "data": chosen.name,
        "n": len(chosen.label),
        "labels": list(opened.labels),
        "seed": seed,
        "settings": [
            {"attack": row.attack, "eps": row.eps, "each": [to_mapping(s) for s in row.settings]}
            for row in rows
        ],
        **everything(found, chosen.index.tolist()),
    }  # fmt: skip


def _write(report: dict[str, Any], text: str, folder: Path, md: Path | None) -> None:
    output.write_json(folder / "report.json", report)
    for path in (folder / "report.md", *([md] if md else [])):
        output.write_text(path, text)


def _say_next(
    say: Callable[[str], Any], path: Path, opened: Target, folder: Path, save_adv: Path | None
) -> None:
    say(f"report: {folder / 'report.md'}   {folder / 'report.json'}")
    if save_adv is not None:
        say(f"clips: {save_adv}")
        say(f"next: vmoe-attack {path} --load-adv {save_adv}")
    elif opened.engine is None:
        say(f"next: vmoe-export {path}")
    else:
        say(f"next: vmoe-run {path} --camera 0")

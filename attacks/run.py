"""What vmoe-attack does once its command line is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from vmoe import adversarial, cli, latest, output
from vmoe.adversarial import AdversarialClips
from vmoe.attacks import channel, deployment, gate, on_video, parts, plot, record, sanity, tables
from vmoe.attacks import chosen as clips_of
from vmoe.attacks import flags as given_by
from vmoe.attacks.asked import KEPT, Asked
from vmoe.attacks.chosen import Chosen
from vmoe.attacks.deployed import Attackable, How, Target, open_target
from vmoe.attacks.evaluate import Evaluation, Row, fitting, job, replay
from vmoe.attacks.figures import everything, telling
from vmoe.attacks.flags import Rows, RunSettings
from vmoe.attacks.modes import ADAPTIVE, QUERY, TRANSFER, Deployed
from vmoe.attacks.ranks import Ranks
from vmoe.attacks.session import Session, say_kept
from vmoe.errors import SettingError
from vmoe.report import plain

log = cli.log
RUNS = Path("runs/attack")
PICTURES = tuple(f"{name}.{kind}" for name in (plot.NAME, plot.ENGINES) for kind in plot.KINDS)
FILES = ("report.json", "report.md", "report.csv", *PICTURES)
SANITY_CLIPS = 32  # that are right: enough for the rule by which its checks fail


@dataclass(frozen=True)
class What:
    """What is done to a target that is open.

    Attributes:
        settings: of the run.
        rows: the attacks.
        saved: clips that are replayed; None where they are made.
        early: what is to be said of early stop; empty for nothing.
        engines: those that are attacked in the place of the twin, by name.
    """

    settings: RunSettings
    rows: list[Row]
    saved: AdversarialClips | None
    early: str
    engines: dict[str, Attackable] = field(default_factory=dict)

    @property
    def models(self) -> dict[str, Deployed]:
        """The engines as models, by name."""
        return {name: engine.model for name, engine in self.engines.items()}


def attack(asked: Asked, here: Ranks) -> None:
    """Do what is asked, as one process of perhaps several."""
    say: Callable[[str], Any] = log.info if asked.as_json else click.echo
    if not here.first:
        log.setLevel("WARNING")
        say = log.debug
    if asked.curve:
        plot.require()
    path, which = latest.target(asked.target)
    if asked.video is not None:
        on_video.attack(asked, asked.video, path, which, say)
        return
    settings, rows = _plan(asked, path)
    folder = _place(asked, path) if here.first else None
    say(which)
    device = here.device(asked.device)
    replays = asked.load_adv is not None
    needs_twin = not replays and settings.modes != (QUERY,)
    through = channel.parse(asked.codec, asked.camera_size, asked.eot)
    how = How(asked.twin, device, asked.compare, settings.backend, needs_twin, through)
    with open_target(path, how) as opened:
        what = _what(asked, opened, settings, rows)
        header = record.header(
            opened, what.settings, what.rows, what.saved, what.early, what.engines
        )
        say(header)
        if asked.gate_robust is not None:
            gate.require(opened.judges, what.rows)  # else told after all the work
        if asked.dry_run:
            if asked.as_json and here.first:
                cli.print_json(record.planned(
                    opened, what.settings, what.rows, what.saved, asked.seed, what.early,
                    asked.preset,
                ))  # fmt: skip
            return
        chosen = _chosen(opened, what)
        found = _found(asked, here, folder, opened, what, chosen, path)
        if found is None or folder is None:  # not rank 0
            return
        try:
            checked = _check(asked, opened, what, chosen, found)
        except BaseException:
            say_kept(folder)
            raise
        if asked.save_adv is not None:
            clips_of.save(asked.save_adv, opened, chosen, found, asked.seed)
    figures = everything(found, chosen.index.tolist())
    figures |= {
        "deployed": deployment.everything(found) if opened.engines else None,
        "unchecked": _unchecked(asked, opened),
    }
    report = record.report(
        opened, chosen, what.rows, asked.seed, figures, checked, what.early, asked.preset
    )
    _write(asked, report, f"{which}\n{header}", folder)
    if asked.as_json:
        cli.print_json(report)
    else:
        _show(report)
    _say_next(say, path, opened, folder, asked)
    if asked.gate_robust is not None:
        gate.refuse(found, asked.gate_robust)


def _plan(asked: Asked, path: Path) -> tuple[RunSettings, Rows]:
    """Read the flags of settings; a replay has its rows from the clips."""
    if asked.load_adv is not None:
        return cli.resolve(RunSettings, asked.flags, asked.config), Rows([], [])
    return given_by.read(
        asked.flags, asked.seed, asked.config, asked.preset, curve=asked.curve,
        bundle=path.is_dir(),
    )  # fmt: skip


def _place(asked: Asked, path: Path) -> Path:
    """Refuse, before any work is done, outputs that exist or cannot be written.

    Returns:
        The folder of the report.
    """
    if asked.save_adv is not None:
        adversarial.refuse_existing(asked.save_adv)
        output.probe(asked.save_adv)
    name = path.parent.name if path.name == latest.BEST else path.stem
    folder = asked.out or _free(RUNS / name)
    if folder.is_file():
        raise SettingError(f"{folder} is a file; --out is a folder.")
    own = [folder / file for file in FILES]
    if asked.resume and asked.md and parts.command_of(folder).get("md") == str(asked.md):
        own.append(asked.md)  # the last run may have written it, and no report.json after it
    for file in [*own, *([asked.md] if asked.md else [])]:
        wanted = asked.overwrite or (asked.resume and file in own)
        if file.exists() and not wanted:
            raise SettingError(f"{file} exists. Choose another --out or --md, or say --overwrite.")
        if file.is_dir():
            raise SettingError(f"{file} is a folder; choose another --out or --md.")
    if parts.begun(folder) and not asked.overwrite and not asked.resume:
        raise SettingError(
            f"{folder} holds a run that was not finished: go on with --resume, or begin anew with "
            "--overwrite."
        )
    for place in (folder, *([asked.md] if asked.md else [])):
        output.probe(place)
    return folder


def _free(folder: Path) -> Path:
    """Return the folder, or the first of NAME-2, NAME-3 ... that does not exist."""
    at, number = folder, 2
    while at.exists():
        at, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return at


def _what(asked: Asked, opened: Target, settings: RunSettings, rows: Rows) -> What:
    """Settle what depends on the target: groups, fold, saved clips, modes, early stop."""
    if settings.group is None:
        settings = dataclasses.replace(settings, group=opened.group)
    if settings.fold is None:
        settings = dataclasses.replace(settings, fold=opened.fold)
    if asked.load_adv is not None:
        saved = clips_of.load(asked.load_adv, opened)
        return What(settings, [row for row, _ in clips_of.rows_of(saved, opened)], saved, "")
    if opened.experts == 1 and asked.flags.get("attack") is None:
        settings, rows = given_by.usual(settings, rows)
    stops = asked.flags.get("early_stop") is not None  # the user's own word
    if opened.engines:
        given = given_by.in_modes(rows, settings.modes, list(opened.engines), as_given=stops)
    else:
        given = given_by.stopping(rows.named, early=False) if asked.save_adv else rows.named
        given = rows.named if stops else given
    engines = {}
    if {row.mode for row in given} != {TRANSFER}:
        engines = opened.deployed(adaptive=any(row.mode == ADAPTIVE for row in given))
    given = fitting(opened.experts, opened.spec.frames, given)
    given_by.refuse_budgets(given, opened.spec)
    if asked.eot is not None and all(given_by.asks(row.attack) for row in given):
        given_by.refuse({"eot"}, "no attack that is made follows a gradient")
    return What(settings, given, None, _early(asked, opened, given, stops), engines)


def _early(asked: Asked, opened: Target, rows: list[Row], stops: bool) -> str:
    """Return what is to be said of early stop; empty where nothing is."""
    transfers = any(row.mode == TRANSFER for row in rows)
    if stops or not transfers or not (opened.engines or asked.save_adv):
        return ""
    who = "an engine judges, too" if opened.engines else "the clips are saved"
    which = "of transfer: off" if opened.engines else "off"
    return (
        f"early stop {which}, as {who}: a first success lies on the twin's boundary, and "
        "transfers worse (--early-stop turns it on)"
    )


def _chosen(opened: Target, what: What) -> Chosen:
    if what.saved is not None:
        return clips_of.as_chosen(what.saved)
    return clips_of.choose(what.settings, opened.spec, opened.labels)


def _found(
    asked: Asked, here: Ranks, folder: Path | None, opened: Target, what: What, chosen: Chosen,
    path: Path,
) -> Evaluation | None:  # fmt: skip
    """Attack and judge, or replay; return None on every rank but 0."""
    judges, batch = opened.judges, what.settings.batch
    if what.saved is not None:
        if not here.first:
            return None  # judging alone is not worth sharing
        pairs = clips_of.rows_of(what.saved, opened)
        return replay(
            chosen.clean, chosen.label, pairs, judges, index=chosen.index, batch=batch
        )  # fmt: skip
    keep = asked.save_adv is not None
    work = job(
        opened.model, chosen.clean, chosen.label, what.rows, judges,
        engines=what.models, index=chosen.index, batch=batch, device=opened.device, keep_clips=keep,
    )  # fmt: skip
    run = record.run_of(opened, what.settings, what.rows, chosen, keep)
    session = Session(work, run, _command(asked, path), asked.resume)
    if asked.overwrite and folder is not None:
        for file in FILES:  # a report of another run must not stand beside parts of this one
            (folder / file).unlink(missing_ok=True)
    if here.world > 1:
        return session.together(folder, here)
    assert folder is not None  # rank 0 has one
    return session.alone(folder)


def _command(asked: Asked, path: Path) -> dict[str, Any]:
    """Return what `as_before` needs to do the same again."""
    flags = {name: value for name, value in asked.flags.items() if value is not None}
    kept = {name: getattr(asked, name) for name in KEPT}
    command: dict[str, Any] = plain({"target": path, "flags": flags, **kept})
    return command


def _unchecked(asked: Asked, opened: Target) -> str | None:
    """Return why the attacks themselves are not checked; None where they are."""
    if not asked.sanity:
        return "--no-sanity was given"
    if asked.load_adv is not None:
        return "saved clips were replayed, and no attack was run"
    if opened.twin is None:
        return "they need the twin's gradients, and no twin was given"
    if opened.channel is not None:
        return "they are made for clips that arrive as they are, without --codec"
    return None


def _check(
    asked: Asked, opened: Target, what: What, chosen: Chosen, found: Evaluation
) -> dict[str, Any] | None:
    """Check the attacks themselves, on some of the clips, where the budget tells most."""
    if _unchecked(asked, opened) is not None or opened.twin is None:
        return None
    right = next(iter(found.clean.values())).said == found.label
    some, eps = slice(0, int((right.cumsum() <= SANITY_CLIPS).sum())), telling(found)
    made = sanity.check(
        opened.twin.twin, chosen.clean[some], chosen.label[some], chosen.index[some], eps=eps,
        norm=what.settings.norm, seed=asked.seed, batch=what.settings.batch, device=opened.device,
        found=found, judges=opened.judges,
    )  # fmt: skip
    count = len(chosen.label[some])
    checks = plain(made.checks)
    return {"n": count, "eps": eps, "verdict": made.verdict(), "checks": checks}


def _write(asked: Asked, report: dict[str, Any], header: str, folder: Path) -> None:
    drawn = plot.write(report, folder) if asked.curve else []
    pictures = [path.name for path in drawn if path.suffix == ".png"]
    text = tables.markdown(report, header, pictures)
    record.write(report, text, folder, asked.md)
    parts.remove(folder)


def _show(report: dict[str, Any]) -> None:
    click.echo("\n" + tables.attacks(report) + "\n")
    click.echo(tables.agreement(report) or "no engine: TARGET is a checkpoint")
    if report["deployed"]:
        click.echo("\n" + tables.deployed(report))
    click.echo("\n" + tables.sanity(report))


def _say_next(
    say: Callable[[str], Any], path: Path, opened: Target, folder: Path, asked: Asked
) -> None:
    say(f"report: {folder / 'report.md'}   {folder / 'report.json'}")
    if asked.curve:
        say(f"curve: {folder / f'{plot.NAME}.png'}")
    if asked.save_adv is not None:
        say(f"clips: {asked.save_adv}")
        say(f"next: vmoe-attack {path} --load-adv {asked.save_adv}")
    elif not opened.engines:
        say(f"next: vmoe-export {path}")
    else:
        say(f"next: vmoe-run {path} --camera 0")

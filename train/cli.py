"""vmoe-train: a twin from a data set and a recipe."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

from vmoe import checkpoint, cli, latest, output, registry
from vmoe.attacks import heap, ranks
from vmoe.attacks.ranks import Ranks
from vmoe.data import ClipData, DataSet, DataSettings, open_data
from vmoe.errors import SettingError, VmoeError
from vmoe.loading import Loader, LoadSettings
from vmoe.models import ModelSettings, VideoMoE, build, flops
from vmoe.models.moe import FAMILIES
from vmoe.settings import format_eps
from vmoe.train import initial, loop, options, report, router_start, together
from vmoe.train import state as states
from vmoe.train.passes import RobustSettings
from vmoe.train.planned import Plan, RunSettings

log = cli.log


@cli.command(
    "vmoe-train",
    "vmoe-train camera-motion --arch tsm --width 0.125 --method j-tlat",
    "vmoe-train /data/clips --method standard --experts 1 --group 'seq\\d+' --epochs 30",
    "vmoe-train --out runs/train/mine --resume",
    topics=options.topics(),
)
@click.argument("data", required=False)
@cli.options(RunSettings)
@cli.options(ModelSettings, skip=options.NO_FLAGS)
@cli.options(loop.LoopSettings, skip=options.NO_FLAGS)
@cli.options(DataSettings, skip=options.NO_FLAGS)
@cli.options(LoadSettings)
@options.of_every_method
@click.option(
    "--init-from",
    type=click.Path(path_type=Path),
    help="Begin with a checkpoint, a training's folder, or weights of torchvision or timm: "
    "safetensors or torch.save.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder. [default: runs/train/NAME]")
@click.option(
    "--resume", is_flag=True, help="Go on where --out, or the newest under runs/, was interrupted."
)
@click.option(
    "--report/--no-report", "reported", default=True, help="Measure the best on the test split."
)
@click.option("--dry-run", is_flag=True, help="Show the plan; train nothing.")
@cli.seed_option
@cli.device_option
@cli.config_option
@cli.json_option
def main(
    data: str | None, init_from: Path | None, out: Path | None, resume: bool, reported: bool,
    dry_run: bool, seed: int, device: str, config: Path | None, as_json: bool, **flags: Any,
) -> None:  # fmt: skip
    """Train a twin on DATA: camera-motion (the default), a folder per class, or NAME:/path.

    A run that was interrupted goes on with --resume; it knows its own recipe.
    """
    heap.keep()
    here = ranks.here()
    if not here.first:
        log.setLevel("ERROR")
    init_from = init_from and latest.inside(init_from)
    if resume:
        out, said = latest.training(out)
        log.info("%s", said)
        data, init_from, seed, flags = _as_before(out, data, init_from, seed, flags)
    else:
        _refuse_at_once(init_from, flags)
    where = checkpoint.device(here.device(device))
    with together.joined(here, where):
        plan = together.first_rank_first(
            lambda: _plan(data or "camera-motion", init_from, seed, config, flags)
        )
        folder = out or Path("runs/train") / f"{plan.run.method}-{plan.model.arch}"
        twin = build(plan.trained, plan.run.spec, seed)  # refuses what does not fit
        _introduce(plan, twin, folder)
        if dry_run:
            if here.first:
                _show(plan, twin, fresh=not resume, as_json=as_json)
            return
        if not resume and here.first and folder.exists():
            raise SettingError(f"{folder} exists. Choose another --out, or go on with --resume.")
        train = together.first_rank_first(lambda: plan.open("train", plan.clips.clips))
        test = plan.open("test", plan.run.test_clips) if reported else None
        state = _begin(twin.to(where), plan, train, folder, resume=resume)
        output.probe(folder)  # all that can be refused is refused before the first epoch
        _train(state, plan, train, cli.resolve(LoadSettings, flags, config), folder, here)
    if here.first:
        _end(state, plan, test, folder, where, as_json=as_json)


def _refuse_at_once(init_from: Path | None, flags: dict[str, Any]) -> None:
    """Refuse what can be refused before any work."""
    if flags.get("budget") and flags.get("epochs"):
        raise SettingError("--budget and --epochs both end the training: give one of them.")
    if flags.get("norm") == "l2" and flags.get("eps") is None:
        raise SettingError(
            "--norm l2 has no --eps of its own: give it, as a length with its point, 2.0."
        )
    if init_from is not None:
        checkpoint.is_pickle(init_from)  # says what cannot be read


def _introduce(plan: Plan, twin: VideoMoE, folder: Path) -> None:
    """Say what will be trained, on what, and what may surprise a user of it."""
    budget = f", eps {format_eps(*plan.budget)}" if isinstance(plan.recipe, RobustSettings) else ""
    log.info("data: %s  recipe: %s%s  out: %s", plan.data, plan.run.method, budget, folder)
    model, cost = plan.trained, flops.count(twin)
    log.info(
        "model: %s, width %g, %d expert(s), %s",
        model.arch, model.width, model.experts, cost.said,
    )  # fmt: skip
    if cost.dense is not None and cost.dense <= cost.expert:
        log.warning(
            "--width %g is so small that every layer has the fewest channels there are: the dense "
            "counterpart is no wider. Give a larger one.", model.width,
        )  # fmt: skip
    family = registry.load(FAMILIES, model.arch, "expert family (--arch)")
    remark = family.remark(plan.run.frames) if hasattr(family, "remark") else ""
    if remark:
        log.warning("%s", remark)


def _show(plan: Plan, twin: VideoMoE, *, fresh: bool, as_json: bool) -> None:
    """Show the plan; weights that a fresh training begins with have to fit."""
    if fresh and plan.init_from:
        log.info("weights: %s", initial.take_weights(twin, Path(plan.init_from)))
    cli.print_json(plan.mapping()) if as_json else click.echo(_lines(plan))


def _begin(
    twin: VideoMoE, plan: Plan, train: DataSet, folder: Path, *, resume: bool
) -> states.State:
    """Return the state to begin with: fresh, with the weights of --init-from, or as it stood."""
    if resume:
        state = states.load(loop.start(twin, plan.loop), plan.mapping(), folder)
        log.info("resumed after epoch %d", state.epoch)
        return state
    router_start.spread(twin, train)
    if plan.init_from:
        log.info("weights: %s", initial.take_weights(twin, Path(plan.init_from)))
    return loop.start(twin, plan.loop)


def _end(
    state: states.State, plan: Plan, test: ClipData | None, folder: Path, where: torch.device,
    *, as_json: bool,
) -> None:  # fmt: skip
    """Report what came out, and say what to do with it."""
    found = {"validation": state.rows[-1], "recipe": plan.mapping()}
    if test is not None:
        found = _report(plan, test, folder, where)
    if as_json:
        cli.print_json(found)
    log.info("next: vmoe-attack %s", folder / latest.BEST)
    log.info("next: vmoe-export %s", folder / latest.BEST)


def _report(plan: Plan, test: ClipData, folder: Path, where: torch.device) -> dict[str, Any]:
    """Measure the best epoch on the test split, which nothing has seen; write the report."""
    best = checkpoint.load(folder / latest.BEST, where)
    eps, norm = plan.budget
    steps = plan.run.report_steps
    found = report.make(best, test, batch=plan.loop.batch, steps=steps, eps=eps, norm=norm)
    output.write_json(folder / "report.json", found)
    output.write_text(folder / "report.md", report.markdown(found))
    log.info("report: %s", folder / "report.md")
    return found


def _as_before(
    folder: Path, data: str | None, init_from: Path | None, seed: int, flags: dict[str, Any]
) -> tuple[str, Path | None, int, dict[str, Any]]:
    """Return data, weights, seed and flags of a run that goes on; a flag given stands over them.

    Where such a flag contradicts the recipe, `states.load` refuses and says which.

    Raises:
        SettingError: another method, other weights to begin with, or another seed.
        VmoeError: no run of vmoe-train.
    """
    recipe = states.recipe_of(folder)
    try:
        parts = [recipe[part] for part in ("run", "model", "loop", "clips", "method")]
    except KeyError as e:
        raise VmoeError(
            f"{folder} holds no run of vmoe-train (its recipe has no {e}): name one with --out."
        ) from e
    held = {key: value for part in parts for key, value in part.items()}
    given = {key: value for key, value in flags.items() if value is not None}
    if init_from is not None and str(init_from) != recipe["init_from"]:
        raise SettingError(
            f"--init-from {init_from} is where a training begins, and --resume goes on with one: "
            "leave it out, or choose another --out."
        )
    source = click.get_current_context().get_parameter_source("seed")
    if source is ParameterSource.COMMANDLINE:
        given["seed"] = seed
    for name in ("method", "seed"):
        if given.get(name) not in (None, held[name]):
            raise SettingError(
                f"--resume goes on with --{name} {held[name]}; leave --{name} {given[name]} out."
            )
    begun = Path(recipe["init_from"]) if recipe["init_from"] else None
    return data or recipe["data"], begun, held["seed"], {**flags, **held, **given}


def _plan(
    data: str, init_from: Path | None, seed: int, config: Path | None, flags: dict[str, Any]
) -> Plan:
    run = cli.resolve(RunSettings, flags, config)
    options.refuse_strangers(run.method, flags)
    clips = cli.resolve(DataSettings, flags, config, seed=seed)
    labels = open_data(data, "train", run.spec, clips).labels
    model = cli.resolve(ModelSettings, flags, config, classes=len(labels))
    if flags.get("val_eps") is None:  # what is trained for is what the best epoch is chosen by
        flags = {**flags, "val_eps": flags.get("eps")}
    looped = cli.resolve(loop.LoopSettings, flags, config, seed=seed)
    chosen = cli.resolve(run.recipe.Settings, flags, config)
    plan = Plan(data, run, model, looped, clips, chosen, str(init_from or ""))
    options.refuse_of_a_router(plan, flags)
    return plan


def _train(
    state: states.State, plan: Plan, train: DataSet, load: LoadSettings, folder: Path, here: Ranks
) -> None:
    """Train; keep every epoch's weights, the best one's, and the state to go on from.

    An interrupt says how to go on.

    Raises:
        VmoeError: as of `loop.run`, with where the weights of the last whole epoch are.
    """
    best = state.best
    recipe = loop.Recipe(plan.walks, plan.recipe.bf16, plan.budget[1])
    val = plan.open("val", plan.run.val_clips)
    share, where = (here.rank, here.world), next(state.twin.parameters()).device
    try:
        with Loader(train, plan.loop.batch, where, load.workers, share=share) as loader:
            for now in loop.run(state, recipe, loader, val, plan.loop, here):
                if here.first:
                    _keep(now, plan, train.labels, folder, now.best > best)
                best = now.best
    except KeyboardInterrupt:
        if (folder / states.FILE).exists():
            log.warning("what is finished is kept; to go on: vmoe-train --out %s --resume", folder)
        raise
    except VmoeError as e:
        last = folder / "last.safetensors"
        kept = f" The last whole epoch's weights: {last}." if last.exists() else ""
        raise type(e)(f"{e}{kept}") from e


def _keep(
    now: states.State, plan: Plan, labels: tuple[str, ...], folder: Path, better: bool
) -> None:
    recipe = plan.mapping()
    held = checkpoint.Checkpoint(now.kept, labels, recipe, {"validation": now.rows[-1]})
    if better or not (folder / latest.BEST).exists():
        checkpoint.save(held, folder / latest.BEST)
    checkpoint.save(held, folder / "last.safetensors")
    output.write_text(folder / "results.csv", _csv(now.rows))
    states.save(now, recipe, folder)


def _csv(rows: list[states.Row]) -> str:
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))  # walks may change
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows([{k: f"{v:.6g}" for k, v in row.items()} for row in rows])
    return text.getvalue()


def _lines(plan: Plan) -> str:
    lines = []
    for name, value in plan.mapping().items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        for key, v in inner:
            said = format_eps(v, plan.budget[1]) if cli.is_budget(key) else v
            lines.append(f"{name}{'.' if key else ''}{key} = {said}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

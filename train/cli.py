"""vmoe-train: a twin from a data set and a recipe."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

from vmoe import checkpoint, cli, output, registry
from vmoe.attacks import heap, ranks
from vmoe.attacks.ranks import Ranks
from vmoe.data import ClipData, DataSet, DataSettings, open_data
from vmoe.errors import SettingError, VmoeError
from vmoe.loading import Loader, LoadSettings
from vmoe.models import ModelSettings, VideoMoE, build, flops
from vmoe.settings import Settings
from vmoe.train import initial, loop, report, router_start, together
from vmoe.train import state as states
from vmoe.train.planned import RECIPES, Plan, RunSettings

log = cli.log


def _every_recipe_option(function: Any) -> Any:
    """Give the command the options of all recipes, each once."""
    seen = _of_all_recipes()
    for cls in _recipes():
        function = cli.options(cls, skip=seen)(function)
        seen |= _fields(cls)
    return function


def _of_all_recipes() -> set[str]:
    return {f for cls in (RunSettings, ModelSettings, loop.LoopSettings) for f in _fields(cls)}


def _recipes() -> list[type[Settings]]:
    return [registry.load(RECIPES, name, "recipe").Settings for name in registry.names(RECIPES)]


def _fields(cls: type[Settings]) -> set[str]:
    return set(_names(cls))


def _names(cls: type[Settings]) -> list[str]:
    return list(cls.__dataclass_fields__)


NO_FLAGS = ["classes", "denoise", "seed", "epoch"]  # decided elsewhere


def _topics() -> dict[str, list[str]]:
    """Return the options by the classes that hold them; a recipe's are those of its method."""
    of_methods = dict.fromkeys(f for cls in _recipes() for f in cls.__dataclass_fields__)
    fields = {
        "The run": [*_names(RunSettings), "init_from", "out", "resume", "reported", "dry_run"],
        "The model": _names(ModelSettings),
        "Optimisation and validation": _names(loop.LoopSettings),
        "Data": _names(DataSettings) + _names(LoadSettings),
        "Of the method": [f for f in of_methods if f not in _of_all_recipes()],
    }
    return {topic: [f for f in names if f not in NO_FLAGS] for topic, names in fields.items()}


@cli.command(
    "vmoe-train",
    "vmoe-train camera-motion --arch tsm --width 0.125 --method j-tlat",
    "vmoe-train /data/clips --method standard --experts 1 --group 'seq\\d+' --epochs 30",
    "vmoe-train --out runs/train/mine --resume",
    topics=_topics(),
)
@click.argument("data", required=False)
@cli.options(RunSettings)
@cli.options(ModelSettings, skip=NO_FLAGS)
@cli.options(loop.LoopSettings, skip=NO_FLAGS)
@cli.options(DataSettings, skip=NO_FLAGS)
@cli.options(LoadSettings)
@_every_recipe_option
@click.option(
    "--init-from",
    type=click.Path(path_type=Path),
    help="Checkpoint to begin with, or weights of torchvision or timm: safetensors or torch.save.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder. [default: runs/train/NAME]")
@click.option("--resume", is_flag=True, help="Go on where --out was interrupted.")
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

    A run that was interrupted goes on with --resume and its --out; it knows its own recipe.
    """
    heap.keep()
    here = ranks.here()
    if not here.first:
        log.setLevel("ERROR")
    if not resume and flags.get("budget") and flags.get("epochs"):
        raise SettingError("--budget and --epochs both end the training: give one of them.")
    if resume:
        if out is None:
            raise SettingError("--resume goes on with the run in a folder; name it with --out.")
        source = click.get_current_context().get_parameter_source("seed")
        given = seed if source is ParameterSource.COMMANDLINE else None
        held = states.recipe_of(out)
        _refuse_another_begin(held, init_from, given)
        data, init_from, seed, flags = _as_before(held, data, flags)
    elif init_from is not None:
        checkpoint.is_pickle(init_from)  # one that cannot be read is said before any work
    where = checkpoint.device(here.device(device))
    with together.joined(here, where):
        plan = together.first_rank_first(
            lambda: _plan(data or "camera-motion", init_from, seed, config, flags)
        )
        folder = out or Path("runs/train") / f"{plan.run.method}-{plan.model.arch}"
        twin = build(plan.trained, plan.run.spec, seed)  # refuses what does not fit
        log.info("data: %s  recipe: %s  out: %s", plan.data, plan.run.method, folder)
        log.info("%s", _describe(plan.trained, flops.count(twin)))
        if dry_run:
            cli.print_json(plan.mapping()) if as_json else click.echo(_lines(plan.mapping()))
            return
        if not resume and here.first and folder.exists():
            raise SettingError(f"{folder} exists. Choose another --out, or go on with --resume.")
        train = together.first_rank_first(lambda: plan.open("train", plan.clips.clips))
        test = plan.open("test", plan.run.test_clips) if reported else None
        state = _begin(twin.to(where), plan, train, folder, resume=resume)
        output.probe(folder)  # all that can be refused is refused before the first epoch
        _train(state, plan, train, cli.resolve(LoadSettings, flags, config), folder, here)
    if not here.first:
        return
    found = {"validation": state.rows[-1], "recipe": plan.mapping()}
    if test is not None:
        found = _report(plan, test, folder, where)
    if as_json:
        cli.print_json(found)
    log.info("next: vmoe-attack %s", folder / "best.safetensors")
    log.info("next: vmoe-export %s", folder / "best.safetensors")


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


def _report(plan: Plan, test: ClipData, folder: Path, where: torch.device) -> dict[str, Any]:
    """Measure the best epoch on the test split, which nothing has seen; write the report."""
    best = checkpoint.load(folder / "best.safetensors", where)
    eps = getattr(plan.recipe, "eps", plan.loop.val_eps)
    steps = plan.run.report_steps
    found = report.make(best, test, batch=plan.loop.batch, steps=steps, eps=eps)
    output.write_json(folder / "report.json", found)
    output.write_text(folder / "report.md", report.markdown(found))
    log.info("report: %s", folder / "report.md")
    return found


def _as_before(
    recipe: dict[str, Any], data: str | None, flags: dict[str, Any]
) -> tuple[str, Path | None, int, dict[str, Any]]:
    """Return data, weights, seed and flags of a run that goes on; a flag given stands over them.

    Where such a flag contradicts the recipe, `loop.load` refuses and says which.
    """
    parts = (recipe[part] for part in ("run", "model", "loop", "clips", "method"))
    held = {key: value for part in parts for key, value in part.items()}
    given = {key: value for key, value in flags.items() if value is not None}
    given_method = flags.get("method")
    if given_method not in (None, held["method"]):
        raise SettingError(
            f"--resume goes on with --method {held['method']}; leave --method {given_method} out."
        )
    begun = Path(recipe["init_from"]) if recipe["init_from"] else None
    return data or recipe["data"], begun, held["seed"], {**flags, **held, **given}


def _refuse_another_begin(recipe: dict[str, Any], init_from: Path | None, seed: int | None) -> None:
    """Refuse weights to begin with, or a seed, that a run to be resumed did not begin with."""
    if init_from is not None and str(init_from) != recipe["init_from"]:
        raise SettingError(
            f"--init-from {init_from} is where a training begins, and --resume goes on with one: "
            "leave it out, or choose another --out."
        )
    if seed not in (None, recipe["loop"]["seed"]):
        raise SettingError(
            f"--resume goes on with --seed {recipe['loop']['seed']}; leave --seed {seed} out."
        )


def _plan(
    data: str, init_from: Path | None, seed: int, config: Path | None, flags: dict[str, Any]
) -> Plan:
    run = cli.resolve(RunSettings, flags, config)
    recipe = run.recipe.Settings
    _refuse_strangers(run.method, recipe, flags)
    clips = cli.resolve(DataSettings, flags, config, seed=seed)
    labels = open_data(data, "train", run.spec, clips).labels
    model = cli.resolve(ModelSettings, flags, config, classes=len(labels))
    looped = cli.resolve(loop.LoopSettings, flags, config, seed=seed)
    chosen = cli.resolve(recipe, flags, config)
    plan = Plan(data, run, model, looped, clips, chosen, str(init_from or ""))
    _refuse_balance_of_one(plan, flags)
    return plan


OF_A_ROUTER = ("balance", "balance_loss", "on_collapse")


def _refuse_balance_of_one(plan: Plan, flags: dict[str, Any]) -> None:
    """Refuse a flag of the router where the method trains a model that has none."""
    for name in OF_A_ROUTER:
        if plan.trained.experts == 1 and flags.get(name) is not None:
            flag = "--" + name.replace("_", "-")
            raise SettingError(
                f"{flag} is of a router, and --method {plan.run.method} trains one network "
                "without one; leave it out."
            )


def _refuse_strangers(method: str, recipe: type[Settings], flags: dict[str, Any]) -> None:
    """Refuse a flag of another recipe: it would have no effect."""
    mine = {RunSettings, ModelSettings, loop.LoopSettings, DataSettings, LoadSettings, recipe}
    known = {name for cls in mine for name in _fields(cls)}
    for name, value in flags.items():
        if value is not None and name not in known:
            flag = "--" + name.replace("_", "-")
            raise SettingError(f"{flag} has no meaning for --method {method}; leave it out.")


def _train(
    state: states.State, plan: Plan, train: DataSet, load: LoadSettings, folder: Path, here: Ranks
) -> None:
    """Train; keep every epoch's weights, the best one's, and the state to go on from.

    Raises:
        VmoeError: as of `loop.run`, with where the weights of the last whole epoch are.
    """
    best = state.best
    recipe = loop.Recipe(plan.walks, plan.recipe.bf16, getattr(plan.recipe, "norm", "linf"))
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
    if better or not (folder / "best.safetensors").exists():
        checkpoint.save(held, folder / "best.safetensors")
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


def _describe(model: ModelSettings, cost: flops.Flops) -> str:
    text = f"model: {model.arch}, width {model.width:g}, {model.experts} expert(s), "
    text += f"{cost.moe / 1e6:.4g} MFLOPs a clip"
    if cost.dense is None or cost.saved is None:
        return text
    return f"{text} against {cost.dense / 1e6:.4g} of the dense counterpart: {cost.saved:.0%} saved"


def _lines(mapping: dict[str, Any]) -> str:
    lines = []
    for name, value in mapping.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        lines += [f"{name}{'.' if key else ''}{key} = {v}" for key, v in inner]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

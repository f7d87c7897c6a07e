"""vmoe-train: a twin from a data set and a recipe."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from vmoe import checkpoint, cli, output, registry
from vmoe.clips import ClipSpec
from vmoe.data import ClipData, DataSettings, open_data
from vmoe.errors import SettingError
from vmoe.models import ModelSettings, build, flops
from vmoe.settings import Settings, opt, to_mapping
from vmoe.train import initial, loop, report
from vmoe.train.passes import Pass, RecipeSettings

RECIPES = "vmoe.train.recipes"
log = cli.log


@dataclass(frozen=True)
class RunSettings(Settings):
    """What the command itself takes."""

    method: str = opt("j-tlat", "recipe: at-m, j-tlat or standard")
    frames: int = opt(8, "frames of a clip", at_least=1)
    spacing: float = opt(0.1, "time between two frames of a clip, in seconds", above=0)
    size: int = opt(64, "height and width of a clip, in pixels", at_least=16)
    mean: tuple[float, ...] = opt(ClipSpec.mean, "mean per channel (RGB), pixels in [0, 1]")
    std: tuple[float, ...] = opt(ClipSpec.std, "deviation per channel (RGB)", above=0)
    val_clips: int = opt(200, "clips of the validation; 0 is all", at_least=0)
    test_clips: int = opt(400, "clips of the report at the end; 0 is all", at_least=0)
    report_steps: int = opt(20, "gradient steps of the report's attacks", at_least=1)


@dataclass(frozen=True)
class Plan:
    """Everything that a run is made of; its mapping is the recipe in the checkpoint."""

    data: str
    run: RunSettings
    model: ModelSettings
    loop: loop.LoopSettings
    clips: DataSettings
    recipe: RecipeSettings
    init_from: str

    def mapping(self) -> dict[str, Any]:
        """Return the recipe as JSON holds it, to be shown, kept and compared."""
        parts = {"run": self.run, "model": self.model, "loop": self.loop, "clips": self.clips}
        held = {name: to_mapping(part) for name, part in parts.items()}
        mapped = {"data": self.data, "init_from": self.init_from, **held}
        return mapped | {"method": to_mapping(self.recipe)}

    def passes(self) -> list[Pass]:
        """Return the recipe's passes."""
        module = registry.load(RECIPES, self.run.method, "recipe (--method)")
        made: list[Pass] = module.passes(self.recipe)
        if self.model.experts == 1 and any(walk.part == "router" for walk in made):
            raise SettingError(
                f"--method {self.run.method} trains a router, and --experts 1 has none: "
                "give --experts 2 or more, or --method at-m."
            )
        return made

    def open(self, split: str, clips: int, spec: ClipSpec, epoch: int = 0) -> ClipData:
        """Open one split of the data."""
        settings = DataSettings(clips, self.clips.group, self.clips.seed, epoch)
        return open_data(self.data, split, spec, settings)


def _every_recipe_option(function: Any) -> Any:
    """Give the command the options of all recipes, each once."""
    seen = {f for cls in (RunSettings, ModelSettings, loop.LoopSettings) for f in _fields(cls)}
    for name in registry.names(RECIPES):
        cls = registry.load(RECIPES, name, "recipe").Settings
        function = cli.options(cls, skip=seen)(function)
        seen |= _fields(cls)
    return function


def _fields(cls: type[Settings]) -> set[str]:
    return set(cls.__dataclass_fields__)


@cli.command(
    "vmoe-train",
    "vmoe-train camera-motion --arch tsm --width 0.125 --method j-tlat",
    "vmoe-train /data/clips --method standard --experts 1 --group 'seq\\d+' --epochs 30",
    "vmoe-train --out runs/train/mine --resume",
)
@click.argument("data", required=False)
@cli.options(RunSettings)
@cli.options(ModelSettings, skip=["classes"])
@cli.options(loop.LoopSettings, skip=["seed"])
@cli.options(DataSettings, skip=["seed", "epoch"])
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
    if resume:
        if out is None:
            raise SettingError("--resume goes on with the run in a folder; name it with --out.")
        data, init_from, seed, flags = _as_before(loop.recipe_of(out), data, flags)
    plan, spec = _plan(data or "camera-motion", init_from, seed, config, flags)
    where = checkpoint.device(device)
    folder = out or Path("runs/train") / f"{plan.run.method}-{plan.model.arch}"
    plan.passes()  # refuses what does not fit, before any work
    twin = build(plan.model, spec, seed)
    cost = flops.count(twin)
    log.info("data: %s  recipe: %s  out: %s", plan.data, plan.run.method, folder)
    log.info("%s", _describe(plan.model, cost))
    if dry_run:
        cli.print_json(plan.mapping()) if as_json else click.echo(_lines(plan.mapping()))
        return
    if not resume and folder.exists():
        raise SettingError(f"{folder} exists. Choose another --out, or go on with --resume.")
    if init_from is not None and not resume:
        log.info("weights: %s", initial.take_weights(twin, init_from))
    twin.to(where)
    state = loop.start(twin, plan.loop)
    if resume:
        state = loop.load(state, plan.mapping(), folder)
        log.info("resumed after epoch %d of %d", state.epoch, plan.loop.epochs)
    labels = plan.open("train", plan.clips.clips, spec).labels
    test = plan.open("test", plan.run.test_clips, spec) if reported else None
    output.probe(folder)  # all that can be refused is refused before the first epoch
    _train(state, plan, spec, labels, folder)
    found = {"validation": state.rows[-1], "recipe": plan.mapping()}
    if test is not None:
        found = _report(plan, test, folder, where)
    if as_json:
        cli.print_json(found)
    log.info("next: vmoe-attack %s", folder / "best.safetensors")
    log.info("next: vmoe-export %s", folder / "best.safetensors")


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
    begun = Path(recipe["init_from"]) if recipe["init_from"] else None
    return data or recipe["data"], begun, held["seed"], {**flags, **held, **given}


def _plan(
    data: str, init_from: Path | None, seed: int, config: Path | None, flags: dict[str, Any]
) -> tuple[Plan, ClipSpec]:
    run = cli.resolve(RunSettings, flags, config)
    recipe = registry.load(RECIPES, run.method, "recipe (--method)").Settings
    _refuse_strangers(run.method, recipe, flags)
    spec = ClipSpec(run.frames, run.spacing, run.size, run.size, mean=run.mean, std=run.std)
    clips = cli.resolve(DataSettings, flags, config, seed=seed)
    labels = open_data(data, "train", spec, clips).labels
    model = cli.resolve(ModelSettings, flags, config, classes=len(labels))
    looped = cli.resolve(loop.LoopSettings, flags, config, seed=seed)
    chosen = cli.resolve(recipe, flags, config)
    return Plan(data, run, model, looped, clips, chosen, str(init_from or "")), spec


def _refuse_strangers(method: str, recipe: type[Settings], flags: dict[str, Any]) -> None:
    """Refuse a flag of another recipe: it would have no effect."""
    mine = {RunSettings, ModelSettings, loop.LoopSettings, DataSettings, recipe}
    known = {name for cls in mine for name in _fields(cls)}
    for name, value in flags.items():
        if value is not None and name not in known:
            flag = "--" + name.replace("_", "-")
            raise SettingError(f"{flag} has no meaning for --method {method}; leave it out.")


def _train(
    state: loop.State, plan: Plan, spec: ClipSpec, labels: tuple[str, ...], folder: Path
) -> None:
    recipe = plan.mapping()
    best = state.best
    val = plan.open("val", plan.run.val_clips, spec)
    for now in loop.run(
        state, plan.passes(), lambda epoch: plan.open("train", plan.clips.clips, spec, epoch),
        val, plan.loop,
    ):  # fmt: skip
        held = checkpoint.Checkpoint(now.twin, labels, recipe, {"validation": now.rows[-1]})
        if now.best > best or not (folder / "best.safetensors").exists():
            checkpoint.save(held, folder / "best.safetensors")
        best = now.best
        checkpoint.save(held, folder / "last.safetensors")
        output.write_text(folder / "results.csv", _csv(now.rows))
        loop.save(now, recipe, folder)


def _csv(rows: list[loop.Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
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

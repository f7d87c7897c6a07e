r"""Attacks at an equal budget, and what an attack costs.

    python benchmarks/attacks.py --quick
    python benchmarks/attacks.py --models \
        standard=A.safetensors@1/255,at-m=B.safetensors,j-tlat=vmoe/shipped/camera-motion/twin.safetensors
    python benchmarks/attacks.py --train runs/benchmark-attacks \
        --out benchmarks/results/attacks.json --out benchmarks/results/attacks.md --overwrite

Each model of --models, NAME=PATH or NAME=PATH@EPS (4/255 where none is given), is attacked on test
clips by every contestant; --train makes the models of `recipes` first, those that its folder does
not hold. Clips lie on the uint8 grid, and so does every adversarial clip.

The budget is --gradients of the whole model for each clip. Passes are counted by hooks on the
router and on every expert; by route_grad `all` and `soft` a gradient runs every expert, so that
such rows come twice: at as many gradients, and at as many passes of experts (fewer gradients).
What j-tlga-plus asks of the router alone is no gradient of the whole model; its row
`j-tlga-plus, FLOPs` has so many steps fewer that it costs no more FLOPs than the others at most.
Early stop is on: `given` is the budget, `spent` what was used of it, on average over all clips.

With --ablations only j-tlga-plus and what it is made of take part, and no costs are measured:
    python benchmarks/attacks.py --ablations --models at-m=B.safetensors@4/255 \
        --out benchmarks/results/attacks-ablations.json

Budgets, and every setting of j-tlga-plus, were chosen on validation clips of models of another
seed (100), not on those of results/: `--train DIR --seed 100 --split val`.

Figures:

plus_gain_NAME
    Robust accuracy under APGD-margin less that under j-tlga-plus, same clips, same gradients;
    `spread` is the paired standard error, `flops` the same at equal FLOPs.
pgd_vs_bare_passes
    CPU time of PGD-k over k bare forward and backward passes of the same model.
pgd_vs_torchattacks_4d
    CPU time of PGD-k over torchattacks' PGD-k, for the same model on single frames, which
    torchattacks sees as images [B, 3, H, W]; every step taken, success judged by ours alone.
    `judged`: with one forward pass added to torchattacks', as its user needs to know what it did.
memory_100_vs_10_steps
    Peak resident memory of a process after PGD-100 over that after PGD-10, in the same process.

Of the CPU times the value is the ratio of medians over interleaved rounds, `minima` that of the
minima, and `spread` half of the range of the rounds' own ratios.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import attack_costs
import click
import contest
import figures
import numpy as np
import recipes
import torch
from contest import Clips, Contestant, Found
from figures import Figure

from vmoe import bundle as bundles
from vmoe import checkpoint, cli, latest, report
from vmoe.attacks.methods import j_tlga_plus
from vmoe.attacks.presets import PRESETS
from vmoe.batches import to_tensor
from vmoe.clips import ClipSpec
from vmoe.data import open_data
from vmoe.errors import SettingError
from vmoe.models import VideoMoE, flops
from vmoe.runtime.bench import context
from vmoe.settings import format_eps, parse_eps

log = logging.getLogger("vmoe")

EPS = 4 / 255
EPS_OF = {"standard": 1 / 255, "fragile": 2 / 255}  # chosen on models of another seed
CLIPS_SEED = 0  # which clips are taken, as vmoe-attack takes them
REFERENCE, PLUS, PLUS_FLOPS = "apgd-margin", "j-tlga-plus", "j-tlga-plus, FLOPs"
NOT_GIVEN = "no such model was given: --models {}=PATH, or --train FOLDER"


QUICK_CLIPS, QUICK_GRADIENTS = 8, 8


class Model(NamedTuple):
    """A model that is attacked: its name, its checkpoint, and the budget."""

    name: str
    path: Path
    eps: float


def read_models(text: str) -> list[Model]:
    """Read NAME=PATH or NAME=PATH@EPS, with commas.

    Raises:
        SettingError: an entry of another form, a name that comes twice, or no number.
    """
    models = []
    for entry in text.split(","):
        name, equals, rest = entry.strip().partition("=")
        path, at, eps = rest.rpartition("@") if "@" in rest else (rest, "", "")
        if not (name and equals and path):
            raise SettingError(f"--models has {entry!r}; write NAME=PATH or NAME=PATH@EPS.")
        if name in {model.name for model in models}:
            raise SettingError(f"--models names {name} twice.")
        models.append(Model(name, Path(path), parse_eps(eps) if at else EPS))
    return models


@cli.command(
    "attacks.py",
    "python benchmarks/attacks.py --quick",
    "python benchmarks/attacks.py --models at-m=runs/train/mine/best.safetensors@4/255 --n 50",
    "python benchmarks/attacks.py --train runs/benchmark-attacks --out attacks.md",
)
@click.option("--models", default=None, help="NAME=PATH[@EPS],... [default: the one that ships]")
@click.option("--train", type=click.Path(path_type=Path), help="Train the models into this folder.")
@click.option("--gradients", type=click.IntRange(4), default=20, show_default=True,
              help="Gradients for each clip.")  # fmt: skip
@click.option("--n", type=click.IntRange(2), default=100, show_default=True, help="Clips a model.")
@click.option("--split", type=click.Choice(["val", "test"]), default="test", show_default=True)
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True)
@click.option("--ablations", is_flag=True, help="Take j-tlga-plus apart; measure no costs.")
@click.option("--quick", is_flag=True, help="Under a minute; tells the direction.")
@figures.result_options
@cli.seed_option
def main(
    models: str | None, train: Path | None, gradients: int, n: int, split: str, batch: int,
    ablations: bool, quick: bool, out: tuple[Path, ...], overwrite: bool, as_json: bool, seed: int,
) -> None:  # fmt: skip
    """Compare attacks at an equal budget on some models, and measure what PGD costs."""
    figures.check_files(out, overwrite=overwrite)
    if models and train:
        raise SettingError("--models and --train exclude each other.")
    machine = context.read()
    if quick:
        gradients, n = min(gradients, QUICK_GRADIENTS), min(n, QUICK_CLIPS)
    measured: dict[str, Any] = {"gradients": gradients, "split": split, "seed": seed, "models": {}}
    tables: dict[str, str] = {}
    found: list[Figure] = []
    for model in _models(models, train, seed):
        held = checkpoint.load(model.path)
        clips = _clips(held.twin.spec, held.labels, split, n)
        if ablations:
            rows = ablated(gradients, held.twin)
        else:
            rows = contestants(gradients, held.twin, ablations=not quick)
        say = _sayer(model.name)
        reached = contest.run(
            held.twin, clips, rows, eps=model.eps, seed=seed, batch=batch, done=say
        )
        clean = _clean(held.twin, clips)
        title = f"{model.name}, eps {format_eps(model.eps)}, {n} {split} clips: {_seen(model.path)}"
        tables[title] = f"clean: {report.percent(int(clean.sum()), n)} %\n\n{table(reached)}"
        measured["models"][model.name] = _record(model, reached, clean)
        found.append(gain(model.name, reached))
    if not ablations:
        found += _not_given(measured["models"])
        found += attack_costs.measure(attack_costs.QUICK if quick else attack_costs.FULL)
    figures.say(found, as_json=as_json)
    if not as_json:
        for title, text in tables.items():
            click.echo(f"\n{title}\n{text}")
    name = "Ablations of j-tlga-plus" if ablations else "Attacks at an equal budget"
    figures.write(out, name, found, machine, tables, measured)


def _not_given(given: Container[str]) -> list[Figure]:
    return [
        Figure(f"plus_gain_{name}", None, "share", 0, "higher", why=NOT_GIVEN.format(name))
        for name in recipes.MODELS
        if name not in given
    ]


def _models(given: str | None, train: Path | None, seed: int) -> list[Model]:
    """Return the models to attack, those of `recipes` at budgets that some clips withstand."""
    if given:
        return read_models(given)
    if train:
        paths = recipes.train(train, seed)
        return [Model(name, path, EPS_OF.get(name, EPS)) for name, path in paths.items()]
    return [Model("j-tlat", latest.shipped() / bundles.TWIN, EPS)]


def _clips(spec: ClipSpec, labels: Sequence[str], split: str, n: int) -> Clips:
    """Take n clips of camera-motion, the same as vmoe-attack takes."""
    data = open_data("camera-motion", split, spec)
    order = np.random.default_rng(CLIPS_SEED).permutation(len(data))
    index = np.sort(order[:n])
    taken = [data[int(i)] for i in index]
    label = torch.tensor([labels.index(data.labels[k]) for _, k in taken])
    return Clips(to_tensor(np.stack([clip for clip, _ in taken])), label, torch.from_numpy(index))


def _clean(twin: VideoMoE, clips: Clips) -> contest.Bools:
    with torch.no_grad():
        said = [twin(clip, "frozen").logits.argmax(dim=1) for clip in clips.clip.split(16)]
    right: contest.Bools = (torch.cat(said) == clips.label).numpy()
    return right


def _sayer(name: str) -> Callable[[str], None]:
    return lambda text: log.info("%s: %s", name, text)


# ---- who takes part


def contestants(gradients: int, twin: VideoMoE, *, ablations: bool) -> list[Contestant]:
    """Return who takes part, teams last, at a number of gradients for each clip.

    Args:
        gradients: the budget.
        twin: says how many experts there are, and what the router costs.
        ablations: with those of j-tlga-plus.
    """
    experts, quarter = len(twin.experts), max(1, gradients // 4)

    def one(name: str, attack: str, steps: int = gradients, *, extra: bool = False,
            given: int = gradients, **values: Any) -> Contestant:  # fmt: skip
        held = {"steps": steps, **values}
        return Contestant(name, attack.replace("-", "_"), given, held, extra=extra)

    rows = [one(name, name) for name in ("pgd", "apgd-ce", REFERENCE, "apgd-dlr", "tla-m", "j-tla")]
    rows.append(one("j-tlga, preset paper", "j-tlga", **PRESETS["paper"]))
    rows += [one("j-tlga", "j-tlga"), one(PLUS, PLUS)]
    less = gradients - asking(twin)
    if less > 0:
        rows.append(one(PLUS_FLOPS, PLUS, less, given=less))
    if experts > 1:
        few = max(1, gradients // experts)
        for name in (REFERENCE, "j-tlga"):
            rows.append(one(f"{name}, frozen", name, route_grad="frozen"))
            for way in ("all", "soft"):
                rows.append(one(f"{name}, {way}, passes", name, few, route_grad=way, given=few))
            rows.append(one(f"{name}, all", name, route_grad="all", extra=True))
    if ablations:
        rows += _ingredients(gradients)
    team = ("pgd", "apgd-ce", REFERENCE, "j-tlga")
    parts = [one(f"{name}, a quarter", name, quarter, given=quarter) for name in team]
    names = tuple(part.name for part in parts)
    rows += [*parts, Contestant("worst-of these quarters", "", 4 * quarter, team=names)]
    everyone = tuple(row.name for row in rows if not row.team)
    return [*rows, Contestant("worst-of all", "", 0, team=everyone, extra=True)]


def ablated(gradients: int, twin: VideoMoE) -> list[Contestant]:
    """Return j-tlga-plus, what it is made of, and what it is without each ingredient.

    Margin against CE is the plain part's, apgd-ce against apgd-margin. What runs every expert at
    each gradient comes at as many gradients, outside the budget, and at as many passes.
    """
    names = ("apgd-ce", REFERENCE, PLUS)
    rows = [_one(name, name, gradients) for name in names]
    rows += [
        *_ingredients(gradients),
        _one("plus: to the lowest score", PLUS, gradients, toward="weakest"),
    ]
    few = max(1, gradients // len(twin.experts))
    for name, attack in ((REFERENCE, REFERENCE), ("plus", PLUS)):
        rows.append(_one(f"{name}: frozen", attack, gradients, route_grad="frozen"))
        for way in ("all", "soft"):
            rows += [
                _one(f"{name}: {way}", attack, gradients, extra=True, route_grad=way),
                _one(f"{name}: {way}, passes", attack, few, route_grad=way),
            ]
    return rows


def _ingredients(gradients: int) -> list[Contestant]:
    return [
        _one("plus: nothing asked", PLUS, gradients, router_steps=0),
        _one("plus: asked 2 steps", PLUS, gradients, router_steps=2),
        _one("plus: asked 10 steps", PLUS, gradients, router_steps=10),
        _one("plus: all steps guided", PLUS, gradients, guided=1.0),
        _one("plus: 1 step guided", PLUS, gradients, guided=1 / gradients),
        _one("plus: route not held", PLUS, gradients, hold=0.0),
    ]


def _one(name: str, attack: str, steps: int, *, extra: bool = False, **values: Any) -> Contestant:
    held = {"steps": steps, **values}
    return Contestant(name, attack.replace("-", "_"), steps, held, extra=extra)


def asking(twin: VideoMoE) -> int:
    """Return how many gradients j-tlga-plus pays at most beside its steps, by FLOPs, rounded up.

    The router's gradients, and one forward pass where each other expert is chosen.
    """
    cost, others = flops.count(twin), len(twin.experts) - 1
    router = others * (2 * j_tlga_plus.Settings().router_steps + 1) * cost.router
    return math.ceil((router + others * cost.moe) / (2 * cost.moe))


# ---- what they reached


def table(found: Sequence[Found]) -> str:
    """Return what the contestants reached, in per cent, and what they spent, per clip."""
    columns = ["attack", "robust %", "s.e.", f"less than {REFERENCE}", "paired s.e.", "flips %",
               "given", "spent", "expert passes", "router passes", "GFLOPs", "CPU ms"]  # fmt: skip
    reference = _named(found, REFERENCE)
    rows = []
    for one in found:
        who, spent = one.contestant, one.spent
        robust, won = contest.share(~one.broken), contest.difference(one.broken, reference.broken)
        rows.append([
            who.name + " (outside the budget)" * who.extra,
            f"{100 * robust.value:.1f}", f"{100 * robust.error:.1f}", f"{100 * won.value:+.1f}",
            f"{100 * won.error:.1f}", f"{100 * float(one.flipped.mean()):.1f}", who.given or None,
            f"{spent.gradients:.1f}", f"{spent.expert_forwards:.1f} + {spent.expert_backwards:.1f}",
            f"{spent.router_forwards:.1f} + {spent.router_backwards:.1f}", f"{spent.gflops:.3f}",
            f"{1000 * spent.cpu_s:.0f}",
        ])  # fmt: skip
    return report.table(rows, columns)


def gain(name: str, found: Sequence[Found]) -> Figure:
    """Return by how much j-tlga-plus leaves fewer clips standing than APGD-margin."""
    reference, plus = _named(found, REFERENCE), _named(found, PLUS)
    won = contest.difference(plus.broken, reference.broken)
    more: dict[str, Any] = {
        "apgd_margin": 1 - float(reference.broken.mean()), "plus": 1 - float(plus.broken.mean()),
    }  # fmt: skip
    if any(one.contestant.name == PLUS_FLOPS for one in found):
        equal = contest.difference(_named(found, PLUS_FLOPS).broken, reference.broken)
        more |= {"flops": equal.value, "flops_spread": equal.error}
    n = len(plus.broken)
    return Figure(f"plus_gain_{name}", won.value, "share", 0, "higher", n, won.error, more=more)


def _named(found: Sequence[Found], name: str) -> Found:
    return next(one for one in found if one.contestant.name == name)


def _seen(path: Path) -> str:
    """Return a path as seen from the repository, where it lies in it."""
    inside = path.is_absolute() and path.is_relative_to(figures.ROOT)
    return str(path.relative_to(figures.ROOT) if inside else path)


def _record(model: Model, found: Sequence[Found], clean: contest.Bools) -> dict[str, Any]:
    rows = [
        {
            "name": one.contestant.name, "attack": one.contestant.attack,
            "settings": dict(one.contestant.values), "team": one.contestant.team,
            "given": one.contestant.given, "spent": one.spent._asdict(),
            "robust": 1 - float(one.broken.mean()), "flips": float(one.flipped.mean()),
            "broken": one.broken.astype(int).tolist(),
        }
        for one in found
    ]  # fmt: skip
    return {"path": _seen(model.path), "eps": model.eps, "clean": float(clean.mean()), "rows": rows}


if __name__ == "__main__":
    main()

"""How well the guard finds attacked streams, and what an attack that knows it does.

Streams are the test pattern's moves at 10 frames a second, two moves each, watched by the model
that ships, every 0.4 s; the guard without a filter, and with the bilateral one. It is calibrated on
streams of other seeds; its filter and its tail were chosen on others again (seeds 500 to 631). An
attack changes the stream's frames once, within eps, and rounds them to uint8; engine and guard
judge. PGD, TLGA-R and J-TLGA attack clips that follow each other; `stream` attacks all overlapping
windows together (attacks/guarded.py), and `adaptive` so with the guard's score, its filter
differentiated, in its loss, at several weights; the worst of them is what counts.

    misled       windows whose label is not the clean one
    AUC          of the guard's score, attacked windows against clean ones; and those misled
    found at a   misled windows with an alarm, where a share a of clean windows may have one
    past at a    windows that are misled without an alarm, of all
    false alarms on clean windows of streams that are in neither
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import figures
import numpy as np
import torch
from figures import Figure
from numpy.typing import NDArray

from vmoe import bundle, checkpoint, cli, clips, latest, report
from vmoe.attacks import guarded
from vmoe.attacks.guarded import StreamAttackSettings
from vmoe.attacks.methods import j_tlga, pgd, tlga_r
from vmoe.batches import to_tensor
from vmoe.models import VideoMoE
from vmoe.runtime import Engine, load
from vmoe.runtime.bench import context
from vmoe.runtime.guard import CALIBRATE, MONITOR, Guard, profile, terms
from vmoe.runtime.guard.profile import Profile
from vmoe.runtime.results import softmax
from vmoe.runtime.sources import test as pattern

MOVES, STEP = 2, 4  # moves of a stream; frames from one window to the next
EVERY = 3  # of the pattern's frames: 10 a second
RATES = (0.01, 0.05)
LOOKS = ("off", "bilateral")
WEIGHTS = (0.3, 3.0)  # of the guard in the adaptive attack's loss
CALIBRATION, CLEAN = 1000, 2000  # first seeds
BASELINE = 0.911  # mean AUC of the detector of arXiv 2404.10790, at the cost of a second model


class Judged(NamedTuple):
    """What engine and guard say of a stream's windows."""

    labels: NDArray[np.int64]
    scores: NDArray[np.float64]
    terms: list[tuple[dict[str, float], int]]


class Row(NamedTuple):
    """What one attack came to, judged by a guard of one filter."""

    look: str
    attack: str
    misled: float
    auc: float
    auc_misled: float
    found: tuple[float, ...]
    past: tuple[float, ...]


def stream(seed: int, spec: clips.ClipSpec) -> clips.Clips:
    """Return the frames of a stream as the model takes them, uint8 [F, H, W, 3]."""
    count = round(MOVES * pattern.MOVE_S * pattern.FPS)
    seen = (pattern.render(number, seed) for number in range(0, count, EVERY))
    return np.stack([clips.prepare(frame, spec) for frame in seen])


def windows(frames: int, length: int) -> NDArray[np.int64]:
    """Return the frames of each window, int [N, T]."""
    starts = np.arange(0, frames - length + 1, STEP)
    return starts[:, None] + np.arange(length)


def judge(engine: Engine, frames: clips.Clips, clean: Profile | None, look: str) -> Judged:
    """Let the deployed model and the guard judge every window."""
    spec = engine.bundle.spec
    found = engine.infer(frames[windows(len(frames), spec.frames)])
    again = None
    if look != "off":
        again = engine.infer(
            terms.filtered(frames[windows(len(frames), spec.frames)], look),
            force_route=found.route.tolist(),
        )
    guard = Guard(MONITOR if clean else CALIBRATE, clean, experts=engine.bundle.experts)
    verdicts = [
        guard.judge(
            softmax(found.logits[i]), softmax(found.scores[i]), int(found.route[i]), epoch=0,
            t_first_s=0.4 * i, t_s=0.4 * i + spec.window_s, age_s=0.0,
            filtered=None if again is None else softmax(again.logits[i]),
        )
        for i in range(len(found.route))
    ]  # fmt: skip
    pairs = [(v.terms, int(route)) for v, route in zip(verdicts, found.route, strict=True)]
    scores = np.array([v.score for v in verdicts])
    return Judged(found.logits.argmax(axis=1), scores, pairs)


def calibrated(engine: Engine, seeds: Sequence[int], look: str) -> list[Profile]:
    """Return a profile for each of RATES."""
    spec = engine.bundle.spec
    seen = [judge(engine, stream(seed, spec), None, look).terms for seed in seeds]
    twin = str(engine.bundle.twin["sha256"])
    return [
        profile.make(seen, experts=engine.bundle.experts, twin=twin, hop_s=0.4, filter=look,
                     false_alarms=rate)
        for rate in RATES
    ]  # fmt: skip


Attack = Callable[[clips.Clips], clips.Clips]


def blind(twin: VideoMoE, eps: float, steps: int) -> dict[str, Attack]:
    """Return the attacks that do not know the guard, by name."""

    def clip_by_clip(method: object) -> Attack:
        def attack(frames: clips.Clips) -> clips.Clips:
            whole = len(frames) // twin.spec.frames * twin.spec.frames
            given = to_tensor(frames[:whole].reshape(-1, twin.spec.frames, *frames.shape[1:]))
            with torch.no_grad():
                label = twin(given).logits.argmax(dim=1)
            how = method.Settings(eps=eps, steps=steps, grid=True)  # type: ignore[attr-defined]
            found = method.attack(twin, given, label, how)  # type: ignore[attr-defined]
            moved = (255 * found.adversarial).round().byte().permute(0, 2, 3, 4, 1).numpy()
            return np.concatenate([moved.reshape(whole, *frames.shape[1:]), frames[whole:]])

        return attack

    named = {"PGD": pgd, "TLGA-R": tlga_r, "J-TLGA": j_tlga}
    return {name: clip_by_clip(method) for name, method in named.items()}


def together(twin: VideoMoE, clean: Profile, eps: float, steps: int, weight: float) -> Attack:
    """Return the attack on all overlapping windows, with the guard's score in its loss."""
    how = StreamAttackSettings(eps=eps, steps=steps, weight=weight)

    def attack(frames: clips.Clips) -> clips.Clips:
        given = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
        places = torch.from_numpy(windows(len(frames), twin.spec.frames))
        moved = guarded.attack(twin, given, places, clean, how)
        return (255 * moved).round().byte().permute(0, 2, 3, 1).numpy()

    return attack


def auc(clean: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return how often a score of the others is above a clean one, ties half."""
    above = (other[:, None] > clean[None]).mean() + (other[:, None] == clean[None]).mean() / 2
    return float(above)


class Guarded:
    """The engine, watched by a guard of one filter."""

    def __init__(self, engine: Engine, look: str, seeds: int) -> None:
        self.engine, self.look = engine, look
        self.profiles = calibrated(engine, range(CALIBRATION, CALIBRATION + seeds), look)

    def judge(self, streams: Sequence[clips.Clips]) -> list[Judged]:
        """Judge every window of some streams."""
        return [judge(self.engine, one, self.profiles[0], self.look) for one in streams]

    def row(self, name: str, clean: list[Judged], other: list[Judged]) -> Row:
        """Compare attacked streams with what they were."""
        before, after = (np.concatenate([one.labels for one in many]) for many in (clean, other))
        quiet, loud = (np.concatenate([one.scores for one in many]) for many in (clean, other))
        wrong = before != after
        caught = [loud > one.threshold for one in self.profiles]
        return Row(
            self.look,
            name,
            float(wrong.mean()),
            auc(quiet, loud),
            auc(quiet, loud[wrong]) if wrong.any() else float("nan"),
            tuple(float(c[wrong].mean()) if wrong.any() else float("nan") for c in caught),
            tuple(float((wrong & ~c).mean()) for c in caught),
        )


@cli.command(
    "guard.py",
    "python benchmarks/guard.py --quick",
    "python benchmarks/guard.py --out benchmarks/results/guard.json",
    "python benchmarks/guard.py --eps 4 --streams 4",
)
@click.option("--quick", is_flag=True, help="Few streams and steps; tells the direction.")
@click.option("--streams", type=click.IntRange(1), default=10, show_default=True,
              help="Streams that are attacked, of 14 windows each.")  # fmt: skip
@click.option("--steps", type=click.IntRange(1), default=15, show_default=True,
              help="Steps of an attack; those on whole streams take 5 more.")  # fmt: skip
@click.option("--eps", type=cli.EpsType(), default="8/255", show_default=True, help="L-infinity.")
@figures.result_options
def main(
    quick: bool, streams: int, steps: int, eps: float, out: tuple[Path, ...], overwrite: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure how well the guard finds attacked streams, and an attack that knows it."""
    figures.check_files(out, overwrite=overwrite)
    machine = context.read()
    calibration, aside = (16, 8) if quick else (48, 48)
    streams, steps = (2, 5) if quick else (streams, steps)
    torch.set_num_threads(1)
    twin = checkpoint.load(latest.shipped() / bundle.TWIN).twin
    with load(latest.shipped(), threads=1) as engine:
        guards = [Guarded(engine, look, calibration) for look in LOOKS]
        given = [stream(seed, twin.spec) for seed in range(streams)]
        rows = list(measure(twin, guards, given, eps, steps))
        other = [stream(seed, twin.spec) for seed in range(CLEAN, CLEAN + aside)]
        quiet = [np.concatenate([j.scores for j in one.judge(other)]) for one in guards]
    found = [
        Figure(f"guard_auc_{one.look}_{_key(one.attack)}", one.auc, "share", BASELINE, "higher",
               sum(len(windows(len(s), twin.spec.frames)) for s in given),
               more={"misled": one.misled, "auc_misled": one.auc_misled})
        for one in rows
    ]  # fmt: skip
    found += [
        Figure(f"guard_false_alarms_{one.look}_{rate:g}", float((scores > p.threshold).mean()),
               "share", rate, n=len(scores))
        for one, scores in zip(guards, quiet, strict=True)
        for rate, p in zip(RATES, one.profiles, strict=True)
    ]  # fmt: skip
    figures.say(found, as_json=as_json)
    shares = [f"{what} at {rate:.0%}" for what in ("found", "past") for rate in RATES]
    heads = ["filter", "attack", "misled %", "AUC", "of those misled", *shares]
    lines = [[r.look, r.attack, 100 * r.misled, r.auc, r.auc_misled,
              *(100 * x for x in (*r.found, *r.past))] for r in rows]  # fmt: skip
    table = report.table(lines, heads)
    click.echo(table, err=True)
    record = {"rows": [r._asdict() for r in rows],
              "windows_of_calibration": guards[0].profiles[0].windows}  # fmt: skip
    title = f"The guard, eps {255 * eps:g}/255"
    figures.write(out, title, found, machine, {title: table}, record)


def measure(
    twin: VideoMoE, guards: Sequence[Guarded], given: Sequence[clips.Clips], eps: float, steps: int
) -> Iterator[Row]:
    """Attack the streams; yield what each guard makes of each attack."""
    clean = [guard.judge(given) for guard in guards]

    def rows(name: str, attack: Attack, judging: Sequence[int]) -> Iterator[Row]:
        moved = [attack(frames) for frames in given]
        for one, before in zip(moved, given, strict=True):
            assert np.abs(one.astype(int) - before).max() <= 255 * eps + 1e-6
        for i in judging:
            found = guards[i].row(name, clean[i], guards[i].judge(moved))
            cli.log.info("%s", found)
            yield found

    every = range(len(guards))
    for name, attack in blind(twin, eps, steps).items():
        yield from rows(name, attack, every)
    blind_stream = together(twin, guards[0].profiles[1], eps, steps + 5, 0.0)
    yield from rows("stream", blind_stream, every)
    for i, guard in enumerate(guards):
        for weight in WEIGHTS:
            knowing = together(twin, guard.profiles[1], eps, steps + 5, weight)
            yield from rows(f"adaptive, weight {weight:g}", knowing, [i])


def _key(attack: str) -> str:
    return attack.lower().replace(", weight ", "_").replace("-", "_")


if __name__ == "__main__":
    main()

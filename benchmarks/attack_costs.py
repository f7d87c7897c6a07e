"""What an attack costs: PGD against bare passes, against torchattacks' PGD, and its memory.

`benchmarks/attacks.py` prints these figures, and says what they are.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from figures import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vmoe.attacks.loop import as_found
from vmoe.attacks.methods import pgd
from vmoe.clips import ClipSpec
from vmoe.models import ModelSettings, VideoMoE, build

BARE, SPEED, MEMORY = 1.1, 1.0, 1.02  # what is to be reached


class Effort(NamedTuple):
    """How much is measured.

    Attributes:
        rounds: of each form, interleaved.
        steps: of PGD, where time is measured.
        batch: clips at once, where time is measured.
    """

    rounds: int
    steps: int
    batch: int


QUICK, FULL = Effort(rounds=3, steps=10, batch=4), Effort(rounds=15, steps=20, batch=8)


def measure(effort: Effort) -> list[Figure]:
    """Measure all three."""
    return [bare_passes(effort), against_torchattacks(effort), memory()]


def bare_passes(effort: Effort) -> Figure:
    """Measure PGD-k against k bare forward and backward passes."""
    twin = build(ModelSettings("tsm", 0.125), ClipSpec()).eval()
    clip, label = _noise(twin.spec, effort.batch)
    how = pgd.Settings(steps=effort.steps, early_stop=False)

    def bare() -> None:
        with as_found(twin):
            at = clip.clone()
            for _ in range(effort.steps):
                at.requires_grad_()
                loss = cross_entropy(twin(at).logits, label, reduction="sum")
                torch.autograd.grad(loss, at)
                at = at.detach()

    forms = [lambda: pgd.attack(twin, clip, label, how), bare]
    return _ratio("pgd_vs_bare_passes", BARE, forms, effort)


def against_torchattacks(effort: Effort) -> Figure:
    """Measure PGD-k against torchattacks', on single frames."""
    name = "pgd_vs_torchattacks_4d"
    try:
        import torchattacks
    except ImportError as e:
        why = f"{e.name} is not installed: pip install --no-deps torchattacks"
        return Figure(name, None, "ratio", SPEED, why=why)
    twin = build(ModelSettings("tsm", 0.125), ClipSpec(frames=1)).eval()
    clip, label = _noise(twin.spec, effort.batch)
    how = pgd.Settings(steps=effort.steps, early_stop=False)
    theirs = torchattacks.PGD(_Images(twin).eval(), how.eps, how.step * how.eps, how.steps)
    images = clip[:, :, 0]

    def judged() -> None:
        found = theirs(images, label)
        with torch.no_grad():
            twin(found[:, :, None])

    forms = [
        lambda: pgd.attack(twin, clip, label, how), lambda: theirs(images, label), judged,
    ]  # fmt: skip
    return _ratio(name, SPEED, forms, effort, "judged")


class _Images(nn.Module):
    """A twin of single frames, as an image classifier: [B, 3, H, W] to logits."""

    def __init__(self, twin: VideoMoE) -> None:
        super().__init__()
        self.twin = twin

    def forward(self, images: Tensor) -> Tensor:
        """Answer images."""
        logits: Tensor = self.twin(images[:, :, None]).logits
        return logits


def _noise(spec: ClipSpec, batch: int) -> tuple[Tensor, Tensor]:
    t, h, w, c = spec.shape
    generator = torch.Generator().manual_seed(0)
    return torch.rand((batch, c, t, h, w), generator=generator), torch.arange(batch) % 10


def _ratio(
    name: str, reach: float, forms: Sequence[Callable[[], object]], effort: Effort, third: str = ""
) -> Figure:
    """Return the CPU time of the first form over that of the second, and over that of the third."""
    times: list[list[float]] = [[] for _ in forms]
    for number in range(effort.rounds + 1):
        for form, held in zip(forms, times, strict=True):
            begin = time.process_time()
            form()
            if number:  # the first round warms up
                held.append(time.process_time() - begin)
    ours, theirs = times[0], times[1]
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    more = {"minima": min(ours) / min(theirs), "k": effort.steps}
    if third:
        more[third] = statistics.median(ours) / statistics.median(times[2])
    value = statistics.median(ours) / statistics.median(theirs)
    half = (max(ratios) - min(ratios)) / 2
    return Figure(name, value, "ratio", reach, n=effort.rounds, spread=half, more=more)


PEAKS = """
import resource, torch
from vmoe.attacks.methods import pgd
from vmoe.clips import ClipSpec
from vmoe.models import ModelSettings, build

twin, clip = build(ModelSettings("tsm", 0.125), ClipSpec()).eval(), torch.rand(4, 3, 8, 64, 64)
for steps in (10, 10, 100):
    how = pgd.Settings(steps=steps, early_stop=False)
    pgd.attack(twin, clip, torch.arange(4), how)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def memory() -> Figure:
    """Measure the peak of a fresh process after PGD-10, twice, and then after PGD-100."""
    name = "memory_100_vs_10_steps"
    if sys.platform == "win32":
        return Figure(name, None, "ratio", MEMORY, why="Windows does not tell a process its peak")
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    _, few, many = map(int, done.stdout.split())
    return Figure(name, many / few, "ratio", MEMORY, more={"peak_kib": many})

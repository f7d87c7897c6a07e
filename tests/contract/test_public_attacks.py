"""Our attacks against public ones on images: same model, same budget, same steps, same rate.

The public libraries take images, [B, 3, H, W]; ours take the same as clips of one frame.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vmoe import registry
from vmoe.attacks import ball
from vmoe.attacks.methods import autoattack
from vmoe.clips import ClipSpec
from vmoe.models import ModelSettings, VideoMoE, build
from vmoe.models.moe import Normalise
from vmoe.moves import photographs

SPEC = ClipSpec(frames=1, spacing_s=0.1, height=16, width=16)
EPS = {"linf": 12 / 255, "l2": 1.2}
STEPS = 20
QUERIES = 60
SEEDS = {"square": 2}  # whose rates are averaged: more hangs on chance than in the others
POINTS = 2.0  # how far apart two rates may lie

WHERE = {
    "torchattacks": "pip install --no-deps torchattacks",
    "autoattack": "pip install git+https://github.com/fra31/auto-attack",
}
Attack = Callable[[Tensor, Tensor], Tensor]


class Pictures(NamedTuple):
    """A classifier that says of which photograph a crop is, and crops that it has not seen."""

    twin: VideoMoE
    clip: Tensor
    label: Tensor

    def image_model(self) -> nn.Module:
        """Return the twin as public attacks want it: of images, in eval mode."""
        return _OfImages(self.twin).eval()


class _OfImages(nn.Module):
    def __init__(self, twin: VideoMoE) -> None:
        super().__init__()
        self.twin = twin

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.twin(image[:, :, None]).logits
        return logits


def crops(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return crops of 48x48 pixels at a third of their size, [n, 3, 1, 16, 16], and whose."""
    rng, scenes = np.random.default_rng(seed), photographs()
    label, found = rng.integers(len(scenes), size=n), []
    for which in label:
        frame = scenes[which].frames[0]
        top, left = (rng.integers(side - 48 + 1) for side in frame.shape[:2])
        crop = frame[top : top + 48, left : left + 48]
        found.append(crop.reshape(16, 3, 16, 3, 3).mean(axis=(1, 3)) / 255)
    clip = torch.tensor(np.stack(found), dtype=torch.float32)
    return clip.permute(0, 3, 1, 2)[:, :, None].contiguous(), torch.from_numpy(label)


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    """Train a small network against FGSM, so that budgets are told apart."""
    clip, y = crops(1500, 1)
    labels = int(y.max()) + 1
    twin = build(ModelSettings("tsm", 0.1, 1, labels), SPEC)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            Normalise(SPEC), nn.Flatten(1, 2),
            nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, labels),
        )  # fmt: skip
        twin.experts = nn.ModuleList([net])
        optimiser = torch.optim.Adam(twin.parameters(), 3e-3)
        for _ in range(6):
            for rows in torch.randperm(len(clip)).split(64):
                x = clip[rows].requires_grad_()
                loss = nn.functional.cross_entropy(twin(x).logits, y[rows])
                moved = x + 4 / 255 * torch.autograd.grad(loss, x)[0].sign()
                loss = nn.functional.cross_entropy(twin(moved.clamp(0, 1)).logits, y[rows])
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
    return Pictures(twin.eval(), *crops(400, 2))


def of_torchattacks(
    library: ModuleType, model: nn.Module, norm: str, labels: int, seed: int
) -> dict[str, Attack]:
    eps, name = EPS[norm], {"linf": "Linf", "l2": "L2"}[norm]
    pgd = library.PGD if norm == "linf" else library.PGDL2
    return {
        "pgd": pgd(model, eps, eps / 4, STEPS),
        "apgd-ce": library.APGD(model, name, eps, STEPS, seed=seed, loss="ce"),
        "apgd-dlr": library.APGD(model, name, eps, STEPS, seed=seed, loss="dlr"),
        "apgd-t": library.APGDT(model, name, eps, STEPS, n_classes=labels),
        "fab": library.FAB(model, name, eps, STEPS, multi_targeted=True, n_classes=labels),
        "square": library.Square(model, name, eps, QUERIES, seed=seed),
    }


def of_autoattack(
    _: ModuleType, model: nn.Module, norm: str, labels: int, seed: int
) -> dict[str, Attack]:
    how = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": EPS[norm], "verbose": False}
    how |= {"seed": seed, "device": "cpu"}
    apgd = importlib.import_module("autoattack.autopgd_base")
    fab = importlib.import_module("autoattack.fab_pt").FABAttack_PT
    square = importlib.import_module("autoattack.square").SquareAttack
    towards = {"n_iter": STEPS, "n_target_classes": labels - 1, **how}
    return {
        "apgd-ce": apgd.APGDAttack(model, n_iter=STEPS, loss="ce", **how).perturb,
        "apgd-dlr": apgd.APGDAttack(model, n_iter=STEPS, loss="dlr", **how).perturb,
        "apgd-t": apgd.APGDAttack_targeted(model, **towards).perturb,
        "fab": fab(model, targeted=True, **towards).perturb,
        "square": square(model, n_queries=QUERIES, **how).perturb,
    }


def public(library: str, pictures: Pictures, norm: str, seed: int) -> dict[str, Attack]:
    """Return the attacks of a library, from images and labels to images."""
    why = f"{library} is not installed: {WHERE[library]}"
    found = pytest.importorskip(library, reason=why)
    make = {"torchattacks": of_torchattacks, "autoattack": of_autoattack}[library]
    return make(found, pictures.image_model(), norm, pictures.twin.settings.classes, seed)


def broken(pictures: Pictures, adversarial: Tensor, norm: str) -> float:
    """Return how many of 100 are wrong within the ball; those that were wrong are."""
    clip, y = pictures.clip, pictures.label
    with torch.no_grad():
        before = pictures.twin(clip).logits.argmax(dim=1) != y
        after = pictures.twin(adversarial).logits.argmax(dim=1) != y
    inside = ball.size(adversarial - clip, norm) <= EPS[norm] * (1 + 1e-5)
    return 100 * float((before | (after & inside)).float().mean())


def compare(
    pictures: Pictures, library: str, name: str, norm: str, seed: int
) -> tuple[float, float]:
    """Return the rates of an attack, ours and theirs."""
    twin, clip, y = pictures
    torch.manual_seed(seed)
    theirs = public(library, pictures, norm, seed)[name](clip[:, :, 0], y)[:, :, None].detach()
    method = registry.load("vmoe.attacks.methods", name, "attack")
    budget = {"queries": QUERIES} if name == "square" else {"steps": STEPS}
    how = method.Settings(eps=EPS[norm], norm=norm, seed=seed, **budget)
    ours = method.attack(twin, clip, y, how).adversarial
    return broken(pictures, ours, norm), broken(pictures, theirs, norm)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ball.NORMS)
@pytest.mark.parametrize("library", WHERE)
@pytest.mark.filterwarnings("ignore")  # theirs
def test_rates_are_those_of_public_attacks(
    pictures: Pictures, library: str, norm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {}
    for name in public(library, pictures, norm, 0):
        both = [compare(pictures, library, name, norm, seed) for seed in range(SEEDS.get(name, 1))]
        rates[name] = tuple(np.mean(both, axis=0).tolist())
    with capsys.disabled():
        print(f"\n{library} {norm}, broken % of {len(pictures.label)}, ours and theirs:", end=" ")
        print(", ".join(f"{name} {a:.1f} {b:.1f}" for name, (a, b) in rates.items()))
    apart = {name: pair for name, pair in rates.items() if abs(pair[0] - pair[1]) > POINTS}
    assert not apart


@pytest.mark.slow
@pytest.mark.parametrize("norm", ball.NORMS)
@pytest.mark.filterwarnings("ignore")  # theirs
def test_ensemble_is_as_strong_as_the_public_one(
    pictures: Pictures, norm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    twin, clip, y = pictures
    parts = public("torchattacks", pictures, norm, 0)
    torch.manual_seed(0)
    together = importlib.import_module("torchattacks").MultiAttack(
        [parts[name] for name in autoattack.STANDARD]
    )
    theirs = broken(pictures, together(clip[:, :, 0], y)[:, :, None].detach(), norm)
    how = autoattack.Settings(
        eps=EPS[norm], norm=norm, steps=STEPS, queries=QUERIES, targets=twin.settings.classes - 1
    )
    ours = broken(pictures, autoattack.attack(twin, clip, y, how).adversarial, norm)
    with capsys.disabled():
        print(f"\nautoattack {norm}, robust %, ours {100 - ours:.1f}, theirs {100 - theirs:.1f}")
    assert abs(ours - theirs) <= POINTS

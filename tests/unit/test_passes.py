"""What a training pass touches, and what it minimises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.twins import lively
from vmoe import registry
from vmoe.attacks.methods import pgd
from vmoe.batches import Batch, Held, batches, shuffled, to_tensor
from vmoe.clips import ClipSpec
from vmoe.data import DataSettings, open_data
from vmoe.models import ModelSettings, VideoMoE, build
from vmoe.train import weak
from vmoe.train.balance import balance_loss
from vmoe.train.passes import RecipeSettings, constant, training, whole_update
from vmoe.train.recipes import j_tlat
from vmoe.train.validate import Validation, validate

RECIPES = registry.names("vmoe.train.recipes")


def twin_of(spec: ClipSpec, experts: int = 4) -> VideoMoE:
    return build(ModelSettings("tsm", 0.1, experts, 10), spec, seed=1).eval()


@pytest.fixture
def batch(spec: ClipSpec) -> Batch:
    data = open_data("camera-motion", "train", spec, DataSettings(clips=8))
    return next(batches(data, 8))


def snapshot(twin: VideoMoE) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in twin.state_dict().items()}


def changed(twin: VideoMoE, before: dict[str, Tensor]) -> set[str]:
    """Return which of router and experts have other weights or statistics than before."""
    after = twin.state_dict()
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def test_load_balance_is_one_where_all_experts_share_alike_and_m_where_one_takes_all() -> None:
    even = 20.0 * torch.eye(4)
    assert balance_loss(even, "switch").item() == pytest.approx(1.0, abs=1e-6)
    assert balance_loss(even[:1].expand(4, 4), "switch").item() == pytest.approx(4.0, abs=1e-6)


def test_load_balance_hand_worked() -> None:
    scores = torch.tensor([[math.log(3.0), 0.0], [math.log(3.0), 0.0]])
    # f = (1, 0), P = (3/4, 1/4): 2 (1 * 3/4 + 0 * 1/4)
    assert balance_loss(scores, "switch").item() == pytest.approx(1.5)


@pytest.mark.parametrize("part", ["whole", "router", "experts", "expert0"])
def test_training_touches_its_part_alone_and_leaves_eval_mode(
    spec: ClipSpec, batch: Batch, part: str
) -> None:
    twin = twin_of(spec)
    before = snapshot(twin)
    with training(twin, part) as parameters:
        names = {id(p): name.split(".")[0] for name, p in twin.named_parameters()}
        own = {id(p) for p in twin.experts[0].parameters()}
        touched = {names[id(p)] for p in parameters}
        out = twin(batch.clip, "all")
        (out.logits.square().sum() + out.scores.square().sum()).backward()
    expected = {"whole": {"router", "experts"}, "router": {"router"}}.get(part, {"experts"})
    assert touched == expected
    assert part != "expert0" or {id(p) for p in parameters} == own
    assert changed(twin, before) == expected  # BatchNorm statistics: nothing was stepped
    assert not any(module.training for module in twin.modules())
    assert all(p.requires_grad for p in twin.parameters())


@pytest.mark.parametrize("done", [0.0, 0.99])
@pytest.mark.parametrize("method", RECIPES)
def test_every_recipe_updates_what_its_passes_say(
    spec: ClipSpec, batch: Batch, method: str, done: float
) -> None:
    module = registry.load("vmoe.train.recipes", method, "recipe")
    settings = module.Settings() if method == "standard" else module.Settings(steps=1)
    asked = ModelSettings("tsm", 0.1, 4, 10)
    twin = build(getattr(module, "model", lambda m: m)(asked), spec, seed=1).eval()
    for walk in module.walks(settings, done):
        for each in walk:
            before = snapshot(twin)
            clip, taken = each.prepare(twin, batch, 7)
            assert not changed(twin, before)
            assert clip.shape == batch.clip.shape
            assert taken >= 0
            assert (clip - batch.clip).abs().max() <= getattr(settings, "eps", 0.0) + 1e-6
            with training(twin, each.part) as parameters:
                optimiser = torch.optim.SGD(parameters, lr=0.1)
                update = each.update(twin, batch, clip)
                update.loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            if each.part != "whole":
                assert changed(twin, before) <= {"router" if each.part == "router" else "experts"}
            assert changed(twin, before), f"pass {each.name} changed nothing"
            assert torch.isfinite(update.loss)


def test_whole_update_without_terms_is_cross_entropy(spec: ClipSpec, batch: Batch) -> None:
    twin = twin_of(spec)
    with torch.no_grad():
        logits = twin(batch.clip).logits
        update = whole_update(twin, batch, batch.clip, RecipeSettings(balance=0.0))
    expected = torch.nn.functional.cross_entropy(logits, batch.label)
    assert update.loss.item() == pytest.approx(expected.item())


def test_weak_experts_update_is_the_weighted_sum_over_the_top_two(
    spec: ClipSpec, batch: Batch
) -> None:
    twin = twin_of(spec)  # in eval mode, so that one clip's loss does not depend on the others
    settings = j_tlat.Settings(lam=0.0)
    with torch.no_grad():
        update = weak.update(twin, batch, batch.clip, settings)
        scores, every = twin.scores(batch.clip), twin.run_all(batch.clip)
    total = 0.0
    for i in range(len(batch.clip)):
        top = scores[i].topk(2)
        for weight, expert in zip(top.values.softmax(0), top.indices, strict=True):
            label = batch.label[i : i + 1]
            each = torch.nn.functional.cross_entropy(every[i, expert][None], label)
            total += float(weight * each)
    assert update.loss.item() == pytest.approx(total / len(batch.clip), rel=1e-5)


def test_router_update_holds_the_route_of_inference(spec: ClipSpec, batch: Batch) -> None:
    twin = lively(4, 10, spec=spec)
    settings = j_tlat.Settings(lam=0.3, balance=0.7)
    moved = (batch.clip + 0.02).clamp(0, 1)
    with torch.no_grad():
        top1 = twin.scores(batch.clip).argmax(dim=1)  # eval mode: by the running statistics
        with training(twin, "router"):
            update = j_tlat.router_update(twin, batch, moved, settings)
            clean, scores = twin.scores(batch.clip), twin.scores(moved)
    mse = (clean - scores).square().mean(1) / (batch.clip - moved).square().flatten(1).mean(1)
    expected = torch.nn.functional.cross_entropy(scores, top1) + 0.3 * mse.mean()
    expected = expected + 0.7 * balance_loss(scores, "switch")
    assert update.loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_lipschitz_term_of_the_whole_compares_two_free_answers(
    spec: ClipSpec, batch: Batch
) -> None:
    twin = lively(4, 10, spec=spec)
    moved = (batch.clip + 0.02).clamp(0, 1)
    with torch.no_grad():
        clean, out = twin(batch.clip).logits, twin(moved).logits
        update = whole_update(twin, batch, moved, RecipeSettings(balance=0.0), 0.5)
    ratio = (clean - out).square().mean(1) / (batch.clip - moved).square().flatten(1).mean(1)
    expected = torch.nn.functional.cross_entropy(out, batch.label) + 0.5 * ratio.mean()
    assert update.loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_constant_leaves_mode_statistics_and_momenta(spec: ClipSpec, batch: Batch) -> None:
    twin = twin_of(spec)
    norm = next(m for m in twin.modules() if isinstance(m, torch.nn.BatchNorm3d))
    before = norm.running_mean.clone()  # type: ignore[union-attr]
    with training(twin, "whole"):
        answer = constant(twin, lambda: twin.scores(batch.clip))
        assert not answer.requires_grad
        assert norm.training
        assert norm.momentum == 0.1
    assert torch.equal(norm.running_mean, before)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shares", "warns"),
    [([0.25] * 4, False), ([1.0, 0, 0, 0], True), ([0.5, 0.5, 0.0, 0.0], True), ([1.0], False)],
)
def test_collapse_is_said_with_what_to_change(shares: list[float], warns: bool) -> None:
    said = Validation(0.5, None, shares, 0.0, 0.0, 0.0, 0.0).collapse()
    assert (said is not None) == warns
    assert said is None or "--balance" in said


def test_validation_counts_what_is_right_and_what_stands(spec: ClipSpec) -> None:
    twin = lively(4, 10, spec=spec)
    data = open_data("camera-motion", "val", spec, DataSettings(clips=20))
    how = pgd.Settings(eps=8 / 255, steps=2, early_stop=False)
    found = validate(twin, data, how, batch=7)
    every = next(batches(data, 20))
    with torch.no_grad():
        out = twin(every.clip)
    right = out.logits.argmax(1) == every.label
    attacked = pgd.attack(
        twin, every.clip, every.label, pgd.Settings(eps=8 / 255, steps=2), every.index
    )
    assert found.clean == pytest.approx(right.float().mean().item())
    assert found.robust == pytest.approx((right & ~attacked.success).float().mean().item())
    assert sum(found.shares) == pytest.approx(1.0)
    top = out.scores.topk(2, dim=1).values
    assert found.margin == pytest.approx((top[:, 0] - top[:, 1]).mean().item(), rel=1e-4)


class Counting:
    """Clips that count how often each is read."""

    labels = ("a", "b")

    def __init__(self, spec: ClipSpec, count: int) -> None:
        self.data = open_data("camera-motion", "train", spec, DataSettings(clips=count))
        self.reads = [0] * count

    def __len__(self) -> int:
        return len(self.reads)

    def __getitem__(self, index: int):  # type: ignore[no-untyped-def]
        self.reads[index] += 1
        return self.data[index]


def test_held_reads_once_up_to_its_limit(spec: ClipSpec) -> None:
    data = Counting(spec, 3)
    bytes_of_one = data[0][0].nbytes
    held = Held(data, limit_bytes=2 * bytes_of_one)
    for _ in range(2):
        for i in range(3):
            held[i]
    assert data.reads == [2, 1, 2]  # the first was read once by hand; the third has no room


def test_batches_cover_all_and_never_leave_one_alone(spec: ClipSpec) -> None:
    data = open_data("camera-motion", "train", spec, DataSettings(clips=9))
    found = list(batches(data, 4, order=shuffled(9, 3)))
    assert [len(b.label) for b in found] == [4, 5]
    assert sorted(int(i) for b in found for i in b.index) == list(range(9))
    assert found[0].clip.shape == (4, 3, *spec.shape[:3])
    first = data[int(found[0].index[0])][0]
    assert torch.equal(found[0].clip[0], to_tensor(first[None])[0])
    assert found[0].clip.max() <= 1

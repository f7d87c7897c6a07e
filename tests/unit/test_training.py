"""The training loop: what it keeps, counts, and gives up on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.twins import SMALL, SPEC, lively, small
from vmoe import checkpoint, registry
from vmoe.attacks.ranks import Ranks
from vmoe.batches import Batch, rows_of
from vmoe.clips import ClipSpec
from vmoe.data import DataSet, DataSettings, open_data
from vmoe.errors import SettingError, VmoeError
from vmoe.loading import Loader
from vmoe.models import ModelSettings, VideoMoE, build
from vmoe.train import averaging, loop, router_start
from vmoe.train import state as states
from vmoe.train.passes import Pass, Update, clean_clips
from vmoe.train.planned import RECIPES
from vmoe.train.recipes import at_m
from vmoe.train.validate import entropy


def data(split: str = "train", clips: int = 12, spec: ClipSpec = SMALL) -> DataSet:
    return open_data("camera-motion", split, spec, DataSettings(clips=clips))


def of(update: Any, part: str = "whole", name: str = "whole") -> loop.Recipe:
    return loop.Recipe(lambda done: [(Pass(name, part, update, clean_clips),)])


def plain(twin: VideoMoE, batch: Batch, clip: Tensor) -> Update:
    logits = twin(clip).logits
    return Update(torch.nn.functional.cross_entropy(logits, batch.label), len(clip))


def run(
    recipe: loop.Recipe, twin: VideoMoE | None = None, ranks: Ranks | None = None, **values: Any
) -> Iterator[states.State]:
    how = loop.LoopSettings(**{"batch": 4, "val_steps": 0, "epochs": 1, **values})
    state = loop.start(twin or small(classes=10), how)
    spec = state.twin.spec
    with Loader(data(spec=spec), how.batch) as loader:
        yield from loop.run(state, recipe, loader, data("val", 4, spec), how, ranks)


def test_an_average_follows_by_its_decay_and_faster_at_first() -> None:
    twin = small()
    name, weight = next(iter(twin.named_parameters()))
    average = averaging.Average(twin, 0.5)
    before = weight.detach().clone()
    with torch.no_grad():
        weight += 1.0
    average.update(twin)  # decay 2/11 < 0.5
    now = dict(average.twin.named_parameters())[name]
    torch.testing.assert_close(now, before + 9 / 11)
    for _ in range(20):
        average.update(twin)
    torch.testing.assert_close(now, before + 1.0, rtol=1e-4, atol=1e-4)
    assert not average.twin.training


def test_the_average_is_what_is_validated_and_kept() -> None:
    (state,) = run(of(plain), ema=0.9)
    assert state.average is not None
    assert state.kept is state.average.twin
    live, kept = state.twin.state_dict(), state.kept.state_dict()
    assert any(not torch.equal(live[name], kept[name]) for name in live)


def test_a_loss_that_is_no_number_ends_the_training_and_says_where() -> None:
    calls = []

    def update(twin: VideoMoE, batch: Batch, clip: Tensor) -> Update:
        calls.append(len(clip))
        loss = plain(twin, batch, clip).loss
        return Update(loss * (math.nan if len(calls) == 5 else 1.0), len(clip))

    twin = small(classes=10)
    wanted = r"loss of pass 'whole' is nan in epoch 2, batch 2: .* smaller --lr than 0.003"
    epochs = run(of(update), twin, epochs=3)
    first = next(epochs)
    assert first.epoch == 1
    with pytest.raises(VmoeError, match=wanted):
        next(epochs)
    assert all(torch.isfinite(p).all() for p in twin.parameters())


def test_a_router_that_sends_all_clips_to_one_expert_ends_the_training() -> None:
    twin = small(classes=10)
    with torch.no_grad():
        twin.router[-1].bias.add_(torch.tensor([50.0, 0, 0, 0]))  # type: ignore[index,union-attr]
    recipe = of(lambda t, b, c: Update(t.run_expert(0, c).square().mean(), len(c)), "experts")
    with pytest.raises(VmoeError, match="routing has collapsed: for 2 epochs, up to epoch 2"):
        list(run(recipe, twin, epochs=3))
    assert len(list(run(recipe, twin, epochs=3, on_collapse="warn"))) == 3


def test_gradients_and_flops_are_counted_and_a_budget_ends_it() -> None:
    (state,) = run(of(plain))
    row = state.rows[-1]
    assert row["gradients"] == 12
    assert row["tflops"] == pytest.approx(12 * state.costs["whole"] / 1e12)
    whole = row["tflops"]
    ended = list(run(of(plain), budget=2.5 * whole, epochs=1))[-1]
    assert ended.epoch == 3
    assert ended.tflops == pytest.approx(2.5 * whole)
    assert [r["gradients"] for r in ended.rows] == [12, 12, 6]


def test_half_precision_trains_float_weights() -> None:
    settings = at_m.Settings(steps=1, bf16=True)
    recipe = loop.Recipe(lambda done: at_m.walks(settings, done), bf16=True)
    (state,) = run(recipe, build(ModelSettings("tsm", 0.1, 2, 10), SPEC, 0))
    assert math.isfinite(state.rows[-1]["loss_whole"])
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in state.twin.parameters())


def test_a_gradient_that_is_no_number_is_never_stepped() -> None:
    def update(twin: VideoMoE, batch: Batch, clip: Tensor) -> Update:
        loss = plain(twin, batch, clip).loss
        scores = twin.scores(clip)
        zero = (scores - scores.detach()).abs().sqrt().sum()  # of no finite slope
        return Update(loss + zero, len(clip))

    twin = small(classes=10)
    with pytest.raises(VmoeError, match="the gradient's norm of pass 'whole' is nan in epoch 1"):
        list(run(of(update), twin))
    assert all(torch.isfinite(p).all() for p in twin.parameters())


@pytest.mark.parametrize("val_steps", [0, 1])
def test_a_model_that_answers_nan_after_an_epoch_is_not_kept(val_steps: int) -> None:
    def ruin(state: states.State) -> None:
        with torch.no_grad():
            next(state.twin.parameters()).fill_(math.nan)

    recipe = loop.Recipe(lambda done: [(Pass("whole", "whole", plain, clean_clips, after=ruin),)])
    wanted = "answers NaN to validation clips after epoch 1: .* smaller --lr than 0.003"
    with pytest.raises(VmoeError, match=wanted):
        list(run(recipe, val_steps=val_steps))


def test_statistics_stay_by_bn_running() -> None:
    (state,) = run(of(plain), bn="running")
    fresh, after = small(classes=10).state_dict(), state.twin.state_dict()
    changed = {name for name in fresh if not torch.equal(fresh[name], after[name])}
    assert changed
    assert not any("running" in name for name in changed)


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(SettingError, match="--batch is 4, over 3 processes: give at least 6"):
        next(run(of(plain), ranks=Ranks(0, 3, 0)))


def test_a_state_comes_back_with_average_costs_and_budget(tmp_path: Any) -> None:
    (state,) = run(of(plain), ema=0.9)
    states.save(state, {"a": 1}, tmp_path)
    fresh = loop.start(small(classes=10, seed=3), loop.LoopSettings(ema=0.9))
    again = states.load(fresh, {"a": 1}, tmp_path)
    assert (again.tflops, again.costs, again.rows) == (state.tflops, state.costs, state.rows)
    assert state.average is not None
    assert again.average is not None
    for one, two in zip(state.average.state_dict().values(),
                        again.average.state_dict().values(), strict=True):  # fmt: skip
        assert torch.equal(one, two)
    with pytest.raises(VmoeError, match="a 1 then, 2 now"):
        states.load(fresh, {"a": 2}, tmp_path)


RESUMED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("j-tlat-plus", {"shared": 0.5}, {"epochs": 4}),  # experts part on the way
    ("j-tlat", {"order": "batch"}, {"ema": 0.9, "epochs": 3}),
    ("aat-m", {}, {"budget": 8e-5, "bn": "running"}),
]


@pytest.mark.parametrize(("method", "values", "how"), RESUMED)
def test_resumed_after_any_epoch_is_the_uninterrupted_training(
    method: str, values: dict[str, Any], how: dict[str, Any], tmp_path: Any
) -> None:
    module = registry.load(RECIPES, method, "recipe")
    settings = module.Settings(steps=1, **values)
    recipe = loop.Recipe(lambda done: module.walks(settings, done))
    settled = loop.LoopSettings(batch=4, val_steps=0, on_collapse="warn", **how)

    def go_on(state: states.State) -> Iterator[states.State]:
        with Loader(data(spec=state.twin.spec), settled.batch) as loader:
            yield from loop.run(state, recipe, loader, data("val", 4), settled)

    def fresh() -> states.State:
        return loop.start(small(classes=10), settled)

    for now in go_on(fresh()):
        states.save(now, {}, tmp_path / f"{now.epoch}")
    wanted = checkpoint.read_tensors(tmp_path / f"{now.epoch}" / states.FILE)[0]
    assert now.epoch > 2
    for epoch in (1, now.epoch - 1):
        for again in go_on(states.load(fresh(), {}, tmp_path / f"{epoch}")):
            states.save(again, {}, tmp_path / "again")
        found = checkpoint.read_tensors(tmp_path / "again" / states.FILE)[0]
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), epoch


def test_a_rest_of_less_than_half_a_batch_joins_the_one_before() -> None:
    assert [len(rows) for rows in rows_of(range(13), 4)] == [4, 4, 5]
    assert [len(rows) for rows in rows_of(range(14), 4)] == [4, 4, 4, 2]
    assert [len(rows) for rows in rows_of(range(1), 4)] == [1]
    assert rows_of([], 4) == []


def test_a_fresh_router_divides_the_clips() -> None:
    twin = lively(4, 10, spec=SMALL)
    with torch.no_grad():
        for p in twin.router[1].parameters():  # type: ignore[index,union-attr]
            p.abs_()  # one expert wins
    router_start.spread(twin, data(clips=40))
    clips = torch.stack([torch.from_numpy(data(clips=40)[i][0]) for i in range(40)])
    with torch.no_grad():
        scores = twin.scores(clips.permute(0, 4, 1, 2, 3).float() / 255)
    torch.testing.assert_close(scores.mean(dim=0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.std(dim=0, correction=0), torch.ones(4), atol=1e-4, rtol=0)
    assert not twin.router.training  # type: ignore[union-attr]


def test_entropy_is_in_units_of_its_highest() -> None:
    assert entropy(torch.full((3, 4), 0.25)) == pytest.approx(1.0)
    assert entropy(torch.eye(4)) == 0.0
    assert entropy(torch.ones(1)) == 0.0

"""What is particular to a method."""

from __future__ import annotations

import math

import pytest
import torch

from tests.twins import SPEC, lively, small
from vmoe.attacks.methods import j_tlga, pgd
from vmoe.batches import Batch, batches
from vmoe.data import DataSettings, open_data
from vmoe.errors import SettingError
from vmoe.models import ModelSettings, VideoMoE, build
from vmoe.models.denoiser import Denoiser
from vmoe.train import weak
from vmoe.train.balance import balance_loss
from vmoe.train.loop import LoopSettings, start
from vmoe.train.passes import RecipeSettings, balance_term, full, label_loss
from vmoe.train.recipes import aat_m, at_d, at_s, j_tlat, j_tlat_plus, oud_m

MIXTURE = ModelSettings("tsm", 0.125, 4, 10)


@pytest.fixture
def twin() -> VideoMoE:
    return lively(4, 10)


@pytest.fixture
def batch(twin: VideoMoE) -> Batch:
    data = open_data("camera-motion", "train", twin.spec, DataSettings(clips=6))
    return next(batches(data, 6))


def test_baselines_train_the_architecture_that_they_stand_for() -> None:
    assert at_s.model(MIXTURE) == ModelSettings("tsm", 0.125, 1, 10)
    assert at_d.model(MIXTURE) == ModelSettings("tsm", 0.25, 1, 10)
    assert oud_m.model(MIXTURE) == ModelSettings("tsm", 0.125, 4, 10, denoise=True)
    with pytest.raises(SettingError, match="--experts 2 or more"):
        at_d.model(ModelSettings("tsm", 0.125, 1, 10))


def test_the_order_of_j_tlat_and_what_is_left_out() -> None:
    per_epoch = j_tlat.walks(j_tlat.Settings(), 0.0)
    assert [[p.part for p in walk] for walk in per_epoch] == [["router"], ["experts"], ["whole"]]
    (per_batch,) = j_tlat.walks(j_tlat.Settings(order="batch"), 0.0)
    assert [p.part for p in per_batch] == ["router", "experts", "whole"]
    without = j_tlat.walks(j_tlat.Settings(without="experts"), 0.0)
    assert [[p.part for p in walk] for walk in without] == [["router"], ["whole"]]


def test_weak_clips_by_both_break_the_weak_experts_more(twin: VideoMoE, batch: Batch) -> None:
    settings = j_tlat.Settings(eps=16 / 255, steps=4, lam=0.0)
    how = j_tlga.Settings(eps=16 / 255, steps=4, early_stop=False)
    clip, taken = weak.attack(twin, batch, batch.clip, how)
    assert taken == 4 * len(clip) * weak.TOP
    assert (clip - batch.clip).abs().max() <= 16 / 255 + 1e-6
    with torch.no_grad():
        before = weak.update(twin, batch, batch.clip, settings).loss
        after = weak.update(twin, batch, clip, settings).loss
    assert after > before


def test_divergence_is_kl_and_its_clips_raise_it(twin: VideoMoE, batch: Batch) -> None:
    even, sure = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    assert aat_m.divergence(even, even).item() == pytest.approx(0.0, abs=1e-7)
    wanted = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert aat_m.divergence(even, sure).item() == pytest.approx(wanted)
    how = pgd.Settings(eps=16 / 255, steps=3, early_stop=False)
    clip, taken = aat_m.diverging(twin, batch, how)
    assert taken == 3 * len(clip)
    with torch.no_grad():
        clean, moved = twin(batch.clip).logits, twin(clip).logits
    assert aat_m.divergence(clean, moved).mean() > 1e-4


def test_aat_m_is_trades_on_each_part_in_turn(twin: VideoMoE, batch: Batch) -> None:
    settings = aat_m.Settings(trades=2.0, balance=0.0)
    (walk,) = aat_m.walks(settings, 0.0)
    assert [each.part for each in walk] == ["experts", "router"]
    moved = (batch.clip + 0.02).clamp(0, 1)
    with torch.no_grad():
        loss = walk[0].update(twin, batch, moved).loss
        clean, out = twin(batch.clip).logits, twin(moved).logits
    wanted = torch.nn.functional.cross_entropy(clean, batch.label)
    wanted = wanted + 2.0 * aat_m.divergence(clean, out).mean()
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)


def test_plus_shares_one_expert_then_parts(twin: VideoMoE) -> None:
    settings = j_tlat_plus.Settings(shared=0.5)
    early, late = j_tlat_plus.walks(settings, 0.49), j_tlat_plus.walks(settings, 0.5)
    assert [[p.part for p in walk] for walk in early] == [["router"], ["expert0"]]
    assert [[p.part for p in walk] for walk in late] == [["router"], ["whole"]]
    state = start(twin, LoopSettings(ema=0.9))
    sum(p.square().sum() for p in twin.parameters()).backward()  # type: ignore[union-attr]
    state.optimiser.step()
    after = early[1][0].after
    assert after is not None
    after(state)
    for held in (twin, state.kept):
        first = held.experts[0].state_dict()
        for expert in held.experts[1:]:
            assert all(torch.equal(first[name], t) for name, t in expert.state_dict().items())
    mine, theirs = twin.experts[0][1].fc.weight, twin.experts[3][1].fc.weight  # type: ignore[index]
    known = state.optimiser.state
    assert torch.equal(known[mine]["exp_avg"], known[theirs]["exp_avg"])
    assert known[mine]["exp_avg"] is not known[theirs]["exp_avg"]


@pytest.mark.parametrize("arch", ["r3d18", "r2plus1d18", "slowfast", "tsm", "tsm-online"])
def test_every_family_has_a_front_and_a_last_stage(arch: str) -> None:
    expert = build(ModelSettings(arch, 0.125, 1, 5), SPEC).experts[0]
    last = sum(p.numel() for n, p in expert.named_parameters() if j_tlat_plus.LAST.search(n))
    assert 0.4 < last / sum(p.numel() for p in expert.parameters()) < 0.9


def test_fronts_take_one_step_of_all_gradients_and_last_stages_their_own(twin: VideoMoE) -> None:
    for expert in twin.experts[1:]:
        expert.load_state_dict(twin.experts[0].state_dict())
    before = {name: p.detach().clone() for name, p in twin.named_parameters()}
    optimiser = torch.optim.SGD(twin.parameters(), lr=1.0)
    for i, expert in enumerate(twin.experts):
        for p in expert.parameters():
            p.grad = None if i == 3 else torch.full_like(p, float(i + 1))  # the last got no clip
    with j_tlat_plus.fronts_as_one(twin):
        optimiser.step()
    for name, p in twin.named_parameters():
        if name.startswith("experts."):
            i, last = int(name.split(".")[1]), j_tlat_plus.LAST.search(name)
            step = (0.0 if i == 3 else i + 1.0) if last else 1.0 + 2.0 + 3.0
            torch.testing.assert_close(p.detach(), before[name] - step)


def test_targets_are_shared_out_and_near_the_routers_own() -> None:
    scores = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    scores[:, 0] += 3.0  # by its own routes nearly all would go to the first
    target = j_tlat_plus.shared_out(scores).argmax(dim=1)
    counts = torch.bincount(target, minlength=4)
    assert counts.min() >= 10
    assert counts.max() <= 22
    sure = 20.0 * torch.eye(4).repeat(2, 1)  # balanced already: nothing moves
    assert torch.equal(j_tlat_plus.shared_out(sure).argmax(dim=1), sure.argmax(dim=1))


def test_margin_update_hand_worked(twin: VideoMoE, batch: Batch) -> None:
    settings = j_tlat_plus.Settings(margin=1.5, balance=0.0)
    with torch.no_grad():
        loss = j_tlat_plus.margin_update(twin, batch, batch.clip, settings).loss
        scores = twin.scores(batch.clip)
    target = j_tlat_plus.shared_out(scores).argmax(dim=1)
    own = scores.gather(1, target[:, None])[:, 0]
    others = scores.scatter(1, target[:, None], -torch.inf).amax(dim=1)
    wanted = (1.5 - (own - others)).clamp(min=0).mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_balance_by_entropy_and_by_none() -> None:
    even = torch.zeros(3, 4)
    assert balance_loss(even, "entropy").item() == pytest.approx(0.0, abs=1e-6)
    one = torch.tensor([[100.0, 0, 0, 0]])
    assert balance_loss(one, "entropy").item() == pytest.approx(math.log(4.0))
    none = RecipeSettings(balance_loss="none")
    assert balance_term(small(), even, none) == 0.0


def test_label_smoothing_hand_worked() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0]])
    loss = label_loss(logits, torch.tensor([0]), RecipeSettings(smoothing=0.2))
    assert loss.item() == pytest.approx(-0.9 * math.log(0.75) - 0.1 * math.log(0.25))


def test_losses_are_never_in_half() -> None:
    assert full(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert full(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def test_an_untrained_denoiser_changes_nothing_and_learns() -> None:
    twin = build(ModelSettings("tsm", 0.1, 2, 5, denoise=True), lively(2, 5).spec, 0).eval()
    assert isinstance(twin.denoiser, Denoiser)
    clip = torch.rand(2, 3, 4, 32, 32)
    with torch.no_grad():
        restored = twin.denoiser(clip)
    assert restored.shape == clip.shape
    assert torch.equal(restored, clip)
    odd = torch.rand(1, 3, 3, 9, 11)
    assert twin.denoiser(odd).shape == odd.shape
    twin(clip, "soft").logits.square().sum().backward()  # type: ignore[no-untyped-call]
    assert twin.denoiser.merge.weight.grad is not None
    assert twin.denoiser.merge.weight.grad.abs().max() > 0
    routed = twin.run_routed(clip, torch.tensor([1, 0]))
    torch.testing.assert_close(routed[0], twin.run_expert(1, clip)[0], rtol=1e-4, atol=1e-5)

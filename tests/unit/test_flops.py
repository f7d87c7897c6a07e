"""FLOPs by torch's counter, against a layer in closed form; and what routing saves."""

from __future__ import annotations

import torch

from vmoe.clips import ClipSpec
from vmoe.models import ModelSettings, build, flops


def test_the_default_saves_at_least_sixty_per_cent() -> None:
    for spec in (ClipSpec(), ClipSpec(frames=16, height=112, width=112)):
        cost = flops.count(build(ModelSettings(), spec))
        assert cost.saved is not None
        assert cost.dense is not None
        assert 0.6 <= cost.saved < 0.8
        assert cost.router < 0.05 * cost.expert
        assert cost.moe == cost.router + cost.expert


def test_a_convolution_in_closed_form() -> None:
    spec = ClipSpec(frames=4, height=32, width=32)
    twin = build(ModelSettings(width=0.5, experts=1, classes=7), spec)
    network = twin.experts[0][1]  # type: ignore[index]
    # stem: [3, 4, 32, 32] -> [32, 4, 16, 16], kernel 3x7x7
    stem = 2 * 32 * (4 * 16 * 16) * 3 * (3 * 7 * 7)
    assert flops._forward(network.stem, twin) == stem
    # what follows: the four stages, whose convolutions halve every size from the second on
    total = stem
    inner, (t, side) = 32, (4, 16)
    for stage, outer in enumerate((32, 64, 128, 256)):
        if stage:
            t, side = -(-t // 2), -(-side // 2)
            total += 2 * outer * (t * side * side) * inner  # the way around
        total += 2 * outer * (t * side * side) * 27 * (inner + 3 * outer)
        inner = outer
    total += 2 * 256 * 7
    assert flops.count(twin) == (0, total, None, 0)


def test_a_dense_model_has_no_counterpart() -> None:
    cost = flops.count(build(ModelSettings(arch="tsm", width=0.125, experts=1), ClipSpec()))
    assert (cost.router, cost.dense, cost.saved) == (0, None, None)
    assert cost.moe == cost.expert


def test_what_a_clip_costs_in_words() -> None:
    said = [flops.Flops(1_000_000, 2_000_000, dense, extra).said
            for dense, extra in ((12_000_000, 0), (2_000_000, 0), (None, 1_000_000))]  # fmt: skip
    assert said == [
        "3 MFLOPs a clip against 12 of the dense counterpart: 75% saved",
        "3 MFLOPs a clip against 2 of the dense counterpart: 50% more",
        "4 MFLOPs a clip",
    ]


def test_counting_leaves_the_twin_alone() -> None:
    twin = build(ModelSettings(arch="tsm", width=0.125), ClipSpec(frames=2)).train()
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    flops.count(twin)
    assert twin.training
    assert all((value == before[name]).all() for name, value in twin.state_dict().items())
    assert {p.device.type for p in twin.parameters()} == {"cpu"}


def test_counter_counts_attacks_and_backward_passes() -> None:
    layer = torch.nn.Linear(6, 5, bias=False)
    x = torch.rand(4, 6, requires_grad=True)
    with flops.Counter() as counter:
        (gradient,) = torch.autograd.grad(layer(x).sum(), x)  # what an attack does
    one = 2 * 4 * 6 * 5
    assert gradient.shape == x.shape
    assert counter.total == 2 * one  # forward, and the gradient of the clip
    with flops.Counter() as counter:
        layer(x).sum().backward()
    assert counter.total == 3 * one  # forward, and the gradients of clip and weights

"""Expert families: against plain references that share only their weights, and by published names.

A reference convolves frame by frame and pixel by pixel, with no 3-D convolution.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.twins import lived
from vmoe import registry
from vmoe.clips import ClipSpec
from vmoe.errors import SettingError
from vmoe.models import ModelSettings, build, flops
from vmoe.models.experts import r2plus1d18, slowfast, tsm, tsm_online
from vmoe.models.moe import FAMILIES

ROOT = Path(__file__).parents[2]
PUBLISHED = json.loads((ROOT / "tests/torchvision.json").read_text())  # names and shapes
BLOCKS = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
State = dict[str, Tensor]


def norm(x: Tensor, state: State, name: str) -> Tensor:
    """Normalise by running statistics, by hand."""
    view = (1, -1, *[1] * (x.dim() - 2))
    mean, var, scale, bias = (
        state[f"{name}.{key}"].view(view)
        for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(var + 1e-5) * scale + bias


def conv(x: Tensor, weight: Tensor, in_time: int = 1, in_space: int = 1) -> Tensor:
    """Convolve [B, C, T, H, W] as sums of 2-D convolutions of frames; nothing is beyond the clip.

    Kernels are odd, and padded by half of them.
    """
    taps, high = weight.shape[2:4]
    frames = []
    for centre in range(0, x.shape[2], in_time):
        at = [(k, centre + k - taps // 2) for k in range(taps)]
        frames.append(sum(
            F.conv2d(x[:, :, t], weight[:, :, k], None, in_space, high // 2)
            for k, t in at if 0 <= t < x.shape[2]
        ))  # fmt: skip
    return torch.stack(frames, dim=2)  # type: ignore[arg-type]


def plain_block(
    x: Tensor, state: State, name: str, halves: Callable[[Tensor, str, int], Tensor],
    around: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Write out a residual block: two convolutions, the first with a stride.

    `around` are the strides, in time and in space, of the way around them.
    """
    y = F.relu(norm(halves(x, f"{name}.conv1.0", around[1]), state, f"{name}.conv1.1"))
    y = norm(halves(y, f"{name}.conv2.0", 1), state, f"{name}.conv2.1")
    if f"{name}.downsample.0.weight" in state:
        x = conv(x, state[f"{name}.downsample.0.weight"], *around)
        x = norm(x, state, f"{name}.downsample.1")
    return F.relu(y + x)


def stride_of(name: str) -> int:
    return 2 if name in ("layer2.0", "layer3.0", "layer4.0") else 1


def classify(x: Tensor, state: State) -> Tensor:
    """Average over all but clips and channels, and classify."""
    return x.flatten(2).mean(dim=2) @ state["fc.weight"].T + state["fc.bias"]


def plain_r3d18(clip: Tensor, state: State) -> Tensor:
    def cube(x: Tensor, name: str, stride: int) -> Tensor:
        return conv(x, state[f"{name}.weight"], stride, stride)

    x = F.relu(norm(conv(clip, state["stem.0.weight"], 1, 2), state, "stem.1"))
    for name in BLOCKS:
        x = plain_block(x, state, name, cube, (stride_of(name),) * 2)
    return classify(x, state)


def plain_r2plus1d18(clip: Tensor, state: State) -> Tensor:
    def over_time(x: Tensor, weight: Tensor, stride: int) -> Tensor:
        """Convolve every pixel's row of frames by itself."""
        b, c, t, h, w = x.shape
        rows = x.permute(0, 3, 4, 1, 2).reshape(b * h * w, c, t)
        y = F.conv1d(rows, weight[:, :, :, 0, 0], None, stride, 1)
        return y.view(b, h, w, *y.shape[1:]).permute(0, 3, 4, 1, 2)

    def two(x: Tensor, name: str, stride: int) -> Tensor:
        y = F.relu(norm(conv(x, state[f"{name}.0.weight"], 1, stride), state, f"{name}.1"))
        return over_time(y, state[f"{name}.3.weight"], stride)

    x = F.relu(norm(conv(clip, state["stem.0.weight"], 1, 2), state, "stem.1"))
    x = F.relu(norm(over_time(x, state["stem.3.weight"], 1), state, "stem.4"))
    for name in BLOCKS:
        x = plain_block(x, state, name, two, (stride_of(name),) * 2)
    return classify(x, state)


def plain_tsm(clip: Tensor, state: State) -> Tensor:
    def plane(x: Tensor, name: str, stride: int) -> Tensor:
        return conv(x, state[f"{name}.weight"].unsqueeze(2), 1, stride)

    x = F.relu(norm(plane(clip, "conv1", 2), state, "bn1"))
    x = torch.stack([F.max_pool2d(x[:, :, t], 3, 2, 1) for t in range(x.shape[2])], dim=2)
    for name in BLOCKS:
        moved, fold = x.clone(), x.shape[1] // 8
        for t in range(x.shape[2]):
            moved[:, :fold, t] = x[:, :fold, t + 1] if t + 1 < x.shape[2] else 0
            moved[:, fold : 2 * fold, t] = x[:, fold : 2 * fold, t - 1] if t else 0
        y = F.relu(norm(plane(moved, f"{name}.conv1", stride_of(name)), state, f"{name}.bn1"))
        y = norm(plane(y, f"{name}.conv2", 1), state, f"{name}.bn2")
        if f"{name}.downsample.0.weight" in state:
            x = norm(plane(x, f"{name}.downsample.0", stride_of(name)), state,
                     f"{name}.downsample.1")  # fmt: skip
        x = F.relu(y + x)
    return classify(x, state)


def plain_slowfast(clip: Tensor, state: State) -> Tensor:
    def keeps_time(x: Tensor, name: str, stride: int) -> Tensor:
        return conv(x, state[f"{name}.weight"], 1, stride)

    def stage(x: Tensor, path: str, i: int) -> Tensor:
        if i == 0:
            x = F.relu(norm(keeps_time(x, f"{path}.0.0", 2), state, f"{path}.0.1"))
            frames = [F.max_pool2d(x[:, :, t], 3, 2, 1) for t in range(x.shape[2])]
            return torch.stack(frames, dim=2)
        for j in (0, 1):
            stride = 2 if i > 1 and j == 0 else 1
            x = plain_block(x, state, f"{path}.{i}.{j}", keeps_time, (1, stride))
        return x

    slow, fast = torch.stack([clip[:, :, t] for t in range(0, clip.shape[2], 4)], dim=2), clip
    for i in range(5):
        slow, fast = stage(slow, "slow", i), stage(fast, "fast", i)
        if i < 4:
            over = conv(fast, state[f"lateral.{i}.0.weight"], in_time=4)
            slow = torch.cat([slow, F.relu(norm(over, state, f"lateral.{i}.1"))], dim=1)
    ends = [x.flatten(2).mean(dim=2) for x in (slow, fast)]
    return classify(torch.cat(ends, dim=1).unsqueeze(2), state)


PLAIN = {
    "r3d18": plain_r3d18, "r2plus1d18": plain_r2plus1d18, "slowfast": plain_slowfast,
    "tsm": plain_tsm,
}  # fmt: skip


def network(arch: str, width: float = 0.125, classes: int = 5) -> nn.Module:
    torch.manual_seed(1)
    made: nn.Module = registry.load(FAMILIES, arch, "family").build(width, classes)
    return lived(made).double()


def test_every_family_has_a_reference() -> None:
    assert {*PLAIN, "tsm-online"} == set(registry.names(FAMILIES))  # its own: test_tsm_online


@pytest.mark.parametrize("shape", [(4, 32, 32), (6, 17, 25), (9, 24, 40)])
@pytest.mark.parametrize("arch", PLAIN)
def test_a_family_and_its_gradient_against_a_plain_reference(
    arch: str, shape: tuple[int, int, int]
) -> None:
    net = network(arch)
    clip = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0)).double()
    seen, plain = clip.clone().requires_grad_(), clip.clone().requires_grad_()
    logits, wanted = net(seen), PLAIN[arch](plain, net.state_dict())
    assert not torch.allclose(logits[0], logits[1], rtol=1e-6), "all clips get one answer"
    torch.testing.assert_close(logits, wanted, rtol=1e-9, atol=1e-12)
    direction = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).double()
    (found,) = torch.autograd.grad((logits * direction).sum(), seen)
    (expected,) = torch.autograd.grad((wanted * direction).sum(), plain)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("arch", "published", "classes"),
    [
        ("r3d18", "r3d_18", 400),
        ("r2plus1d18", "r2plus1d_18", 400),
        ("tsm", "resnet18", 1000),
        ("tsm-online", "resnet18", 1000),
    ],
)
def test_names_and_shapes_are_torchvisions(arch: str, published: str, classes: int) -> None:
    with torch.device("meta"):
        state = registry.load(FAMILIES, arch, "family").build(1, classes).state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == PUBLISHED[published]


@pytest.mark.parametrize(
    ("width", "middle"),
    [(1, [45, 144, 230, 288, 460, 576, 921, 1152]), (0.5, [16, 64, 112, 144, 224, 288, 464, 576]),
     (0.125, [8, 16, 32, 32, 64, 64, 112, 144])],
)  # fmt: skip
def test_middle_planes_of_r2plus1d18(width: float, middle: list[int]) -> None:
    net = r2plus1d18.build(width, 2)
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv3d)]
    found = {c.out_channels for c in convolutions if c.kernel_size[0] < c.kernel_size[1]}
    assert found == set(middle)


@pytest.mark.parametrize(
    ("width", "slow", "fast"),
    [
        (1, [64, 64, 128, 256, 512], [8, 8, 16, 32, 64]),
        (0.5, [32, 32, 64, 128, 256], [8, 8, 8, 16, 32]),
        (0.125, [8, 8, 16, 32, 64], [8, 8, 8, 8, 8]),
    ],
)
def test_channels_of_slowfasts_pathways(width: float, slow: list[int], fast: list[int]) -> None:
    state = slowfast.build(width, 2).state_dict()
    for path, counts in (("slow", slow), ("fast", fast)):
        names = [f"{path}.0.0.weight", *(f"{path}.{i}.1.conv2.0.weight" for i in (1, 2, 3, 4))]
        assert [len(state[name]) for name in names] == counts
    assert [len(state[f"lateral.{i}.0.weight"]) for i in range(4)] == [2 * n for n in fast[:4]]
    assert state["fc.weight"].shape == (2, slow[-1] + fast[-1])


@pytest.mark.parametrize("frames", range(4, 13))
def test_slowfasts_pathways_meet_at_any_number_of_frames(frames: int) -> None:
    net, clip = network("slowfast"), torch.zeros(1, 3, frames, 16, 16).double()
    with torch.no_grad():
        assert net(clip).shape == (1, 5)
        assert net.slow[0](clip[:, :, ::4]).shape[2] == -(-frames // 4)  # type: ignore[operator,index]


def test_slowfast_refuses_a_clip_that_is_too_short() -> None:
    with pytest.raises(SettingError) as e:
        network("slowfast")(torch.zeros(1, 3, 3, 16, 16).double())
    assert str(e.value) == (
        "slowfast takes clips of 4 frames or more; this one has 3. Give --frames 4 or more."
    )
    twin = build(ModelSettings("slowfast", 0.125), ClipSpec(frames=2))
    with pytest.raises(SettingError, match="this one has 2"):
        flops.count(twin)  # as vmoe-train does first of all


def test_shift_worked_by_hand() -> None:
    # 8 channels: one comes from the next frame, one from the last, six stay.
    x = torch.arange(1.0, 25).view(1, 3, 8, 1, 1)  # frame t holds 8t+1 .. 8t+8
    moved = tsm.shift(x).view(3, 8)
    assert moved[:, 0].tolist() == [9, 17, 0]
    assert moved[:, 1].tolist() == [0, 2, 10]
    assert torch.equal(moved[:, 2:], x.view(3, 8)[:, 2:])


@pytest.mark.parametrize("family", [tsm, tsm_online])
def test_at_the_least_width_every_shift_moves_a_channel(family: Any) -> None:
    blocks = [m for m in family.build(1e-3, 2).modules() if isinstance(m, tsm.Block)]
    assert [block.conv1.in_channels // 8 for block in blocks] == [1] * 8


def test_tsm_without_time_is_a_resnet_of_one_frame() -> None:
    # with one frame, all that is shifted away is zero
    x = torch.randn(2, 1, 16, 5, 5)
    moved = tsm.shift(x)
    assert not moved[:, :, :4].any()
    assert torch.equal(moved[:, :, 4:], x[:, :, 4:])


def test_the_table_of_costs_is_what_the_command_says() -> None:
    def rows(text: str) -> set[str]:
        return {" ".join(line.split()) for line in text.splitlines() if line.startswith("| ")}

    found = [row for row in rows(flops.table((0.125,), (ClipSpec(),))) if "| --" not in row]
    assert len(found) == 1 + len(registry.names(FAMILIES))
    assert set(found) <= rows((ROOT / "docs/families.md").read_text())

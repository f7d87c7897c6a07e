"""The causal family: clip by clip, frame by frame and over the whole stream it is one function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from vmoe.models.experts import tsm_online
from vmoe.models.experts.tsm_online import REACH, TSMOnline18, shift, voting

CLASSES, SIZE = 5, 33


@pytest.fixture(scope="module")
def net() -> TSMOnline18:
    """Return a small network whose norms have seen something, in double precision."""
    drawn = torch.Generator().manual_seed(1)
    made = tsm_online.build(0.125, CLASSES)
    for value in made.state_dict().values():
        if value.dim() == 1:
            value.copy_(0.5 + torch.rand(value.shape, generator=drawn))
        elif value.dim() > 1:
            value.copy_(torch.randn(value.shape, generator=drawn) / value[0].numel() ** 0.5)
    assert isinstance(made, TSMOnline18)
    return made.double().eval()


def stream(frames: int, n: int = 2, seed: int = 0) -> Tensor:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, frames, SIZE, SIZE, generator=drawn).double()


def norm(x: Tensor, state: dict[str, Any], name: str) -> Tensor:
    mean, var, scale, bias = (
        state[f"{name}.{key}"].view(1, -1, 1, 1)
        for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(var + 1e-5) * scale + bias


def plainly(net: TSMOnline18, clip: Tensor) -> Tensor:
    """Return the logits of each frame of a stream, [N, S, K]: one frame after another, by hand."""
    state, before, each = net.state_dict(), {}, []
    for t in range(clip.shape[2]):
        x = F.conv2d(clip[:, :, t], state["conv1.weight"], None, 2, 3)
        x = F.max_pool2d(F.relu(norm(x, state, "bn1")), 3, 2, 1)
        for name in [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]:
            stride = 2 if name in ("layer2.0", "layer3.0", "layer4.0") else 1
            fold = x.shape[1] // 8
            mixed = x.clone()
            mixed[:, :fold] = before[name][:, :fold] if t else 0
            before[name] = x
            y = F.conv2d(mixed, state[f"{name}.conv1.weight"], None, stride, 1)
            y = F.conv2d(F.relu(norm(y, state, f"{name}.bn1")), state[f"{name}.conv2.weight"],
                         None, 1, 1)  # fmt: skip
            around = x
            if f"{name}.downsample.0.weight" in state:
                around = F.conv2d(x, state[f"{name}.downsample.0.weight"], None, stride)
                around = norm(around, state, f"{name}.downsample.1")
            x = F.relu(norm(y, state, f"{name}.bn2") + around)
        each.append(x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"])
    return torch.stack(each, 1)


@pytest.mark.parametrize("frames", [REACH + 1, 12])
def test_a_clips_answer_is_the_streams_whatever_came_before(net: TSMOnline18, frames: int) -> None:
    long = stream(20)
    with torch.no_grad():
        each = plainly(net, long)
        for end in range(frames, 21):
            wanted = each[:, end - voting(frames) : end].mean(1)
            torch.testing.assert_close(net(long[:, :, end - frames : end]), wanted)


@pytest.mark.parametrize("frames", [1, 5, REACH])
def test_in_a_short_clip_the_last_frame_votes(net: TSMOnline18, frames: int) -> None:
    clip = stream(frames)
    with torch.no_grad():
        torch.testing.assert_close(net(clip), plainly(net, clip)[:, -1])


@pytest.mark.parametrize(("n", "pieces"), [(1, [1] * 20), (3, [1] * 20), (2, [9, 1, 3, 1, 6])])
def test_frames_in_pieces_give_the_clips_answers(
    net: TSMOnline18, n: int, pieces: list[int]
) -> None:
    frames, end = 12, 0
    long = stream(20, n)
    with torch.no_grad():
        states = net.first(n, frames, SIZE, SIZE)
        for piece in pieces:
            logits, after = net.follow(long[:, :, end : end + piece], states)
            assert [s.shape for s in after] == [s.shape for s in states]
            states, end = after, end + piece
            if end >= frames:
                torch.testing.assert_close(logits, net(long[:, :, end - frames : end]))
    assert end == 20


def test_a_frame_reaches_so_far_and_no_farther(net: TSMOnline18) -> None:
    clip = stream(2 * REACH + 2, 1).requires_grad_()
    (grad,) = torch.autograd.grad(net(clip[:, :, : REACH + 3])[0, 0], clip)
    seen = grad[0].flatten(2).any(-1).any(0)  # by frame
    assert seen.tolist() == [True] * (REACH + 3) + [False] * (REACH - 1)
    states = net.first(1, REACH + 1, SIZE, SIZE)  # one frame votes
    logits, _ = net.follow(clip, states)
    (grad,) = torch.autograd.grad(logits[0, 0], clip)
    seen = grad[0].flatten(2).any(-1).any(0)
    assert seen.tolist() == [False] * (REACH + 1) + [True] * (REACH + 1)


def test_shift_worked_by_hand() -> None:
    # 2 streams, 2 frames, 8 channels: the first channel comes from the frame before
    x = torch.arange(1.0, 33).view(4, 8, 1, 1)  # row t*2+n
    state = torch.tensor([-1.0, -2.0]).view(2, 1, 1, 1)
    moved, after = shift(x, state)
    assert moved[:, 0].flatten().tolist() == [-1, -2, 1, 9]
    assert torch.equal(moved[:, 1:], x[:, 1:])
    assert after.flatten().tolist() == [17, 25]


def test_it_has_the_parameters_of_torchvisions_resnet18() -> None:
    assert sum(p.numel() for p in tsm_online.build(1, 1000).parameters()) == 11_689_512

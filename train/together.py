"""Several processes, as torchrun starts them, that train as one would on the same batches.

Each process takes every n-th clip of a batch. Attacks are of each clip alone and need no other
process; in an update, what one process would compute of the whole batch is computed of all their
clips: BatchNorm's statistics, the load balance, whether an expert has the two clips that it needs,
the gradients. So the result is that of one process at the same batch, up to rounding.

Without torchrun every function here returns what it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vmoe.attacks.ranks import Ranks
from vmoe.errors import VmoeError


def alone() -> bool:
    """Return whether there is only this process."""
    return not dist.is_initialized()


@contextmanager
def joined(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, for as long as the context lasts.

    Raises:
        VmoeError: another of them has ended.
    """
    if ranks.world == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where collectives put what they exchange
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and "gloo" not in str(e):
            raise
        raise VmoeError(
            f"process {ranks.rank} lost another of the {ranks.world}: its own line says why."
        ) from e
    finally:
        dist.destroy_process_group()


T = TypeVar("T")


def first_rank_first(make: Callable[[], T]) -> T:
    """Return what `make` gives, made by the first process before the others begin.

    So that one of them reads what all keep on this machine, and the others find it.
    """
    if alone():
        return make()
    first = dist.get_rank() == 0
    made = make() if first else None
    dist.barrier()
    return make() if made is None else made


class _Sum(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        out = grad.contiguous().clone()
        dist.all_reduce(out)
        return out


def total(x: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes; a gradient passes."""
    summed: Tensor = x if alone() else _Sum.apply(x)  # type: ignore[no-untyped-call]
    return summed


def total_count(count: int) -> int:
    """Return the sum of a number over all processes."""
    return count if alone() else int(_number(count))


def mean(rows: Tensor) -> Tensor:
    """Return the mean over the rows of all processes, [...] of [B, ...]; a gradient passes."""
    return total(rows.sum(dim=0)) / total_count(len(rows))


def total_float(value: float) -> float:
    """Return the sum of a number over all processes."""
    return value if alone() else float(_number(value))


def _number(value: float) -> Tensor:
    where = "cuda" if dist.get_backend() == "nccl" else "cpu"
    held = torch.tensor(float(value), dtype=torch.float64, device=where)
    dist.all_reduce(held)
    return held


def gathered(item: Any) -> list[Any]:
    """Return what every process holds, in the order of their ranks."""
    if alone():
        return [item]
    held = [None] * dist.get_world_size()
    dist.all_gather_object(held, item)
    return held


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Put the sum of all processes' gradients in the place of each, in one exchange."""
    if alone():
        return
    every = list(parameters)
    have = torch.tensor([float(p.grad is not None) for p in every], device=every[0].device)
    dist.all_reduce(have)  # of an expert without clips here, others may have gradients
    for p, some in zip(every, have.tolist(), strict=True):
        if some and p.grad is None:
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in every if p.grad is not None]
    if grads:
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        sizes = [grad.numel() for grad in grads]
        for grad, summed in zip(grads, torch.split(flat, sizes), strict=True):
            grad.copy_(summed.view_as(grad))


class SharedNorm2d(nn.BatchNorm2d):
    """BatchNorm whose statistics are those of all processes' clips."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, H, W]."""
        return _normalised(self, x) if self.training else super().forward(x)


class SharedNorm3d(nn.BatchNorm3d):
    """The same of [B, C, T, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, T, H, W]."""
        return _normalised(self, x) if self.training else super().forward(x)


SHARED: dict[type[nn.Module], type[SharedNorm2d | SharedNorm3d]] = {
    nn.BatchNorm2d: SharedNorm2d,
    nn.BatchNorm3d: SharedNorm3d,
}


def _normalised(norm: nn.modules.batchnorm._BatchNorm, given: Tensor) -> Tensor:
    x = given.float() if given.dtype == torch.bfloat16 else given  # as torch's own does
    dims = [d for d in range(x.dim()) if d != 1]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    count = total_count(x.numel() // x.shape[1])
    center = total(x.sum(dim=dims)) / count
    off = x - center.view(shape)
    variance = total(off.square().sum(dim=dims)) / count
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.momentum is not None
    with torch.no_grad():
        norm.running_mean.lerp_(center.to(norm.running_mean), norm.momentum)
        unbiased = variance * (count / max(count - 1, 1))
        norm.running_var.lerp_(unbiased.to(norm.running_var), norm.momentum)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked += 1
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return (off * scale.view(shape) + norm.bias.view(shape)).to(given)


def share(twin: nn.Module) -> None:
    """Give a twin the first process's weights, and let its BatchNorms count all processes' clips.

    Alone, nothing changes.
    """
    if alone():
        return
    for tensor in twin.state_dict().values():
        dist.broadcast(tensor, 0)
    twin.total = total_count  # type: ignore[assignment]
    for module in twin.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d | nn.BatchNorm3d):
                shared = SHARED[type(child)](child.num_features, child.eps, child.momentum)
                shared.to(child.weight).load_state_dict(child.state_dict())
                setattr(module, name, shared)

"""The one loop that every attack runs through.

Starts, restarts, the best iterate, early stop, the counting of passes and the checks stand here.
How an attack moves is its climb (`climbs`, or its own file); what it maximises, its objective
(`losses`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from vmoe.attacks import ball, grid
from vmoe.attacks.budget import (
    BallSettings,
    IterativeSettings,
    LoopSettings,
    TemporalSettings,
    route_grad_option,
)
from vmoe.errors import SettingError, VmoeError
from vmoe.models import VideoMoE

__all__ = [
    "Aim", "AttackResult", "BallSettings", "Climb", "IterativeSettings", "Judged", "LoopSettings",
    "Objective", "Search", "TemporalSettings", "as_found", "ascend", "improves",
    "route_grad_option",
]  # fmt: skip


class AttackResult(NamedTuple):
    """What an attack found, for each sample the best iterate: by success, then by loss.

    With early stop, a sample's first success is its best iterate, and a clip that succeeds without
    a perturbation is returned as it is.

    Attributes:
        adversarial: [B, C, T, H, W], within eps of the clip and in [0, 1].
        success: by the attack's own criterion, bool [B].
        loss: the attack's own, [B]; -inf where nothing but the clean clip was looked at.
        route_before: route of the clean clip, [B].
        route_after: route of the adversarial clip, [B].
        forwards: forward passes of each sample through what is attacked, the one of the clean
            clip included, int64 [B]: of the router, an expert, or the whole model. A pass of the
            whole model is the router and one expert; by route_grad `all` and `soft`, the router
            and every expert. The router's alone count as much, though they cost less: those by
            which j-tlga-plus asks it first, and the clean pass where neither a Lipschitz term nor
            early stop needs more.
        backwards: backward passes of each sample, int64 [B].
        dead: of them, those whose gradient was zero or not finite, int64 [B].
    """

    adversarial: Tensor
    success: Tensor
    loss: Tensor
    route_before: Tensor
    route_after: Tensor
    forwards: Tensor
    backwards: Tensor
    dead: Tensor


class Judged(NamedTuple):
    """What an objective says of some clips.

    Attributes:
        loss: to maximise, [b], with its graph; NaN where the model's answer holds one.
        success: by the attack's criterion, bool [b].
        route: of each clip, [b].
    """

    loss: Tensor
    success: Tensor
    route: Tensor


# From clips that stand in some rows of the batch, [b, C, T, H, W], and those rows, int64 [b].
Objective: TypeAlias = Callable[[Tensor, Tensor], Judged]


class Aim(NamedTuple):
    """What to maximise, ready for some clean clips.

    Attributes:
        objectives: tried one after the other in each restart; most attacks have one.
        route_before: route of the clean clips, [B].
        success: whether the clean clips succeed as they are, [B]; None where nobody looked.
        silent: to which of them the model answers NaN, [B].
    """

    objectives: tuple[Objective, ...]
    route_before: Tensor
    success: Tensor | None
    silent: Tensor


T = TypeVar("T", Tensor, NDArray[Any])


def improves(success: T, loss: T, held: T, least: T) -> T:
    """Return where a find is better than what is held: by success, then by loss, bool [b].

    Args:
        success: of the find, bool [b].
        loss: of the find, [b].
        held: success of what is held.
        least: loss of what is held.
    """
    better: T = (success & ~held) | ((success == held) & (loss > least))
    return better


@contextmanager
def as_found(twin: VideoMoE) -> Iterator[None]:
    """Attack in eval mode, in float32, without gradients of parameters; put all back, always.

    In float32: not in TF32, whose 10 bits are cuDNN's default for convolutions. An engine has none.
    """
    modes = {module: module.training for module in twin.modules()}
    wanted = {p: p.requires_grad for p in twin.parameters()}
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    short = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        twin.eval().requires_grad_(False)
        yield
    finally:
        for backend, allowed in zip(backends, short, strict=True):
            backend.allow_tf32 = allowed
        for module, mode in modes.items():
            module.training = mode
        for parameter, needs in wanted.items():
            parameter.requires_grad_(needs)


class Search:
    """An attack under way on one batch: which clips still stand, the best iterate of each.

    A climb asks `slope` and `judge` about whole batches, and moves whole batches; what is computed
    is computed of the clips that still stand.

    Attributes:
        clip: clean, x, [B, C, T, H, W].
        settings: of the attack.
        indices: number of each sample in its data set, [B].
        number: of the start under way, 0, 1, ... over restarts and objectives.
        standing: which clips are still attacked, bool [B].
    """

    def __init__(
        self, clip: Tensor, settings: BallSettings, aim: Aim, indices: Tensor,
        given: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Begin; a clip that succeeds as it is stands no more, by early stop.

        `given`, [B, C, T, H, W], is where the first start begins, within the ball.
        """
        self.clip, self.settings, self.indices, self._given = clip, settings, indices, given
        self._ends = ball.bounds(clip, settings.eps)
        self._levels = grid.bounds(clip, settings.eps) if settings.grid else None
        self.number = 0
        self.standing = torch.ones(len(clip), dtype=torch.bool, device=clip.device)
        self.best = clip.clone()
        self.success = ~self.standing
        self.loss = clip.new_full((len(clip),), -torch.inf)
        self.route = aim.route_before.clone()
        self.forwards = self.standing.long()  # `prepare` answered the clean clips
        self.backwards, self.dead = self.forwards * 0, self.forwards * 0
        self._objective = aim.objectives[0]
        self._refuse(aim.silent, self._rows())
        if settings.early_stop and aim.success is not None:
            self.success, self.standing = aim.success.clone(), ~aim.success

    def begin(self, objective: Objective, number: int) -> None:
        """Start anew, on the clips that still stand."""
        self._objective, self.number = objective, number

    def start(self, *, random: bool) -> Tensor:
        """Return where this start begins: a random point of the ball, or the clean clip.

        Of clips that stand no more, the clean one. The first begins where it is given, if it is.
        """
        how, begun = self.settings, self.clip.clone()
        if self._given is not None and self.number == 0:
            return self.project(self._given.clone())
        if random:
            rows = self._rows()
            numbers = self.indices[rows.cpu()]
            drawn = ball.start(begun[rows], how.eps, how.norm, how.seed, numbers, self.number)
            begun[rows] = drawn
        return begun

    def project(self, moved: Tensor) -> Tensor:
        """Return clips within the ball and in [0, 1]; those that are given may be overwritten."""
        if self.settings.norm == "linf":
            return moved.clamp_(*self._ends)
        return ball.project(self.clip, moved, self.settings.eps, self.settings.norm)

    def slope(self, clip: Tensor, *, probe: bool = False) -> tuple[Tensor, Tensor]:
        """Return the loss of clips, [B], and its gradient; 0 of those that stand no more.

        Args:
            clip: [B, C, T, H, W], within the ball, or anywhere where it is a probe.
            probe: only ask: the clips are no candidates.
        """
        rows = self._rows()
        at = (clip.detach()[rows] if probe else self._seen(clip, rows)).requires_grad_()
        with torch.enable_grad(), self._autocast(at):
            judged = self._objective(at, rows)
            found = _gradient(judged.loss, at)
        low, high = found.flatten(1).amin(dim=1), found.flatten(1).amax(dim=1)
        largest = torch.maximum(-low, high)
        alive = (largest > 0) & (largest < torch.inf)
        if not alive.all():
            found = found.nan_to_num()  # one that overflowed must not lead out of [0, 1]
        self.backwards[rows] += 1
        self.dead[rows] += (~alive).long()
        loss = self._heard(at.detach(), rows, judged, probe)
        if len(rows) == len(clip):
            return loss, found
        return self._whole(loss, rows), torch.zeros_like(clip).index_copy_(0, rows, found)

    def judge(self, clip: Tensor, *, probe: bool = False) -> Tensor:
        """Return the loss of clips, [B]; 0 of those that stand no more.

        Args:
            clip: [B, C, T, H, W], within the ball, or anywhere where it is a probe.
            probe: only ask: the clips are no candidates.
        """
        rows = self._rows()
        at = clip[rows] if probe else self._seen(clip, rows)
        return self._whole(self._heard(at, rows, self._look(at, rows), probe), rows)

    def breaks(self, clip: Tensor) -> Tensor:
        """Return which clips succeed, bool [B], wherever they are; they are no candidates.

        Those that stand no more do not.
        """
        rows = self._rows()
        judged = self._look(clip[rows], rows)
        self._heard(clip, rows, judged, probe=True)
        return self._whole(judged.success, rows)

    def claim(self, clip: Tensor, among: Tensor, loss: Tensor) -> None:
        """Look at some clips again, as candidates, with a loss of the climb's own.

        Args:
            clip: [B, C, T, H, W]; those of `among` within the ball.
            among: which, bool [B].
            loss: what is best, [B].
        """
        rows = torch.nonzero(self.standing & among).flatten()
        if len(rows):
            at = self._seen(clip, rows)
            judged = self._look(at, rows)
            self._heard(at, rows, judged, probe=True)
            self._offer(at, rows, judged, loss[rows])

    def settle(self) -> None:
        """Judge the best clips of a bfloat16 search that have not succeeded, in float32."""
        rows = torch.nonzero(~self.success & (self.loss > -torch.inf)).flatten()
        if self.settings.bf16 and len(rows):
            with torch.no_grad():
                judged = self._objective(self.best[rows], rows)
            self._refuse(judged.loss.isnan(), rows)
            self.forwards[rows] += 1
            self.success[rows], self.route[rows] = judged.success, judged.route

    def result(self, before: Tensor) -> AttackResult:
        """Return the best of every sample."""
        return AttackResult(
            self.best, self.success, self.loss, before, self.route,
            self.forwards, self.backwards, self.dead,
        )  # fmt: skip

    def _rows(self) -> Tensor:
        return torch.nonzero(self.standing).flatten()

    def _seen(self, clip: Tensor, rows: Tensor) -> Tensor:
        """Return the clips that are looked at: those that stand, on the grid where it is asked."""
        some = slice(None) if len(rows) == len(clip) else rows
        clip = clip.detach()[some]
        if self._levels is None:
            return clip
        if self.settings.norm == "linf":
            low, high = self._levels
            return grid.nearest(clip, low[some], high[some])
        return grid.rounded(clip, self.clip[some], self.settings.eps, self.settings.norm)

    def _look(self, clip: Tensor, rows: Tensor) -> Judged:
        with torch.no_grad(), self._autocast(clip):
            return self._objective(clip, rows)

    def _autocast(self, clip: Tensor) -> torch.autocast:
        return torch.autocast(clip.device.type, torch.bfloat16, enabled=self.settings.bf16)

    def _whole(self, values: Tensor, rows: Tensor) -> Tensor:
        """Return values of rows as values of the batch, 0 elsewhere (of bools, False)."""
        return values.new_zeros(len(self.clip)).index_copy_(0, rows, values)

    def _heard(self, clip: Tensor, rows: Tensor, judged: Judged, probe: bool) -> Tensor:
        """Count a forward pass, and take its clips as candidates but for a probe; return losses."""
        self._refuse(judged.loss.isnan(), rows)
        self.forwards[rows] += 1
        loss = judged.loss.detach().to(self.loss)
        if not probe:
            self._offer(clip, rows, judged, loss)
        return loss

    def _offer(self, clip: Tensor, rows: Tensor, judged: Judged, loss: Tensor) -> None:
        """Keep the clips that are better than the best of their samples."""
        success, route = judged.success, judged.route
        if self.settings.bf16 and success.any():
            success, route = self._confirm(clip, rows, judged)
        held, least = self.success[rows], self.loss[rows]
        better = improves(success, loss, held, least)
        those = torch.nonzero(better).flatten()
        at = rows[those]
        self.best.index_copy_(0, at, clip.index_select(0, those))  # masks are slower
        self.loss[at], self.route[at] = loss[those], route[those]
        self.success[rows] = held | success
        if self.settings.early_stop:
            self.standing[rows] = ~success

    def _confirm(self, clip: Tensor, rows: Tensor, judged: Judged) -> tuple[Tensor, Tensor]:
        """Judge successes of bfloat16 again, in float32."""
        claimed = torch.nonzero(judged.success).flatten()
        with torch.no_grad():
            again = self._objective(clip[claimed], rows[claimed])
        self._refuse(again.loss.isnan(), rows[claimed])
        self.forwards[rows[claimed]] += 1
        success, route = judged.success.clone(), judged.route.clone()
        success[claimed], route[claimed] = again.success, again.route
        return success, route

    def _refuse(self, silent: Tensor, rows: Tensor) -> None:
        """Refuse clips of some rows that the model answers NaN to."""
        if silent.any():
            index = int(self.indices[rows[silent].cpu()][0])
            raise VmoeError(
                f"clip {index}: the model answers NaN to it or near it; no figure of this model "
                "would mean anything. Look at its weights, or at --bf16."
            )


def _gradient(loss: Tensor, clip: Tensor) -> Tensor:
    """Return the gradient of each sample's loss; 0 where the loss does not hang on the clip."""
    if not loss.requires_grad:
        return torch.zeros_like(clip)
    (found,) = torch.autograd.grad(loss.sum(), clip, allow_unused=True, materialize_grads=True)
    return found


Climb: TypeAlias = Callable[[Search, Tensor], None]  # from a start; it asks slope and judge


def ascend(
    twin: VideoMoE,
    clip: Tensor,
    settings: BallSettings,
    prepare: Callable[[Tensor], Aim],
    indices: Tensor | None = None,
    *,
    climb: Climb,
) -> AttackResult:
    """Maximise objectives in the ball around each clip, from each start.

    Args:
        twin: put in eval mode for the attack, and back; it may know where to `begin`.
        clip: x, [B, C, T, H, W], pixels in [0, 1].
        settings: at least BallSettings; restarts and random_start where it has them.
        prepare: called once with the clean clip (the twin being in eval mode), for one forward
            pass of it; the loss of its objectives is summed over the batch, so that gradients
            are per sample.
        indices: number of each sample in its data set, [B]; starts are drawn from (seed, index,
            number of the start), so that sharding and order change nothing. Default: 0, 1, ...
        climb: how it moves from a start.

    Returns:
        The best iterate of every sample, over all starts.

    Raises:
        SettingError: clips of another shape or range than the method's, or too few indices.
        VmoeError: the model answers NaN; names the clip.
    """
    clip = clip.detach().contiguous()  # as gradients are: mixed layouts are slow
    order = torch.arange(len(clip)) if indices is None else indices.cpu()
    check_clip(clip, order, settings)
    random = getattr(settings, "random_start", False)
    with as_found(twin):
        aim = prepare(clip)
        begin = getattr(twin, "begin", None)  # of modes.Deployed
        search = Search(clip, settings, aim, order, begin and begin(order))
        number = 0
        for restart in range(getattr(settings, "restarts", 1)):
            for objective in aim.objectives:
                if not search.standing.any():
                    break
                search.begin(objective, number)
                climb(search, search.start(random=random or restart > 0))
                number += 1
        search.settle()
    return search.result(aim.route_before)


def check_clip(clip: Tensor, order: Tensor, settings: BallSettings) -> None:
    """Refuse what would make the attack void in silence, such as pixels of 0 to 255."""
    if clip.ndim != 5 or not len(clip) or not clip.is_floating_point():
        raise SettingError(
            f"clip is {clip.dtype} {list(clip.shape)}; an attack takes float [B, 3, T, H, W]."
        )
    low, high = float(clip.min()), float(clip.max())
    if not (low >= 0 and high <= 1):
        raise SettingError(
            f"clip has pixels from {low:g} to {high:g}; an attack takes [0, 1]: divide by 255."
        )
    if settings.grid and not grid.holds(clip):
        raise SettingError("clip has pixels between two grey levels; leave grid out.")
    if len(order) != len(clip):
        raise SettingError(f"{len(order)} indices for {len(clip)} clips; give one for each.")

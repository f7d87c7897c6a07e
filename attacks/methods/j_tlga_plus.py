"""J-TLGA-plus: APGD on the margin; where a clip can be misrouted, on the joint margin, too.

Ours, after J-TLGA of arXiv 2602.01369: router and expert are attacked jointly, and the attack is
guided to another expert, but

- it moves as APGD does, on the margin of the hard logits (Croce and Hein, ICML 2020);
- it is guided only where that can pay. The router is light, so it is asked first, alone, which
  experts it can be made to choose within the ball. Where it can be made to choose none, the attack
  is APGD-margin, step for step;
- it is guided to the expert that fails most easily among those, and not to the one of the lowest
  score: each is judged where the router chooses it;
- its second part keeps the route that it has reached, by a penalty, while that expert is attacked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vmoe.attacks import apgd, ball, losses
from vmoe.attacks.loop import Aim, AttackResult, Judged, Objective, Search, ascend
from vmoe.models import MoEOutput, VideoMoE
from vmoe.settings import opt

PART = "model"


@dataclass(frozen=True)
class Settings(apgd.ApgdSettings):
    """J-TLGA-plus's settings; steps are gradients of the whole model."""

    router_steps: int = opt(5, "gradient steps of the router alone, to each expert", at_least=0)
    guided: float = opt(
        0.5, "share of the steps that are guided, of clips that can be", above=0, at_most=1
    )
    toward: str = opt(
        "failing",
        "of the experts that can be chosen, the one that is nearest to failing, or of lowest score",
        choices=("failing", "weakest"),
    )
    hold: float = opt(2.0, "weight of the penalty that keeps the route", at_least=0)


def attack(
    twin: VideoMoE, clip: Tensor, label: Tensor, settings: Settings, indices: Tensor | None = None
) -> AttackResult:
    """Maximise the margin, and the joint margin of another expert; success: the label is wrong.

    The margin of F(x+d); then, towards an expert j that the router chose at some x+d_j,
    margin(E_j(x+d), y) + hold |margin_j| min(0, s_j(x+d) / |s_j(x+d_0)|), s_j the score of j less
    the best other score, d_0 the start, margin_j that of E_j at x+d_j: a route that is lost as far
    as it was at the start costs hold times what E_j still has to lose.

    Gradients of the router alone are counted like the others, though they cost a fraction of them.
    """
    guide = _Guide(twin, label, settings)
    return ascend(twin, clip, settings, guide.prepare, indices, climb=guide.climb)


class _Guide:
    """The objectives and the climb of one batch."""

    def __init__(self, twin: VideoMoE, label: Tensor, settings: Settings) -> None:
        self.twin, self.label, self.settings = twin, label, settings

    def prepare(self, clip: Tensor) -> Aim:
        """Return the aim of APGD-margin."""
        how = self.settings
        aim = losses.whole(
            self.twin, clip, self.label, how, route_grad=how.route_grad, loss=losses.margin
        )
        self.plain, self.route = aim.objectives[0], aim.route_before
        return aim

    def climb(self, search: Search, clip: Tensor) -> None:
        """Ask the router; then climb the margin, and where it was misrouted the joint margin."""
        steps = self.settings.steps
        guided = max(1, round(self.settings.guided * steps))
        reached, at, expert, unit = self._ask(search, clip)
        for among, first, number, objective in (
            (~reached, clip, steps, self.plain),
            (reached, clip, steps - guided, self.plain),
            (reached, at, guided, self._joint(expert, unit)),
        ):
            with _only(search, among) as some:
                if some and number:
                    search.begin(objective, search.number)
                    apgd.climb(search, first, number)
        search.begin(self.plain, search.number)

    def _ask(self, search: Search, clip: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ask the router alone which experts it can be made to choose; judge each where it does.

        A clip that fails there is broken. Of the others, the nearest to failing is returned, or
        that of the lowest score at the start.

        Returns:
            Whether a clip can be misrouted, bool [B]; where, [B, C, T, H, W]; to which expert, [B];
            and what its penalty is worth, |margin_j| / |s_j(x+d_0)|, [B].
        """
        twin, how = self.twin, self.settings
        best = torch.full_like(clip[:, 0, 0, 0, 0], -torch.inf)
        at, expert, unit = clip, self.route, torch.ones_like(best)
        for k in range(1, len(twin.experts) if how.router_steps else 1):
            j = (self.route + k) % len(twin.experts)
            search.begin(self._toward(j), search.number)
            moved, score, first = self._misroute(search, clip)
            search.begin(self.plain, search.number)
            with _only(search, score > 0) as some:
                if not some:
                    continue
                value = search.judge(moved)  # first: a clip that fails there stands no more
                lost = ~search.standing
            rank = (value if how.toward == "failing" else -first).masked_fill(lost, -torch.inf)
            better = rank > best
            best, expert = torch.where(better, rank, best), torch.where(better, j, expert)
            unit = torch.where(better, value.abs() / first.abs().clamp(min=1e-6), unit)
            at = torch.where(ball.spread(better, clip), moved, at)
        return best > -torch.inf, at, expert, unit

    def _misroute(self, search: Search, clip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Raise the objective, s_j, by steps of eps, eps/2, eps/4, eps/4, ... from a start.

        Returns:
            The best point, its s_j, -inf where a clip stands no more, and s_j at the start.
        """
        how, step = self.settings, self.settings.eps
        best, most, first = clip, torch.full_like(clip[:, 0, 0, 0, 0], -torch.inf), None
        for _ in range(how.router_steps):
            score, gradient = search.slope(clip, probe=True)
            first = score if first is None else first
            most, best = _keep(most, best, score, clip)
            clip = search.project(clip + step * ball.steepest(gradient, how.norm))
            step = max(step / 2, how.eps / 4)
        most, best = _keep(most, best, search.judge(clip, probe=True), clip)
        assert first is not None
        return best, torch.where(search.standing, most, -torch.inf), first

    def _toward(self, j: Tensor) -> Objective:
        """Return s_j: the score of an expert less the best other score, by the router alone."""

        def objective(adversarial: Tensor, rows: Tensor) -> Judged:
            scores = self.twin.scores(adversarial)
            route = scores.argmax(dim=1)
            return Judged(-losses.margin(scores, j[rows]), route < 0, route)

        return objective

    def _joint(self, expert: Tensor, unit: Tensor) -> Objective:
        """Return the joint margin of an expert: its own, and a penalty where it is not chosen."""
        twin, hold = self.twin, self.settings.hold

        def objective(adversarial: Tensor, rows: Tensor) -> Judged:
            j, y = expert[rows], self.label[rows]
            scores = twin.scores(adversarial)
            route = scores.argmax(dim=1)
            logits = twin.run_routed(adversarial, j)
            lost = -losses.margin(scores, j).clamp(min=0)
            value = losses.margin(logits, y) + hold * unit[rows] * lost
            hard = logits.detach().clone()
            away = torch.nonzero(route != j).flatten()
            if len(away):
                with torch.no_grad():
                    hard[away] = twin.run_routed(adversarial[away], route[away])
            return losses.judged(value, hard, y, MoEOutput(logits, scores, route))

        return objective


@contextmanager
def _only(search: Search, among: Tensor) -> Iterator[bool]:
    """Attack, of the clips that stand, some alone; say whether there are any."""
    rest = search.standing & ~among
    search.standing = search.standing & among
    try:
        yield bool(search.standing.any())
    finally:
        search.standing = search.standing | rest


def _keep(most: Tensor, best: Tensor, loss: Tensor, clip: Tensor) -> tuple[Tensor, Tensor]:
    """Return the larger loss and its clip, of each sample."""
    better = loss > most
    return torch.where(better, loss, most), torch.where(ball.spread(better, clip), clip, best)

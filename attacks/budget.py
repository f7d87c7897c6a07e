"""What attacks take: the budget that all share, and what iterative ones take beside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vmoe.attacks import ball
from vmoe.errors import SettingError
from vmoe.models import ROUTE_GRADS
from vmoe.settings import Settings, opt


@dataclass(frozen=True)
class BallSettings(Settings):
    """What every attack takes."""

    eps: float = opt(8 / 255, "budget, on pixels in [0, 1]", at_least=0)
    norm: str = opt("linf", "norm of the budget", choices=ball.NORMS)
    seed: int = opt(0, "seed of the random draws")
    early_stop: bool = opt(True, "a clip that is broken costs no further pass")
    bf16: bool = opt(False, "gradient passes in bfloat16; success is judged in float32")
    grid: bool = opt(False, "look only at clips that uint8 can hold")

    def __post_init__(self) -> None:
        """Check every value; beyond 1, an L-infinity ball holds every clip there is."""
        super().__post_init__()
        if self.norm == "linf" and self.eps > 1:
            raise SettingError(f"--eps is {self.eps:g}; with --norm linf it must be at most 1.")


@dataclass(frozen=True)
class IterativeSettings(BallSettings):
    """What every iterative attack takes beside."""

    steps: int = opt(20, "gradient steps", at_least=1)
    restarts: int = opt(1, "random starts; the best counts", at_least=1)
    random_start: bool = opt(True, "start at random in the ball (restarts always do)")


@dataclass(frozen=True)
class LoopSettings(IterativeSettings):
    """What every attack of fixed step takes beside."""

    step: float = opt(0.25, "step size (the paper's alpha), as a share of eps", above=0)


@dataclass(frozen=True)
class TemporalSettings(LoopSettings):
    """What the temporal Lipschitz attacks take beside."""

    temporal: str = opt(
        "iterations",
        "temporal step: V over iterations, V along the frames of one, or off",
        choices=("iterations", "frames", "off"),
    )
    beta: float = opt(0.9, "decay of the temporal step's V", at_least=0, at_most=1)
    lam: float = opt(0.0, "weight of the Lipschitz term", at_least=0)
    lip: str = opt(
        "detached",
        "gradient through the Lipschitz term's denominator: no, or yes (the paper's literal form)",
        choices=("detached", "quotient"),
    )


def route_grad_option() -> Any:
    """Return the field that the settings of every attack on the whole model have."""
    return opt("straight-through", "how a gradient passes the hard choice", choices=ROUTE_GRADS)

"""What can be set of a stream: one class for the flags of vmoe-run and for the API."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmoe.errors import SettingError
from vmoe.settings import Settings, opt

AUTO = "auto"
BUFFERS = (AUTO, "latest", "oldest", "block")


@dataclass(frozen=True)
class StreamSettings(Settings):
    """How streams are served."""

    hop: float | None = opt(None, "seconds between two windows; half of a window's frames if not "
                            "given, of a bundle in the online form one frame", above=0)  # fmt: skip
    sampling: str = opt("exact", "exact refuses sources slower than the model's frame spacing; "
                        "nearest repeats frames", choices=("exact", "nearest"))  # fmt: skip
    top: int = opt(3, "how many labels to list", at_least=1)
    duration: float | None = opt(None, "stop after so many seconds of the stream", above=0)
    buffer: str = opt(AUTO, "what waits where a stage is too slow: latest (the newest frames), "
                      "oldest, or block (nothing is dropped); auto: latest of what is live, "
                      "else block", choices=BUFFERS)  # fmt: skip
    max_staleness: float | None = opt(None, "seconds after which a window of a live source is no "
                                      "longer worth labelling", above=0)  # fmt: skip
    latency_budget: float = opt(0.0, "milliseconds that a window may wait for those of other "
                                "streams, to be run with them", at_least=0)  # fmt: skip
    max_batch: int = opt(16, "most windows of one run of the engine, one a stream", at_least=1)
    smooth: float = opt(0.5, "seconds over which shares are averaged for events (time constant "
                        "of an EMA); 0 does not average", at_least=0)  # fmt: skip
    threshold: float = opt(0.5, "share from which a label is an event", at_least=0, at_most=1)
    hysteresis: float = opt(0.1, "share that a label may fall below the threshold, or behind "
                            "another, before its event ends", at_least=0, at_most=1)  # fmt: skip
    min_event: float = opt(0.5, "seconds that a label must hold to be an event", at_least=0)
    guard: str = opt("off", "monitor reports windows that do not look like clean video; enforce "
                     "acts on them", choices=("off", "monitor", "enforce"))  # fmt: skip
    guard_profile: Path | None = opt(
        None, "what --guard-calibrate wrote of clean video; else the bundle's guard.json"
    )
    on_alarm: str = opt("abstain", "what enforce does: abstain, or vote (all experts run, at "
                        "their cost)", choices=("abstain", "vote"))  # fmt: skip
    vote_share: float = opt(0.25, "at most so much of 100 windows is voted on, the others abstain",
                            at_least=0, at_most=1)  # fmt: skip

    def __post_init__(self) -> None:
        """Check every value; refuse what has no effect."""
        super().__post_init__()
        self._needs("--guard monitor or enforce", self.guard != "off", "guard_profile")
        self._needs("--guard enforce", self.guard == "enforce", "on_alarm", "vote_share")
        self._needs("--on-alarm vote", self.on_alarm == "vote", "vote_share")

    def _needs(self, needed: str, given: bool, *names: str) -> None:
        """Refuse settings that are not at their defaults, and do nothing without another."""
        for name in names:
            default = type(self).__dataclass_fields__[name].default
            if not given and getattr(self, name) != default:
                raise SettingError(f"--{name.replace('_', '-')} does nothing without {needed}.")

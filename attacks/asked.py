"""A command line of vmoe-attack, and the one of a run that goes on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from vmoe.attacks import flags as given_by
from vmoe.attacks import parts
from vmoe.errors import SettingError

# For --resume; of them, those that are paths.
KEPT = (
    "twin", "compare", "save_adv", "md", "preset", "curve", "sanity", "gate_robust", "codec",
    "camera_size", "eot", "seed", "device",
)  # fmt: skip
PATHS = ("twin", "save_adv", "md")
OF_VIDEO = {  # the others have no effect on it
    "target", "twin", "video", "save_adv", "to_label", "dry_run", "device", "config", "as_json",
    "eps", "steps", "step", "route_grad", "batch", "mode", "backend",
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A command line of vmoe-attack; `flags` are those of settings, None where not given."""

    target: Path | None
    twin: Path | None
    compare: tuple[Path, ...]
    save_adv: Path | None
    load_adv: Path | None
    out: Path | None
    md: Path | None
    preset: str | None
    curve: bool
    sanity: bool
    gate_robust: float | None
    codec: str | None
    camera_size: str | None
    eot: int | None
    video: Path | None
    to_label: str | None
    resume: bool
    overwrite: bool
    dry_run: bool
    seed: int
    device: str
    config: Path | None
    as_json: bool
    flags: dict[str, Any]

    @property
    def given(self) -> set[str]:
        """What stands on the command line, and the settings of the --config file."""
        source = click.get_current_context().get_parameter_source
        own = (field.name for field in dataclasses.fields(self) if field.name != "flags")
        given = {name for name in own if source(name) is not ParameterSource.DEFAULT}
        return given | {name for name, value in self.flags.items() if value is not None}

    def refuse_contradictions(self) -> None:
        """Refuse options that exclude each other or have no effect, before any work."""
        if self.video is not None:
            why = "--video attacks all windows of one video together"
            given_by.refuse(self.given - OF_VIDEO, why)
        if self.save_adv is not None and self.load_adv is not None:
            raise SettingError(
                "--save-adv and --load-adv exclude each other: make clips, or replay."
            )
        if self.resume and self.overwrite:
            raise SettingError("--resume and --overwrite exclude each other: go on, or begin anew.")
        if self.to_label is not None and self.video is None:
            raise SettingError("--to-label has no effect: it goes with --video; leave it out.")
        if self.load_adv is not None:
            given = {name for name, value in self.flags.items() if value is not None}
            given -= {"batch", "backend"}
            also = {name for name in ("preset", "curve", "resume", "eot") if getattr(self, name)}
            given_by.refuse(given | also, f"--load-adv {self.load_adv} replays clips as they are")


def compared(
    targets: tuple[Path, ...], compare: tuple[Path, ...]
) -> tuple[Path | None, tuple[Path, ...]]:
    """Return the target and what it is compared with: `A --compare B C` names three bundles."""
    if len(targets) > 1 and not compare:
        raise SettingError(f"{targets[1]} is a second TARGET; attack it beside with --compare.")
    return next(iter(targets), None), (*compare, *targets[1:])


def as_before(asked: Asked) -> Asked:
    """Return the command line of a run that goes on; what is given now stands over it.

    Where it contradicts the run, `parts.go_on` refuses and says which.
    """
    if asked.out is None:
        raise SettingError("--resume goes on with the run in a folder; name it with --out.")
    held = parts.command_of(asked.out)
    before = {k: tuple(v) if isinstance(v, list) else v for k, v in held["flags"].items()}
    given = {name: value for name, value in asked.flags.items() if value is not None}
    source = click.get_current_context().get_parameter_source
    left_out = [name for name in KEPT if source(name) is ParameterSource.DEFAULT]
    values: dict[str, Any] = {
        n: Path(v) if n in PATHS and v else v for n, v in held.items() if n in left_out
    }
    if "compare" in values:
        values["compare"] = tuple(map(Path, values["compare"]))
    target = asked.target or Path(held["target"])
    return dataclasses.replace(
        asked, target=target, flags={**asked.flags, **before, **given}, **values
    )

"""One run over a job: its parts in files, gone on with, shared with other processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmoe.attacks import parts
from vmoe.attacks.evaluate import Evaluation, Job
from vmoe.attacks.parts import PartFiles
from vmoe.attacks.ranks import Meeting, Ranks
from vmoe.cli import log
from vmoe.errors import VmoeError


@dataclass(frozen=True)
class Session:
    """A job, and what must be known of it to go on with it, or to share it.

    Attributes:
        work: what is to be done.
        run: everything that its result depends on, by names that a user knows.
        command: what was given on the command line.
        resume: go on with what is in the folder.
    """

    work: Job
    run: Mapping[str, Any]
    command: Mapping[str, Any]
    resume: bool = False

    def alone(self, out: Path) -> Evaluation:
        """Do what is missing, and put it together.

        Args:
            out: the run's folder.

        Raises:
            SettingError: another run was begun there.
            VmoeError: a model answers NaN, or a part cannot be written. What is finished is kept.
        """
        held = self._open(out)
        try:
            self.work.fill(held)
        except BaseException:
            _keep(out)
            raise
        return self.work.gather(held)

    def together(self, out: Path | None, here: Ranks) -> Evaluation | None:
        """Do this process's share; rank 0 waits for the others and puts all together.

        Args:
            out: the run's folder; only rank 0 needs to know it.
            here: this process among them.

        Returns:
            The whole evaluation; None on every rank but 0.

        Raises:
            SettingError: another run was begun there, or a process was started for another.
            VmoeError: a model answers NaN, a part cannot be written, another process failed.
        """
        meeting = Meeting(here)
        if here.first:
            assert out is not None  # the caller gives it on rank 0
            held = self._open(out)
            meeting.tell(out, self.run)
        else:
            held = PartFiles(meeting.hear(self.run) / parts.FOLDER)
        try:
            self.work.fill(held, (here.rank, here.world))
            meeting.done()
            if not here.first:
                return None
            meeting.wait()
        except BaseException as e:
            if isinstance(e, VmoeError):
                meeting.failed(str(e))
            if out is not None and here.first:
                say_kept(out)  # whole or not: others may be writing there
            raise
        lacking = self.work.missing(held, range(self.work.batches))
        if any(lacking.values()):
            raise VmoeError(
                f"{out} lacks the parts of other processes: it must lie where all of them see it."
            )
        return self.work.gather(held)

    def _open(self, out: Path) -> PartFiles:
        if self.resume:
            held = parts.go_on(out, self.run)
            log.info("resumed: %d parts are there", len(held))
            return held
        return parts.begin(out, self.run, self.command)


def _keep(out: Path) -> None:
    """Say how to go on with what a run that fails has finished; remove it where that is nothing."""
    parts.abandon(out)
    say_kept(out)


def say_kept(out: Path) -> None:
    """Say how to go on with a run that ends too early, where it has finished something."""
    if parts.begun(out):
        log.warning("what is finished is kept; to go on: vmoe-attack --out %s --resume", out)

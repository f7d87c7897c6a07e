"""Several processes, as torchrun starts them, on one evaluation.

Whole batches are shared, every n-th to each process, so that each batch is the same as in one
process; results go through files (`parts`), not through a collective, and rank 0 puts them
together. The store that torchrun brings is asked for two things alone: that all of them do the
same run, and who has finished.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from vmoe import report
from vmoe.attacks import parts
from vmoe.errors import SettingError, VmoeError

PATIENCE = timedelta(minutes=30)  # until rank 0 has read its clips
ONE_LOOK = timedelta(seconds=1)


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Attributes:
        rank: its number; rank 0 reports.
        world: how many there are.
        local: its number on its machine.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process puts together and reports."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """Return the device of this process: with `auto` and several, a GPU each."""
        count = torch.cuda.device_count() if name == "auto" and self.world > 1 else 0
        return f"cuda:{self.local % count}" if count else name


def here() -> Ranks:
    """Return this process's place, as torchrun says it; alone without torchrun.

    Raises:
        SettingError: half of what torchrun sets is missing.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise SettingError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} and {missing[0]} is not set: start several "
            "processes with torchrun."
        )
    rank = int(os.environ["RANK"])
    local = int(os.environ.get("LOCAL_RANK", rank))
    return Ranks(rank, int(os.environ["WORLD_SIZE"]), local)


class Meeting:
    """Where the processes of a run agree on it, and say that they are done."""

    def __init__(self, ranks: Ranks) -> None:
        """Meet at the store that the environment names."""
        from torch.distributed.rendezvous import rendezvous

        self._ranks = ranks
        self._store, _, _ = next(rendezvous("env://"))

    def tell(self, out: Path, run: Mapping[str, Any]) -> None:
        """Tell the others, as rank 0, where the run is and what."""
        self._store.set("run", report.to_json({"out": str(out.resolve()), "run": run}))

    def hear(self, run: Mapping[str, Any]) -> Path:
        """Return where rank 0's run is.

        Raises:
            SettingError: it is another run than this process was started for.
            VmoeError: nothing was heard of rank 0.
        """
        try:
            self._store.wait(["run"], PATIENCE)
        except RuntimeError as e:  # of torch: DistStoreError
            raise VmoeError(f"rank {self._ranks.rank} heard nothing of rank 0.") from e
        told = json.loads(self._store.get("run"))
        parts.compare(
            told["run"], run, "rank 0 was started", "give every process the same command line"
        )
        return Path(told["out"])

    def done(self) -> None:
        """Say that this process has made its batches."""
        self._store.set(f"done{self._ranks.rank}", "")

    def failed(self, why: str) -> None:
        """Say that this process cannot make its batches."""
        with suppress(RuntimeError):  # the store may be gone with whoever kept it
            self._store.set("failed", f"rank {self._ranks.rank}: {why}")

    def wait(self) -> None:
        """Wait until all processes are done; torchrun ends this one where another has died.

        Raises:
            VmoeError: one of them has failed.
        """
        names = [f"done{rank}" for rank in range(self._ranks.world)]
        while True:
            if self._store.check(["failed"]):
                raise VmoeError(self._store.get("failed").decode())
            with suppress(RuntimeError):  # of torch: DistStoreError, not yet
                self._store.wait(names, ONE_LOOK)
                return

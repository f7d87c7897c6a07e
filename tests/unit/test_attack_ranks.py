"""Several processes: where they meet, over the store that torchrun brings."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from torch.distributed import TCPStore

from tests.twins import SMALL, random_clips, small
from vmoe.attacks import parts, ranks
from vmoe.attacks.evaluate import job, plan
from vmoe.attacks.judge import of_twin
from vmoe.attacks.ranks import Meeting, Ranks
from vmoe.attacks.session import Session
from vmoe.cli import log
from vmoe.errors import SettingError, VmoeError

RUN = {"--n": 5, "steps of pgd": 3}


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Meeting, Meeting]]:
    """Return two processes' meetings at one store, which stands where torchrun's agent has it."""
    agent = TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=20))
    values = {
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(agent.port), "WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    made = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert ranks.here() == Ranks(rank, 2, rank)
        made.append(Meeting(ranks.here()))
    yield made[0], made[1]
    del agent


def test_alone_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert ranks.here() == Ranks()
    assert ranks.here().first
    assert ranks.here().device("auto") == "auto"


def test_half_of_what_torchrun_sets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SettingError, match="WORLD_SIZE is 2 and RANK is not set: start several"):
        ranks.here()


def test_the_same_run_is_heard_of(pair: tuple[Meeting, Meeting], tmp_path: Path) -> None:
    first, second = pair
    first.tell(tmp_path, RUN)
    assert second.hear(RUN) == tmp_path.resolve()
    first.done()
    second.done()
    first.wait()


def test_another_run_is_named(pair: tuple[Meeting, Meeting], tmp_path: Path) -> None:
    first, second = pair
    first.tell(tmp_path, RUN)
    with pytest.raises(SettingError, match="started with steps of pgd: 3; this one has 4"):
        second.hear({**RUN, "steps of pgd": 4})


def test_one_that_failed_ends_the_wait(pair: tuple[Meeting, Meeting]) -> None:
    first, second = pair
    first.done()
    second.failed("clip 7: the twin answers NaN")
    with pytest.raises(VmoeError, match="rank 1: clip 7: the twin answers NaN"):
        first.wait()


def test_rank_0_says_how_to_go_on(
    pair: tuple[Meeting, Meeting], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("RANK", "0")
    pair[1].failed("clip 7: the twin answers NaN")
    twin, clips = small(), random_clips(2, spec=SMALL)
    rows = plan(["noise"], [4 / 255])
    work = job(twin, clips, np.array([0, 1]), rows, {"twin": of_twin(twin)}, batch=1)
    caplog.set_level("WARNING", logger="vmoe")
    monkeypatch.setattr(log, "propagate", True)
    with pytest.raises(VmoeError, match="rank 1: clip 7"):
        Session(work, RUN, {}).together(tmp_path, Ranks(0, 2, 0))
    assert f"to go on: vmoe-attack --out {tmp_path} --resume" in caplog.text
    assert len(parts.go_on(tmp_path, RUN)) == 2  # its own batch: clean, and attacked


def test_rank_0_that_says_nothing(
    pair: tuple[Meeting, Meeting], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "PATIENCE", timedelta(seconds=0.2))
    with pytest.raises(VmoeError, match="rank 1 heard nothing of rank 0"):
        pair[1].hear(RUN)

"""Worker processes: the same batches, read once and ahead; errors, kills and ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import layouts
from tests.videos import write
from vmoe.batches import Batch, batches, shuffled
from vmoe.clips import ClipSpec
from vmoe.data import DataSet, DataSettings, open_data
from vmoe.errors import SettingError, VmoeError
from vmoe.loading import Loader, LoadSettings

SPEC = ClipSpec(frames=4, spacing_s=0.1, height=32, width=32)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("videos")
    layouts.folder(where)
    for i in range(5):
        write(where / f"train/hug/more{i}.avi", 10)
    return where


@pytest.fixture
def data(videos: Path) -> DataSet:
    return open_data(str(videos), "train", SPEC, DataSettings(seed=3))  # 9 clips, augmented


def same(found: Iterator[Batch], wanted: Iterator[Batch]) -> bool:
    return all(
        torch.equal(a.clip, b.clip)
        and torch.equal(a.label, b.label)
        and torch.equal(a.index, b.index)
        for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_bit_for_bit(data: DataSet, workers: int) -> None:
    with Loader(data, 4, workers=workers) as loader:
        assert len(loader) == 9
        assert same(loader.batches(), batches(data, 4))
        for epoch in (0, 1, 5):
            for number in range(2):
                order = shuffled(9, epoch, number)
                wanted = batches(data.at_epoch(epoch), 4, order=order)
                assert same(loader.batches(order, epoch), wanted)
        assert same(loader.batches([1, 1, 8]), batches(data, 4, order=[1, 1, 8]))
        assert loader.waited_s > 0
    assert not multiprocessing.active_children()


class Counting:
    """Clips that count how often each is read."""

    labels = ("a", "b")

    def __init__(self, data: DataSet) -> None:
        self.data = data
        self.reads = [0] * len(data)

    def __len__(self) -> int:
        return len(self.reads)

    def __getitem__(self, index: int):  # type: ignore[no-untyped-def]
        self.reads[index] += 1
        return self.data[index]

    def at_epoch(self, epoch: int) -> Counting:
        return self


def test_a_clip_is_read_once_in_an_epoch_up_to_the_limit(data: DataSet) -> None:
    counting = Counting(data)
    loader = Loader(counting, 4)
    for epoch in range(2):
        for number in range(3):
            for _ in loader.batches(shuffled(9, number), epoch):
                pass
        assert counting.reads == [epoch + 1] * 9
    counting = Counting(data)
    loader = Loader(counting, 4, keep_bytes=2 * data[0][0].nbytes)
    for _ in range(3):
        list(loader.batches(range(9), 0))
    assert counting.reads == [1, 1] + [3] * 7
    loader.close()
    loader.close()


def test_a_video_that_breaks_is_one_line_and_the_workers_end(tmp_path: Path) -> None:
    layouts.folder(tmp_path)
    data = open_data(str(tmp_path), "train", SPEC)
    (tmp_path / "train/kick/train_1.avi").write_bytes(b"x")
    with (
        pytest.raises(
            SettingError, match=r"train_1.avi has changed while .* cannot be decoded\."
        ) as e,
        Loader(data, 2, workers=1) as loader,
    ):
        list(loader.batches())
    assert "\n" not in str(e.value)
    assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_is_an_error_and_no_hang(data: DataSet) -> None:
    with Loader(data, 3, workers=1, keep_bytes=0) as loader:
        taken = loader.batches(list(range(9)) * 5)
        next(taken)
        (worker,) = multiprocessing.active_children()
        assert worker.pid
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(VmoeError, match="ended from outside; often memory was short"):
            list(taken)
        with pytest.raises(VmoeError, match="Give fewer --workers, or --workers 0"):
            list(loader.batches())


PARENT = """
if __name__ == "__main__":
    import multiprocessing, signal, time
    from vmoe.clips import ClipSpec
    from vmoe.data import DataSettings, open_data
    from vmoe.loading import Loader
    # What starts the tests in the background may have it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    data = open_data("camera-motion", "train", ClipSpec(4, 0.1, 32, 32), DataSettings(clips=4))
    with Loader(data, 2, workers=1) as loader:
        next(loader.batches())
        print(multiprocessing.active_children()[0].pid, flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent_however_it_ends(tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert parent.stdout
    worker = int(parent.stdout.readline())
    if how == signal.SIGINT:  # a terminal sends it to all
        os.killpg(parent.pid, how)
    else:
        parent.send_signal(how)
    _, said = parent.communicate(timeout=60)
    assert parent.returncode == -how
    assert said.count("Traceback") == (how == signal.SIGINT)  # the parent's own
    for _ in range(600):
        if not running(worker):
            return
        time.sleep(0.05)
    pytest.fail("the worker goes on")


def running(pid: int) -> bool:
    """Return whether a process runs; one that has ended may wait for somebody to ask."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_does_without_torch() -> None:
    code = "import sys, vmoe.data._worker; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_workers_are_counted_from_none() -> None:
    with pytest.raises(SettingError, match="--workers is -1; it must be at least 0"):
        LoadSettings(workers=-1)

"""Long runs of vmoe-attack: killed and gone on with, shared by the processes of torchrun."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from vmoe import adversarial
from vmoe.attacks.cli import main

FLAGS = [
    "--attack", "pgd,pgd-r", "--n", "5", "--batch", "2", "--steps", "2", "--eps", "1,2",
    "--route-grad", "frozen,all", "--device", "cpu", "--no-sanity",
]  # fmt: skip
PARTS = 3 * (4 + 1)  # three batches, each under four rows and as it is
BIN = Path(sys.executable).parent


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*args: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def timeless(value: Any) -> Any:
    """Return a report without what no two runs share: seconds, and the command line."""
    if isinstance(value, dict):
        apart = ("seconds", "command")
        return {key: timeless(v) for key, v in value.items() if key not in apart}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def result_of(out: str, clips: str) -> tuple[Any, list[np.ndarray]]:
    report = json.loads(Path(out, "report.json").read_text())
    return timeless(report), [each.clips for each in adversarial.load(Path(clips)).attacked]


def assert_same(one: tuple[Any, list[np.ndarray]], other: tuple[Any, list[np.ndarray]]) -> None:
    assert one[0] == other[0]
    assert all((a == b).all() for a, b in zip(one[1], other[1], strict=True))


@pytest.fixture
def whole(tiny_checkpoint: Path, tmp_path: Path) -> tuple[Any, list[np.ndarray]]:
    """Return what a run of one process says, that nobody interrupted."""
    run(tiny_checkpoint, *FLAGS, "--out", "whole", "--save-adv", "whole-clips")
    return result_of("whole", "whole-clips")


def test_killed_at_any_point_and_gone_on_with(
    tiny_checkpoint: Path, whole: tuple[Any, list[np.ndarray]]
) -> None:
    wanted = random.randrange(1, PARTS)  # drawn anew in each run: any point must do
    print("killed after", wanted, "parts")
    flags = [*FLAGS, "--out", "cut", "--save-adv", "cut-clips"]
    command = [sys.executable, "-m", "vmoe.attacks.cli", str(tiny_checkpoint), *flags]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(Path().glob("cut/parts/*.npz"))) < wanted:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    if Path("cut/report.json").exists():
        pytest.skip("it had finished before it could be killed")
    assert "cut holds a run that was not finished" in run(
        tiny_checkpoint, *flags, code=2
    ).stderr.replace("\n", " ")
    changed = run("--resume", "--out", "cut", "--steps", "3", code=2).stderr
    assert (
        "cut was begun with steps of pgd at eps 1/255 (0.0039), run 1: 2; this one has 3" in changed
    )
    result = run("--resume", "--out", "cut")
    assert "resumed: " in result.stderr
    assert_same(result_of("cut", "cut-clips"), whole)
    assert sorted(path.name for path in Path("cut").iterdir()) == [
        "report.csv", "report.json", "report.md",
    ]  # fmt: skip
    done = run("--resume", "--out", "cut", code=2).stderr
    assert "cut cannot be resumed: its run is finished" in done


def test_a_damaged_part_is_made_again(
    tiny_checkpoint: Path, whole: tuple[Any, list[np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("vmoe.attacks.record.write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tiny_checkpoint, *FLAGS, "--out", "cut", "--save-adv", "cut-clips")
    part = Path("cut/parts/batch00001-row002.npz")
    part.write_bytes(part.read_bytes()[:-9])
    Path("cut/parts/.half.npz").write_bytes(b"of a process that was killed while it wrote")
    Path("cut-clips").rename("moved")
    result = run("--resume", "--out", "cut")
    assert "batch00001-row002.npz is damaged" in result.stderr
    assert_same(result_of("cut", "cut-clips"), whole)


def test_the_second_report_is_remembered(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("vmoe.attacks.parts.remove", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tiny_checkpoint, *FLAGS, "--out", "cut", "--md", "second.md")
    Path("second.md").write_text("of before")
    Path("mine.md").write_text("of another")
    assert "mine.md exists" in run("--resume", "--out", "cut", "--md", "mine.md", code=2).stderr
    run("--resume", "--out", "cut")
    assert Path("second.md").read_text() == Path("cut/report.md").read_text()


def test_another_run_in_the_folder_is_refused(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    flags = [*FLAGS, "--out", "cut", "--n", "100"]
    command = [sys.executable, "-m", "vmoe.attacks.cli", str(tiny_checkpoint), *flags]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(Path().glob("cut/parts/*.npz")):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    for given, why in (
        (["--n", "4"], "cut was begun with --n: 100; this one has 4"),
        (["--seed", "7"], "seed of pgd at eps 1/255 (0.0039), run 1: 0; this one has 7"),
        (["--eps", "1"], "cut was begun with --eps: "),
        ([str(tiny_bundle)], "cut was begun with engine sha256: none"),
    ):
        said = run(*given, "--resume", "--out", "cut", code=2).stderr.strip().splitlines()[-1]
        assert why in said
        assert said.endswith("leave it as it was, or take another --out.")


def torchrun(*args: str | Path, script: Path | None = None) -> subprocess.CompletedProcess[str]:
    what = (
        ["--no-python", "--", str(BIN / "vmoe-attack")] if script is None else ["--", str(script)]
    )
    start = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*start, *what, *map(str, args)], capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.slow
def test_two_processes_say_what_one_says(
    tiny_checkpoint: Path, whole: tuple[Any, list[np.ndarray]]
) -> None:
    flags = [*FLAGS, "--out", "two", "--save-adv", "two-clips"]
    done = torchrun(tiny_checkpoint, *flags)
    assert done.returncode == 0, done.stderr
    assert_same(result_of("two", "two-clips"), whole)
    assert done.stdout.count("threat model") == 1  # one of them reports
    assert not Path("two/parts").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("difference", "why"),
    [
        ("sys.argv += ['--steps', '3']", "rank 0 was started with steps of pgd at eps"),
        ("os.kill(os.getpid(), 9)", "Signal 9"),
    ],
)
def test_a_process_that_fails_leaves_none_hanging(
    tiny_checkpoint: Path, difference: str, why: str
) -> None:
    script = Path("script.py")
    script.write_text(
        f"import os, sys\nfrom vmoe.attacks.cli import main\n"
        f"if os.environ['RANK'] == '1':\n    {difference}\nmain()\n"
    )
    done = torchrun(tiny_checkpoint, *FLAGS, "--out", "two", script=script)
    assert done.returncode != 0
    assert why in done.stderr
    assert not Path("two/report.json").exists()

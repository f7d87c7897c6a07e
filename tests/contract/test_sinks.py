"""What every sink promises: whole files, or none and one line that says why."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests import videos
from vmoe import registry
from vmoe.errors import MissingDependencyError, OutputError, SettingError, SourceError
from vmoe.runtime import sinks
from vmoe.runtime.frames import Frame, Stop
from vmoe.runtime.results import Result
from vmoe.runtime.sinks import Sink, Step, _draw, _kept, jsonl, terminal, video, window
from vmoe.runtime.smoothing import Event

FPS = 20.0


def result(number: int = 0, t_s: float = 0.3) -> Result:
    return Result(
        window=number, stream=0, source="a.mp4", epoch=0, t_first_s=t_s - 0.3, t_s=t_s,
        t_capture=1000.0, t_label=1000.0125, age_ms=12.5, frame_first=0, frame_last=6,
        gap=False, dropped=0,
        label="pan-left", score=0.75, top=(("pan-left", 0.75), ("shake", 0.2)), expert=1,
        weights=(0.25, 0.75), route_margin=0.5, route_entropy=0.562335,
        stage_ms={"decode_ms": 1.0, "prepare_ms": 0.5, "wait_ms": 0.1, "infer_ms": 10.9},
    )  # fmt: skip


def steps(count: int, times_s: list[float] | None = None) -> Iterator[Step]:
    """Yield numbered frames, with a result at every fifth."""
    for i in range(count):
        t_s = times_s[i] if times_s else i / FPS
        frame = Frame(videos.picture(i), t_s, i, 0, t_s, 1.0)
        yield Step(frame, result(i // 5, t_s) if i % 5 == 4 else None, FPS)


def feed(sink: Sink, given: Iterable[Step]) -> None:
    with sink:
        for step in given:
            sink.take(step)


@pytest.mark.parametrize("name", registry.names("vmoe.runtime.sinks"))
def test_a_sink_is_a_file_with_open(name: str) -> None:
    module = registry.load("vmoe.runtime.sinks", name, "sink")
    assert module.__doc__
    assert callable(module.open)


class Flaky:
    """A sink that fails while it is told to."""

    name, wants_frames = "flaky", False

    def __init__(self) -> None:
        self.broken, self.seen = False, 0

    def take(self, step: Step) -> None:
        if self.broken:
            raise OutputError("cannot write flaky: full.")
        self.seen += 1

    def __enter__(self) -> Flaky:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is held."""


def test_a_sink_that_fails_is_tried_again_and_what_it_misses_is_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr(_kept.time, "monotonic", lambda: now)
    monkeypatch.setattr(logging.getLogger("vmoe"), "propagate", True)
    sink = Flaky()
    kept, step = _kept.Kept(sink), Step(None, result(), FPS)
    kept.take(step)
    sink.broken = True
    for _ in range(3):  # tried once; then it is left alone for a while
        kept.take(step)
    assert (sink.seen, kept.failures, kept.missed) == (1, 1, 3)
    now += 0.6
    kept.take(step)
    assert (kept.failures, kept.missed) == (2, 4)
    sink.broken = False
    now += 0.9  # the wait has doubled
    kept.take(step)
    assert sink.seen == 1
    now += 0.2
    kept.take(step)
    assert (sink.seen, kept.failures, kept.missed) == (2, 2, 5)
    assert caplog.text.count("cannot write flaky: full. The stream goes on; flaky is tried") == 1


class Failing(Flaky):
    """A sink that fails as it is told, also when it is left; it notes how."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.left_with = error, "never"

    def take(self, step: Step) -> None:
        raise self.error

    def __exit__(self, *error: object) -> None:
        self.left_with = str(error[0])
        raise self.error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "flaky: No space left on device."),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates"), "flaky: 'utf-8' codec can't"),
        (OutputError("cannot write it."), "cannot write it."),
    ],
)
def test_whatever_a_sink_fails_with_stays_its_own(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vmoe"), "propagate", True)
    first, last = Failing(error), Failing(error)
    with contextlib.ExitStack() as stack:
        kept = [stack.enter_context(_kept.Kept(sink)) for sink in (first, last)]
        kept[0].take(Step(None, result(), FPS))
    assert (kept[0].failures, kept[0].missed, kept[1].failures) == (2, 1, 1)
    assert str(kept[1].error).startswith(said)
    assert first.left_with == last.left_with == "None"
    caplog.clear()
    with pytest.raises(ZeroDivisionError), _kept.Kept(first):
        raise ZeroDivisionError
    assert said in caplog.text  # nobody else will tell
    with pytest.raises(BrokenPipeError), _kept.Kept(Failing(BrokenPipeError())) as broken:
        broken.take(Step(None, result(), FPS))


def test_a_name_that_is_no_utf8_is_written_as_json_escapes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = dataclasses.replace(result(), source="a\udcff.mp4")
    for path in (tmp_path / "a.jsonl", None):
        feed(jsonl.open(path), [Step(None, named, FPS)])
        text = path.read_text() if path else capsys.readouterr().out
        assert json.loads(text)["source"] == named.source


def test_a_video_whose_disk_has_gone_is_an_error_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(path: Path) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(video.shutil, "disk_usage", gone)
    with pytest.raises(OutputError, match=r"cannot write .*a\.avi: Stale file handle"):
        feed(video.open(tmp_path / "a.avi"), steps(video.LOOKED_AT + 1))
    assert not list(tmp_path.iterdir())


def test_a_line_for_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    feed(terminal.open(), steps(5))
    line = capsys.readouterr().out
    assert line == "    0.20 s  pan-left      75%  expert 1 (75%)    12.5 ms  then shake 20%\n"


def test_json_lines_have_the_keys_that_are_documented(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    feed(jsonl.open(path), steps(10))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["window"] for line in lines] == [0, 1]
    assert lines[0]["top"] == [
        {"label": "pan-left", "score": 0.75},
        {"label": "shake", "score": 0.2},
    ]
    assert jsonl.__doc__ is not None
    assert all(key in jsonl.__doc__ for key in [*lines[0], *lines[0]["stage_ms"]])


def test_events_have_lines_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    event = Event("start", 3, 0, "a.mp4", "shake", 0.75, 1.0, 2.0, 1001.0, 1002.0, 4)
    feed(
        jsonl.open(path, kind=jsonl.EVENTS),
        [Step(None, result(), FPS), Step(None, result(), FPS, 0, (event, event))],
    )
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 2
    assert (lines[0]["event"], lines[0]["id"], lines[0]["label"]) == ("start", 3, "shake")
    assert jsonl.__doc__ is not None
    assert all(key in jsonl.__doc__ for key in lines[0])


def test_json_lines_on_a_full_disk_stay_whole(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write /dev/full: No space left"):
        feed(jsonl.open(Path("/dev/full"), overwrite=True), steps(5))
    path = tmp_path / "a.jsonl"
    with _SmallFiles(1000), pytest.raises(OutputError, match=r"a\.jsonl: File too large"):
        feed(jsonl.open(path), steps(50))
    text = path.read_text()
    assert text.endswith("}\n")
    assert [json.loads(line)["window"] for line in text.splitlines()] == [0]


def test_json_lines_go_on_when_there_is_room_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    given = list(steps(25))
    with jsonl.open(path) as sink:
        with _SmallFiles(1000), pytest.raises(OutputError):  # noqa: PT012
            for step in given:
                sink.take(step)
        sink.take(given[-1])
    assert [json.loads(line)["window"] for line in path.read_text().splitlines()] == [0, 4]


def test_a_video_that_failed_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = list(steps(80))
    with video.open(tmp_path / "a.avi") as sink:
        with monkeypatch.context() as full, pytest.raises(OutputError, match="full"):  # noqa: PT012
            full.setattr(video, "ROOM_BYTES", 1 << 60)
            for step in given[:70]:
                sink.take(step)
        assert list(tmp_path.iterdir()) == []
        for step in given[70:]:
            sink.take(step)
    assert len(videos.read(tmp_path / "a.avi")) == 10


def test_json_lines_begin_with_the_first_result(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for before in (None, "mine"):
        if before:
            path.write_text(before)
        with pytest.raises(SourceError), jsonl.open(path, overwrite=True) as sink:  # noqa: PT012
            for step in steps(4):
                sink.take(step)
            raise SourceError("cannot be opened")
        assert [p.read_text() for p in tmp_path.iterdir()] == [before] * bool(before)
    feed(jsonl.open(path, overwrite=True), steps(4))
    assert path.read_text() == ""  # it ended well: no window, no line


def test_json_lines_that_cannot_be_written_are_refused_before_any_frame(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write .*a\.jsonl"):
        jsonl.open(tmp_path / "file" / "a.jsonl").__enter__()


class _SmallFiles:
    """No file of this process may grow beyond a limit: what a full disk does, without one."""

    def __init__(self, limit_bytes: int) -> None:
        self._bytes = limit_bytes

    def __enter__(self) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)
        self._handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._bytes, self._before[1]))

    def __exit__(self, *error: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)
        signal.signal(signal.SIGXFSZ, self._handler)


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv"])
def test_a_saved_video_holds_every_frame_at_the_sources_rate(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    feed(video.open(path), steps(30))
    frames = videos.read(path)
    assert len(frames) == 30
    assert frames[0].shape == (384, 512, 3)  # four times as large, so that text can be read
    assert frames[0][:20, :60].mean() < frames[0][300:, :60].mean()  # the panel is dark
    assert (frames[20][:60, :200] > 240).any()  # the label is white
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


def test_a_lossless_video_shows_the_frames_themselves(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    feed(video.open(path), steps(3))
    for i, frame in enumerate(videos.read(path)):
        wanted = _draw.enlarged(videos.picture(i))[200:]
        assert np.abs(frame[200:].astype(int) - wanted).max() <= 3  # the codec stores YUV


def test_uneven_times_are_kept_by_repeating_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.avi"
    feed(video.open(path), steps(4, [0.0, 0.05, 0.30, 0.35]))
    assert len(videos.read(path)) == 8


def test_a_source_faster_than_it_says_does_not_stretch_time(tmp_path: Path) -> None:
    feed(video.open(tmp_path / "a.avi"), steps(40, [i / 40 for i in range(40)]))
    assert 20 <= len(videos.read(tmp_path / "a.avi")) <= 23  # one second at 20 per second


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv"])
def test_a_video_on_a_full_disk_leaves_nothing(tmp_path: Path, suffix: str) -> None:
    with _SmallFiles(60_000), pytest.raises(OutputError, match="is the disk full"):
        feed(video.open(tmp_path / f"a{suffix}"), steps(60))
    assert list(tmp_path.iterdir()) == []


def test_a_video_on_a_tiny_disk_that_fills_up(tmp_path: Path) -> None:
    """A real full disk, where this user may mount one."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        with pytest.raises(OutputError, match="full"):
            feed(video.open(tmp_path / "a.mkv"), steps(70))
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_source_that_broke_off_leaves_what_was_labelled(tmp_path: Path) -> None:
    for count, left in ((12, 1), (3, 0)):  # of the second nothing was labelled
        shutil.rmtree(tmp_path / "v", ignore_errors=True)
        with pytest.raises(SourceError), video.open(tmp_path / "v" / "a.avi") as sink:  # noqa: PT012
            for step in steps(count):
                sink.take(step)
            raise SourceError("breaks off")
        assert len(list((tmp_path / "v").iterdir())) == left


def test_an_error_of_ours_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), video.open(tmp_path / "a.avi") as sink:  # noqa: PT012
        for step in steps(12):
            sink.take(step)
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_refused_unless_told(tmp_path: Path) -> None:
    for module, name in ((video, "a.mp4"), (jsonl, "a.jsonl")):
        path = tmp_path / name
        path.write_text("mine")
        with pytest.raises(SettingError, match=rf"{name} exists.*--overwrite"):
            module.open(path)
        module.open(path, overwrite=True)
        assert path.read_text() == "mine"  # nothing happens before the run begins
    with pytest.raises(SettingError, match=r"cannot write '\.gif'; use \.mp4"):
        video.open(tmp_path / "a.gif")


def test_a_video_whose_name_is_no_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"caf\\udce9.* is no UTF-8"):
        video.open(tmp_path / os.fsdecode(b"caf\xe9.mkv"))


def test_no_screen_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    with pytest.raises(SettingError, match=r"no screen here \(DISPLAY is not set\). Use --save"):
        window.open(Stop())
    for display in (":9876", "localhost:999.0", "nonsense"):
        monkeypatch.setenv("DISPLAY", display)
        with pytest.raises(SettingError, match=f"'{display}' does not answer"):
            window.open(Stop())


def with_windows(folder: Path) -> dict[str, str]:
    """Return an environment whose OpenCV has windows: ours has none, another goes to a folder."""
    if re.search(r"GUI: +NONE", cv2.getBuildInformation()) is None:
        return dict(os.environ)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--target",
        str(folder),
        f"opencv-python=={version('opencv-python-headless')}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"an OpenCV with windows cannot be installed: {done.stderr.strip()[-200:]}")
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.mark.skipif(shutil.which("Xvfb") is None, reason="no Xvfb here to show a window on")
def test_a_window_shows_the_stream(tmp_path: Path) -> None:
    """In a process of its own: OpenCV keeps one window system for a process's life."""
    own = with_windows(tmp_path)
    screen = subprocess.Popen(
        ["Xvfb", "-displayfd", "1", "-nolisten", "tcp"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert screen.stdout is not None
        display = f":{screen.stdout.readline().decode().strip()}"
        code = (
            "from tests.contract.test_sinks import feed, steps\n"
            "from vmoe.runtime.frames import Stop\n"
            "from vmoe.runtime.sinks import window\n"
            "feed(window.open(Stop()), steps(8))"
        )
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=root, env={**own, "DISPLAY": display},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    finally:
        screen.terminate()
        screen.wait()
        assert screen.stdout is not None
        screen.stdout.close()


def test_windows_that_opencv_does_not_have_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise cv2.error("The function is not implemented.")

    monkeypatch.setattr(cv2, "namedWindow", refuse)
    with (
        pytest.raises(MissingDependencyError, match="pip uninstall opencv-python-headless && pip"),
        window.Screen(Stop()),
    ):
        pass


def test_long_labels_and_small_frames_can_be_drawn() -> None:
    long = sinks.Result(**{**result().__dict__, "top": (("a-very-long-label-indeed", 1.0),)})
    for height, width in ((24, 32), (360, 640), (1080, 1920)):
        drawn = _draw.annotate(np.full((height, width, 3), 128, np.uint8), long, 1.0)
        assert drawn.shape[0] >= 360
        assert drawn.std() > 5

"""vmoe-run as a user runs it: real processes, real files, an emulated camera, bad input."""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import bundles, videos
from vmoe import latest, opencv
from vmoe.clips import ClipSpec
from vmoe.data import _decode
from vmoe.runtime import load

RUN = [sys.executable, "-c", "from vmoe.runtime.cli import main; main(prog_name='vmoe-run')"]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, spec: ClipSpec) -> Path:
    return bundles.write(tmp_path_factory.mktemp("b") / "tiny", spec)


@pytest.fixture(scope="module")
def movie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return videos.write(tmp_path_factory.mktemp("v") / "movie.mp4", 60, 20.0)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(*args: object, env: dict[str, str] | None = None, **more: Any) -> Any:
        command = [*RUN, *map(str, args)]
        environment = {**os.environ, **(env or {})}
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
            env=environment,
            **more,
        )

    return run


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def refused(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    """Check an exit code and that the last line of stderr says why, with no traceback."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("vmoe-run: ")
    assert all(part in last for part in parts), last


# --- what works ---------------------------------------------------------------------------------


def test_a_file_to_json_lines_video_and_report(
    run: Run, bundle: Path, movie: Path, tmp_path: Path
) -> None:
    done = run(
        bundle, "--source", movie, "--json", "--jsonl", "a.jsonl", "--save", "a.mkv", "--hop", 0.5,
        "--top", 2, "--threads", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    got = lines_of(done.stdout)
    assert [line["t_s"] for line in got] == [0.3, 0.8, 1.3, 1.8, 2.3, 2.8]
    assert [len(line["top"]) for line in got] == [2] * 6
    assert (tmp_path / "a.jsonl").read_text() == done.stdout
    assert len(videos.read(tmp_path / "a.mkv")) == 60
    for said in (
        "bundle: ",
        "60 in 2.95 s",
        "6 labelled",
        "p50/p95/p99",
        "experts: ",
        "next: vmoe-",
    ):
        assert said in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "a.mkv"]


def test_lines_for_a_person(run: Run, bundle: Path, movie: Path) -> None:
    done = run(bundle, "--source", movie, "-q")
    assert done.returncode == 0
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 14
    assert "expert" in done.stdout.splitlines()[0]


def test_the_newest_bundle_under_runs_is_taken(
    run: Run, bundle: Path, movie: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundle, tmp_path / "runs" / "b")
    done = run("--source", movie)
    assert done.returncode == 0
    assert done.stderr.splitlines()[0] == "bundle: runs/b (the newest under runs/)"


def test_the_pattern_needs_nothing(run: Run, bundle: Path) -> None:
    done = run(bundle, "--source", "test", "--duration", 1, "--json", "--stats-every", 0.2)
    assert done.returncode == 0, done.stderr
    assert len(lines_of(done.stdout)) >= 2
    assert done.stderr.count("windows: ") >= 2


def test_frames_on_stdin(run: Run, bundle: Path, tmp_path: Path) -> None:
    path = videos.write(tmp_path / "a.ts", 60, 20.0)
    with path.open("rb") as given:
        done = run(bundle, "--source", "-", "--json", stdin=given)
    assert done.returncode == 0, done.stderr
    assert len(lines_of(done.stdout)) == 14
    (tmp_path / "a.rgb").write_bytes(b"".join(videos.picture(i).tobytes() for i in range(20)))
    args = (bundle, "--source", "-", "--raw", "128x96", "--fps", 20, "--json")
    with (tmp_path / "a.rgb").open("rb") as given:
        done = run(*args, stdin=given)
    assert done.returncode == 0, done.stderr
    assert [line["t_s"] for line in lines_of(done.stdout)] == [0.3, 0.5, 0.7, 0.9]


def test_several_sources_one_of_them_lost(
    run: Run, bundle: Path, movie: Path, tmp_path: Path
) -> None:
    (tmp_path / "cameras.txt").write_text(
        f"# two of them\n{movie}\n\nrtsp://me:sesame@127.0.0.1:1/x\n"
    )
    done = run(
        bundle, "--source", movie, "--list", "cameras.txt", "--reconnect", 1, "--json", "--save",
        "a.avi", "--events", "e.jsonl", "--threshold", 0, "--min-event", 0,
    )  # fmt: skip
    refused(done, 4, "1 of 3 sources were lost: rtsp://me:***@127.0.0.1:1/x: 127.0.0.1 port 1")
    got = lines_of(done.stdout)
    assert sorted({line["stream"] for line in got}) == [0, 1]
    assert len(got) == 28
    assert "sesame" not in done.stdout + done.stderr
    assert f"{movie}: 60 frames, 0 dropped; 14 windows" in done.stderr
    assert len(videos.read(tmp_path / "a-0.avi")) == len(videos.read(tmp_path / "a-1.avi")) == 60
    events = lines_of((tmp_path / "e.jsonl").read_text())
    assert [e["event"] for e in events if e["stream"] == 0][:: len(events) // 2 - 1] == [
        "start",
        "end",
    ]


def test_a_replay_gives_the_labels_of_offline_evaluation(run: Run, tmp_path: Path) -> None:
    """The offline side is what trains and attacks: vmoe.data's clips, all in one batch."""
    cv2 = opencv.quiet()
    fourcc = cv2.VideoWriter_fourcc(*"FFV1")
    writer = cv2.VideoWriter(str(tmp_path / "a.mkv"), cv2.CAP_FFMPEG, fourcc, 15.0, (160, 120))
    noise = np.random.default_rng(0).integers(0, 256, (30, 90, 3), dtype=np.uint8)
    scene = cv2.resize(noise, (720, 240), interpolation=cv2.INTER_CUBIC)
    for number in range(45):  # first the camera stands still, then it pans
        left = 8 * max(0, number - 20)
        writer.write(np.ascontiguousarray(scene[60:180, left : left + 160]))
    writer.release()
    done = run(latest.shipped(), "--replay", "a.mkv", "--hop", "0.05", "--json")
    assert done.returncode == 0, done.stderr
    got = lines_of(done.stdout)
    with load(latest.shipped()) as engine:
        path, spec = tmp_path / "a.mkv", engine.bundle.spec
        every, _ = _decode.cut(_decode.timestamps(path), spec)
        clips = every[1:]  # live, the first window is a whole window after the first frame
        offline = engine.infer(np.stack([_decode.decode(path, clip, spec) for clip in clips]))
        labels = [engine.bundle.labels[i] for i in offline.logits.argmax(axis=1)]
    assert [line["frame_last"] for line in got] == [int(clip[-1]) for clip in clips]
    assert [line["frame_first"] for line in got] == [int(clip[0]) for clip in clips]
    assert [line["label"] for line in got] == labels
    assert [line["expert"] for line in got] == offline.route.tolist()
    assert len(set(labels)) > 1
    assert all(line["t_capture"] == line["t_s"] for line in got)  # the file's own clock


def test_a_file_in_a_loop(run: Run, bundle: Path, movie: Path) -> None:
    done = run(bundle, "--source", movie, "--loop", "--duration", 7, "--json")
    assert done.returncode == 0
    got = lines_of(done.stdout)
    assert sorted({line["epoch"] for line in got}) == [0, 1, 2]
    assert [line["gap"] for line in got].count(True) == 2


def test_help_has_examples_that_can_be_pasted(run: Run) -> None:
    done = run("--help")
    assert done.returncode == 0
    assert done.stdout.count("\n    vmoe-run ") >= 3


def test_starting_up_never_imports_torch_or_onnx(bundle: Path, movie: Path) -> None:
    code = (
        "import sys; from vmoe.runtime.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "bad = {'torch', 'onnx', 'skimage', 'scipy', 'pandas'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    args = [str(bundle), "--source", "test", "--duration", "0.5", "-q"]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_room_is_cheap() -> None:
    code = "import sys, vmoe.runtime; sys.exit(any(m in sys.modules for m in ('cv2', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_whole_files(bundle: Path, tmp_path: Path, number: int) -> None:
    command = [*RUN, str(bundle), "--source", "test", "--save", "a.mp4", "--jsonl", "a.jsonl"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(2):
        process.stdout.readline()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert len(lines_of((tmp_path / "a.jsonl").read_text())) == 2 + len(out.splitlines())
    assert len(videos.read(tmp_path / "a.mp4")) > 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "a.mp4"]


READY = """
import sys
from vmoe.runtime.cli import main
print("ready", flush=True)
try:
    main(prog_name="vmoe-run")
except KeyboardInterrupt:  # as the command's door does
    sys.exit(0)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay_s", [0.03, 0.1, 0.3, 1.0])
def test_a_signal_while_it_starts_ends_it_too(
    bundle: Path, tmp_path: Path, number: int, delay_s: float
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", READY, str(bundle), "--source", "test"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(delay_s)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "Aborted" not in err


def test_nothing_heavy_is_loaded_before_signals_are_heard() -> None:
    code = "import sys, vmoe.runtime.cli; sys.exit(any(m in sys.modules for m in ('cv2', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def next_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the words of the command that a run names at its end."""
    assert done.returncode == 0, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("next: ")
    return shlex.split(last.removeprefix("next: "))


def test_the_next_command_has_the_flags_of_this_one(run: Run, bundle: Path, tmp_path: Path) -> None:
    slow = videos.write(tmp_path / "it's slow.avi", 12, 2.5)
    (tmp_path / "labelled.mp4").write_text("mine")
    flags = ["--sampling", "nearest", "--hop", "0.5", "--top", "2", "--threads", "1"]
    command = next_of(run(bundle, "--source", slow.name, *flags, "--jsonl", "a.jsonl"))
    assert command[:2] == ["vmoe-run", str(bundle)]
    assert command[-2:] == ["--save", "labelled2.mp4"]
    assert set(command[2:-2]) == {"--source", slow.name, *flags}
    assert next_of(run(*command[1:])) == ["vmoe-bench", str(bundle), "--threads", "1"]
    command = next_of(run(bundle, "--source", "test", "--duration", 0.6, "--seed", 3))
    assert command[2:-2] == ["--duration", "0.6", "--source", "test", "--seed", "3"]


def test_a_reader_that_leaves_is_no_error(bundle: Path, movie: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*RUN, str(bundle), "--source", str(movie), "--loop", "--save", "a.avi"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=30) == 0
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    assert videos.read(tmp_path / "a.avi")


# --- bad input ----------------------------------------------------------------------------------


def test_sources_that_cannot_be_opened(run: Run, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "garbage.mp4").write_bytes(os.urandom(9000))
    (tmp_path / "old.jsonl").write_text("mine")
    (tmp_path / "1000").write_bytes(b"a file")
    for source, why in (
        ("missing.mp4", "missing.mp4: No such file or directory"),
        ("garbage.mp4", "garbage.mp4 is no video that can be decoded"),
        (".", ". is a folder and holds no pictures"),
        ("gopher://me:sesame@nowhere", "source 'gopher://me:***@nowhere': cannot read this kind"),
        ("rtsp://me:sesame@127.0.0.1:1/x", "rtsp://me:***@127.0.0.1:1/x: 127.0.0.1 port 1: Conn"),
    ):
        done = run(bundle, "--source", source, "--save", "a.mp4", "--jsonl", "a.jsonl")
        refused(done, 4, why)
        assert done.stdout == ""
    refused(run(bundle, "--source", "garbage.mp4", "--jsonl", "old.jsonl", "--overwrite"), 4)
    assert (tmp_path / "old.jsonl").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1000", "garbage.mp4", "old.jsonl"]
    refused(run(bundle, "--camera", 1000), 2, "--camera is 1000; it must be at most 999")


def test_what_is_read_is_never_written(run: Run, bundle: Path, movie: Path, tmp_path: Path) -> None:
    shutil.copy(movie, tmp_path / "a.mp4")
    (tmp_path / "link.mp4").symlink_to("a.mp4")
    (tmp_path / "hard.mp4").hardlink_to(tmp_path / "a.mp4")
    (tmp_path / "d").mkdir()
    for source, flag, name in (
        ("a.mp4", "--jsonl", "a.mp4"),
        ("a.mp4", "--save", "d/../a.mp4"),
        ("link.mp4", "--save", "a.mp4"),
        (tmp_path / "a.mp4", "--save", "link.mp4"),
        ("a.mp4", "--jsonl", "hard.mp4"),
    ):
        done = run(bundle, "--source", source, flag, name, "--overwrite")
        refused(done, 2, f"--source and {flag} are one file ({name})")
    args = ("--save", "o.mkv", "--jsonl", "d/../o.mkv")
    refused(run(bundle, "--source", "a.mp4", *args), 2, "--save and --jsonl are one file")
    shutil.copy(movie, tmp_path / "o-1.mp4")
    two = ("--source", "o-1.mp4", "--source", "test", "--save", "o.mp4", "--overwrite")
    refused(run(bundle, *two), 2, "--source and --save are one file (o-1.mp4)")
    (tmp_path / "l.txt").write_text("a.mp4\n")
    args = ("--list", "l.txt", "--csv", "l.txt", "--overwrite")
    refused(run(bundle, *args), 2, "--list and --csv are one file (l.txt)")
    refused(run(bundle, "--replay", "rtsp://u:ses/ame@cam/1"), 2, "--replay is rtsp://u:***@cam/1;")
    assert (tmp_path / "a.mp4").read_bytes() == movie.read_bytes()
    assert not (tmp_path / "o.mkv").exists()


def test_a_name_that_is_no_utf8(run: Run, bundle: Path, movie: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.mkv")
    shutil.copy(movie, tmp_path / name)
    refused(run(bundle, "--source", name), 4, "is no UTF-8", "rename it")
    refused(run(bundle, "--source", movie, "--save", name, "--overwrite"), 2, "is no UTF-8")


@pytest.mark.skipif(Path("/dev/video0").exists(), reason="this machine has a camera")
def test_no_camera(run: Run, bundle: Path) -> None:
    for args in ((), ("--camera", 0)):
        done = run(bundle, *args)
        refused(done, 4, "camera 0: /dev/video0 does not exist")
        assert len(done.stderr.splitlines()) == 1


def test_a_video_cut_in_the_middle(run: Run, bundle: Path, movie: Path, tmp_path: Path) -> None:
    cut = videos.cut(shutil.copy(movie, tmp_path / "a.mp4"), 0.6)
    done = run(bundle, "--source", cut, "--json", "--save", "out.mkv")
    refused(done, 4, "breaks off", "of 60 frames could be read")
    got = lines_of(done.stdout)
    assert len(got) > 3
    assert len(videos.read(tmp_path / "out.mkv")) > got[-1]["frame_last"]


def test_bundles_that_are_none(run: Run, bundle: Path, movie: Path, tmp_path: Path) -> None:
    def broken(change: Callable[[Path], object]) -> Path:
        path = tmp_path / "b"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(bundle, path)
        change(path)
        return path

    def edit(old: str, new: str) -> Callable[[Path], object]:
        def change(path: Path) -> None:
            text = (path / "vmoe.json").read_text()
            assert old in text
            (path / "vmoe.json").write_text(text.replace(old, new))

        return change

    def flip(path: Path) -> None:
        data = bytearray((path / "expert1.onnx").read_bytes())
        data[50] ^= 1
        (path / "expert1.onnx").write_bytes(data)

    for change, *why in (
        (lambda path: (path / "expert1.onnx").unlink(), "expert1.onnx is missing"),
        (flip, "expert1.onnx has changed since export"),
        (edit('"schema_version": 1', '"schema_version": 7'), "schema version 7", "reads 1"),
        (
            edit('"expert1.onnx"', '"../expert1.onnx"'),
            "'../expert1.onnx' leaves the bundle's folder",
        ),
        (edit('"expert1": {', '"expert7": {'), "lacks part 'expert1'"),
        (edit('"labels"', '"lables"'), "vmoe.json is damaged", "'labels' is missing"),
    ):
        done = run(broken(change), "--source", movie)
        refused(done, 1, *why)
        assert len(done.stderr.splitlines()) == 1
    refused(run(movie, "--source", movie), 1, "is no folder: not a bundle")
    refused(run(tmp_path, "--source", movie), 1, "holds no vmoe.json: not a bundle")
    refused(run(tmp_path / "no", "--source", movie), 1, "not a bundle")


@pytest.mark.parametrize(
    ("watched", "said"),
    [
        ("a b.mp4", "a b.mp4 is no folder: not a bundle. To watch it: vmoe-run --source 'a b.mp4'"),
        ("rtsp://me:sesame@cam/1", "To watch it: vmoe-run --source 'rtsp://me:***@cam/1'"),
        ("test", "test is no folder: not a bundle. To watch it: vmoe-run --source test"),
        ("no", "no does not exist: not a bundle"),
    ],
)
def test_a_source_in_the_bundle_s_place_is_told_from_a_camera_that_is_not_there(
    run: Run, tmp_path: Path, watched: str, said: str
) -> None:
    (tmp_path / "a b.mp4").touch()
    refused(run(watched), 1, said)


def test_settings_that_cannot_be_used(run: Run, bundle: Path, movie: Path, tmp_path: Path) -> None:
    (tmp_path / "there.mp4").write_text("mine")
    for args, why in (
        (("--top", -1), "--top is -1; it must be at least 1"),
        (("--hop", 0), "--hop is 0.0; it must be above 0"),
        (("--backend", "onnxruntme"), "did you mean 'onnxruntime'?"),
        (("--device", "gpu"), "--device is 'gpu'; it is auto, cpu or cuda:N"),
        (("--read-timeout", 1e9), "--read-timeout is 1000000000.0; it must be at most 3600"),
        (("--camera", 0), "--camera and --source exclude each other"),
        (("--replay", "a.mp4"), "--source and --replay exclude each other"),
        (("--list", "no.txt"), "cannot read --list no.txt: No such file or directory"),
        (("--list", "/dev/null"), "--list /dev/null names no source"),
        (("--source", "-", "--source", "-"), "--source - is given twice"),
        (("--guard-profile", "g.json"), "--guard-profile does nothing without --guard monitor or"),
        (("--on-alarm", "vote"), "--on-alarm does nothing without --guard enforce"),
        (
            ("--guard", "monitor", "--vote-share", 0.5),
            "--vote-share does nothing without --guard e",
        ),
        (("--guard", "enforce", "--vote-share", 0.5), "--vote-share does nothing without --on-al"),
        (("--guard-filter", "jpeg"), "--guard-filter does nothing without --guard-calibrate"),
        (("--guard", "monitor", "--guard-calibrate", "g"), "calibrate exclude each other"),
        (("--raw", "640"), "--raw is '640'; it is WIDTHxHEIGHT, such as 640x480"),
        (("--save", "there.mp4"), "there.mp4 exists. Choose another --save, or say --overwrite"),
        (("--save", "a.gif"), "cannot write '.gif'"),
    ):
        done = run(bundle, "--source", movie, *args)
        refused(done, 2, why)
        assert len(done.stderr.splitlines()) == 1
    assert (tmp_path / "there.mp4").read_text() == "mine"
    assert run(bundle, "--source", movie, "--sampling", "fast").returncode == 2
    assert run(bundle, "--source", movie, "--save", "there.mp4", "--overwrite").returncode == 0
    assert len(videos.read(tmp_path / "there.mp4")) == 60


def test_a_full_disk(run: Run, bundle: Path, movie: Path, tmp_path: Path) -> None:
    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = run(bundle, "--source", movie, "--save", "a.avi", preexec_fn=small_files)
    refused(done, 1, "cannot write a.avi", "Nothing was left half-written")
    assert list(tmp_path.iterdir()) == []
    done = run(bundle, "--source", movie, "--jsonl", "/dev/full", "--json")
    refused(done, 1, "not written: /dev/full 14. cannot write /dev/full: No space left on device")
    assert len(lines_of(done.stdout)) == 14  # the others go on


# --- real streams -------------------------------------------------------------------------------

STREAMS = {  # frames, and the time between two in milliseconds
    "bottle-detection.mp4": (1189, 34),
    "car-detection.mp4": (377, 80),
    "one-by-one-person-detection.mp4": (1394, 100),
    "tree.avi": (68, 400),
    "vtest.avi": (795, 100),
    "walk.mkv": (89, 33),
}


@pytest.mark.parametrize("name", sorted(STREAMS))
def test_real_streams(run: Run, bundle: Path, real_data: Path, name: str) -> None:
    frames, between_ms = STREAMS[name]
    args = (bundle, "--source", real_data / "streams" / name, "--json", "--hop", 1)
    done = run(*args)
    if between_ms > 100:
        refused(done, 4, "has a frame every 4", "wants one every 100 ms", "--sampling nearest")
        done = run(*args, "--sampling", "nearest")
    assert done.returncode == 0, done.stderr
    assert f"frames: {frames} in" in done.stderr
    assert "0 incomplete" in done.stderr
    got = lines_of(done.stdout)
    assert len(got) >= 3
    assert not any(line["gap"] for line in got)


def test_streams_too_slow_for_a_finer_model(run: Run, real_data: Path, tmp_path: Path) -> None:
    finer = ClipSpec(frames=4, spacing_s=0.05, height=32, width=32)
    path = bundles.write(tmp_path / "fine", finer)
    args = (path, "--source", real_data / "streams" / "vtest.avi", "--duration", 5)
    refused(run(*args), 4, "has a frame every 100 ms; this model wants one every 50 ms")
    assert run(*args, "--sampling", "nearest").returncode == 0


# --- a camera, through OpenCV's real V4L2 code --------------------------------------------------


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Compile the V4L2 emulation; return the environment that puts a /dev/video0 there."""
    if shutil.which("gcc") is None or sys.platform != "linux":
        pytest.skip("no gcc here to compile the emulated camera with")
    library = tmp_path_factory.mktemp("v4l2") / "emulation.so"
    source = Path(__file__).with_name("v4l2_emulation.c")
    command = ["gcc", "-shared", "-fPIC", "-O1", "-w", "-o", library, source, "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return {"LD_PRELOAD": str(library), "VCAM_W": "160", "VCAM_H": "120", "VCAM_FPS": "30"}


def test_a_camera(run: Run, bundle: Path, emulation: dict[str, str]) -> None:
    done = run(bundle, "--camera", 0, "--duration", 1.5, "--json", env=emulation)
    assert done.returncode == 0, done.stderr
    got = lines_of(done.stdout)
    assert len(got) >= 4
    assert all(line["source"] == "camera 0" and line["epoch"] == 0 for line in got)
    assert all(0 <= line["t_first_s"] < line["t_s"] < 2 for line in got)
    assert all(abs(line["t_s"] - line["t_first_s"] - 0.3) <= 0.051 for line in got)


def test_a_camera_that_is_unplugged(run: Run, bundle: Path, emulation: dict[str, str]) -> None:
    env = {**emulation, "VCAM_UNPLUG_AFTER": "20"}
    refused(run(bundle, "--reconnect", 0, env=env), 4, "camera 0 was lost after", "--reconnect")
    done = run(bundle, "--duration", 2.5, "--json", env=env)
    assert done.returncode == 0, done.stderr
    got = lines_of(done.stdout)
    assert len({line["epoch"] for line in got}) >= 2
    assert [line["gap"] for line in got].count(True) == len({line["epoch"] for line in got}) - 1
    assert "Reopening it" in done.stderr


READ = """
import sys
from tests import videos
from vmoe.runtime import sources
from vmoe.runtime.frames import Stop
stop = Stop()
for number, frame in enumerate(sources.open("0").frames(stop)):
    print(frame.epoch, videos.number_of(frame.pixels), frame.t_s)
    if number == 49:
        stop.ask()
"""


def test_frames_of_a_camera_that_was_unplugged_are_known_by_their_pixels(
    emulation: dict[str, str], tmp_path: Path
) -> None:
    raw = tmp_path / "numbers.yuyv"
    grey = np.stack([videos.picture(i)[..., 0] for i in range(30)])
    raw.write_bytes(np.stack([grey, np.full_like(grey, 128)], axis=-1).tobytes())
    env = {**os.environ, **emulation, "VCAM_RAW": str(raw), "VCAM_UNPLUG_AFTER": "20",
           "VCAM_W": str(videos.SIZE[1]), "VCAM_H": str(videos.SIZE[0])}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", READ], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = [line.split() for line in done.stdout.splitlines()]
    assert len(got) == 50
    for epoch in range(3):  # each connection begins anew (OpenCV drops the first), and skips none
        numbers = [int(number) for of, number, _ in got if int(of) == epoch]
        assert numbers == list(range(1, 1 + len(numbers)))
    times = [float(t_s) for _, _, t_s in got]
    assert times == sorted(times)


def test_a_camera_that_stalls(run: Run, bundle: Path, emulation: dict[str, str]) -> None:
    env = {**emulation, "VCAM_STALL_AFTER": "20"}
    began = time.monotonic()
    done = run(bundle, "--reconnect", 0, "--read-timeout", 1, env=env)
    refused(done, 4, "camera 0 was lost after")
    assert time.monotonic() - began < 20  # it does not hang

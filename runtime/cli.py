"""vmoe-run: a bundle watches a stream."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vmoe import cli, latest
from vmoe.errors import SettingError
from vmoe.settings import Settings, opt

from . import addresses
from .frames import Stop

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .sinks import Sink
    from .sources import Source

log = logging.getLogger("vmoe")


@dataclass(frozen=True)
class RunSettings(Settings):
    """The flags of vmoe-run."""

    camera: int | None = opt(
        None, "a camera of this machine, by its number", at_least=0, at_most=999
    )
    source: str | None = opt(None, "a video file, a folder or glob of pictures, a camera (0, "
                             "/dev/video0), rtsp:, http:, udp:, - (stdin), or test")  # fmt: skip
    backend: str = opt("auto", "what runs the graphs: auto, onnxruntime, openvino or torch")
    device: str = opt("auto", "auto, cpu or cuda:N")
    threads: int | None = opt(None, "CPU threads of the engine; its own choice if not given",
                              at_least=1)  # fmt: skip
    cache: bool = opt(
        True, "keep large graphs as optimised for this CPU in the user's cache folder"
    )
    hop: float | None = opt(None, "seconds between two windows; half a window if not given, of "
                            "a bundle in the online form one frame", above=0)  # fmt: skip
    sampling: str = opt("exact", "exact refuses sources slower than the model's frame spacing; "
                        "nearest repeats frames", choices=("exact", "nearest"))  # fmt: skip
    top: int = opt(3, "how many labels to list", at_least=1)
    save: Path | None = opt(None, "write the annotated video: .mp4, .avi or .mkv (lossless)")
    jsonl: Path | None = opt(None, "write one JSON object per window to a file")
    duration: float | None = opt(None, "stop after so many seconds of the stream", above=0)
    loop: bool = opt(False, "start a file again when it ends")
    stats_every: float | None = opt(None, "print counts every so many seconds", above=0)
    reconnect: int = opt(60, "tries to reopen a live source that was lost, about one a second",
                         at_least=0)  # fmt: skip
    read_timeout: float = opt(3.0, "seconds of silence after which a live source is lost",
                              above=0, at_most=3600)  # fmt: skip
    rtsp_transport: str = opt("tcp", "what RTSP streams come by", choices=("tcp", "udp"))
    fps: float = opt(10.0, "frames per second of pictures and of --raw frames", above=0,
                     at_most=1000)  # fmt: skip
    raw: str | None = opt(None, "stdin holds raw RGB frames of this size, such as 640x480")
    show: bool = opt(False, "show the annotated stream in a window; q ends it")
    overwrite: bool = opt(False, "replace the files of --save and --jsonl")
    seed: int = opt(0, "seed of --source test", at_least=0)


@cli.command(
    "vmoe-run",
    "vmoe-run --camera 0",
    "vmoe-run --source street.mp4 --save labelled.mp4 --jsonl labels.jsonl",
    "vmoe-run --source rtsp://user:password@camera.local/stream1 --jsonl labels.jsonl",
    "vmoe-run runs/bundle --source test --duration 10 --json | jq .label",
)
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@cli.options(RunSettings)
@click.option("--json", "as_json", is_flag=True, help="JSON lines on stdout; all else on stderr.")
@cli.config_option
@click.pass_obj
def command(
    stop: Stop, /, bundle: Path | None, as_json: bool, config: Path | None, **flags: Any
) -> None:
    """Label what a camera or a video shows, window by window, until it ends or Ctrl-C.

    BUNDLE is a folder that vmoe-export wrote; the newest under runs/ if not given, else the one
    that ships. Without --camera or --source it watches camera 0. A camera is served live: the
    newest frame wins, and every drop is counted. Of a file nothing is dropped.
    """
    settings = cli.resolve(RunSettings, flags, config)
    if settings.camera is not None and settings.source is not None:
        raise SettingError("--camera and --source exclude each other; give one.")
    _run(bundle, settings, as_json=as_json, stop=stop)


def main(args: Sequence[str] | None = None, prog_name: str | None = None) -> None:
    """Run the command; from here on, before it loads anything, a signal ends it in order."""
    stop = Stop()
    with _ends_on_signals(stop):
        command.main(args, prog_name, obj=stop)


def _run(named: Path | None, settings: RunSettings, *, as_json: bool, stop: Stop) -> None:
    _refuse_one_file(settings)
    sinks = _sinks(settings, as_json=as_json, stop=stop)
    path, said = latest.bundle(named)
    from . import engine as engines
    from .pipeline import Pipeline

    source = _source(settings)
    cache = cli.cache_folder() if settings.cache else None
    with engines.load(
        path, settings.backend, settings.device, settings.threads, cache=cache
    ) as engine:
        pipeline = Pipeline(
            engine,
            source,
            hop_s=settings.hop,
            sampling=settings.sampling,
            top=settings.top,
            duration_s=settings.duration,
            stop=stop,
        )
        spec, model = engine.bundle.spec, engine.bundle.model.get("name", "model")
        seen = f"{spec.frames} frames over {spec.window_s:.2f} s, every {pipeline.hop_s:.2f} s"
        seen += ", frame by frame" if pipeline.online else ""
        log.info("%s", said)
        log.info("source: %s; %s on %s sees %s.", source.name, model, engine.backend_name, seen)
        try:
            _watch(pipeline, sinks, settings.stats_every)
        finally:
            if pipeline.tally.windows or sys.exc_info()[0] is None:
                log.info("\n".join(pipeline.tally.lines()))
    if not pipeline.tally.windows:
        log.warning("no window: one needs frames over %.2f s, or was too irregular.", spec.window_s)
    log.info("next: %s", _next_command(path, settings, live=source.live))


def _source(settings: RunSettings) -> Source:
    from . import sources
    from .sources import camera

    how = sources.SourceSettings(
        loop=settings.loop,
        reconnect=settings.reconnect,
        read_timeout_s=settings.read_timeout,
        rtsp_transport=settings.rtsp_transport,
        fps=settings.fps,
        raw=_size(settings.raw),
        seed=settings.seed,
    )
    if settings.source is None:
        return camera.open(str(settings.camera or 0), how)
    return sources.open(settings.source, how)


def _size(text: str | None) -> tuple[int, int] | None:
    """Return the width and height that --raw names."""
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not found:
        raise SettingError(f"--raw is {text!r}; it is WIDTHxHEIGHT, such as 640x480.")
    return int(found[1]), int(found[2])


def _watch(pipeline: Pipeline, sinks: list[Sink], stats_every_s: float | None) -> None:
    """Run to the end; the sinks say the results, and counts come between them."""
    due_s = time.monotonic() + (stats_every_s or 0)
    for _ in pipeline.results(sinks):
        if stats_every_s and time.monotonic() >= due_s:
            due_s += stats_every_s
            log.info("\n".join(pipeline.tally.lines()))


def _refuse_one_file(settings: RunSettings) -> None:
    """Refuse to write over what is read, or two results into one file."""
    source = Path(settings.source) if settings.source is not None else None
    named = {"--source": source, "--save": settings.save, "--jsonl": settings.jsonl}
    files = [(flag, path) for flag, path in named.items() if path is not None]
    for (first, one), (second, other) in itertools.combinations(files, 2):
        same = os.path.realpath(one) == os.path.realpath(other)
        with contextlib.suppress(OSError):  # what is not there is no other's link
            same = same or one.samefile(other)
        if same:
            raise SettingError(f"{first} and {second} are one file ({other}); name another.")


def _sinks(settings: RunSettings, *, as_json: bool, stop: Stop) -> list[Sink]:
    """Make the sinks; what exists already or cannot be is refused here, before any work."""
    from .sinks import jsonl, terminal

    sinks: list[Sink] = [jsonl.open(None) if as_json else terminal.open()]
    if settings.jsonl is not None:
        sinks.append(jsonl.open(settings.jsonl, overwrite=settings.overwrite))
    if settings.save is not None:
        from .sinks import video

        sinks.append(video.open(settings.save, overwrite=settings.overwrite))
    if settings.show:
        from .sinks import window

        sinks.append(window.open(stop))
    return sinks


@contextlib.contextmanager
def _ends_on_signals(stop: Stop) -> Iterator[None]:
    """Let SIGINT and SIGTERM end the run in order; a second one ends it at once."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: object) -> None:
        stop.ask()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


OUTPUTS = {"save", "jsonl", "show", "overwrite"}
SHARED = {"backend", "device", "threads"}  # flags of vmoe-bench too
NEXT_S = 20.0  # how long the next command watches what has no end


def _next_command(bundle: Path, settings: RunSettings, *, live: bool) -> str:
    """Return the command that most would type next, with the flags of this one."""
    names = {field.name for field in dataclasses.fields(settings)}
    if settings.save is not None:
        return shlex.join(["vmoe-bench", str(bundle), *_given(settings, SHARED)])
    words = ["vmoe-run", str(bundle), *_given(settings, names - OUTPUTS)]
    if settings.source is None and settings.camera is None:
        words += ["--camera", "0"]
    if settings.duration is None and (live or settings.loop):
        words += ["--duration", f"{NEXT_S:g}"]
    free = (f"labelled{number}.mp4" for number in itertools.chain([""], itertools.count(2)))
    return shlex.join([*words, "--save", next(name for name in free if not Path(name).exists())])


def _given(settings: RunSettings, names: Container[str]) -> list[str]:
    """Return the flags of these names that differ from their defaults."""
    words: list[str] = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in names and value != field.default:
            words.append("--" + field.name.replace("_", "-"))
            words += [] if value is True else [addresses.shown(str(value))]
    return words

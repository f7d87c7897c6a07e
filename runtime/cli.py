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
from vmoe.settings import opt

from . import addresses, misplaced, topics
from .frames import Stop
from .settings import StreamSettings

if TYPE_CHECKING:
    from .engine import Engine
    from .pipeline import Pipeline
    from .sinks import Sink
    from .sources import Source

log = logging.getLogger("vmoe")


@dataclass(frozen=True)
class RunSettings(StreamSettings):
    """The flags of vmoe-run: those of its streams, and what is read and written."""

    camera: int | None = opt(
        None, "a camera of this machine, by its number", at_least=0, at_most=999
    )
    source: tuple[str, ...] = opt((), "a video file, a folder or glob of pictures, a camera (0, "
                                  "/dev/video0), rtsp:, http:, udp:, - (stdin), or test",
                                  repeat=True)  # fmt: skip
    list: Path | None = opt(None, "a file that names sources, one a line; # begins a comment")
    replay: Path | None = opt(None, "a video file by the live path, on the file's own clock, "
                              "with nothing dropped: the labels of offline evaluation")  # fmt: skip
    backend: str = opt("auto", "what runs the graphs: auto, onnxruntime, openvino, torch or triton")
    server: str | None = opt(None, "HOST:PORT (HTTP) or grpc://HOST:PORT of a Triton server that "
                             "has the bundle: backend triton")  # fmt: skip
    device: str = opt("auto", "auto, cpu or cuda:N")
    threads: int | None = opt(None, "CPU threads of the engine; if not given, what decoding the "
                              "sources leaves", at_least=1)  # fmt: skip
    cache: bool = opt(
        True, "keep large graphs as optimised for this CPU in the user's cache folder"
    )
    trust: bool = opt(False, "load TensorRT plans that were not built here: they are code")
    save: Path | None = opt(None, "write the annotated video: .mp4, .avi or .mkv (lossless); of "
                            "several sources one file each, with their numbers")  # fmt: skip
    jsonl: Path | None = opt(None, "write one JSON object per window to a file")
    events: Path | None = opt(None, "write one JSON object per start, update and end of an event")
    csv: Path | None = opt(None, "write one row per window to a file")
    mqtt: str | None = opt(None, "publish results and events to mqtt://USER:PASSWORD@HOST/TOPIC")
    webhook: str | None = opt(None, "POST every start and end of an event to an address")
    guard_calibrate: Path | None = opt(None, "write a guard's profile of clean sources")
    guard_filter: str = opt("off", "of --guard-calibrate: a second look at a filtered clip, for "
                            "the filter and one more run of the expert",
                            choices=("off", "median", "jpeg", "bilateral"))  # fmt: skip
    false_alarms: float = opt(0.01, "of --guard-calibrate: share of clean windows that may raise "
                              "an alarm", above=0, at_most=0.5)  # fmt: skip
    page: str | None = opt(None, "serve the live page at HOST:PORT; alone: 127.0.0.1:8080",
                           bare="127.0.0.1:8080")  # fmt: skip
    metrics: str | None = opt(None, "serve /metrics and /healthz alone; alone: 127.0.0.1:9109",
                              bare="127.0.0.1:9109")  # fmt: skip
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
    overwrite: bool = opt(False, "replace the files of --save, --jsonl, --events and --csv")
    seed: int = opt(0, "seed of --source test", at_least=0)

    def __post_init__(self) -> None:
        """Check every value; refuse what has no effect."""
        super().__post_init__()
        calibrates = self.guard_calibrate is not None
        self._needs("--guard-calibrate", calibrates, "guard_filter", "false_alarms")
        if calibrates and self.guard != "off":
            raise SettingError(
                f"--guard {self.guard} and --guard-calibrate exclude each other: calibrate first."
            )


@cli.command(
    "vmoe-run",
    "vmoe-run --camera 0",
    "vmoe-run --source street.mp4 --save labelled.mp4 --jsonl labels.jsonl",
    "vmoe-run --source rtsp://user:password@camera.local/stream1 --page",
    "vmoe-run runs/bundle --source test --duration 10 --json | jq .label",
    topics=topics.RUN,
)
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@cli.options(RunSettings)
@click.option("--json", "as_json", is_flag=True, help="JSON lines on stdout; all else on stderr.")
@cli.config_option
@click.pass_obj
def command(
    stop: Stop, /, bundle: Path | None, as_json: bool, config: Path | None, **flags: Any
) -> None:
    """Label what cameras or videos show, window by window, until they end or Ctrl-C.

    BUNDLE is a folder that vmoe-export wrote; the newest under runs/ if not given, else the one
    that ships. Without a source it watches camera 0. Several are served at once, by one engine. A
    camera is served live: the newest frame wins, and every drop is counted. Of a file nothing is
    dropped.
    """
    settings = cli.resolve(RunSettings, flags, config)
    given = [f for f in ("camera", "source", "list", "replay") if _is_given(settings, f)]
    if len(given) > 1 and given != ["source", "list"]:
        raise SettingError(f"--{given[0]} and --{given[1]} exclude each other; give one.")
    if settings.replay is not None:
        misplaced.refuse_address(settings.replay)
        settings = dataclasses.replace(
            settings, source=(str(settings.replay),), buffer="block", max_staleness=None
        )
    _run(bundle, settings, as_json=as_json, stop=stop)


def _is_given(settings: RunSettings, flag: str) -> bool:
    return getattr(settings, flag) not in (None, ())


def main(args: Sequence[str] | None = None, prog_name: str | None = None) -> None:
    """Run the command; from here on, before it loads anything, a signal ends it in order."""
    stop = Stop()
    with _ends_on_signals(stop):
        command.main(args, prog_name, obj=stop)


def _run(named: Path | None, settings: RunSettings, *, as_json: bool, stop: Stop) -> None:
    names = _names(settings)
    _refuse_one_file(settings, names)
    sinks = _sinks(settings, len(names), as_json=as_json, stop=stop)
    path, said = latest.bundle(named)
    misplaced.refuse_source(path)
    from . import engine as engines
    from . import threads
    from .pipeline import Pipeline

    sources = _sources(settings, names)
    count = threads.of_engine(len(sources), settings.threads)
    cache = cli.cache_folder() if settings.cache else None
    with engines.load(
        path,
        settings.backend,
        settings.device,
        count,
        cache=cache,
        trust=settings.trust,
        server=settings.server,
        stopping=stop.asked,
    ) as engine:
        calibrate = settings.guard_filter if settings.guard_calibrate is not None else None
        pipeline = Pipeline(engine, sources, settings, stop=stop, calibrate=calibrate)
        if settings.guard_calibrate is not None:
            sinks.append(_calibration(settings, engine, pipeline.hop_s))
        _begin_talk(pipeline, engine, said)
        try:
            _watch(pipeline, sinks, settings.stats_every)
        finally:
            if pipeline.tally.windows or sys.exc_info()[0] is None:
                log.info("\n".join(_counts(pipeline)))
    if not pipeline.tally.windows:
        window_s = engine.bundle.spec.window_s
        log.warning("no window: one needs frames over %.2f s, or was too irregular.", window_s)
    live = any(source.live for source in sources)
    log.info("next: %s", _next_command(path, settings, live=live))


def _calibration(settings: RunSettings, engine: Engine, hop_s: float) -> Sink:
    from .guard import calibration

    assert settings.guard_calibrate is not None
    return calibration.open(
        settings.guard_calibrate,
        bundle=engine.bundle,
        hop_s=hop_s,
        filter=settings.guard_filter,
        false_alarms=settings.false_alarms,
        overwrite=settings.overwrite,
    )


def _names(settings: RunSettings) -> list[str]:
    """Return the names of all sources that the flags give."""
    if settings.list is None:
        return list(settings.source) or [str(settings.camera or 0)]
    try:
        lines = [line.strip() for line in settings.list.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is no text"
        raise SettingError(f"cannot read --list {settings.list}: {why}.") from e
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise SettingError(f"--list {settings.list} names no source; write one a line.")
    return [*settings.source, *names]


def _sources(settings: RunSettings, names: Sequence[str]) -> Sequence[Source]:
    from . import sources
    from .sources import camera

    how = sources.SourceSettings(
        loop=settings.loop,
        reconnect=settings.reconnect,
        patient=len(names) > 1,
        read_timeout_s=settings.read_timeout,
        rtsp_transport=settings.rtsp_transport,
        fps=settings.fps,
        raw=_size(settings.raw),
        replay=settings.replay is not None,
        seed=settings.seed,
    )
    if names.count("-") > 1:
        raise SettingError("--source - is given twice; there is one stdin.")
    if not settings.source and settings.list is None:
        return [camera.open(names[0], how)]
    return [sources.open(name, how) for name in names]


def _begin_talk(pipeline: Pipeline, engine: Engine, said: str) -> None:
    spec, model = engine.bundle.spec, engine.bundle.model.get("name", "model")
    seen = f"{spec.frames} frames over {spec.window_s:.2f} s, every {pipeline.hop_s:.2f} s"
    seen += ", frame by frame" if pipeline.online else ""
    log.info("%s", said)
    names = [lane.source.name for lane in pipeline.lanes]
    kind = "source: " if len(names) == 1 else f"{len(names)} sources: "
    log.info("%s%s; %s on %s sees %s.", kind, ", ".join(names), model, engine.backend_name, seen)


def _counts(pipeline: Pipeline) -> list[str]:
    """Return what was counted, as lines; of several streams one for each before the whole."""
    lines = []
    for lane in pipeline.lanes if len(pipeline.lanes) > 1 else ():
        tally = lane.tally
        lines.append(
            f"{lane.source.name}: {tally.frames} frames, {tally.frames_dropped} dropped; "
            f"{tally.windows} windows, {tally.windows_dropped + tally.results_dropped} dropped; "
            f"{lane.source.state}"
        )
    missed = [f"{sink.name}: {sink.failures} failures, {sink.missed} not written"
              for sink in pipeline.sinks if sink.failures]  # fmt: skip
    again = [f"server: away, {pipeline.retries} requests repeated"] if pipeline.retries else []
    return [*lines, *pipeline.tally.lines(), *_guarded(pipeline), *again, *missed]


def _guarded(pipeline: Pipeline) -> list[str]:
    """Return what the guard found, also where that is nothing; empty without a guard."""
    if pipeline.guard_mode not in ("monitor", "enforce"):
        return []
    tally = pipeline.tally
    return [f"guard ({pipeline.guard_mode}): {tally.alarms} alarms in {tally.windows} windows"]


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
            log.info("\n".join(_counts(pipeline)))


def _refuse_one_file(settings: RunSettings, names: Sequence[str]) -> None:
    """Refuse to write over what is read, or two results into one file."""
    files = [("--source", Path(name)) for name in names]
    files = files if settings.replay is None else [("--replay", settings.replay)]
    flags = [("list", settings.list), ("guard_profile", settings.guard_profile)]
    files += [(_flag(name), path) for name, path in flags if path is not None]
    flags = [(name, getattr(settings, name)) for name in FILES]
    written = [("--save", path) for path in _saved(settings, len(names))]
    written += [(_flag(name), path) for name, path in flags if path is not None]
    pairs = itertools.chain(itertools.product(files, written), itertools.combinations(written, 2))
    for (first, one), (second, other) in pairs:
        same = os.path.realpath(one) == os.path.realpath(other)
        with contextlib.suppress(OSError):  # what is not there is no other's link
            same = same or one.samefile(other)
        if same:
            raise SettingError(f"{first} and {second} are one file ({other}); name another.")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _saved(settings: RunSettings, streams: int) -> list[Path]:
    """Return the videos that --save writes, one for each stream."""
    path = settings.save
    if path is None or streams == 1:
        return [] if path is None else [path]
    return [path.with_stem(f"{path.stem}-{stream}") for stream in range(streams)]


def _sinks(settings: RunSettings, streams: int, *, as_json: bool, stop: Stop) -> list[Sink]:
    """Make the sinks; what exists already or cannot be is refused here, before any work."""
    from .sinks import csv, jsonl, mqtt, terminal, webhook

    overwrite = settings.overwrite
    sinks: list[Sink] = [jsonl.open(None) if as_json else terminal.open(streams=streams)]
    if settings.jsonl is not None:
        sinks.append(jsonl.open(settings.jsonl, overwrite=overwrite))
    if settings.events is not None:
        sinks.append(jsonl.open(settings.events, overwrite=overwrite, kind=jsonl.EVENTS))
    if settings.csv is not None:
        sinks.append(csv.open(settings.csv, overwrite=overwrite))
    if settings.mqtt is not None:
        sinks.append(mqtt.open(settings.mqtt))
    if settings.webhook is not None:
        sinks.append(webhook.open(settings.webhook))
    if settings.page is not None or settings.metrics is not None:
        from .sinks import page

        if settings.page is not None:
            sinks.append(page.open(settings.page))
        if settings.metrics is not None:
            sinks.append(page.open(settings.metrics, page=False))
    if settings.save is not None:
        from .sinks import video

        for stream, path in enumerate(_saved(settings, streams)):
            sinks.append(video.open(path, overwrite=overwrite, stream=stream))
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


FILES = ("jsonl", "events", "csv", "guard_calibrate")
OUTPUTS = {*FILES, "save", "mqtt", "webhook", "page", "metrics", "show", "overwrite"}
CALIBRATION = {"guard_filter", "false_alarms"}
SHARED = {"backend", "device", "threads", "server"}  # flags of vmoe-bench too
NEXT_S = 20.0  # how long the next command watches what has no end


def _next_command(bundle: Path, settings: RunSettings, *, live: bool) -> str:
    """Return the command that most would type next, with the flags of this one."""
    names = {field.name for field in dataclasses.fields(settings)}
    if settings.save is not None:
        return shlex.join(["vmoe-bench", str(bundle), *_given(settings, SHARED)])
    skipped = {*OUTPUTS, *CALIBRATION, *({"source", "buffer"} if settings.replay else ())}
    words = ["vmoe-run", str(bundle), *_given(settings, names - skipped)]
    if settings.guard_calibrate is not None:
        words += ["--guard", "monitor", "--guard-profile", str(settings.guard_calibrate)]
    if not settings.source and settings.list is None and settings.camera is None:
        words += ["--camera", "0"]
    if settings.duration is None and (live or settings.loop):
        words += ["--duration", f"{NEXT_S:g}"]
    free = (f"labelled{number}.mp4" for number in itertools.chain([""], itertools.count(2)))
    return shlex.join([*words, "--save", next(name for name in free if not Path(name).exists())])


def _given(settings: RunSettings, names: Container[str]) -> list[str]:
    """Return the flags of these names that differ from their defaults; passwords hidden."""
    words: list[str] = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name not in names or value == field.default:
            continue
        for one in value if isinstance(value, tuple) else (value,):
            words.append(_flag(field.name))
            words += [] if one is True else [addresses.shown(str(one))]
    return words

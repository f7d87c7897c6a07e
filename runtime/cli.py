"""vmoe-run: a bundle watches a stream."""

from __future__ import annotations

import contextlib
import logging
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vmoe import cli, latest
from vmoe.errors import SettingError
from vmoe.settings import Settings, opt

from .frames import Stop

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .sinks import Sink
    from .sources import Source

log = logging.getLogger("vmoe")


@dataclass(frozen=True)
class RunSettings(Settings):
    """The flags of vmoe-run."""

    camera: int | None = opt(None, "a camera of this machine, by its number", at_least=0)
    source: str | None = opt(None, "a video file, a camera (0, /dev/video0), or test")
    backend: str = opt("auto", "what runs the graphs: auto, onnxruntime")
    device: str = opt("auto", "auto, cpu or cuda:N")
    threads: int | None = opt(None, "CPU threads of the engine; its own choice if not given",
                              at_least=1)  # fmt: skip
    hop: float | None = opt(None, "seconds between two windows; half a window if not given",
                            above=0)  # fmt: skip
    sampling: str = opt("exact", "exact refuses sources slower than the model's frame spacing; "
                        "nearest repeats frames", choices=("exact", "nearest"))  # fmt: skip
    top: int = opt(3, "how many labels to list", at_least=1)
    save: Path | None = opt(None, "write the annotated video: .mp4, .avi or .mkv (lossless)")
    jsonl: Path | None = opt(None, "write one JSON object per window to a file")
    duration: float | None = opt(None, "stop after so many seconds of the stream", above=0)
    loop: bool = opt(False, "start a file again when it ends")
    stats_every: float | None = opt(None, "print counts every so many seconds", above=0)
    reconnect: int = opt(5, "tries to reopen a camera that was lost", at_least=0)
    read_timeout: float = opt(3.0, "seconds of silence after which a camera is lost", above=0)
    show: bool = opt(False, "show the annotated stream in a window; q ends it")
    overwrite: bool = opt(False, "replace the files of --save and --jsonl")
    seed: int = opt(0, "seed of --source test", at_least=0)


@cli.command(
    "vmoe-run",
    "vmoe-run --camera 0",
    "vmoe-run --source street.mp4 --save labelled.mp4 --jsonl labels.jsonl",
    "vmoe-run runs/bundle --source test --duration 10 --json | jq .label",
)
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@cli.options(RunSettings)
@click.option("--json", "as_json", is_flag=True, help="JSON lines on stdout; all else on stderr.")
@cli.config_option
def main(bundle: Path | None, as_json: bool, config: Path | None, **flags: Any) -> None:
    """Label what a camera or a video shows, window by window, until it ends or Ctrl-C.

    BUNDLE is a folder that vmoe-export wrote; the newest under runs/ if not given, else the one
    that ships. Without --camera or --source it watches camera 0. A camera is served live: the
    newest frame wins, and every drop is counted. Of a file nothing is dropped.
    """
    settings = cli.resolve(RunSettings, flags, config)
    if settings.camera is not None and settings.source is not None:
        raise SettingError("--camera and --source exclude each other; give one.")
    stop = Stop()
    with _ends_on_signals(stop):
        _run(bundle, settings, as_json=as_json, stop=stop)


def _run(named: Path | None, settings: RunSettings, *, as_json: bool, stop: Stop) -> None:
    sinks = _sinks(settings, as_json=as_json, stop=stop)
    path, said = latest.bundle(named)
    from . import engine as engines
    from .pipeline import Pipeline
    from .windows import default_hop_s

    source = _source(settings)
    with engines.load(path, settings.backend, settings.device, settings.threads) as engine:
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
        hop_s = settings.hop or default_hop_s(spec)
        seen = f"{spec.frames} frames over {spec.window_s:.2f} s, every {hop_s:.2f} s"
        log.info("%s", said)
        log.info("source: %s; %s on %s sees %s.", source.name, model, engine.backend_name, seen)
        try:
            _watch(pipeline, sinks, settings.stats_every)
        finally:
            if pipeline.tally.windows or sys.exc_info()[0] is None:
                log.info("\n".join(pipeline.tally.lines()))
    if not pipeline.tally.windows:
        log.warning("no window: one needs frames over %.2f s, or was too irregular.", spec.window_s)
    log.info("next: %s", _next_command(path, settings))


def _source(settings: RunSettings) -> Source:
    from . import sources

    name = settings.source if settings.source is not None else str(settings.camera or 0)
    how = sources.SourceSettings(
        loop=settings.loop,
        reconnect=settings.reconnect,
        read_timeout_s=settings.read_timeout,
        seed=settings.seed,
    )
    return sources.open(name, how)


def _watch(pipeline: Pipeline, sinks: list[Sink], stats_every_s: float | None) -> None:
    """Run to the end; the sinks say the results, and counts come between them."""
    due_s = time.monotonic() + (stats_every_s or 0)
    for _ in pipeline.results(sinks):
        if stats_every_s and time.monotonic() >= due_s:
            due_s += stats_every_s
            log.info("\n".join(pipeline.tally.lines()))


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


def _next_command(bundle: Path, settings: RunSettings) -> str:
    """Return the command that most would type next."""
    if settings.save is not None:
        return f"vmoe-bench {shlex.quote(str(bundle))}"
    source = settings.source
    given = f"--source {shlex.quote(source)}" if source else f"--camera {settings.camera or 0}"
    ends = "" if source and source != "test" else " --duration 20"
    return f"vmoe-run {shlex.quote(str(bundle))} {given}{ends} --save labelled.mp4"

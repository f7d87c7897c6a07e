"""vmoe-bench: what bundles cost, route by route."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from vmoe import cli, latest, output
from vmoe.bundle import TWIN
from vmoe.errors import GateError, SettingError
from vmoe.runtime import topics

from . import compare, plots, render
from . import run as runs
from .record import Record
from .settings import BenchSettings

log = logging.getLogger("vmoe")

FAILED, INTERRUPTED = 1, 130  # exit codes


@cli.command(
    "vmoe-bench",
    "vmoe-bench",
    "vmoe-bench runs/split runs/if --baseline runs/dense --duration 20 --md bench.md",
    "vmoe-bench --scenario single,offline --batch 1,2,4,8 --threads 1,all --baseline torch",
    "vmoe-bench runs/bundle --scenario multi,stream --streams 1,4 --duration 30",
    "vmoe-bench runs/bundle --accuracy camera-motion --robust clips --plot bench.png",
    "vmoe-bench runs/bundle --out new.json --compare old.json --fail-over 5%",
    "vmoe-bench runs/bundle --scenario offline --batch 16 --json | jq .certificates",
    topics=topics.BENCH,
)
@click.argument("bundle", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--baseline",
    multiple=True,
    help="What to compare with: a bundle, such as the dense counterpart; or torch, torch-compile: "
    "the twin that the first BUNDLE carries. May be given again.",
)
@cli.options(BenchSettings)
@cli.json_option
@cli.config_option
def main(
    bundle: tuple[Path, ...],
    baseline: tuple[str, ...],
    as_json: bool,
    config: Path | None,
    **flags: Any,
) -> None:
    """Measure what a clip costs on each route, and certify that only one expert is paid for.

    BUNDLE is a folder that vmoe-export wrote; the newest under runs/ if not given, else the one
    that ships. All calls that are compared are made in turn, in one run. What cannot be loaded, or
    fails, has a row that says why; the rest goes on, and the exit code is 1. Ctrl-C ends the run,
    gives what was measured until then, and 130. docs/bench.md says what each verdict means; the
    record's JSON is described by runtime/bench/schema.json.

    \b
    Scenarios (--scenario), of which the first of single and offline has all forms (each forced
    route, router alone, each expert alone, all experts), the others two (free, slowest route):
      single   one clip a call: latency
      offline  --batch clips a call: throughput
      multi    a call answers one window of each of --streams streams: latency of the query
      stream   the pipeline of vmoe-run over --streams paced test sources: capture to label, drops

    \b
    Baselines (--baseline), all of one checkpoint:
      the dense counterpart      vmoe-export CKPT --counterpart --out DIR
      as everybody exports it    vmoe-export CKPT --lowering dense --optimize none --out DIR
      another lowering           vmoe-export CKPT --lowering if --out DIR
      the twin in PyTorch        --baseline torch, and compiled: --baseline torch-compile
    """  # noqa: D301  # a backspace keeps click from filling the lines below it
    chosen = cli.resolve(BenchSettings, flags, config)
    files = _files(chosen)
    _check_plot(chosen)
    paths = list(bundle)
    if not paths:
        path, said = latest.bundle(None)
        paths = [path]
        log.info("%s", said)
    made = runs.run(paths, list(baseline), chosen)
    if as_json:
        cli.print_json(made.to_json())
        log.info("%s", render.text(made))
    else:
        click.echo(render.text(made))
    for path, text in files.items():  # after what is printed: a full disk costs no measurement
        output.write_text(path, text(made))
        log.info("written: %s", path)
    if chosen.plot is not None:
        _plot(made, chosen.plot)
    log.info("next: %s", _next_command(baseline, made))
    _end(made)


def _end(made: Record) -> None:
    """End with what the exit code has to say, after everything is printed and written."""
    if made.interrupted:
        log.warning("vmoe-bench: interrupted; what was measured until then stands above.")
        raise click.exceptions.Exit(INTERRUPTED)
    against = made.comparison
    if against is not None and against.regressions and made.settings["fail_over"] is not None:
        raise GateError(f"{compare.summary(against)} Exit code 3 is --fail-over's.")
    if made.failed:
        log.error(
            "vmoe-bench: %d of %d rows failed; each says why.", len(made.failed), len(made.rows)
        )
        raise click.exceptions.Exit(FAILED)


def _check_plot(settings: BenchSettings) -> None:
    """Refuse, before any work, pictures that could not be written, or would replace others."""
    for path in plots.targets(settings.plot) if settings.plot is not None else ():
        if path.exists() and not settings.overwrite:
            raise SettingError(f"{path} exists. Choose another --plot, or say --overwrite.")
        output.probe(path)


def _plot(made: Record, path: Path) -> None:
    written, left_out = plots.write(made.to_json(), path)
    for file in written:
        log.info("written: %s", file)
    for why in left_out:
        log.info("plot: %s", why)


def _files(settings: BenchSettings) -> dict[Path, Callable[[Record], str]]:
    """Return what makes each file's text; a file that exists is refused here, before any work."""
    texts: list[tuple[Path | None, Callable[[Record], str]]] = [
        (settings.out, lambda made: json.dumps(made.to_json(samples=True), indent=1) + "\n"),
        (settings.csv, render.csv),
        (settings.md, render.markdown),
    ]
    files: dict[Path, Callable[[Record], str]] = {}
    for path, text in texts:
        if path is None:
            continue
        if path in files:
            raise SettingError(f"{path} is named by two of --out, --csv and --md.")
        if path.is_dir():
            raise SettingError(f"{path} is a folder; name a file.")
        if path.exists() and not settings.overwrite:
            raise SettingError(f"{path} exists. Choose another file, or say --overwrite.")
        output.probe(path)
        files[path] = text
    return files


def _next_command(baselines: Sequence[str], made: Record) -> str:
    """Return the command that most would type next."""
    about = made.bundles[0]
    path, bundle = Path(about.path), shlex.quote(about.path)
    if baselines or about.experts == 1:
        return f"vmoe-run {bundle} --source test --duration 20"
    twin = bundle if (path / TWIN).is_file() else "CKPT"
    dense = shlex.quote(f"{path.resolve().name}-dense-{about.lowering}")
    return (
        f"vmoe-export {twin} --counterpart --lowering {about.lowering} --out {dense} && "
        f"vmoe-bench {bundle} --baseline {dense}"
    )

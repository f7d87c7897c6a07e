"""vmoe-export --triton-repo: its flags, and what it does with a bundle that is there."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from vmoe import bundle as bundles
from vmoe import cli, latest, report
from vmoe.errors import SettingError
from vmoe.runtime import served

from . import ONNXRUNTIME, RUNS_ONNX, Repository, configs, write

F = TypeVar("F", bound=Callable[..., Any])
log = cli.log
BATCH = 16
FLAGS = ("triton_backend", "triton_batch")


def options(function: F) -> F:
    """Give a command the flags of a repository."""
    for option in reversed([
        click.option("--triton-repo", type=click.Path(path_type=Path), metavar="DIR",
                     help="Write a model repository for Triton Inference Server, too."),
        click.option("--triton-backend", type=cli.NameType(RUNS_ONNX), default=None,
                     help="What runs ONNX parts there: Triton's onnxruntime backend, or python: "
                          f"onnxruntime in the server's Python. [default: {ONNXRUNTIME}]"),
        click.option("--triton-batch", type=click.IntRange(1), default=None,
                     help="Most clips of one request, and of a batch that the server makes. "
                          f"[default: {BATCH}]"),
    ]):  # fmt: skip
        function = option(function)
    return function


def of_flags(folder: Path | None, flags: Mapping[str, Any]) -> Repository | None:
    """Return how a bundle is to be served; None where it is not.

    Raises:
        SettingError: a flag of a repository, and none is asked for.
    """
    given = [name for name in FLAGS if flags.get(name) is not None]
    if folder is None:
        if given:
            said = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise SettingError(f"{said} is for --triton-repo DIR: give that too.")
        return None
    return Repository(
        folder, flags["triton_backend"] or ONNXRUNTIME, flags["triton_batch"] or BATCH
    )


def is_bundle(named: Path | None) -> bool:
    """Return whether what a command works on is a bundle; where nothing is named, the newest is."""
    return named is None or (named / bundles.MANIFEST).is_file()


def run(
    named: Path | None, how: Repository, *, overwrite: bool, dry_run: bool, as_json: bool
) -> None:
    """Write the repository of a bundle as it is."""
    path, said = latest.bundle(named)
    log.info("%s", said)
    bundle = bundles.read(path)
    made = configs(bundle, how)
    if not dry_run:
        write(bundle, how, overwrite=overwrite)
    rows = [[of["name"], of["backend"], of["max_batch_size"]] for of in made.values()]
    if as_json:
        found = {"repository": str(how.folder), "bundle": str(path)}
        names = [name for name, *_ in rows]
        cli.print_json({**found, "version": served.version(bundle), "models": names})
    else:
        click.echo(report.table(rows, ["model", "backend", "most clips"]))
    if not dry_run:
        for line in next_lines(path, how):
            log.info("next: %s", line)


def next_lines(bundle: Path, how: Repository | None) -> list[str]:
    """Return the commands that serve a repository, and use it."""
    if how is None:
        return []
    log.info("repository: %s", how.folder)
    return [
        f"tritonserver --model-repository {shlex.quote(str(how.folder.resolve()))}",
        f"vmoe-run {shlex.quote(str(bundle))} --server localhost:8000 --camera 0",
    ]

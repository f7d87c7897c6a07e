"""Command lines: exit codes, one line for a user's mistake, shared options."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from vmoe import __version__, cli, errors
from vmoe.settings import Settings, opt


@pytest.fixture(autouse=True)
def _talk_as_before() -> Iterator[None]:
    held = cli.log.handlers[:], cli.log.level, cli.log.propagate
    yield
    cli.log.handlers[:], cli.log.level, cli.log.propagate = held


@dataclass(frozen=True)
class Some(Settings):
    eps: float = opt(8 / 255, "budget", at_least=0, at_most=1)
    steps: int = opt(10, "steps", at_least=1)
    kind: str = opt("area", "kind", choices=("area", "linear"))
    sizes: tuple[int, ...] = opt((1, 2), "sizes")
    loud: bool = opt(False, "loud")
    place: Path | None = opt(None, "place")


@dataclass(frozen=True)
class More(Settings):
    rate: float = opt(0.5, "rate", above=0)


@cli.command("try-it", "try-it --steps 3")
@click.argument("what", default="nothing")
@cli.options(Some)
@cli.options(More)
@click.option("--source", multiple=True)
@cli.seed_option
@cli.config_option
@cli.json_option
def try_it(
    what: str, source: tuple[str, ...], seed: int, config: Path | None, as_json: bool, **flags: Any
) -> None:
    """Say what was given."""
    some, more = cli.resolve(Some, flags, config), cli.resolve(More, flags, config)
    cli.log.debug("debugging")
    cli.log.info("working")
    cli.log.warning("careful")
    cli.print_json([what, list(source), seed, repr(some), repr(more)])


def run(command: click.Command, *args: str) -> Result:
    return CliRunner().invoke(command, list(args), prog_name=command.name)


def failing(error: BaseException) -> click.Command:
    @cli.command("fail")
    def fail() -> None:
        """Fail."""
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.VmoeError("wrong"), 1),
        (errors.OutputError("wrong"), 1),
        (errors.BundleError("wrong"), 1),
        (errors.CorruptBundleError("wrong"), 1),
        (errors.EngineMismatchError("wrong"), 1),
        (errors.SettingError("wrong"), 2),
        (errors.UnknownNameError("thing", "a", ["b"]), 2),
        (errors.GateError("wrong"), 3),
        (errors.SourceError("wrong"), 4),
        (errors.MissingDependencyError("wrong"), 5),
        (OSError(28, "No space left on device", "a.txt"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(error: BaseException, code: int) -> None:
    found = run(failing(error))
    assert found.exit_code == code
    assert found.stdout == ""
    assert found.stderr.startswith("fail: ")
    assert found.stderr.count("\n") == 1
    shown = run(failing(error), "-v")
    assert shown.exit_code == code
    assert "Traceback" in shown.stderr
    assert shown.stderr.endswith(found.stderr)


def test_every_error_of_ours_has_an_exit_code_of_the_list() -> None:
    def below(cls: type[errors.VmoeError]) -> Iterator[type[errors.VmoeError]]:
        yield cls
        for sub in cls.__subclasses__():
            yield from below(sub)

    assert {cls.exit_code for cls in below(errors.VmoeError)} == {1, 2, 3, 4, 5}


def test_a_full_disk_names_the_file() -> None:
    found = run(failing(OSError(28, "No space left on device", "a.txt")))
    assert found.stderr == "fail: a.txt: No space left on device.\n"


def test_a_bug_keeps_its_traceback() -> None:
    assert isinstance(run(failing(ZeroDivisionError())).exception, ZeroDivisionError)


def test_defaults_and_flags() -> None:
    found = run(try_it)
    assert found.exit_code == 0
    assert repr(Some()) in found.stdout
    found = run(
        try_it, "--eps", "4", "--steps", "3", "--sizes", "4, 5", "--loud", "--place", "x", "w"
    )
    wanted = Some(eps=4 / 255, steps=3, sizes=(4, 5), loud=True, place=Path("x"))
    assert repr(wanted) in found.stdout


def test_quiet_and_verbose() -> None:
    assert run(try_it).stderr == "working\ncareful\n"
    assert run(try_it, "-q").stderr == "careful\n"
    assert run(try_it, "-v").stderr == "debugging\nworking\ncareful\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--stepps", "3"], "No such option.*--steps"),
        (["--kind", "arae"], "'arae': did you mean 'area'\\? Known: area, linear"),
        (["--eps", "abc"], "eps 'abc' is not a number: write it 8/255"),
        (["--steps", "3.5"], "'3.5' is not a valid integer"),
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--sizes", "1,x"], "'x' is not a valid integer"),
        (["a", "b"], "unexpected extra argument"),
        (["--config", "none.toml"], "cannot read none.toml: No such file or directory"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line(args: list[str], message: str) -> None:
    found = run(try_it, *args)
    assert found.exit_code == 2
    assert found.stderr.startswith("try-it: ")
    assert found.stderr.count("\n") == 1
    assert re.search(message, found.stderr), found.stderr


def test_config_lies_between_defaults_and_flags(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'eps = 4\nsteps = 5\nsizes = [7, 8]\nloud = true\nrate = 1e-05\nseed = 9\nwhat = "this"\n'
        'source = ["a", "b"]\nkind = "linear"\n'
    )
    found = run(try_it, "--steps", "6", "--config", str(path))
    assert found.exit_code == 0, found.stderr
    some = Some(eps=4 / 255, steps=6, sizes=(7, 8), loud=True, kind="linear")
    assert repr(some) in found.stdout
    assert found.stdout.startswith('["this", ["a", "b"], 9, ')
    assert "More(rate=1e-05)" in found.stdout
    assert run(try_it, "--no-loud", "--config", str(path)).stdout.count("loud=False") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps = 3", "unknown key in .*run.toml 'stepps': did you mean 'steps'"),
        ("steps = 3.5", "'3.5' is not a valid integer"),
        ('eps = "x"', "eps 'x' is not a number"),
        ("eps = 1.5", "eps '1.5' could mean two things"),
        ("[steps]\na = 1", "steps in .*run.toml is a table"),
        ('config = "a.toml"', "unknown key in .* 'config'"),
        ("help = true", "unknown key in .* 'help'"),
        ("steps", "is not TOML"),
    ],
)
def test_a_mistake_in_the_config_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    found = run(try_it, "--config", str(path))
    assert found.exit_code == 2
    assert found.stderr.count("\n") == 1
    assert re.search(message, found.stderr), found.stderr


def test_help_shows_examples_defaults_and_both_forms_of_eps() -> None:
    text = run(try_it, "--help").stdout
    assert "Examples:\n    try-it --steps 3" in text
    assert "[default: 8/255 (0.0314)]" in " ".join(text.split())
    assert "[default: 1, 2]" in text
    assert "[default: off]" in text


def test_version() -> None:
    assert __version__ in run(try_it, "--version").stdout


def test_progress_is_a_line_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    cli.log.propagate = True
    with caplog.at_level(logging.INFO, "vmoe"):
        assert list(cli.progress(iter(range(3)), "walking", 3)) == [0, 1, 2]
    assert caplog.messages == ["walking: 3 done"]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "vmoe"):
        assert list(cli.progress([1], "walking", 1)) == [1]
    assert not caplog.messages


PRINTER = """
from vmoe import cli
@cli.command("talk")
def talk():
    for i in range(100000):
        cli.print_json({"i": i})
talk()
"""


def test_a_reader_that_leaves_is_no_error() -> None:
    script = f'{sys.executable} -c "$CODE" | head -1; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True,
        env={**os.environ, "CODE": PRINTER},
    )  # fmt: skip
    assert done.stdout == '{"i": 0}\n0\n'
    assert done.stderr == ""

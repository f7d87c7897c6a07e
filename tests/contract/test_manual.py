"""Help, manual pages and completion: what they say without torch is what the commands take."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from vmoe import manual
from vmoe.__main__ import DOORS, _own_page, _parts, _real, main
from vmoe.roff import EXIT_CODES

COMMANDS = ["vmoe", *DOORS]


def test_the_table_is_what_the_commands_take() -> None:
    pages = {name: manual.page(_real(name)) for name in DOORS}
    held = manual.TABLE.read_text(encoding="utf-8")
    assert manual.table(pages) == held, "options have changed: run `vmoe man --refresh`"
    assert manual.pages() == pages


@pytest.mark.parametrize("name", DOORS)
def test_help_from_the_table_is_the_commands_own(name: str) -> None:
    command = _real(name)
    own = command.get_help(click.Context(command, info_name=name, **command.context_settings))
    assert manual.help_text(name, manual.pages()[name]) == own


@pytest.mark.parametrize("name", DOORS)
def test_long_help_is_by_topic_and_every_topic_names_what_there_is(name: str) -> None:
    command = _real(name)
    names = [name for names in command.topics.values() for name in names]
    assert set(names) <= {param.name for param in command.params}
    assert len(names) == len(set(names))
    general = manual.topics(manual.pages()[name].options)["General"]
    assert len(general) <= 10


def test_help_without_torch_is_there_and_the_command_is_not() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import importlib.util as u; f = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'torch' else f(n, *a)\n"
        "import vmoe.__main__ as m; m.attack()"
    )
    told, run = (
        subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True,
                       check=False)
        for words in (["--help"], ["--n", "1"])
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert "Usage: vmoe-attack [OPTIONS] [TARGET]..." in told.stdout
    assert run.returncode == 5


def vmoe(*words: str) -> str:
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_a_manual_page_has_every_section_and_option(name: str) -> None:
    page = vmoe("man", name)
    sections = [line.removeprefix(".SH ") for line in page.splitlines() if line.startswith(".SH")]
    wanted = ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "EXAMPLES", "FILES",
              "SEE ALSO"]  # fmt: skip
    assert [section for section in sections if section != "COMMANDS"] == wanted
    about = _own_page() if name == "vmoe" else manual.pages()[name]
    for option in about.options:
        assert option.names[0].replace("-", r"\-") in page
    for part in _parts() if name == "vmoe" else ():
        assert f'.SS "vmoe {part} ' in page
    for code in EXIT_CODES:
        assert rf"\fB{code}\fR" in page


def test_man_can_read_the_pages(tmp_path: Path) -> None:
    if shutil.which("man") is None:
        pytest.skip("man is not installed here")
    vmoe("man", "--out", str(tmp_path / "man1"))
    pages = sorted((tmp_path / "man1").iterdir())
    assert [page.name for page in pages] == sorted(f"{name}.1" for name in COMMANDS)
    for page in pages:
        command = ["man", "--warnings=w", "-l", str(page)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0
        assert done.stderr == ""
        assert "EXIT STATUS" in done.stdout


def test_a_page_of_no_command_is_one_line() -> None:
    result = CliRunner().invoke(main, ["man", "vmoe-rum"])
    assert result.exit_code == 2
    assert "man: unknown command 'vmoe-rum': did you mean 'vmoe-run'?" in result.output

"""What every command takes, as text: help, completion and manual pages that load no torch.

`manual.json` beside this file says it of the commands that load torch or a room to say it
themselves; `vmoe man --refresh` writes it anew, and a test holds it to them.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import click

from vmoe import cli, output

TABLE = Path(__file__).with_name("manual.json")
CHECKOUT = (Path(__file__).parent / "train").is_symlink()  # there, files change under the table


@dataclass(frozen=True)
class Option:
    """One option as it is shown, and what it takes.

    Attributes:
        topic: under which --help sets it.
        names: as they are typed, such as `--sanity` and `--no-sanity`.
        usage: the left column of --help, with the metavar.
        help: the right one, with the default.
        takes: flag, value, or optional (a value that may be left out).
        choices: the values there are, where they are few and known.
        path: whether a value is a path.
        many: whether values are joined by commas.
    """

    topic: str
    names: tuple[str, ...]
    usage: str
    help: str
    takes: str = "value"
    choices: tuple[str, ...] = ()
    path: bool = False
    many: bool = False


@dataclass(frozen=True)
class Page:
    """What one command takes.

    Attributes:
        usage: what stands behind its name, such as `[OPTIONS] [BUNDLE]`.
        help: what it does, paragraphs apart by empty lines.
        examples: command lines.
        options: in the order of --help.
        argument: the name of what it works on; empty where there is nothing.
        several: whether that may be given several times.
    """

    usage: str
    help: str
    examples: tuple[str, ...]
    options: tuple[Option, ...]
    argument: str
    several: bool


def page(command: click.Command) -> Page:
    """Return what a command says of itself."""
    ctx = click.Context(command, info_name=command.name, **command.context_settings)
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    grouped = getattr(command, "topics", None)
    options = [
        _option(option, topic if grouped else "Options", ctx)
        for topic, options in cli.by_topic(command, ctx).items()
        for option in options
    ]
    return Page(
        usage=" ".join(command.collect_usage_pieces(ctx)),
        help=inspect.cleandoc(command.help or ""),  # 3.13 strips what older ones leave
        examples=tuple(line.strip() for line in (command.epilog or "").splitlines()[2:]),
        options=tuple(options),
        argument=arguments[0].name or "" if arguments else "",
        several=bool(arguments) and arguments[0].nargs == -1,
    )


def _option(option: click.Option, topic: str, ctx: click.Context) -> Option:
    usage, text = option.get_help_record(ctx) or ("", "")
    many = isinstance(option.type, cli.ListType)
    kind = option.type.member if isinstance(option.type, cli.ListType) else option.type
    takes = "flag" if option.is_flag or option.count else "value"
    bare = takes == "value" and isinstance(getattr(option, "flag_value", None), str)
    return Option(
        topic=topic,
        names=(*option.opts, *option.secondary_opts),
        usage=usage,
        help=text,
        takes="optional" if bare else takes,
        choices=tuple(map(str, kind.choices)) if isinstance(kind, click.Choice) else (),
        path=isinstance(kind, click.Path),
        many=many,
    )


def write(commands: Mapping[str, click.Command]) -> None:
    """Write the table of these commands anew."""
    output.write_text(TABLE, table({name: page(command) for name, command in commands.items()}))


def table(pages: Mapping[str, Page]) -> str:
    """Return the table: JSON, an option a line, so that changes are seen and merged by option."""
    texts = [f"{json.dumps(name)}: {_text(about)}" for name, about in pages.items()]
    return "{\n" + ",\n".join(texts) + "\n}\n"


def _text(about: Page) -> str:
    plain = {key: value for key, value in asdict(about).items() if key != "options"}
    lines = [json.dumps(_given(option)) for option in about.options]
    head = json.dumps(plain).removesuffix("}")
    return f'{head}, "options": [\n' + ",\n".join(lines) + "\n]}"


def _given(option: Option) -> dict[str, Any]:
    """Return an option's values, but those that stand where nothing is said."""
    return {
        f.name: value for f in fields(option) if (value := getattr(option, f.name)) != f.default
    }


@cache
def pages() -> dict[str, Page]:
    """Return the pages of the table, by command."""
    held = json.loads(TABLE.read_text(encoding="utf-8"))
    return {name: _page(value) for name, value in held.items()}


def _page(value: dict[str, Any]) -> Page:
    options = tuple(Option(**_tuples(option)) for option in value["options"])
    return Page(**{**_tuples(value), "options": options})


def _tuples(value: dict[str, Any]) -> dict[str, Any]:
    """Return values as a page has them: JSON knows no tuple."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}


def help_text(name: str, about: Page) -> str:
    """Return what `NAME --help` prints, as the command itself would."""
    told = _Told(name, about)
    return told.get_help(told.make_context(name, [], resilient_parsing=True))


class _Told(cli.Command):
    """A command of which only the page is known."""

    def __init__(self, name: str, about: Page) -> None:
        """Take the name and the page."""
        epilog = "\n".join(["\b", "Examples:", *(f"  {line}" for line in about.examples)])
        super().__init__(name, help=about.help, epilog=epilog, context_settings=cli.CONTEXT)
        self._about = about

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Return the page's usage."""
        return self._about.usage.split()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the page's options."""
        for topic, options in topics(self._about.options).items():
            with formatter.section(topic):
                formatter.write_dl([(option.usage, option.help) for option in options])


def topics(options: Iterable[Option]) -> dict[str, list[Option]]:
    """Return options by topic, in their order."""
    found: dict[str, list[Option]] = {}
    for option in options:
        found.setdefault(option.topic, []).append(option)
    return found

"""Command lines: flags from a settings class; an error as one line and an exit code."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import sys
import traceback
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import click

import vmoe
from vmoe import report
from vmoe import settings as _settings
from vmoe.errors import SettingError, UnknownNameError, VmoeError, nearest
from vmoe.settings import Settings

S = TypeVar("S", bound=Settings)
F = TypeVar("F", bound=Callable[..., Any])

log = logging.getLogger("vmoe")


GENERAL = "General"  # the topic of options that have none
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Command(click.Command):
    """A command that shows a user's mistake as one line, and ends with its exit code."""

    topics: Mapping[str, Collection[str]] = MappingProxyType({})

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, each under its topic where the command has topics."""
        for topic, params in by_topic(self, ctx).items():
            with formatter.section(topic if self.topics else "Options"):
                formatter.write_dl([p.get_help_record(ctx) or ("", "") for p in params])

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:  # fmt: skip
        """Read the arguments; say in one line what is wrong with them."""
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as e:
            name = f"{parent.command_path} {info_name}" if parent else info_name
            message = " ".join(e.format_message().split()).rstrip(".")
            end = "" if message.endswith("?") else "."  # click asks "Did you mean --x?"
            click.echo(f"{name}: {message}{end} See {name} --help.", err=True)
            raise click.exceptions.Exit(2) from e

    def invoke(self, ctx: click.Context) -> Any:
        """Run; turn our errors, a full disk and an interrupt into a line and an exit code."""
        verbose = bool(ctx.params.get("verbose"))
        try:
            return super().invoke(ctx)
        except VmoeError as e:
            self._fail(ctx, str(e), e.exit_code, verbose)
        except BrokenPipeError:  # `vmoe-run ... | head`: whoever read has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the last flush
            ctx.exit(0)
        except OSError as e:
            place = f"{e.filename}: " if e.filename else ""
            self._fail(ctx, f"{place}{e.strerror or e}.", 1, verbose)
        except KeyboardInterrupt:
            self._fail(ctx, "interrupted.", 130, verbose)

    def _fail(self, ctx: click.Context, message: str, code: int, verbose: bool) -> None:
        if verbose:
            traceback.print_exc()
        click.echo(f"{ctx.command_path}: {message}", err=True)
        ctx.exit(code)


class EpsType(click.ParamType):  # type: ignore[type-arg]
    """`8/255`, `8` or `0.0314`, or as the command's --norm has it; several with commas a tuple."""

    name = "eps"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return one budget on pixels in [0, 1]."""
        if not isinstance(value, str):
            return value
        norm = ctx.params.get("norm") if ctx else None  # read before: see `_option`
        try:
            return _settings.parse_eps(value, norm or "linf")
        except SettingError as e:
            self.fail(str(e), param, ctx)


class NameType(click.Choice):  # type: ignore[type-arg]
    """One of some names; a near miss gets "did you mean"."""

    def get_metavar(self, param: Any, ctx: Any = None) -> str:
        """Return the names, but for an empty one, which stands for none of them."""
        return f"[{'|'.join(filter(None, self.choices))}]"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the name."""
        if value in self.choices:
            return value
        known = ", ".join(self.choices)
        return self.fail(f"{value!r}{nearest(str(value), self.choices)} Known: {known}.", param)


class ListType(click.ParamType):  # type: ignore[type-arg]
    """Comma-separated values of another type."""

    def __init__(self, member: click.ParamType[Any]) -> None:
        """Take the type of the members."""
        self.member = member
        self.name = f"{member.name},..."

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return a tuple of what stands between the commas."""
        if not isinstance(value, str):
            return value
        return tuple(self.member.convert(v.strip(), param, ctx) for v in value.split(","))


def by_topic(command: click.Command, ctx: click.Context) -> dict[str, list[click.Option]]:
    """Return the options that --help shows, by topic; what no topic names is general, and last."""
    shown = {p.name: p for p in command.get_params(ctx)
             if isinstance(p, click.Option) and not p.hidden}  # fmt: skip
    topics: Mapping[str, Collection[str]] = getattr(command, "topics", {})
    found = {topic: [shown.pop(name) for name in names if name in shown]
             for topic, names in topics.items()}  # fmt: skip
    found[GENERAL] = list(shown.values())
    return {topic: options for topic, options in found.items() if options}


def command(
    name: str, *examples: str, topics: Mapping[str, Collection[str]] | None = None
) -> Callable[[F], Command]:
    """Make a function a command with the options that all commands share.

    The function gets `as_json` and `config` only if it names them; -v and -q set the log level.

    Args:
        name: what the user types.
        examples: command lines that can be pasted, shown by --help.
        topics: titles under which --help sets options, by the names of their parameters.
    """

    def wrap(function: F) -> Command:
        lines = "\n".join(["\b", "Examples:", *(f"  {line}" for line in examples)])
        made = click.command(
            name,
            cls=Command,
            epilog=lines,
            context_settings=CONTEXT,
        )(_shared(function))
        made.topics = topics or {}
        return click.version_option(vmoe.__version__, prog_name=name)(made)

    return wrap


def _shared(function: F) -> F:
    @functools.wraps(function)
    def run(*args: Any, verbose: bool, quiet: bool, **kwargs: Any) -> Any:
        level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
        _talk(level)
        return function(*args, **kwargs)

    run = click.option("-q", "--quiet", is_flag=True, help="Warnings and errors only.")(run)
    run = click.option("-v", "--verbose", is_flag=True, help="More, and tracebacks.")(run)
    return typing.cast(F, run)


def _talk(level: int) -> None:
    """Send our log to stderr, one plain line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(level)
    log.propagate = False


json_option = click.option(
    "--json", "as_json", is_flag=True, help="One JSON object on stdout; all else on stderr."
)


def _take_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Make a TOML file's values the defaults of the command's options, read as a flag's text is."""
    if path is None:
        return None
    known = {p.name: p for p in ctx.command.params if p.name and p is not param and p.expose_value}
    defaults: dict[str, Any] = {}
    try:
        for key, value in _settings.read_toml(path).items():
            name = key.replace("-", "_")
            if name not in known:
                raise UnknownNameError(f"key in {path}", key, [n for n in known if n])
            if isinstance(value, dict):
                raise SettingError(f"{key} in {path} is a table; give a value.")
            texts = [str(v) for v in value] if isinstance(value, list) else str(value)
            several = isinstance(texts, list) and not known[name].multiple
            defaults[name] = ",".join(texts) if several else texts
    except SettingError as e:
        raise click.BadParameter(str(e), ctx, param) from e
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return path


config_option = click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    is_eager=True,  # before the options that it gives defaults to
    callback=_take_config,
    help="TOML file of these options.",
)
seed_option = click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Random seed."
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu or cuda:N."
)


def options(
    cls: type[Settings],
    *,
    skip: Iterable[str] = (),
    also: Mapping[str, Mapping[str, Any]] | None = None,
) -> Callable[[F], F]:
    """Give a command one flag for each field of a settings class.

    Every flag's default is None in the call, so that `resolve` can tell what was given.

    Args:
        cls: the settings class.
        skip: fields that get no flag.
        also: of a field, the defaults that it has elsewhere, by where: shown in the help.
    """
    hints = typing.get_type_hints(cls)

    def wrap(function: F) -> F:
        for field in reversed([f for f in dataclasses.fields(cls) if f.name not in set(skip)]):
            function = _option(field, hints[field.name], (also or {}).get(field.name, {}))(function)
        return function

    return wrap


def _option(field: dataclasses.Field[Any], hint: Any, also: Mapping[str, Any]) -> Callable[[F], F]:
    flag = "--" + field.name.replace("_", "-")
    kinds = _settings._kinds(hint)
    text = field.metadata["help"]
    shown = _shown(field.name, field.default, also)
    if bool in kinds:
        help = f"{text} {shown}".rstrip()
        return click.option(f"{flag}/--no-{flag[2:]}", default=None, help=help)
    member: Any = typing.get_args(hint)[0] if tuple in kinds else kinds[0]
    kind = _click_type(field.name, member, field.metadata["choices"])
    if field.metadata["repeat"]:
        return click.option(flag, type=kind, multiple=True, help=f"{text}; may be given again")
    if field.metadata["bare"] is not None:
        bare = field.metadata["bare"]
        return click.option(flag, type=kind, is_flag=False, flag_value=bare, help=text)
    if tuple in kinds:
        kind = ListType(kind)
    early = field.name == "norm"  # budgets are read by it
    help = f"{text} {shown}".rstrip()
    return click.option(flag, type=kind, default=None, help=help, is_eager=early)


def _shown(name: str, default: Any, also: Mapping[str, Any]) -> str:
    if default is None or default in ((), ""):
        return ""
    values = default if isinstance(default, tuple) else (default,)
    text = ", ".join(_one(name, value) for value in values)
    others = "".join(f"; {where}: {_one(name, value)}" for where, value in also.items())
    return f" [default: {text}{others}]"


def is_budget(name: str) -> bool:
    """Return whether a field is a budget: `eps`, `val_eps`; `steps` is none."""
    return name.split("_")[-1] == "eps"


def _one(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return _settings.format_eps(value) if is_budget(name) else f"{value:.4g}"
    return str(value)


def _click_type(name: str, kind: type, choices: tuple[str, ...] | None) -> click.ParamType[Any]:
    if is_budget(name):
        return EpsType()
    if choices:
        return NameType(choices)
    plain: dict[type, click.ParamType[Any]] = {
        int: click.INT,
        float: click.FLOAT,
        str: click.STRING,
    }
    return plain.get(kind, click.Path(path_type=Path))


def resolve(cls: type[S], flags: dict[str, Any], config: Path | None = None, **fixed: Any) -> S:
    """Make settings: defaults < the TOML file < the flags that were given.

    Args:
        cls: the settings class.
        flags: the command's keyword arguments, in which `config_option` has put the TOML file's;
            those that are not fields are left alone: they are another class's of the command.
        config: the `--config` file, for errors.
        fixed: values that the command itself decides.
    """
    names = {field.name for field in dataclasses.fields(cls)}
    given = {k: v for k, v in flags.items() if k in names and v not in (None, ())}
    return _settings.from_mapping(cls, {**given, **fixed}, str(config or "flags"))


def cache_folder() -> Path:
    """Return where the commands keep what can be made again: the user's own cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path("~/.cache").expanduser()) / "vmoe"


def print_json(value: Any) -> None:
    """Print one JSON object on stdout, as `report.plain` makes it."""
    click.echo(report.to_json(value))


T = TypeVar("T")


def progress(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """Yield the items, with a bar on a terminal and a line at the end elsewhere."""
    if log.getEffectiveLevel() > logging.INFO:
        yield from items
    elif sys.stderr.isatty():
        with click.progressbar(items, length=total, label=label, file=sys.stderr) as bar:
            yield from bar
    else:
        yield from items
        log.info("%s: %d done", label, total)

"""The `vmoe` command: demo, inspect, doctor, completion, man; and the doors of the others.

The one base file that imports rooms, lazily: a command whose packages are missing says so.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

import vmoe
from vmoe import cli, completion, latest, manual, output, report
from vmoe import doctor as doctors
from vmoe.errors import MissingDependencyError, SettingError, UnknownNameError, nearest

if TYPE_CHECKING:
    from vmoe.moves import Scene, Segment
    from vmoe.runtime import Result

log = cli.log


class Group(click.Group):
    """Commands; an unknown name is one line, as a wrong option is."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the first argument names."""
        unknown = args and args[0] not in self.commands and not args[0].startswith("-")
        if unknown and not ctx.resilient_parsing:
            known = ", ".join(sorted(self.commands))
            near = nearest(args[0], self.commands)
            click.echo(f"vmoe: unknown command {args[0]!r}{near} Known: {known}.", err=True)
            ctx.exit(2)
        return super().resolve_command(ctx, args)


@click.group(
    cls=Group,
    epilog="\b\nExamples:\n  vmoe demo\n  vmoe doctor\n  vmoe inspect runs/export/mine-split",
    context_settings=cli.CONTEXT,
)
@click.version_option(vmoe.__version__, prog_name="vmoe")
def main() -> None:
    """Sparse video Mixture-of-Experts that survive attack: train, export, serve, attack.

    The other commands: vmoe-train, vmoe-export, vmoe-run, vmoe-attack, vmoe-bench.
    """


@cli.command(
    "demo", "vmoe demo", "vmoe demo --source holiday.mp4 --out runs/mine", "vmoe demo --json"
)
@click.option(
    "--source", type=click.Path(path_type=Path), help="Your own picture, folder of them, or video."
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True,
    help="Folder; an earlier demo there is replaced.",
)  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=4, show_default=True,
              help="How often each of the ten moves is made.")  # fmt: skip
@cli.seed_option
@cli.json_option
def demo(source: Path | None, out: Path, rounds: int, seed: int, as_json: bool) -> None:
    """Let the model that ships watch a video whose camera moves are known.

    The model is exported here and now; the video is rendered by panning, tilting, zooming,
    rolling and shaking a camera over photographs that the model has never seen, or over your own
    file. What comes out: labels, routes, latency, the accuracy against the known moves, an
    annotated video and a report.

    Where torch is not installed, the exported bundle that ships is taken; where scikit-image is
    not, whose photographs they are, pictures are drawn. The report says which.
    """
    from vmoe import demo as judged
    from vmoe import moves

    _wait_idly()
    _refuse_strange(out)
    scenes = moves.scenes_of(source) if source else _pictures()
    output.write_json(out / "report.json", {"made_by": MADE_BY})  # until there is more to say
    model = _exported(out / "bundle")
    log.info("rendering %d known moves over %s", 10 * rounds, ", ".join(s.name for s in scenes))
    segments = moves.render(scenes, out / "moves.avi", rounds=rounds, seed=seed)
    results = _watch(model, out / "moves.avi", out / "annotated.mp4", segments)
    found = {"made_by": MADE_BY, **judged.judge(segments, results)}
    found |= {"bundle": str(model), "video": str(out / "moves.avi"), "seed": seed,
              "exported_here": model != latest.SHIPPED}  # fmt: skip
    output.write_json(out / "report.json", found)
    text = judged.text(found)
    output.write_text(out / "report.md", text)
    if as_json:
        cli.print_json(found)
    else:
        click.echo(text)
    log.info("annotated video: %s   report: %s", out / "annotated.mp4", out / "report.md")
    for command in ("vmoe-run {} --camera 0", "vmoe-attack {} --n 100", "vmoe-bench {}"):
        if not doctors.missing(command.split()[0]):
            log.info("next: %s", command.format(shlex.quote(str(model))))


MADE_BY = "vmoe demo"  # in its report.json: how the demo knows a folder of its own


def _refuse_strange(out: Path) -> None:
    """Refuse a folder that is not a demo's own: its files will be replaced."""
    if not out.exists():
        output.probe(out)
        return
    try:
        own = json.loads((out / "report.json").read_text())["made_by"] == MADE_BY
    except (OSError, ValueError, KeyError, TypeError):
        own = False
    if not own and (not out.is_dir() or any(out.iterdir())):
        raise SettingError(f"{out} is no folder of an earlier demo; choose another --out.")


def _pictures() -> list[Scene]:
    """Return photographs; where there are none, drawn pictures."""
    from vmoe import moves

    try:
        return moves.photographs()
    except MissingDependencyError:
        log.info("scikit-image, whose photographs the demo shows, is not installed (pip install "
                 "'vmoe[demo]'): taking drawn pictures, of the kind that it was trained on, though "
                 "not those")  # fmt: skip
        return moves.procedural()


def _exported(folder: Path) -> Path:
    """Export the twin that ships; without torch take the bundle that ships."""
    lacks = doctors.missing("vmoe-export")
    if lacks:
        log.info(
            "%s not installed: taking the bundle that ships, not a fresh one", ", ".join(lacks)
        )
        return latest.shipped()
    from vmoe.bundle import TWIN
    from vmoe.export import export

    begin = time.monotonic()
    export(latest.shipped() / TWIN, folder, overwrite=True)
    log.info("exported the model that ships to %s in %.1f s", folder, time.monotonic() - begin)
    return folder


def _watch(model: Path, video: Path, annotated: Path, segments: list[Segment]) -> list[Result]:
    """Run the video through the runtime; say each window; write the annotated video."""
    from vmoe.moves import truth
    from vmoe.runtime import load, watch
    from vmoe.runtime.sinks import video as video_sink

    results = []
    with load(model) as engine:
        for result in watch(engine, video, sinks=[video_sink.open(annotated, overwrite=True)]):
            results.append(result)
            segment = truth(segments, result.t_first_s, result.t_s)
            mark = "" if segment is None else "ok" if segment.label == result.label else "WRONG"
            was = "(between two moves)" if segment is None else segment.label
            log.info(
                "%6.2f s  %-10s %.2f  expert %d  %5.2f ms  was %-19s %s", result.t_s, result.label,
                result.score, result.expert, result.stage_ms["infer_ms"], was, mark,
            )  # fmt: skip
    return results


@cli.command("inspect", "vmoe inspect", "vmoe inspect runs/mine", "vmoe inspect runs/mine --json")
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@cli.json_option
def inspect(bundle: Path | None, as_json: bool) -> None:
    """Prove a bundle whole; show what is in it, and what was measured of it at export."""
    from vmoe import bundle as bundles
    from vmoe import contents

    path, line = latest.bundle(bundle)
    log.info("%s", line)
    read = bundles.read(path)
    card = str(latest.CARD) if path.resolve() == latest.SHIPPED.resolve() else None
    if as_json:
        cli.print_json({**report.plain(read), "report": read.report(), "card": card})
        return
    click.echo(contents.text(read))
    if card is not None:
        click.echo(f"\nmodel card: {card}")


@cli.command("doctor", "vmoe doctor", "vmoe doctor --json", "vmoe doctor --self-test --dry-run")
@click.option("--self-test", is_flag=True, help="On a machine with TensorRT: run what no machine "
              "of ours could, and write a report to send.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="List what --self-test would do.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("vmoe-self-test.json"),
              show_default=True, help="The report of --self-test.")  # fmt: skip
@cli.device_option
@cli.json_option
def doctor(self_test: bool, dry_run: bool, out: Path, device: str, as_json: bool) -> None:
    """Say what is installed, what can run here, what was verified where, and what nowhere."""
    if self_test:
        _self_test(out, device, dry_run=dry_run, as_json=as_json)
        return
    given = click.get_current_context().get_parameter_source
    for name in ("dry_run", "out", "device"):
        if given(name) is click.core.ParameterSource.COMMANDLINE:
            flag = f"--{name.replace('_', '-')}"
            raise SettingError(f"{flag} is for --self-test: give that too, or leave it out.")
    found = doctors.found()
    if as_json:
        cli.print_json(found)
    else:
        click.echo(doctors.text(found))


def _self_test(out: Path, device: str, *, dry_run: bool, as_json: bool) -> None:
    """Run what no machine of ours could, or list it; the report is written whatever it says."""
    if importlib.util.find_spec("onnx") is None:
        raise MissingDependencyError("onnx is not installed: pip install onnx.")
    from vmoe.export.tensorrt import selftest

    if dry_run:
        steps = selftest.listed()
        if as_json:
            cli.print_json({"steps": steps, "out": str(out)})
        else:
            click.echo("\n".join(f"{s['step']}: {s['what']}" for s in steps) + f"\nreport: {out}")
        return
    output.probe(out)
    found = selftest.run(device)
    output.write_json(out, found)
    if as_json:
        cli.print_json(found)
    log.info("report: %s", out)
    selftest.refuse(found, out)


def _wait_idly() -> None:
    """Let torch's threads sleep while they wait: where others use the cores, spinning costs all.

    Read when torch is imported; a user's own setting stands.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@cli.command(
    "completion",
    'eval "$(vmoe completion bash)"                         # in ~/.bashrc',
    'eval "$(vmoe completion zsh)"                          # in ~/.zshrc, behind compinit',
    "vmoe completion fish > ~/.config/fish/conf.d/vmoe.fish",
)
@click.argument("shell", metavar="SHELL", type=cli.NameType(completion.SHELLS))
def complete(shell: str) -> None:
    """Print what SHELL (bash, zsh or fish) reads to complete all commands.

    It completes options, and the values that are known: bundles under runs/, attacks, methods,
    families, backends.
    """
    click.echo(completion.script(shell, ["vmoe", *DOORS]))


@cli.command("man", "vmoe man vmoe-run", "vmoe man --out ~/.local/share/man/man1")
@click.argument("command", required=False, default="vmoe")
@click.option("--out", type=click.Path(path_type=Path), help="Write all pages to this folder.")
@click.option("--refresh", is_flag=True, hidden=True, help="Of a checkout: write manual.json.")
def man(command: str, out: Path | None, refresh: bool) -> None:
    """Show a command's manual page: by man on a terminal, else as man reads it."""
    if refresh:
        manual.write({name: _real(name) for name in DOORS})
        return
    names = ["vmoe", *DOORS]
    if command not in names:
        raise UnknownNameError("command", command, names)
    if out is not None:
        for name in names:
            output.write_text(out / f"{name}.1", _roff(name))
        log.info("written: %s/vmoe.1 and %d more", out, len(DOORS))
    elif sys.stdout.isatty() and shutil.which("man"):
        subprocess.run(["man", "-l", "-"], input=_roff(command), text=True, check=False)
    else:
        click.echo(_roff(command))


def _roff(name: str) -> str:
    from vmoe import roff

    parts = _parts() if name == "vmoe" else {}
    about = _own_page() if name == "vmoe" else manual.pages()[name]
    return roff.text(name, about, ["vmoe", *DOORS], parts)


def _own_page() -> manual.Page:
    """Return what `vmoe` itself takes."""
    return dataclasses.replace(manual.page(main), usage="COMMAND [OPTIONS]")


def _parts() -> dict[str, manual.Page]:
    return {name: manual.page(part) for name, part in main.commands.items()}


DOORS = {
    "vmoe-train": "vmoe.train.cli:main", "vmoe-export": "vmoe.export.cli:main",
    "vmoe-run": "vmoe.runtime.cli:command", "vmoe-attack": "vmoe.attacks.cli:main",
    "vmoe-bench": "vmoe.runtime.bench.cli:main",
}  # fmt: skip


def _real(name: str) -> cli.Command:
    module, _, attribute = DOORS[name].partition(":")
    command: cli.Command = getattr(importlib.import_module(module), attribute)
    return command


def _is_told(command: str) -> bool:
    """Answer what needs no room: completion; help, where a room is slow to load or is missing."""
    if completion.asked(command):
        completion.answer(command, manual.pages()[command])
    if "torch" not in doctors.COMMANDS[command] or not {"-h", "--help"} & set(sys.argv[1:]):
        return False
    if manual.CHECKOUT and not doctors.missing(command):
        return False  # what is being written says itself what it takes
    click.echo(manual.help_text(command, manual.pages()[command]))
    return True


def _enter(command: str) -> None:
    """Run a command's own main, or say in one line what it needs.

    A command that serves loads without its backend: the engine says itself what is missing.
    """
    if _is_told(command):
        return
    _wait_idly()
    lacks = doctors.missing(command)
    if lacks and "torch" in doctors.COMMANDS[command]:
        need = f"{', '.join(lacks)} not installed"
        click.echo(f"{command}: {need}: pip install 'vmoe[train,cpu]'.", err=True)
        sys.exit(MissingDependencyError.exit_code)
    try:
        importlib.import_module(DOORS[command].partition(":")[0]).main()
    except KeyboardInterrupt:  # before the command could say itself how it ends
        sys.exit(0 if command == "vmoe-run" else 130)


def train() -> None:
    """Run vmoe-train."""
    _enter("vmoe-train")


def attack() -> None:
    """Run vmoe-attack."""
    _enter("vmoe-attack")


def export() -> None:
    """Run vmoe-export; what it does without torch has files of its own."""
    given = (
        {word.partition("=")[0] for word in sys.argv} if doctors.missing("vmoe-export") else set()
    )
    if "--from-onnx" in given:
        if importlib.util.find_spec("onnx") is None:
            click.echo("vmoe-export: onnx not installed: pip install onnx.", err=True)
            sys.exit(MissingDependencyError.exit_code)
        importlib.import_module("vmoe.export.tensorrt.from_onnx").main()
    elif "--triton-repo" in given:
        importlib.import_module("vmoe.export.triton.as_it_is").main()
    else:
        _enter("vmoe-export")


def run() -> None:
    """Run vmoe-run."""
    _enter("vmoe-run")


def bench() -> None:
    """Run vmoe-bench."""
    _enter("vmoe-bench")


def own() -> None:
    """Run vmoe."""
    if completion.asked("vmoe"):
        completion.answer("vmoe", _own_page(), _parts())
    main()


for command in (demo, inspect, doctor, complete, man):
    main.add_command(command)

if __name__ == "__main__":
    sys.exit(main())

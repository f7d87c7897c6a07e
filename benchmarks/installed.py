r"""What is installed, and does it work with no repository around it?

    python benchmarks/installed.py --quick
    python benchmarks/installed.py --out benchmarks/results/installed.json \
        --out benchmarks/results/installed.md --overwrite

A wheel and an sdist are built of a copy of the checkout, checked by twine, and the wheel is
installed into a clean environment of every Python from 3.10 to 3.13 that is found (on PATH, or
pyenv's); with `--quick` only into this one's. Needs pip's index.

base_mb
    The largest of what `pip install WHEEL` adds to an environment, without pip itself: all that pip
    wrote, bytecode too, in MB of 10^6 bytes, by each distribution's own record. Beside it what
    OpenCV and NumPy weigh of it.
works_alone
    The share of the commands that work there: `--help` of all six, doctor, completion; and, with
    the extra `cpu` in one environment, `vmoe demo`, `vmoe-run --source test --duration 3` and
    `vmoe-bench --iterations 3`, in an empty folder.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import figures
from figures import ROOT, Figure

from vmoe import cli, report
from vmoe.errors import VmoeError
from vmoe.runtime.bench import context as contexts

VERSIONS = ("3.10", "3.11", "3.12", "3.13")
BASE_MB = 250
NOT_OURS = ("pip", "setuptools")  # what a clean environment holds before
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "runs", "dist", "*.egg-info")
COMMANDS = ("vmoe", "vmoe-train", "vmoe-export", "vmoe-run", "vmoe-attack", "vmoe-bench")
BASE = [[name, "--help"] for name in COMMANDS] + [["vmoe", "doctor"], ["vmoe", "completion", "zsh"]]
SERVING = [
    ["vmoe", "demo", "--rounds", "1"],
    ["vmoe-run", "--source", "test", "--duration", "3"],
    ["vmoe-bench", "--iterations", "3"],
]


@dataclass
class Installed:
    """What one Python's environment holds, and how it went.

    Attributes:
        python: its version.
        sizes_mb: of each distribution, in MB of 10^6 bytes.
        failed: the commands that did not end with 0, with the end of what they said.
        tried: how many commands there were.
        cpu_s: CPU seconds of the first import of the runtime, of `vmoe --help`, once and again, and
            of `vmoe-run --help`.
        demo: what the demo reported.
    """

    python: str
    sizes_mb: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    tried: int = 0
    cpu_s: dict[str, float] = field(default_factory=dict)
    demo: dict[str, Any] = field(default_factory=dict)

    @property
    def base_mb(self) -> float:
        """What was added, in MB."""
        return sum(mb for name, mb in self.sizes_mb.items() if name not in NOT_OURS)


def build(out: Path) -> tuple[Path, Path]:
    """Build an sdist, and a wheel of it, from a copy of the checkout; return both.

    Raises:
        VmoeError: it cannot be built.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "vmoe"
        shutil.copytree(ROOT, tree, symlinks=True, ignore=NOT_COPIED)
        _do([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)])
        direct = out / "direct"
        _do([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(direct),
             str(tree)])  # fmt: skip
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    if contents(direct / wheel.name) != contents(wheel):
        raise VmoeError("the sdist's wheel differs from the checkout's.")
    shutil.rmtree(direct)
    return wheel, sdist


def contents(wheel: Path) -> dict[str, bytes]:
    """Return a wheel's files."""
    with zipfile.ZipFile(wheel) as held:
        return {name: held.read(name) for name in held.namelist()}


def interpreters() -> Iterator[str]:
    """Yield the Pythons of this machine, of each version one."""
    for version in VERSIONS:
        found = shutil.which(f"python{version}")
        home = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
        places = [*([found] if found else []),
                  *sorted(map(str, home.glob(f"versions/{version}.*/bin/python")))]  # fmt: skip
        for place in places:
            done = subprocess.run([place, "-c", "import ensurepip, sys; print(sys.version)"],
                                  capture_output=True, text=True, check=False)  # fmt: skip
            if done.stdout.startswith(f"{version}."):  # a shim may stand for what is not there
                yield place
                break


def environment(python: str, folder: Path, what: str) -> Path:
    """Install something into a clean environment; return its bin/.

    Raises:
        VmoeError: it cannot be installed.
    """
    _do([python, "-m", "venv", str(folder)])
    _do([str(folder / "bin" / "python"), "-m", "pip", "install", "-q", what])
    return folder / "bin"


def sizes_mb(folder: Path) -> dict[str, float]:
    """Return what each distribution of an environment weighs, in MB of 10^6 bytes."""
    (site,) = folder.glob("lib/python3*/site-packages")
    held = {}
    for distribution in importlib.metadata.distributions(path=[str(site)]):
        files = {Path(str(distribution.locate_file(file))) for file in distribution.files or ()}
        size = sum(file.stat().st_size for file in files if file.is_file())
        held[distribution.metadata["Name"]] = size / 1e6
    return held


def alone(bin: Path, words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run an installed command with nothing of a checkout, or of this environment, around it."""
    kept = {key: os.environ[key] for key in ("PATH", "TMPDIR") if key in os.environ}
    folder.mkdir(exist_ok=True)
    return subprocess.run([str(bin / words[0]), *words[1:]], cwd=folder, text=True, check=False,
                          capture_output=True, env={**kept, "HOME": str(folder)})  # fmt: skip


def _do(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise VmoeError(f"{' '.join(command)}: {(done.stdout + done.stderr)[-1000:]}")


def install(python: str, wheel: Path, folder: Path, *, serves: bool) -> Installed:
    """Install the wheel for one Python, and run what its user would.

    Args:
        python: its path.
        wheel: what is installed.
        folder: for the environment and what the commands write.
        serves: whether to add the extra `cpu`, and serve.
    """
    bin = environment(python, folder / "env", str(wheel))
    version = alone(bin, ["python", "--version"], folder).stdout.split()[-1]
    found = Installed(version, sizes_mb(folder / "env"))
    for what, words in (
        ("import", ["python", "-c", "import vmoe.runtime"]), ("help", ["vmoe", "--help"]),
        ("help again", ["vmoe", "--help"]), ("run help", ["vmoe-run", "--help"]),
    ):  # fmt: skip
        begin = os.times()
        alone(bin, words, folder / "work")
        ends = os.times()
        found.cpu_s[what] = sum(ends[2:4]) - sum(begin[2:4])  # of children, user and system
    _try(found, bin, BASE, folder / "work")
    if serves:
        _do([str(bin / "python"), "-m", "pip", "install", "-q", f"vmoe[cpu] @ {wheel.as_uri()}"])
        _try(found, bin, SERVING, folder / "work")
        demo = folder / "work" / "runs" / "demo" / "report.json"
        found.demo = json.loads(demo.read_text()) if demo.is_file() else {}
    return found


def _try(found: Installed, bin: Path, commands: list[list[str]], folder: Path) -> None:
    for words in commands:
        done = alone(bin, words, folder)
        found.tried += 1
        if done.returncode:
            found.failed[" ".join(words)] = (done.stdout + done.stderr)[-500:]


@cli.command(
    "installed.py",
    "python benchmarks/installed.py --quick",
    "python benchmarks/installed.py --json",
)
@click.option("--quick", is_flag=True, help="This Python alone, and nothing served.")
@click.option("--out", multiple=True, type=click.Path(path_type=Path),
              help="Results, .json or .md; may be given twice.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace results that exist.")
@click.option("--dist", type=click.Path(path_type=Path), help="Keep wheel and sdist here.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a figure on stdout.")
def main(
    quick: bool, out: tuple[Path, ...], overwrite: bool, dist: Path | None, as_json: bool
) -> None:
    """Build, check, install and run what a user would."""
    figures.check_files(out, overwrite=overwrite)
    context = contexts.read()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel, sdist = build(folder / "dist")
        _do([sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)])
        if dist is not None:
            dist.mkdir(parents=True, exist_ok=True)
            for file in (wheel, sdist):
                shutil.copy(file, dist)
        found = []
        for python in [sys.executable] if quick else interpreters():
            cli.log.info("installing for %s", python)
            serves = not quick and not any(f.demo for f in found)
            found.append(install(python, wheel, folder / str(len(found)), serves=serves))
            shutil.rmtree(folder / str(len(found) - 1))
    made = _figures(found)
    tables = {"By Python": _table(found), "Alone": _alone(found)}
    measured = {"installed": [report.plain(each) for each in found]}
    figures.say(made, as_json=as_json)
    figures.write(out, "Installed", made, context, tables, measured)


def _figures(found: list[Installed]) -> list[Figure]:
    largest = max(found, key=lambda each: each.base_mb)
    tried, failed = sum(f.tried for f in found), sum(len(f.failed) for f in found)
    mb = largest.sizes_mb
    beside = {"opencv_mb": mb["opencv-python-headless"], "numpy_mb": mb["numpy"],
              "vmoe_mb": mb["vmoe"], "python": largest.python}  # fmt: skip
    return [
        Figure("base_mb", largest.base_mb, "MB", BASE_MB, n=len(found), more=beside),
        Figure("works_alone", (tried - failed) / tried, "share", 1.0, "higher", tried),
    ]


def _table(found: list[Installed]) -> str:
    columns = ["Python", "wheel", "commands", "MB in all", "OpenCV", "NumPy", "vmoe",
               "CPU s: import vmoe.runtime", "vmoe --help", "again",
               "vmoe-run --help"]  # fmt: skip
    rows = [
        [f.python, "ok" if not f.failed else "NO", f"{f.tried - len(f.failed)} of {f.tried}",
         *(f"{mb:.1f}" for mb in (f.base_mb, f.sizes_mb["opencv-python-headless"],
                                  f.sizes_mb["numpy"], f.sizes_mb["vmoe"])),
         *(f"{s:.2f}" for s in f.cpu_s.values())]
        for f in found
    ]  # fmt: skip
    return report.table(rows, columns)


def _alone(found: list[Installed]) -> str:
    """Say what the demo found, and what failed."""
    lines = []
    for each in found:
        if each.demo:
            pictures = dict.fromkeys(segment["picture"] for segment in each.demo["segments"])
            lines.append(
                f"Python {each.python}, with the extra `cpu`, no torch and no scikit-image: `vmoe "
                f"demo --rounds 1` over {', '.join(pictures)}: {each.demo['right']} of "
                f"{each.demo['windows']} windows right; `vmoe-run` and `vmoe-bench` run."
            )
        lines += [f"Python {each.python}: `{words}` failed: {said}"
                  for words, said in each.failed.items()]  # fmt: skip
    return "\n\n".join(lines) or "Nothing was served."


if __name__ == "__main__":
    main()

"""Completion as a shell asks for it: by the scripts that it reads, through the real commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vmoe.__main__ import DOORS
from vmoe.completion import SHELLS

COMMANDS = ["vmoe", *DOORS]
ROOT = Path(__file__).parents[2]
WRAPPER = """#!{}
import sys
sys.path.insert(0, {!r})
from vmoe.__main__ import {} as door
try:
    door()
finally:
    assert "torch" not in sys.modules
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with bundles under runs/, and the commands in bin/."""
    place = tmp_path_factory.mktemp("place")
    (place / "bin").mkdir()
    for name in COMMANDS:
        function = name.removeprefix("vmoe-") if name in DOORS else "own"
        file = place / "bin" / name
        file.write_text(WRAPPER.format(sys.executable, str(ROOT), function))
        file.chmod(0o755)
    for bundle in ("runs/export/one", "runs/export/two", "runs/export/bad.rejected"):
        (place / bundle).mkdir(parents=True)
        (place / bundle / "vmoe.json").write_text("{}")
    (place / "clip.mp4").touch()
    return place


def ask(place: Path, words: str, shell: str = "bash") -> list[str]:
    """Return what a command answers to what its shell's script asks."""
    name, *typed = words.split(" ")
    told = {"COMP_WORDS": words, "COMP_CWORD": typed[-1] if shell == "fish" else str(len(typed))}
    told[f"_{name.replace('-', '_').upper()}_COMPLETE"] = f"{shell}_complete"
    done = subprocess.run([str(place / "bin" / name)], cwd=place, env={**os.environ, **told},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split("\n")[:-1] if done.stdout.strip() else []


def in_bash(place: Path, words: str) -> list[str]:
    """Return what bash would offer: its own function, as `complete -F` calls it."""
    name, *typed = words.split(" ")
    lines = f"""
        eval "$(vmoe completion bash)"
        compopt() {{ :; }}  # of a line that is being typed
        COMP_WORDS=({" ".join(f'"{word}"' for word in (name, *typed))}); COMP_CWORD={len(typed)}
        $(complete -p {name} | sed 's/.*-F \\([^ ]*\\).*/\\1/') {name}
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    path = f"{place / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "--norc", "-c", lines], cwd=place, text=True, check=True,
                          capture_output=True, env={**os.environ, "PATH": path})  # fmt: skip
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("vmoe-run --guard-", ["--guard-profile", "--guard-calibrate", "--guard-filter"]),
        ("vmoe-attack --attack pgd,j-tlg", ["pgd,j-tlga", "pgd,j-tlga-plus"]),
        ("vmoe-bench runs/", ["runs/export/one", "runs/export/two"]),
        ("vmoe ins", ["inspect"]),
    ],
)
def test_bash_completes(place: Path, words: str, offered: list[str]) -> None:
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed here")
    assert in_bash(place, words) == offered


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("vmoe-train --method j-", ["plain,j-tlat", "plain,j-tlat-plus"]),
        ("vmoe-train --arch=tsm", ["plain,tsm", "plain,tsm-online"]),
        ("vmoe-train cam", ["file,cam", "plain,camera-motion"]),
        ("vmoe-export --lowering ", ["plain,dense", "plain,if", "plain,plugin", "plain,split"]),
        ("vmoe-run --guard m", ["plain,monitor"]),
        ("vmoe-run --backend onnx", ["plain,onnxruntime"]),
        ("vmoe-run --source t", ["file,t", "plain,test"]),
        ("vmoe-run --show --sho", ["plain,--show"]),
        ("vmoe-run --page --met", ["plain,--metrics"]),  # --page may stand without a value
        ("vmoe-run --hop ", []),
        ("vmoe-attack --compare runs/export/t", ["file,runs/export/t", "plain,runs/export/two"]),
        ("vmoe inspect runs/export/o", ["file,runs/export/o", "plain,runs/export/one"]),
        ("vmoe completion z", ["plain,zsh"]),
        ("vmoe man vmoe-b", ["plain,vmoe-bench"]),
        ("vmoe nonsense --", ["plain,--version", "plain,--help"]),
    ],
)
def test_what_is_answered(place: Path, words: str, offered: list[str]) -> None:
    assert ask(place, words) == offered


def test_zsh_and_fish_are_told_what_options_do(place: Path) -> None:
    assert ask(place, "vmoe-run --cam", "zsh") == [
        "plain", "--camera", "a camera of this machine, by its number",
    ]  # fmt: skip
    first, *_ = ask(place, "vmoe-run --cam", "fish")
    assert first.startswith("plain")


def test_fish_completes(place: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed here")
    code = "vmoe completion fish | source; complete -C 'vmoe-run --guard-p'"
    env = {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "HOME": str(place)}
    done = subprocess.run(["fish", "-c", code], cwd=place, env=env, capture_output=True, text=True,
                          check=True)  # fmt: skip
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["--guard-profile"]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_can_read_its_script(place: Path, shell: str) -> None:
    done = subprocess.run([str(place / "bin" / "vmoe"), "completion", shell], capture_output=True,
                          text=True, check=True)  # fmt: skip
    for name in COMMANDS:
        assert f"_{name.replace('-', '_').upper()}_COMPLETE={shell}_complete" in done.stdout
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed here: its script was not read")
    read = subprocess.run([shell, "-n"], input=done.stdout, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert (read.returncode, read.stderr) == (0, "")

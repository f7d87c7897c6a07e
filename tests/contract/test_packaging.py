"""What a wheel holds: every room once, no links, and what every command needs."""

from __future__ import annotations

import importlib.util
import shutil
import stat
import subprocess
import sys
import zipfile
from collections import Counter
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("train", "export", "runtime", "attacks")
COMMANDS = {"vmoe", "vmoe-train", "vmoe-export", "vmoe-run", "vmoe-attack", "vmoe-bench"}
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "runs", "dist", "benchmarks")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Return a wheel that is built from a copy, so that nothing is left in the checkout."""
    for module in ("build", "hatchling"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install build hatchling")
    tree, out = tmp_path_factory.mktemp("tree") / "vmoe", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=NOT_COPIED)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(tree)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_every_source_file_is_there_once(wheel: zipfile.ZipFile) -> None:
    counts = Counter(wheel.namelist())
    assert set(counts.values()) == {1}
    for room in ROOMS:
        for path in (p for p in (ROOT / room).rglob("*.*") if "__pycache__" not in p.parts):
            assert counts[f"vmoe/{path.relative_to(ROOT).as_posix()}"] == 1
    for path in (ROOT / "vmoe").glob("*.py"):
        assert counts[f"vmoe/{path.name}"] == 1


def test_nothing_else_is_there(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert len(tops) == 2  # vmoe and its dist-info
    assert "vmoe" in tops
    assert not [name for name in wheel.namelist() if "__pycache__" in name or "tests/" in name]


def test_no_links(wheel: zipfile.ZipFile) -> None:
    links = [i.filename for i in wheel.infolist() if stat.S_ISLNK(i.external_attr >> 16)]
    assert not links


def test_every_command_has_its_module(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    parser = ConfigParser()
    parser.read_string(wheel.read(name).decode())
    scripts = dict(parser["console_scripts"])
    assert set(scripts) == COMMANDS
    for target in scripts.values():
        module, function = target.split(":")
        text = wheel.read(f"{module.replace('.', '/')}.py").decode()
        assert f"def {function}(" in text


def test_what_a_bundle_needs_ships(wheel: zipfile.ZipFile) -> None:
    folder = ROOT / "vmoe" / "shipped" / "camera-motion"
    files = {path.name: path for path in folder.iterdir() if path.is_file()}
    assert {"vmoe.json", "report.json", "twin.safetensors", "router.onnx"} <= files.keys()
    for name, path in files.items():
        shipped = wheel.read(f"vmoe/shipped/camera-motion/{name}")
        assert shipped
        assert shipped == path.read_bytes()


def test_it_runs_from_the_wheel_alone(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = "import vmoe, vmoe.runtime.cli as c; print(vmoe.__file__); c.main(['--version'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))

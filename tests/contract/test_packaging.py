"""What a wheel holds: every room once, no links, and what every command needs."""

from __future__ import annotations

import email
import importlib
import importlib.util
import json
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("train", "export", "runtime", "attacks")
COMMANDS = {"vmoe", "vmoe-train", "vmoe-export", "vmoe-run", "vmoe-attack", "vmoe-bench"}
sys.path.insert(0, str(ROOT / "benchmarks"))
installed = importlib.import_module("installed")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a wheel and an sdist, of a copy of the checkout, in which nothing is left."""
    for module in ("build", "hatchling", "twine"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install build hatchling twine")
    # refuses where the sdist's wheel is not the checkout's
    wheel, sdist = installed.build(tmp_path_factory.mktemp("dist"))
    return wheel, sdist


@pytest.fixture(scope="module")
def wheel(built: tuple[Path, Path]) -> zipfile.ZipFile:
    return zipfile.ZipFile(built[0])


def test_every_source_file_is_there_once(wheel: zipfile.ZipFile) -> None:
    counts = Counter(wheel.namelist())
    assert set(counts.values()) == {1}
    for room in ROOMS:
        for path in (p for p in (ROOT / room).rglob("*.*") if "__pycache__" not in p.parts):
            assert counts[f"vmoe/{path.relative_to(ROOT).as_posix()}"] == 1
    for path in (ROOT / "vmoe").glob("*.py"):
        assert counts[f"vmoe/{path.name}"] == 1


def test_nothing_else_is_there(wheel: zipfile.ZipFile, built: tuple[Path, Path]) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert len(tops) == 2  # vmoe and its dist-info
    assert "vmoe" in tops
    with tarfile.open(built[1]) as sdist:
        inside = [name.partition("/")[2] for name in sdist.getnames()]
    assert {name.split("/")[0] for name in inside} - {".gitignore"} == {
        *ROOMS, "vmoe", "pyproject.toml", "PKG-INFO", "LICENSE", "README.md",
        "CHANGELOG.md", "CONTRIBUTING.md",
    }  # fmt: skip
    for name in [*wheel.namelist(), *inside]:
        assert not {"__pycache__", "tests", "runs", "shared", ".dev"} & set(name.split("/"))
        assert Path(name).suffix not in (".pyc", ".mp4", ".avi", ".mkv")


def test_twine_has_nothing_to_say(built: tuple[Path, Path]) -> None:
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, built)],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2


def test_the_metadata_is_true(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    said = email.message_from_bytes(wheel.read(name))
    assert said["License-Expression"] == "Apache-2.0"
    assert said["License-File"] == "LICENSE"
    assert wheel.read(name.replace("METADATA", "licenses/LICENSE"))
    assert said.get_all("Project-URL") is None  # there is none yet
    pythons = [line.rpartition(" ")[2] for line in said.get_all("Classifier") or ()
               if line.startswith("Programming Language :: Python :: 3.")]  # fmt: skip
    assert tuple(pythons) == installed.VERSIONS


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


def test_the_model_card_ships(wheel: zipfile.ZipFile) -> None:
    card = wheel.read("vmoe/shipped/README.md").decode()
    for section in ("Intended use", "Training data", "Evaluation", "Limitations", "Licence"):
        assert f"\n## {section}" in card
    assert wheel.read("vmoe/shipped/training.json")


@pytest.fixture(scope="module")
def base(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an environment with the wheel and what it needs, and no more."""
    folder = tmp_path_factory.mktemp("base")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "click"]
    if subprocess.run([*command, "-d", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("pip reaches no index here, so that nothing can be installed")
    installed.environment(sys.executable, folder / "env", str(built[0]))
    return folder / "env"


def test_what_is_installed_is_small(base: Path) -> None:
    sizes = installed.sizes_mb(base)
    opencv, numpy = sizes["opencv-python-headless"], sizes["numpy"]
    total = sum(mb for name, mb in sizes.items() if name not in installed.NOT_OURS)
    print(f"base install {total:.1f} MB, of it OpenCV {opencv:.1f} and NumPy {numpy:.1f}")
    assert "torch" not in sizes
    assert total < installed.BASE_MB
    assert sizes["vmoe"] < 15


def test_every_command_explains_itself_where_only_the_base_is(base: Path, tmp_path: Path) -> None:
    for words in installed.BASE:
        done = installed.alone(base / "bin", words, tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    done = installed.alone(base / "bin", ["vmoe-run", "--source", "test"], tmp_path)
    assert done.returncode == 5
    assert "vmoe[cpu]" in done.stderr


def test_the_cpu_extra_serves_with_no_repository_around(base: Path, built: tuple[Path, Path],
                                                        tmp_path: Path) -> None:  # fmt: skip
    pip = [str(base / "bin" / "python"), "-m", "pip", "install", "-q"]
    subprocess.run([*pip, f"vmoe[cpu] @ {built[0].as_uri()}"], check=True, capture_output=True)
    for words in installed.SERVING:
        done = installed.alone(base / "bin", words, tmp_path)
        assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "runs" / "demo" / "report.json").read_text())
    assert {segment["picture"] for segment in report["segments"]} == {
        f"procedural-{n}" for n in range(5)
    }
    assert report["exported_here"] is False
    assert report["right"] / report["windows"] > 0.5
    assert "bundle: as it ships" in (tmp_path / "runs" / "demo" / "report.md").read_text()


def test_it_runs_from_the_wheel_alone(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = "import vmoe, vmoe.runtime.cli as c; print(vmoe.__file__); c.main(['--version'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))

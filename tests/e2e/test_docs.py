"""The documentation, run: what a page says to type is typed, in order, in a folder of the page's.

A block of a page is run, or a comment before it says why not (`<!-- not run: needs a Jetson -->`)
or which other test runs it (`<!-- run by: tests/unit/test_x.py::test_y -->`).
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from tests import bundles, pages, videos
from tests.contract import test_registries as registries
from tests.pages import Block
from vmoe import registry

WITH_TORCH = {"vmoe-train": "vmoe.train.cli", "vmoe-export": "vmoe.export.cli",
              "vmoe-attack": "vmoe.attacks.cli"}  # fmt: skip
OURS = re.compile(
    r"\b(vmoe-(?:train|export|run|attack|bench)|vmoe (?:demo|doctor|inspect))\b(?!\.)([^\n`|;]*)"
)
# Flags of benchmarks/ and of other programs.
OTHERS = {"--quick", "--large", "--jobs", "--seeds", "--only", "--models", "--ablations",
          "--model-repository", "--exit-timeout-secs", "--group-add"}  # fmt: skip
FOR_SHELL = re.compile(r"[|><&;$]")
RUN_HERE = [page for page in pages.pages() if any(
    block.language in (pages.SHELL, pages.PYTHON) and not (block.not_run or block.run_by)
    for block in pages.blocks(page)
)]  # fmt: skip
BESIDE = [  # pages outside of docs/
    pages.ROOT / name
    for name in ("README.md", "CONTRIBUTING.md", "docker/README.md", "vmoe/shipped/README.md")
]
BLOCKS = [block for page in pages.pages() for block in pages.blocks(page)]


def name_of(page: Path) -> str:
    return page.relative_to(pages.DOCS).as_posix()


def where(page: Path) -> str:
    return page.relative_to(pages.ROOT).as_posix()


# --- what a page asks for is run ----------------------------------------------------------------


@pytest.fixture(scope="module")
def movie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a video of camera moves, five seconds of 320x240, 15 frames a second."""
    from vmoe import opencv
    from vmoe.runtime.sources import test

    cv2, path = opencv.quiet(), tmp_path_factory.mktemp("movie") / "street.mp4"
    size = (320, 240)
    fourcc = cv2.VideoWriter_fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, fourcc, 15.0, size)
    for number in range(0, 150, 2):
        writer.write(cv2.resize(test.render(number), size)[..., ::-1])
    writer.release()
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint that exports fast: an untrained tsm of two experts, camera-motion."""
    from tests.twins import lively
    from vmoe.checkpoint import Checkpoint, save
    from vmoe.data.camera_motion import LABELS

    path = tmp_path_factory.mktemp("trained") / "best.safetensors"
    save(Checkpoint(lively(experts=2, classes=len(LABELS)), LABELS), path)
    return path


@pytest.fixture
def folder(
    request: pytest.FixtureRequest, tmp_path: Path, movie: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Return the folder in which a page is followed, with what the page takes for granted."""
    for name in ("street.mp4", "walk.mp4"):
        (tmp_path / name).symlink_to(movie)
    page = name_of(request.getfixturevalue("page"))
    if page == "train.md":
        for label, first in (("left", 0), ("right", 100)):
            (tmp_path / "videos" / label).mkdir(parents=True)
            for take in range(1, 21):
                path = tmp_path / "videos" / label / f"take{take:02d}.mp4"
                videos.write(path, 9, 10.0, first=first + take)
    if page == "export.md":
        best = tmp_path / "runs" / "train" / "mine" / "best.safetensors"
        best.parent.mkdir(parents=True)
        shutil.copy(request.getfixturevalue("trained"), best)  # a link would give it its name
    if page in ("deploy.md", "triton.md"):
        bundles.write(tmp_path / "runs" / "export" / "mine-split", request.getfixturevalue("spec"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder whose attacks/methods/, runtime/sinks/ ... stand beside the real ones."""
    root, before = tmp_path / "added", set(sys.modules)
    for package in registries.FUNCTIONS:
        module = importlib.import_module(package)
        here = root / _place(package)
        here.mkdir(parents=True)
        monkeypatch.setattr(module, "__path__", [*module.__path__, str(here)])
    yield root
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(root):
            parent, _, child = name.rpartition(".")
            vars(sys.modules[parent]).pop(child, None)
            del sys.modules[name]


def _place(package: str) -> Path:
    """Return the folder of a package, as the repository has it."""
    parts = package.split(".")
    return Path(*(parts if parts[1] in ("models", "data") else parts[1:]))


@pytest.mark.parametrize("page", RUN_HERE, ids=name_of)
def test_what_a_page_says_to_type_works(
    page: Path, folder: Path, registered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(pages.ROOT))
    names: dict[str, Any] = {"__name__": page.stem}
    for block in pages.blocks(page):
        if block.not_run or block.run_by:
            continue
        if block.language == pages.SHELL:
            for command in block.commands:
                run(command, block.exit_code if command == block.commands[-1] else 0)
        elif block.language == pages.PYTHON and block.path:
            add(block, registered)
        elif block.language == pages.PYTHON:
            exec(compile(block.code, f"{page.name}, a block", "exec"), names)


def run(command: str, exit_code: int) -> None:
    """Type a command; what needs torch runs in this process, which has loaded it already."""
    words = shlex.split(command, comments=True)
    if words[0] in WITH_TORCH and not FOR_SHELL.search(re.sub(r"'[^']*'", "", command)):
        main = importlib.import_module(WITH_TORCH[words[0]]).main
        done = CliRunner().invoke(main, words[1:])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == exit_code, f"{command}\n{done.output}"
        return
    shell = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert shell.returncode == exit_code, f"{command}\n{shell.stdout}{shell.stderr}"
    assert "Traceback" not in shell.stderr, shell.stderr


def add(block: Block, root: Path) -> None:
    """Put an example's file into its folder, and look whether it holds what that promises."""
    assert block.path is not None
    path = root / block.path
    assert path.parent.is_dir(), f"{block.path}: no registry there"
    path.write_text(block.code)
    importlib.invalidate_caches()
    inside = Path(block.path).parent.as_posix().replace("/", ".")
    package = inside if inside.startswith("vmoe.") else f"vmoe.{inside}"
    name = path.stem.replace("_", "-")
    assert name in registry.names(package)
    registries.test_a_file_offers_what_its_folder_promises(package, name)
    if package in ("vmoe.attacks.methods", "vmoe.train.recipes"):
        registries.test_settings_have_defaults_and_help(package, name)
    if package == "vmoe.runtime.engines":
        registries.test_a_backend_names_its_formats_and_why_it_cannot_run(name)


def test_the_lowering_that_is_shown_answers_as_its_parts_do(
    registered: Path, tmp_path: Path
) -> None:
    import numpy as np
    import onnx
    import onnxruntime

    from vmoe.bundle import part_names
    from vmoe.clips import ClipSpec

    (block,) = [b for b in BLOCKS if b.path == "export/lowerings/masked.py"]
    add(block, registered)
    spec = ClipSpec(frames=2, spacing_s=0.1, height=8, width=8)
    tiny = bundles.write(tmp_path / "tiny", spec, experts=3)
    router, *experts = [onnx.load(tiny / f"{p}.onnx") for p in part_names("split", 3)]
    lowered = registry.load("vmoe.export.lowerings", "masked", "lowering").lower(router, experts)
    session = onnxruntime.InferenceSession(lowered["moe"].SerializeToString())
    clips = bundles.plain_clips(spec, (0, 50, 0), (255, 100, 0), (120, 200, 0))
    found, _, route = session.run(["logits", "scores", "route"], {"clip": clips})
    scores, logits = bundles.expected(clips, 3)
    assert route.tolist() == scores.argmax(axis=1).tolist() == [0, 2, 1]
    np.testing.assert_allclose(found, logits[np.arange(3), route], rtol=1e-5)


# --- what is not run says why -------------------------------------------------------------------


@pytest.mark.parametrize("page", pages.pages(), ids=name_of)
def test_a_block_is_run_or_says_why_not(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in pages.blocks(page):
        assert block.language, f"{page.name}: a block without a language:\n{block.code}"
        if block.run_by is not None:
            file, _, test = block.run_by.partition("::")
            source = (pages.ROOT / file).read_text()
            assert not test or f"def {test}(" in source, f"{page.name}: no test {block.run_by}"
        for named in re.findall(r"tests/[\w/]+\.py", block.not_run or ""):
            assert (pages.ROOT / named).is_file(), f"{page.name}: no {named}"
    said = len(re.findall(r"^<!-- (?:not run|run by|exit): .+ -->$", text, re.MULTILINE))
    heard = [b for b in pages.blocks(page) if b.not_run or b.run_by or b.exit_code]
    assert said == len(heard), f"{page.name}: a comment that stands before no block"
    assert not re.search(r"^(?: {4}|\t)(?:\$ )?vmoe", pages.prose(page), re.MULTILINE), (
        f"{page.name}: commands stand in ```sh blocks"
    )


# --- what is named is there ---------------------------------------------------------------------


def commands_of() -> dict[str, click.Command]:
    from vmoe.__main__ import main as vmoe
    from vmoe.attacks.cli import main as attack
    from vmoe.export.cli import main as export
    from vmoe.runtime.bench.cli import main as bench
    from vmoe.runtime.cli import command as run
    from vmoe.train.cli import main as train

    made = {"vmoe-train": train, "vmoe-export": export, "vmoe-run": run, "vmoe-attack": attack,
            "vmoe-bench": bench}  # fmt: skip
    return made | {f"vmoe {name}": command for name, command in vmoe.commands.items()}


def flags_of(command: click.Command) -> set[str]:
    named = {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}
    return named | {"--help", "-h", "--version"}


def typed(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each command line of ours in a text, by its command and the flags given."""
    joined = re.sub(r"\\\n\s*", "", text)
    for found in OURS.finditer(joined):
        rest = re.split(r"(?<!\S)#|  # |: | -- ", found[2])[0]
        yield found[1], re.findall(r"(?<![\w-])--?[a-z][\w-]*", rest)


@pytest.mark.parametrize("page", [*pages.pages(), *BESIDE], ids=where)
def test_every_flag_is_one_of_its_command(page: Path) -> None:
    """Of the README, whose commands are excerpts of long runs, this is all that is looked up."""
    known = {name: flags_of(command) for name, command in commands_of().items()}
    every = set().union(*known.values())
    text = page.read_text(encoding="utf-8")
    code = "\n".join([*re.findall(r"`([^`\n]+)`", text), *(b.code for b in pages.blocks(page)),
                      *re.findall(r"^ {4}(.+)$", text, re.MULTILINE)])  # fmt: skip
    for command, flags in typed(code):
        unknown = set(flags) - known[command]
        assert not unknown, f"{page.name}: {command} has no {unknown}"
    for flag in re.findall(r"`(--[a-z][\w-]+)", pages.prose(page)):
        assert flag in every | OTHERS, f"{page.name}: nothing has {flag}"


@pytest.mark.parametrize("page", [*pages.pages(), *BESIDE], ids=where)
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    for link in pages.links(page):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: no {link}"
        if anchor and target.suffix == ".md":
            assert anchor in pages.anchors(target), f"{page.name}: no {link}"


@pytest.mark.parametrize("page", [p for p in pages.pages() if "decisions" not in p.parts],
                         ids=name_of)  # fmt: skip
def test_a_table_of_measurements_has_its_command_beside_it(page: Path) -> None:
    whole = page.read_text(encoding="utf-8")
    for before, table in pages.tables(page):
        numbers = re.findall(r"\|\s*\**-?\d+\.\d+", table)
        if len(numbers) < 3:
            continue
        beside = before + whole[: whole.find("\n## ")]
        assert re.search(r"python (?:-m |benchmarks/)|benchmarks/\w+\.py|^vmoe|```sh|`vmoe", beside,
                         re.MULTILINE), f"{page.name}: no command beside\n{table}"  # fmt: skip


# --- pictures and the site ----------------------------------------------------------------------


def test_the_pictures_are_of_these_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="no matplotlib: pip install 'vmoe[plot]'")
    done = python("benchmarks/plots.py", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    kept = pages.DOCS / "plots"
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in kept.iterdir()}
    mark = re.compile(r"[\w.-]+\.json sha256 [0-9a-f]{64}")
    for path in tmp_path.iterdir():
        new, old = mark.findall(path.read_text()), mark.findall((kept / path.name).read_text())
        assert len(new) == 1
        assert new == old, f"{path.name} is older than its numbers: python benchmarks/plots.py"


def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(
    tmp_path: Path,
) -> None:
    pytest.importorskip("mkdocs", reason="no mkdocs: pip install 'vmoe[docs]'")
    done = python("-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    built = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.html")}
    assert {page.relative_to(pages.DOCS).with_suffix(".html") for page in pages.pages()} <= set(
        built
    )
    for path, text in built.items():
        assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=.https?:[^>]+>", text), path


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the repository's root."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=pages.ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(pages.ROOT), "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip

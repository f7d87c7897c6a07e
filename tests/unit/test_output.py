"""What is written is whole, or it is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vmoe import cli, output
from vmoe.errors import OutputError, SettingError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_in_file(path: Path) -> None:
    with output.whole_file(path) as temporary:
        temporary.write_text("half")
        raise KeyError


def fail_in_folder(path: Path, error: type[BaseException], *, overwrite: bool = False) -> None:
    with output.whole_folder(path, overwrite=overwrite) as folder:
        (folder / "part").write_text("half")
        raise error


def test_a_file_appears_when_the_body_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with output.whole_file(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.suffix == ".txt"
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert names(path.parent) == ["a.txt"]


def test_a_file_has_the_mode_of_any_other(tmp_path: Path) -> None:
    output.write_text(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_nothing_appears_when_the_body_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError):
        fail_in_file(path)
    assert path.read_text() == "old"
    with pytest.raises(KeyboardInterrupt):
        fail_in_folder(tmp_path / "d", KeyboardInterrupt)
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_appears_when_the_body_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bundle"
    with output.whole_folder(path) as folder:
        (folder / "part").write_text("x")
        assert not path.exists()
    assert (path / "part").read_text() == "x"
    assert names(path.parent) == ["bundle"]
    (tmp_path / "plain").mkdir()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_exists_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"exists\. Choose another --out, or say --overwrite"):
        output.whole_folder(tmp_path).__enter__()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SettingError, match="holds more than a bundle"):
        output.whole_folder(tmp_path, overwrite=True).__enter__()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_overwrite_replaces_a_bundle_whole(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    path.mkdir()
    (path / "vmoe.json").write_text("old")
    (path / "old.onnx").write_text("old")
    with output.whole_folder(path, overwrite=True) as folder:
        (folder / "vmoe.json").write_text("new")
    assert names(path) == ["vmoe.json"]
    assert names(tmp_path) == ["bundle"]
    with pytest.raises(KeyError):
        fail_in_folder(path, KeyError, overwrite=True)
    assert (path / "vmoe.json").read_text() == "new"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for inside in (tmp_path / "file" / "a", tmp_path / "file" / "b" / "a"):
        with pytest.raises(OutputError, match=r"cannot write .*Nothing was left half-written"):
            output.write_text(inside, "x")
        with pytest.raises(OutputError), output.whole_folder(inside):
            pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError):
        output.write_text(tmp_path / "folder", "x")


def test_an_output_is_probed_and_nothing_stays(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    for path in (tmp_path, tmp_path / "file", tmp_path / "new", tmp_path / "new" / "a" / "b"):
        output.probe(path)
    output.probe(Path("/dev/null"))
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"
    for path in (tmp_path / "file" / "a" / "b", tmp_path / ("n" * 300), Path("/proc/x")):
        with pytest.raises(OutputError, match=f"cannot write {path}: "):
            output.probe(path)


def test_an_error_of_another_file_is_not_ours(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), output.whole_folder(tmp_path / "out"):
        (tmp_path / "missing.mp4").read_bytes()
    assert not list(tmp_path.iterdir())


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    output.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_pipe_is_written_as_it_stands() -> None:
    code = "from pathlib import Path; from vmoe import output; "
    code += "output.write_json(Path('/dev/stdout'), {'a': 1})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == '{\n  "a": 1\n}\n'


def test_json_ends_with_a_newline(tmp_path: Path) -> None:
    output.write_json(tmp_path / "a.json", {"b": "é", "a": [1]})
    assert (tmp_path / "a.json").read_text() == '{\n  "b": "é",\n  "a": [\n    1\n  ]\n}\n'


def test_json_holds_no_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = {"a": float("nan"), "b": [float("-inf"), 1.5]}
    output.write_json(tmp_path / "a.json", value)
    cli.print_json(value)
    for text in ((tmp_path / "a.json").read_text(), capsys.readouterr().out):
        assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [None, 1.5]}


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from vmoe import output
from vmoe.errors import OutputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
where = Path(sys.argv[1])
def one(path):
    output.write_text(path, "x" * 5000)
def many(path):
    with output.whole_folder(path) as folder:
        (folder / "a").write_bytes(bytes(500))
        (folder / "b").write_bytes(bytes(5000))
def none(path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 1000))
    output.probe(path)
for write, name in ((one, "file"), (many, "folder"), (none, "probed")):
    try:
        write(where / name)
    except OutputError as e:
        print(e)
"""


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all("File too large. Nothing was left half-written." in line for line in lines)
    assert not list(tmp_path.iterdir())

"""A folder is a registry."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vmoe import registry
from vmoe.errors import UnknownNameError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "a_folder_of_things"
    folder.mkdir()
    for name in ("__init__", "plain", "two_words", "if_", "_hidden"):
        (folder / f"{name}.py").write_text(f"said = {name!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    return folder.name


@pytest.fixture(autouse=True)
def _forget() -> object:
    yield
    for name in [name for name in sys.modules if name.startswith("a_folder_of_things")]:
        del sys.modules[name]


def test_names_are_files_as_users_type_them(package: str) -> None:
    assert registry.names(package) == ["if", "plain", "two-words"]


@pytest.mark.parametrize(
    ("name", "file"),
    [("plain", "plain"), ("two-words", "two_words"), ("two_words", "two_words"), ("if", "if_")],
)
def test_a_name_loads_its_file(package: str, name: str, file: str) -> None:
    assert registry.load(package, name, "thing").said == file


@pytest.mark.parametrize("name", ["plian", "_hidden", "-hidden", "__init__", "", "plain.x", "os"])
def test_an_unknown_name(package: str, name: str) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown thing .*Known: if, plain, two-words"):
        registry.load(package, name, "thing")


def test_the_nearest_is_named(package: str) -> None:
    with pytest.raises(UnknownNameError, match="'two-wrods': did you mean 'two-words'"):
        registry.load(package, "two-wrods", "thing")


def test_a_new_file_is_known_at_once(package: str, tmp_path: Path) -> None:
    assert "later" not in registry.names(package)
    (tmp_path / package / "later.py").write_text("said = 'later'\n")
    assert registry.load(package, "later", "thing").said == "later"

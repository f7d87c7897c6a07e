"""Adversarial clips on disk."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tests.twins import SPEC, random_clips
from vmoe import adversarial
from vmoe.adversarial import AdversarialClips, Attacked
from vmoe.bundle import sha256
from vmoe.errors import SettingError, VmoeError

NEARLY = 0.03137255  # 8/255 as a decimal: another budget, whose name reads the same


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    attacked = tuple(
        Attacked(name, eps, [{"eps": eps, "steps": 3}], random_clips(3, seed))
        for seed, (name, eps) in enumerate([("pgd", 8 / 255), ("pgd", NEARLY), ("j-tlga", 8 / 255)])
    )
    clips = AdversarialClips(
        SPEC, ("a", "b"), random_clips(3, 9), (0, 1, 0), (4, 7, 9), attacked, {"data": "mine test"}
    )
    adversarial.save(clips, tmp_path / "clips")
    return tmp_path / "clips"


def edit(folder: Path, **values: object) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | values))


def test_comes_back_without_loss(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [
        "1-pgd-8.npz", "2-pgd-8.npz", "3-j-tlga-8.npz", "clean.npz", "manifest.json",
    ]  # fmt: skip
    clips = adversarial.load(saved)
    assert (clips.clean == random_clips(3, 9)).all()
    assert clips.spec == SPEC
    assert (clips.labels, clips.label, clips.index) == (("a", "b"), (0, 1, 0), (4, 7, 9))
    assert [(a.attack, a.eps) for a in clips.attacked] == [
        ("pgd", 8 / 255), ("pgd", NEARLY), ("j-tlga", 8 / 255),
    ]  # fmt: skip
    assert all((a.clips == random_clips(3, i)).all() for i, a in enumerate(clips.attacked))
    assert clips.origin == {"data": "mine test"}


def test_l2_clips_say_so(saved: Path, tmp_path: Path) -> None:
    clips = adversarial.load(saved)
    moved = (dataclasses.replace(clips.attacked[0], eps=2.0, norm="l2"),)
    adversarial.save(dataclasses.replace(clips, attacked=moved), tmp_path / "l2")
    assert (tmp_path / "l2/1-pgd-l2-2.npz").is_file()
    (again,) = adversarial.load(tmp_path / "l2").attacked
    assert (again.norm, again.eps) == ("l2", 2.0)


def test_clips_of_before_there_was_another_norm(saved: Path) -> None:
    attacked = json.loads((saved / "manifest.json").read_text())["attacked"]
    for each in attacked:
        del each["norm"]
    edit(saved, attacked=attacked)
    assert {each.norm for each in adversarial.load(saved).attacked} == {"linf"}
    attacked[0]["norm"] = "l3"
    edit(saved, attacked=attacked)
    with pytest.raises(VmoeError, match="norm is 'l3', neither linf nor l2"):
        adversarial.load(saved)


def test_folder_that_exists_is_left_alone(saved: Path) -> None:
    clips = adversarial.load(saved)
    with pytest.raises(SettingError, match="clips exists"):
        adversarial.save(clips, saved)


def test_nothing_is_left_where_it_cannot_be_written(saved: Path, tmp_path: Path) -> None:
    clips = adversarial.load(saved)
    (tmp_path / "file").write_text("x")
    with pytest.raises(VmoeError, match="cannot write"):
        adversarial.save(clips, tmp_path / "file" / "clips")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "file"]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(VmoeError, match=r"No such file or directory: .* --save-adv FOLDER"):
        adversarial.load(tmp_path / "none")


def test_changed_byte(saved: Path) -> None:
    data = bytearray((saved / "1-pgd-8.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (saved / "1-pgd-8.npz").write_bytes(data)
    with pytest.raises(VmoeError, match=r"1-pgd-8\.npz has changed since it was made"):
        adversarial.load(saved)


def test_missing_part(saved: Path) -> None:
    (saved / "clean.npz").unlink()
    with pytest.raises(VmoeError, match=r"clean\.npz is missing"):
        adversarial.load(saved)


def test_another_version(saved: Path) -> None:
    edit(saved, schema_version=2)
    with pytest.raises(VmoeError, match="schema version 2; this vmoe reads 1"):
        adversarial.load(saved)


def test_manifest_that_is_no_json(saved: Path) -> None:
    (saved / "manifest.json").write_text("{")
    with pytest.raises(VmoeError, match="is not JSON"):
        adversarial.load(saved)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"label": [0, 1, 2]}, "a label is not one of 2"),
        ({"label": [0, 1], "index": [0, 1]}, "3 clips for 2 labels"),
        ({"label": [], "index": []}, "0 labels and 0 indices"),
        ({"attacked": [{"attack": "pgd"}]}, "is missing"),
        ({"sha256": 3}, "damaged"),
        ({"clip": {"frames": "many"}}, "frames"),
        ({"clip": {"frames": 9, "height": 32, "width": 32}}, "takes uint8"),
    ],
)
def test_damaged_manifest(saved: Path, values: dict[str, object], why: str) -> None:
    edit(saved, **values)
    with pytest.raises(VmoeError, match=why):
        adversarial.load(saved)


@pytest.mark.parametrize("name", ["../outside.npz", "/etc/outside.npz", "a\\b.npz"])
def test_path_that_leaves_the_folder(saved: Path, name: str) -> None:
    hashes = json.loads((saved / "manifest.json").read_text())["sha256"]
    (saved.parent / "outside.npz").write_bytes((saved / "clean.npz").read_bytes())
    attacked = [{"attack": "pgd", "eps": 0.1, "settings": [], "file": name}]
    edit(saved, attacked=attacked, sha256=hashes | {name: hashes["clean.npz"]})
    with pytest.raises(VmoeError, match="leaves its folder; refused"):
        adversarial.load(saved)


def test_link_is_refused(saved: Path) -> None:
    (saved / "1-pgd-8.npz").rename(saved.parent / "elsewhere.npz")
    (saved / "1-pgd-8.npz").symlink_to(saved.parent / "elsewhere.npz")
    with pytest.raises(VmoeError, match="refused"):
        adversarial.load(saved)


def test_pickle_inside_is_refused(saved: Path) -> None:
    """An array of objects is a pickle, whatever its hash says."""
    np.savez(saved / "1-pgd-8.npz", clips=np.array([{"a": print}], dtype=object))
    hashes = json.loads((saved / "manifest.json").read_text())["sha256"]
    edit(saved, sha256=hashes | {"1-pgd-8.npz": sha256(saved / "1-pgd-8.npz")})
    with pytest.raises(VmoeError, match="holds no clips"):
        adversarial.load(saved)

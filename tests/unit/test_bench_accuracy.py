"""Accuracy beside speed, on bundles whose answers are known: any green is `waving`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests import bundles as tiny
from tests.bundles import BLACK, GREEN, RED, attack
from tests.bundles import attacked_clips as saved
from vmoe import adversarial, output
from vmoe import bundle as bundles
from vmoe.adversarial import AdversarialClips
from vmoe.bundle import Bundle
from vmoe.clips import ClipSpec
from vmoe.errors import SettingError, UnknownNameError, VmoeError
from vmoe.report import wilson
from vmoe.runtime import engine as engines
from vmoe.runtime.bench import accuracy


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, spec: ClipSpec) -> Path:
    return tiny.write(tmp_path_factory.mktemp("accuracy") / "split", spec)


def found(path: Path, clips: AdversarialClips) -> accuracy.Accuracy:
    with engines.load(path, threads=1) as engine:
        return accuracy.measure(engine, accuracy.Asked(saved=clips))


def test_robust_is_right_under_every_attack_of_a_budget(path: Path, spec: ClipSpec) -> None:
    clips = saved(
        spec,
        attack(spec, "pgd", BLACK, GREEN, BLACK, RED),  # breaks the first
        attack(spec, "tlga-r", GREEN, GREEN, GREEN, RED),  # breaks the third
        attack(spec, "pgd", BLACK, BLACK, GREEN, RED, eps=16 / 255),
    )
    made = found(path, clips)
    assert made.clean is None
    assert made.saved_clean is not None
    assert (made.saved_clean.hits, made.saved_clean.n) == (4, 4)
    eight, sixteen = made.robust
    assert eight.attacks == ("pgd", "tlga-r")
    assert (eight.right.hits, eight.right.n) == (2, 4)
    assert (eight.right.low, eight.right.high) == wilson(2, 4)
    assert eight.routes == (6, 0, 2)  # of both attacks
    assert sixteen.right.hits == 1
    assert [accuracy.budget(each) for each in made.robust] == ["8/255", "16/255"]


@pytest.mark.parametrize(
    ("origin", "more", "made", "own"),
    [
        ({"twin_sha256": "0" * 64}, {}, "transfer from its twin", True),
        (
            {"twin_sha256": "abcdef0123456789"},
            {},
            "transfer from another twin (sha256 abcdef012345)",
            False,
        ),
        ({}, {}, "transfer from an unknown twin", False),
        (
            {"engines": {"fp32": "x onnxruntime"}},
            {"mode": "query", "against": "fp32"},
            "query against another engine",
            False,
        ),
    ],
)
def test_where_the_clips_are_from_is_said(
    path: Path, spec: ClipSpec, origin: dict[str, Any], more: dict[str, str], made: str, own: bool
) -> None:
    clips = saved(spec, attack(spec, "square", GREEN, GREEN, BLACK, RED, **more), origin=origin)
    (robust,) = found(path, clips).robust
    assert (robust.made, robust.own) == (made, own)


def test_clips_made_against_the_bundle_itself_are_its_own(path: Path, spec: ClipSpec) -> None:
    with engines.load(path, threads=1) as engine:
        engine_s = {"engine": accuracy.identity(engine)}
    made = attack(spec, "nes", GREEN, GREEN, BLACK, RED, mode="adaptive", against="engine")
    both = attack(spec, "pgd", GREEN, GREEN, BLACK, RED)
    clips = saved(spec, made, both, origin={"engines": engine_s, "twin_sha256": "f" * 64})
    (robust,) = found(path, clips).robust
    assert robust.made == (
        "adaptive against itself; transfer from another twin (sha256 ffffffffffff)"
    )
    assert not robust.own


def test_l2_budgets_have_a_column_of_their_own(path: Path, spec: ClipSpec) -> None:
    clips = saved(spec, attack(spec, "pgd", GREEN, GREEN, BLACK, RED, eps=2.0, norm="l2"))
    assert [accuracy.budget(each) for each in found(path, clips).robust] == ["L2 2.0"]


# ---- clean clips


def labelled(path: Path, spec: ClipSpec, labels: tuple[str, ...]) -> Path:
    """Return a bundle like `path`, with other labels."""
    tiny.write(path, spec, experts=2)
    manifest = path / bundles.MANIFEST
    values = json.loads(manifest.read_text())
    output.write_json(manifest, {**values, "labels": list(labels)})
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set of which the tiny bundles get 3 of 4 test clips right."""
    return tiny.coloured_videos(tmp_path_factory.mktemp("videos"))


def test_clean_accuracy_is_of_the_data_s_test_split(path: Path, videos: Path) -> None:
    read = [("split", bundles.read(path))]
    asked = accuracy.ask(str(videos), 100, None, read)
    with engines.load(path, threads=1) as engine:
        made = accuracy.measure(engine, asked).clean
        fewer = accuracy.measure(engine, dataclasses.replace(asked, n=1)).clean
    assert made is not None
    assert made.data == f"{videos} test"
    assert (made.right.hits, made.right.n) == (3, 4)
    assert made.routes == (4, 0, 0)
    assert fewer is not None
    assert fewer.right.n == 1


def bundle(path: Path) -> Bundle:
    return bundles.read(path)


def test_data_that_a_bundle_cannot_answer_is_refused(
    tmp_path: Path, spec: ClipSpec, path: Path, videos: Path
) -> None:
    other = bundle(labelled(tmp_path / "other", spec, ("still", "left", "right")))
    with pytest.raises(SettingError) as refused:
        accuracy.ask(str(videos), 10, None, [("split", bundle(path)), ("other", other)])
    assert str(refused.value) == (
        f"--accuracy {videos} has the label 'waving', which other does not know; it knows still, "
        "left, right (3)."
    )
    with pytest.raises(UnknownNameError, match="did you mean 'camera-motion'"):
        accuracy.ask("camera-motin", 10, None, [("split", bundle(path))])
    with pytest.raises(SettingError, match="is no folder"):
        accuracy.ask(str(tmp_path / "nowhere"), 10, None, [("split", bundle(path))])


def test_saved_clips_of_another_model_are_refused(
    tmp_path: Path, spec: ClipSpec, path: Path
) -> None:
    clips = saved(spec, attack(spec, "pgd", GREEN, GREEN, BLACK, RED))
    adversarial.save(clips, tmp_path / "clips")
    assert accuracy.ask(None, 1, tmp_path / "clips", [("split", bundle(path))]).saved is not None
    larger = dataclasses.replace(spec, spacing_s=0.2)
    another = [("split", bundle(path)), ("slow", bundle(tiny.write(tmp_path / "slow", larger)))]
    with pytest.raises(SettingError) as refused:
        accuracy.ask(None, 1, tmp_path / "clips", another)
    assert str(refused.value) == (
        f"--robust {tmp_path}/clips has clips of spacing_s 0.1, slow takes 0.2: make them for this "
        "model (vmoe-attack BUNDLE --save-adv DIR)."
    )
    names = [("l", bundle(labelled(tmp_path / "l", spec, ("a", "b", "c"))))]
    with pytest.raises(SettingError, match=r"has labels still, moving, waving \(3\), l has a, b"):
        accuracy.ask(None, 1, tmp_path / "clips", names)


def test_saved_clips_that_are_none_are_refused(tmp_path: Path, spec: ClipSpec, path: Path) -> None:
    read = [("split", bundle(path))]
    with pytest.raises(VmoeError, match=r"has no manifest.json: make it by vmoe-attack BUNDLE"):
        accuracy.ask(None, 1, tmp_path / "nowhere", read)
    adversarial.save(saved(spec), tmp_path / "clean")
    with pytest.raises(VmoeError, match="holds clean clips alone: make them with some --attack"):
        accuracy.ask(None, 1, tmp_path / "clean", read)

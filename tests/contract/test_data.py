"""Every data set keeps what `vmoe.data.DataSet` promises, on a small one in its own layout."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from tests.layouts import LAYOUTS
from vmoe import registry
from vmoe.clips import ClipSpec
from vmoe.data import SPLITS, DataSet, DataSettings, open_data
from vmoe.errors import SettingError, VmoeError

NAMES = registry.names("vmoe.data")
CLIPS = 4
SEEDED = DataSettings(clips=CLIPS, seed=7)


@pytest.fixture(scope="module", params=NAMES)
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return what a command line calls a small data set."""
    name: str = request.param
    assert name in LAYOUTS, f"show in tests/layouts.py how {name} is laid out"
    return LAYOUTS[name](tmp_path_factory.mktemp(name) / "data")


@pytest.fixture
def opened(data: str, spec: ClipSpec) -> dict[str, DataSet]:
    return {split: open_data(data, split, spec, SEEDED) for split in SPLITS}


def same(one: DataSet, other: DataSet) -> bool:
    both = zip(
        (one[i] for i in range(len(one))), (other[i] for i in range(len(other))), strict=True
    )
    return all(np.array_equal(a[0], b[0]) and a[1] == b[1] for a, b in both)


def test_clips_are_as_the_spec_has_them(opened: dict[str, DataSet], spec: ClipSpec) -> None:
    for one in opened.values():
        assert 2 <= len(one) <= CLIPS
        for i in range(len(one)):
            clip, label = one[i]
            assert clip.shape == spec.shape
            assert clip.dtype == np.uint8
            assert clip.flags.c_contiguous
            assert type(label) is int
            assert 0 <= label < len(one.labels)
        for beyond in (len(one), -1):
            with pytest.raises(IndexError):
                one[beyond]


def test_labels_agree_and_classes_take_turns(opened: dict[str, DataSet]) -> None:
    assert len({one.labels for one in opened.values()}) == 1
    for one in opened.values():
        assert [one[i][1] for i in range(2)] == [0, 1]
        assert len(set(one.labels)) == len(one.labels) >= 2


def test_the_same_again_in_another_process(opened: dict[str, DataSet]) -> None:
    for one in opened.values():
        assert same(one, one)
        assert same(one, pickle.loads(pickle.dumps(one)))


def test_an_epoch_changes_train_alone_and_comes_back(
    data: str, opened: dict[str, DataSet], spec: ClipSpec
) -> None:
    later = opened["train"].at_epoch(3)
    assert not same(later, opened["train"])
    settings = DataSettings(clips=CLIPS, seed=7, epoch=3)
    assert same(later, open_data(data, "train", spec, settings))
    assert same(later.at_epoch(0), opened["train"])


def test_splits_share_no_file(data: str, spec: ClipSpec) -> None:
    files = {
        split: {path for path, _ in getattr(open_data(data, split, spec), "files", ())}
        for split in SPLITS
    }
    assert sum(map(len, files.values())) == len(set.union(*files.values()))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_there_is_said_in_one_line(name: str, spec: ClipSpec, tmp_path: Path) -> None:
    for data in (f"{name}:{tmp_path / 'none'}", f"{name}:{tmp_path}", name):
        if data == "camera-motion":
            continue  # needs no folder
        with pytest.raises(SettingError) as e:
            open_data(data, "train", spec)
        assert "\n" not in str(e.value)
        assert isinstance(e.value, VmoeError)


@pytest.mark.parametrize("name", NAMES)
def test_a_flip_never_makes_a_label_wrong(name: str, spec: ClipSpec, tmp_path: Path) -> None:
    """Camera-motion refuses it; files are flipped only where no class names a side."""
    settings = DataSettings(clips=2, augment=("flip",))
    data = LAYOUTS[name](tmp_path / "data")
    if name == "camera-motion":
        with pytest.raises(SettingError, match="a flip would make pan-left pan-right"):
            open_data(data, "train", spec, settings)
        return
    plain = open_data(data, "train", spec, DataSettings(clips=2, augment=("none",)))
    one = open_data(data, "train", spec, settings)
    flipped = [
        [np.array_equal(one.at_epoch(e)[i][0], plain.at_epoch(e)[i][0][:, :, ::-1]) for i in (0, 1)]
        for e in range(6)
    ]
    kept = [
        [np.array_equal(one.at_epoch(e)[i][0], plain.at_epoch(e)[i][0]) for i in (0, 1)]
        for e in range(6)
    ]
    assert np.array(flipped).any()
    assert np.array(kept).any()
    assert (np.array(flipped) != np.array(kept)).all()

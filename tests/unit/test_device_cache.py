"""The device cache: optimised graphs that are kept, proven, made again, and never in the way."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array

from tests.graphs import Writer
from vmoe import cli
from vmoe.bundle import Part
from vmoe.clips import Clips
from vmoe.errors import CorruptBundleError
from vmoe.export import graphs, optimize
from vmoe.export.onnx import write_part
from vmoe.runtime.engines import BackendSettings, _cache, _names
from vmoe.runtime.engines import onnxruntime as backend
from vmoe.runtime.engines._cache import Cache


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Part]:
    """Return a folder with a part whose convolutions get the CPU's layout, and the part."""
    write = Writer(3, 12)
    x = write.conv(write.pixels(), 3, 32, (3, 3, 3), pads=[1] * 6)
    y = write.conv(write.node("Relu", x), 32, 32, (3, 3, 3), pads=[1] * 6)
    model = write.model(write.head(write.node("Relu", write.node("Add", x, y)), 32))
    made = optimize.lower(model, "direct")
    assert made is not None
    folder = tmp_path_factory.mktemp("part")
    return folder, write_part(made, folder, "expert0")


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cache, "LARGE_BYTES", 0)


def clips() -> Clips:
    return np.random.default_rng(0).integers(0, 256, (2, 3, 12, 12, 3)).astype(np.uint8)


def answer(written: tuple[Path, Part], cache: Path | None, runs: int = 2) -> np.ndarray:
    """Load the part, run it, and close; return the last logits."""
    folder, part = written
    opened = backend.open(BackendSettings(folder, "cpu", 1, cache=cache))
    run = opened.load(part)
    for _ in range(runs):
        logits = run({"clip": clips()})["logits"]
    opened.close()
    return logits


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("onnxruntime/*"))


def the_cache(cache: Path) -> Cache:
    return Cache(cache, onnxruntime.__version__)


def test_a_part_is_kept_after_its_first_answer_and_gives_the_same_bits(
    written: tuple[Path, Part], tmp_path: Path
) -> None:
    plain = answer(written, None)
    assert not list(tmp_path.iterdir())
    folder, part = written
    opened = backend.open(BackendSettings(folder, "cpu", 1, cache=tmp_path))
    run = opened.load(part)
    assert not list(tmp_path.iterdir()), "loading waits for the cache"
    first = run({"clip": clips()})["logits"]
    opened.close()
    assert len(entries(tmp_path)) == 1
    found = the_cache(tmp_path).find(part)
    assert found is not None
    kinds = {node.domain for node in onnx.load(found, load_external_data=False).graph.node}
    assert "com.microsoft.nchwc" in kinds
    again = answer(written, tmp_path)
    assert np.array_equal(plain, first)
    assert np.array_equal(plain, again)


def test_of_a_part_in_the_cache_nothing_is_read(written: tuple[Path, Part], tmp_path: Path) -> None:
    plain = answer(written, tmp_path / "cache")
    (tmp_path / "gone").mkdir()
    moved = (tmp_path / "gone", written[1])
    assert np.array_equal(answer(moved, tmp_path / "cache"), plain)
    with pytest.raises(CorruptBundleError, match=r"gone changed since it was loaded: expert0"):
        answer(moved, None)


def test_what_is_kept_is_what_is_loaded(written: tuple[Path, Part], tmp_path: Path) -> None:
    plain = answer(written, tmp_path)
    found = the_cache(tmp_path).find(written[1])
    assert found is not None
    model = onnx.load(found)
    bias = next(t for t in model.graph.initializer if t.dims == [4])
    bias.CopyFrom(from_array(np.full(4, 9, np.float32), bias.name))
    onnx.save(model, found, save_as_external_data=True, location="graph.onnx.data",
              size_threshold=1024)  # fmt: skip
    entry = json.loads(found.with_name("entry.json").read_text())
    entry["sums"] = {n: _cache.checksum(found.with_name(n)) for n in entry["sums"]}
    found.with_name("entry.json").write_text(json.dumps(entry))
    assert not np.allclose(answer(written, tmp_path), plain), "the cache is not read at all"


@pytest.mark.parametrize("damage", ["graph.onnx", "graph.onnx.data", "entry.json", "gone", "text"])
def test_a_damaged_entry_is_not_parsed_and_made_again(
    written: tuple[Path, Part], damage: str, tmp_path: Path
) -> None:
    plain = answer(written, tmp_path)
    (place,) = entries(tmp_path)
    if damage == "gone":
        (place / "graph.onnx").unlink()
    elif damage == "text":
        (place / "entry.json").write_text('{"about": [')
    else:
        held = bytearray((place / damage).read_bytes())
        held[len(held) // 2] ^= 0x20
        (place / damage).write_bytes(held)
    assert the_cache(tmp_path).find(written[1]) is None
    assert np.array_equal(answer(written, tmp_path), plain)
    assert the_cache(tmp_path).find(written[1]) is not None
    assert entries(tmp_path) == [place]


@pytest.mark.parametrize("size", [0, 1, 4096, (256 << 10) + 5])
def test_the_checksum_finds_what_a_disk_does(size: int, tmp_path: Path) -> None:
    whole = np.random.default_rng(0).integers(1, 256, size, np.uint8).tobytes()
    zeros, at = bytes(8), size // 2
    others = {whole + zeros, whole[:-1] + zeros, b"\0" + whole}
    if size:
        others |= {whole[:-1], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]}
    if size > 8192:
        for unit in (8, 512, 4096):  # a word, a sector, a page
            one, other, rest = whole[:unit], whole[unit : 2 * unit], whole[2 * unit :]
            others |= {other + one + rest, bytes(unit) + other + rest, one + one + rest}
    sums = set()
    for i, held in enumerate([whole, *others]):
        (tmp_path / str(i)).write_bytes(held)
        sums.add(_cache.checksum(tmp_path / str(i)))
    assert len(sums) == 1 + len(others)


def test_another_version_cpu_or_part_is_another_entry(
    written: tuple[Path, Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(written, tmp_path)
    part = written[1]
    assert Cache(tmp_path, "1.0").find(part) is None
    other = Part(part.file, part.format, {"a": "0" * 64}, part.inputs, part.outputs, {})
    assert the_cache(tmp_path).find(other) is None
    monkeypatch.setattr(_cache, "cpu", lambda: "another")
    assert the_cache(tmp_path).find(part) is None


def test_an_entry_that_was_moved_to_anothers_place_is_refused(
    written: tuple[Path, Part], tmp_path: Path
) -> None:
    answer(written, tmp_path)
    (place,) = entries(tmp_path)
    other = Cache(tmp_path, "1.0")
    place.rename(other._place(written[1]))
    assert other.find(written[1]) is None


def test_one_that_loads_no_more_is_dropped(written: tuple[Path, Part], tmp_path: Path) -> None:
    plain = answer(written, tmp_path)
    (place,) = entries(tmp_path)
    (place / "graph.onnx").write_bytes(b"\x08\x0a")  # a model without a graph
    entry = json.loads((place / "entry.json").read_text())
    entry["sums"]["graph.onnx"] = _cache.checksum(place / "graph.onnx")
    (place / "entry.json").write_text(json.dumps(entry))
    assert np.array_equal(answer(written, tmp_path), plain)
    assert (place / "graph.onnx").stat().st_size > 1000, "it was not made again"


@pytest.fixture
def read_only(tmp_path: Path) -> Path:
    """Return a folder that cannot be made: a file stands in its way (root ignores modes)."""
    blocked = tmp_path / "home"
    blocked.write_text("")
    return blocked / "cache"


def test_a_home_that_cannot_be_written_only_means_no_cache(
    written: tuple[Path, Part], read_only: Path
) -> None:
    assert np.array_equal(answer(written, read_only), answer(written, None))


def test_a_full_disk_leaves_nothing(written: tuple[Path, Part], tmp_path: Path) -> None:
    def save(graph: Path, place: Path) -> None:
        place.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    assert not the_cache(tmp_path).put(written[1], written[0] / "expert0.onnx", save)
    assert not entries(tmp_path)


@pytest.mark.parametrize("when", ["while", "until it was made"])
def test_what_another_file_gives_is_not_kept_under_the_old_hash(
    written: tuple[Path, Part], tmp_path: Path, when: str
) -> None:
    folder = shutil.copytree(written[0], tmp_path / "part")
    graph = folder / written[1].file
    held = graph.read_bytes()
    opened = backend.open(BackendSettings(folder, "cpu", 1))

    def overwrite() -> None:
        model = onnx.load(graph)
        model.producer_name = "another export"
        onnx.save(model, graph)

    def save(graph: Path, place: Path) -> None:
        if when == "while":
            overwrite()
        opened._save(graph, place)
        if when == "until it was made":
            graph.write_bytes(held)

    if when == "until it was made":
        overwrite()
    cache = the_cache(tmp_path)
    assert not cache.put(written[1], graph, save)
    assert cache.find(written[1]) is None
    assert not entries(tmp_path)


def test_several_at_once_leave_one_whole_entry(written: tuple[Path, Part], tmp_path: Path) -> None:
    def one() -> None:
        answer(written, tmp_path, runs=1)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert the_cache(tmp_path).find(written[1]) is not None
    assert len(entries(tmp_path)) == 1
    assert not list(tmp_path.glob("onnxruntime/.*"))


def test_a_small_graph_is_not_kept(
    written: tuple[Path, Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cache, "LARGE_BYTES", 1 << 30)
    answer(written, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_was_not_used_for_a_month_goes(written: tuple[Path, Part], tmp_path: Path) -> None:
    old = tmp_path / "onnxruntime" / "old"
    old.mkdir(parents=True)
    (old / "entry.json").write_text("{}")
    os.utime(old / "entry.json", (0, 0))
    answer(written, tmp_path)
    assert not old.exists()
    assert len(entries(tmp_path)) == 1


def test_what_a_killed_process_left_goes_and_what_is_being_made_stays(
    written: tuple[Path, Part], tmp_path: Path
) -> None:
    left, making = (tmp_path / "onnxruntime" / f".new-{name}" for name in ("left", "making"))
    for folder in (left, making):
        folder.mkdir(parents=True)
    os.utime(left, (0, 0))
    answer(written, tmp_path)
    assert not left.exists()
    assert making.exists()


def test_the_users_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.cache_folder() == tmp_path / "vmoe"
    for nothing in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", nothing)
        assert cli.cache_folder() == Path.home() / ".cache" / "vmoe"


def test_names_are_made_unique_in_subgraphs_alone() -> None:
    value = helper.make_tensor_value_info

    def branch(shift: float) -> onnx.GraphProto:
        nodes = [helper.make_node("Add", ["x", "w"], ["t"]), helper.make_node("Relu", ["t"], ["y"])]
        held = [from_array(np.full(3, shift, np.float32), "w")]
        return helper.make_graph(nodes, "b", [], [value("y", TensorProto.FLOAT, [3])], held)

    nodes = [
        helper.make_node("Neg", ["in"], ["t"]), helper.make_node("Neg", ["t"], ["x"]),
        helper.make_node("If", ["go"], ["out"], then_branch=branch(1), else_branch=branch(2)),
    ]  # fmt: skip
    inputs = [value("in", TensorProto.FLOAT, [3]), value("go", TensorProto.BOOL, [])]
    graph = helper.make_graph(nodes, "g", inputs, [value("out", TensorProto.FLOAT, [3])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(onnx.checker.ValidationError, match="SSA"):
        onnx.checker.check_model(model)
    made = onnx.ModelProto()
    made.ParseFromString(_names.make_unique(model.SerializeToString()))
    onnx.checker.check_model(made, full_check=True)
    names = [o for s in graphs.walk(made.graph) for n in s.node for o in n.output]
    assert len(names) == len(set(names))
    assert [v.name for v in (*made.graph.input, *made.graph.output)] == ["in", "go", "out"]
    session = onnxruntime.InferenceSession(
        made.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = np.float32([-5, 0, 5])
    for go, shift in ((True, 1), (False, 2)):
        got = session.run(None, {"in": x, "go": np.asarray(go)})[0]
        assert np.array_equal(got, np.maximum(x + shift, 0))


@pytest.mark.parametrize("data", [b"\xff", b"\x3a\x7f", b"\x3b", b"\x39\x00"])
def test_what_is_no_protobuf_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"byte|message"):
        _names.make_unique(data)

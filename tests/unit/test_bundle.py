"""A bundle is read with suspicion: each way in which it can be bad, by error class and line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import vmoe
from vmoe import bundle as bundles
from vmoe import output
from vmoe.bundle import Bundle, Part, Port
from vmoe.clips import ClipSpec
from vmoe.errors import BundleError, CorruptBundleError, EngineMismatchError

FILES = {"router.onnx": b"r", "expert0.onnx": b"e0", "expert1.onnx": b"e1", "expert1.data": b"d"}
TWIN = b"twin"
SCHEMA = json.loads(Path(vmoe.__file__).with_name("bundle.schema.json").read_text())


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def part(*files: str, out: str) -> Part:
    return Part(
        file=files[0],
        format="onnx",
        hashes={name: digest(FILES[name]) for name in files},
        inputs=(Port("clip", "uint8", (None, 8, 64, 64, 3)),),
        outputs=(Port(out, "float32", (None, 2)),),
        precision={"asked": "fp32", "found": "fp32"},
    )


def made(path: Path) -> Bundle:
    return Bundle(
        path=path,
        model={"name": "tiny", "arch": "tsm", "width": 0.5, "experts": 2, "classes": 3},
        spec=ClipSpec(),
        labels=("a", "b", "c"),
        lowering="split",
        parts={
            "router": part("router.onnx", out="scores"),
            "expert0": part("expert0.onnx", out="logits"),
            "expert1": part("expert1.onnx", "expert1.data", out="logits"),
        },
        twin={"sha256": digest(TWIN), "file": "twin.safetensors"},
        versions={"vmoe": "0"},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with output.whole_folder(tmp_path / "bundle") as inside:
        for name, data in FILES.items():
            (inside / name).write_bytes(data)
        (inside / "twin.safetensors").write_bytes(TWIN)
        bundles.write_manifest(made(inside), inside)
    return tmp_path / "bundle"


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "vmoe.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def test_what_was_written_is_read(folder: Path) -> None:
    assert bundles.read(folder) == made(folder)


def test_the_same_bytes_twice(folder: Path, tmp_path: Path) -> None:
    bundles.write_manifest(made(folder), tmp_path)
    assert (tmp_path / "vmoe.json").read_bytes() == (folder / "vmoe.json").read_bytes()


def test_unknown_keys_are_kept(folder: Path, tmp_path: Path) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["card"] = {"by": "us"}
        manifest["model"]["depth"] = 18
        manifest["parts"]["router"]["layout"] = "NDHWC"

    change(folder, edit)
    read = bundles.read(folder)
    assert read.extra == {"card": {"by": "us"}}
    bundles.write_manifest(read, tmp_path)
    again = json.loads((tmp_path / "vmoe.json").read_text())
    assert again == json.loads((folder / "vmoe.json").read_text())


def test_report(folder: Path) -> None:
    assert bundles.read(folder).report() == {}
    (folder / "report.json").write_text('{"parity": 1e-6}')
    assert bundles.read(folder).report() == {"parity": 1e-6}
    (folder / "report.json").write_text("[]")
    with pytest.raises(CorruptBundleError, match=r"report\.json is not a JSON object"):
        bundles.read(folder).report()


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here that fails to read")
def test_a_report_that_cannot_be_read(folder: Path) -> None:
    (folder / "report.json").symlink_to("/proc/self/mem")  # root reads whatever modes forbid
    with pytest.raises(CorruptBundleError, match=r"report\.json cannot be read: "):
        bundles.read(folder).report()


def test_parts_of_each_lowering() -> None:
    assert bundles.part_names("split", 2) == ["router", "expert0", "expert1"]
    assert bundles.part_names("split", 1) == ["expert0"]
    for lowering in ("if", "plugin", "dense"):
        assert bundles.part_names(lowering, 4) == ["moe"]


def test_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "a.safetensors").touch()
    for file in ("export/one/vmoe.json", "export/two/vmoe.json", "trained/best.safetensors"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    for path, why in (
        (tmp_path / "none", r"does not exist: not a bundle\. Make one: vmoe-export CKPT --out"),
        (tmp_path / "file", "is no folder: not a bundle"),
        (tmp_path, r"holds no vmoe\.json: not a bundle"),
        (tmp_path / "export", r"holds no vmoe\.json: not a bundle\. Name one in it: .*one, .*two$"),
        (tmp_path / "trained", "is a training's folder: not a bundle. Make one of it: vmoe-export"),
        (tmp_path / "a.safetensors", "is a checkpoint: not a bundle. Make one of it: vmoe-export"),
    ):
        with pytest.raises(BundleError, match=why):
            bundles.read(path)


def test_a_misspelt_bundle_gets_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "export" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "export" / "mine" / "vmoe.json").touch()
    with pytest.raises(BundleError, match=r"did you mean 'runs/export/mine'\? Make one"):
        bundles.read(Path("runs/exprot/mine"))


def test_another_schema_version(folder: Path) -> None:
    change(folder, lambda m: m.update(schema_version=2))
    with pytest.raises(EngineMismatchError, match="has schema version 2; this vmoe reads 1"):
        bundles.read(folder)
    change(folder, lambda m: m.pop("schema_version"))
    with pytest.raises(EngineMismatchError, match="has schema version None"):
        bundles.read(folder)


@pytest.mark.parametrize("key", ["model", "clip", "labels", "lowering", "parts", "twin"])
def test_a_missing_key_is_named(folder: Path, key: str) -> None:
    change(folder, lambda m: m.pop(key))
    with pytest.raises(CorruptBundleError, match=f"is damaged: key '{key}' is missing"):
        bundles.read(folder)


BAD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "experts": (lambda m: m["model"].update(experts=0), r"model\.experts is 0"),
    "no experts": (lambda m: m["model"].pop("experts"), "key 'experts' is missing"),
    "many": (lambda m: m["model"].update(experts=10**9), r"model\.experts is 1000000000"),
    "bool": (lambda m: m["model"].update(experts=True), r"model\.experts is True"),
    "model": (lambda m: m.update(model=7), "is damaged"),
    "lowering": (lambda m: m.update(lowering="magic"), "lowering is 'magic'"),
    "lowering list": (lambda m: m.update(lowering=["if"]), r"lowering is \['if'\]"),
    "labels": (lambda m: m.update(labels=[]), "labels must be a list of names"),
    "label text": (lambda m: m.update(labels="abc"), "labels must be a list of names"),
    "label": (lambda m: m.update(labels=["a", 3]), "labels must be a list of names"),
    "clip": (lambda m: m["clip"].update(frames=0), "--frames is 0; it must be at least 1. Exp"),
    "clip key": (lambda m: m["clip"].update(fames=3), "'fames': did you mean 'frames'"),
    "clip type": (lambda m: m["clip"].update(height="64"), "height in .* must be int"),
    "mean": (lambda m: m["clip"].update(mean=["x", 0, 0]), "mean in .* must be float"),
    "parts": (lambda m: m.update(parts=[]), "is damaged"),
    "part": (lambda m: m["parts"].update(router=None), "is damaged"),
    "no file": (lambda m: m["parts"]["router"].pop("file"), "key 'file' is missing"),
    "file": (lambda m: m["parts"]["router"].update(file=[1]), r"file is \[1\]"),
    "hashes": (lambda m: m["parts"]["router"].update(sha256={"router.onnx": 1}), "router.onnx is"),
    "shape": (
        lambda m: m["parts"]["router"]["inputs"][0].update(shape="N8"),
        "clip's shape is 'N8'",
    ),
    "port": (lambda m: m["parts"]["router"]["inputs"][0].update(name=3), "name is 3"),
    "twin": (lambda m: m["twin"].update(file=3), "file is 3"),
    "twin hash": (lambda m: m["twin"].pop("sha256"), "key 'sha256' is missing"),
    "versions": (lambda m: m.update(versions=3), "versions is 3"),
    "version": (lambda m: m["versions"].update(onnx=3), "onnx is 3"),
    "versions list": (lambda m: m.update(versions=[1]), r"versions is \[1\]"),
    "no name": (lambda m: m["model"].pop("name"), "key 'name' is missing"),
    "no arch": (lambda m: m["model"].pop("arch"), "key 'arch' is missing"),
    "arch": (lambda m: m["model"].update(arch=3), "arch is 3"),
    "no width": (lambda m: m["model"].pop("width"), "key 'width' is missing"),
    "width": (lambda m: m["model"].update(width="x"), r"model\.width is 'x'"),
    "no width at all": (lambda m: m["model"].update(width=0), r"model\.width is 0"),
    "true width": (lambda m: m["model"].update(width=True), r"model\.width is True"),
    "giant width": (lambda m: m["model"].update(width=10**400), r"model\.width is 1000"),
    "classes": (lambda m: m["model"].update(classes=1), r"model\.classes is 1"),
    "twin list": (lambda m: m.update(twin=[0]), r"twin is \[0\]"),
    "twin empty": (lambda m: m.update(twin={}), "key 'sha256' is missing"),
    "short hash": (lambda m: m["twin"].update(sha256="0" * 63), "sha256 of twin is '0"),
    "large hash": (lambda m: m["twin"].update(sha256="A" * 64), "sha256 of twin is 'A"),
    "part hash": (
        lambda m: m["parts"]["router"].update(sha256={"router.onnx": "x"}),
        r"sha256 of router\.onnx is 'x'",
    ),
    "precision": (lambda m: m["parts"]["router"].update(precision=3), "precision is 3"),
    "found": (lambda m: m["parts"]["router"]["precision"].update(found=3), "found is 3"),
    "no found": (lambda m: m["parts"]["router"]["precision"].pop("found"), "key 'found' is missi"),
    **{
        f"clip {shape}": (
            lambda m, shape=shape: m["parts"]["expert0"]["inputs"][0].update(shape=shape),  # type: ignore[misc]
            rf"clip's shape is {re.escape(str(shape))}",
        )
        for shape in ([], [0, 8, 64, 64, 3], [-1, 8, 64, 64, 3], [8, 64, 64, 3], [True] * 5)
    },
    "logits": (
        lambda m: m["parts"]["expert0"]["outputs"][0].update(shape=[2]),
        r"logits's shape is \[2\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_named(folder: Path, name: str) -> None:
    edit, message = BAD[name]
    change(folder, edit)
    with pytest.raises(CorruptBundleError, match=message) as e:
        bundles.read(folder)
    assert "\n" not in str(e.value)
    assert str(e.value).endswith("Export it again.")
    assert ".." not in str(e.value)


@pytest.mark.parametrize("name", BAD)
def test_the_schema_refuses_what_is_refused(folder: Path, name: str) -> None:
    path = folder / "vmoe.json"
    jsonschema.validate(json.loads(path.read_text()), SCHEMA)
    change(folder, BAD[name][0])
    if name != "clip key":  # a schema allows the keys of a later version
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(json.loads(path.read_text()), SCHEMA)


def test_a_part_that_is_not_listed(folder: Path) -> None:
    change(folder, lambda m: m["parts"].pop("expert1"))
    with pytest.raises(CorruptBundleError, match="lacks part 'expert1'"):
        bundles.read(folder)


def test_a_part_without_a_hash(folder: Path) -> None:
    change(folder, lambda m: m["parts"]["router"].update(sha256={}))
    with pytest.raises(CorruptBundleError, match="part 'router' has no hash of its file"):
        bundles.read(folder)


@pytest.mark.parametrize("name", [*FILES, "twin.safetensors"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CorruptBundleError, match=f"{name} is missing"):
        bundles.read(folder)


@pytest.mark.parametrize("name", [*FILES, "twin.safetensors"])
def test_a_changed_byte(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(CorruptBundleError, match=f"{name} has changed since export"):
        bundles.read(folder)


@pytest.mark.parametrize(
    "name",
    ["../router.onnx", "/etc/passwd", "a/b", "..", ".", "", "..\\router.onnx", "C:\\a", "a/"],
)
def test_a_name_that_leaves_the_folder(folder: Path, name: str) -> None:
    (folder.parent / "router.onnx").write_bytes(FILES["router.onnx"])
    hashes = {name: digest(FILES["router.onnx"])}
    change(folder, lambda m: m["parts"]["router"].update(file=name, sha256=hashes))
    with pytest.raises(CorruptBundleError, match="leaves the bundle's folder; refused"):
        bundles.read(folder)


def test_external_data_and_twin_stay_inside_too(folder: Path) -> None:
    change(folder, lambda m: m["parts"]["router"]["sha256"].update({"../x": "0" * 64}))
    with pytest.raises(CorruptBundleError, match=r"'\.\./x' leaves"):
        bundles.read(folder)
    change(folder, lambda m: m["parts"]["router"]["sha256"].pop("../x"))
    change(folder, lambda m: m["twin"].update(file="/x"))
    with pytest.raises(CorruptBundleError, match="'/x' leaves"):
        bundles.read(folder)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_no_file_can_have(folder: Path, name: str) -> None:
    change(folder, lambda m: m["parts"]["router"].update(file=name, sha256={name: "0" * 64}))
    with pytest.raises(CorruptBundleError, match=r"is missing|cannot be read"):
        bundles.read(folder)


def test_a_link_is_refused(folder: Path) -> None:
    (folder.parent / "outside").write_bytes(FILES["router.onnx"])
    (folder / "router.onnx").unlink()
    (folder / "router.onnx").symlink_to(folder.parent / "outside")
    with pytest.raises(CorruptBundleError, match="is a link"):
        bundles.read(folder)


def test_a_pipe_is_no_part(folder: Path) -> None:
    (folder / "router.onnx").unlink()
    os.mkfifo(folder / "router.onnx")
    with pytest.raises(CorruptBundleError, match="is missing"):
        bundles.read(folder)


def test_a_giant_manifest_is_not_read(folder: Path) -> None:
    with (folder / "vmoe.json").open("wb") as file:
        file.truncate(bundles.MAX_MANIFEST_BYTES + 1)
    with pytest.raises(CorruptBundleError, match="is over 4194304 bytes"):
        bundles.read(folder)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff", "9" * 10_000, "nil"])
def test_no_json(folder: Path, text: str) -> None:
    (folder / "vmoe.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptBundleError, match="is not JSON"):
        bundles.read(folder)


def test_json_but_no_object(folder: Path) -> None:
    (folder / "vmoe.json").write_text("[1]")
    with pytest.raises(CorruptBundleError, match="is not a JSON object"):
        bundles.read(folder)


def test_a_dense_model_needs_no_router(folder: Path) -> None:
    one = made(folder)
    dense = dataclasses.replace(
        one, model=one.model | {"experts": 1}, parts={"expert0": one.parts["expert0"]}
    )
    bundles.write_manifest(dense, folder)
    assert bundles.read(folder).experts == 1

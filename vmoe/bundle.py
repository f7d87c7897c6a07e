"""A bundle: the folder that holds one deployed model. Read with suspicion, written whole.

    vmoe.json            the manifest: model, clip spec, labels, lowering, parts and their hashes
    router.onnx, ...     the parts, each with its external data beside it
    report.json          what was measured at export (parity, gates, timings)
    twin.safetensors     the twin, for attacks on what was deployed (may be left out)

Parts and manifest are the same bytes for the same twin, plan of export and versions. Hashes
prove that nothing changed since export; they do not prove who made it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmoe import latest, output
from vmoe.clips import ClipSpec
from vmoe.errors import (
    BundleError,
    CorruptBundleError,
    EngineMismatchError,
    VmoeError,
    nearest,
)
from vmoe.settings import from_mapping, to_mapping

SCHEMA_VERSION = 1
MANIFEST = "vmoe.json"
REPORT = "report.json"
TWIN = "twin.safetensors"
MAKE = "Make one: vmoe-export CKPT --out FOLDER"
NAMED = 3  # bundles of a folder, where the folder itself was given
MAX_MANIFEST_BYTES = 4 << 20
LOWERINGS = ("split", "if", "plugin", "dense")
MAX_EXPERTS = 256
MAX_WIDTH = 1000
RANKS = {"clip": 5, "logits": 2, "scores": 2, "route": 1, "force_route": 0}
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Port:
    """One input or output of a part.

    Attributes:
        name: as in the graph: `clip`, `logits`, `scores`, `route`.
        dtype: numpy's name: `uint8`, `float32`, `int64`.
        shape: None where the size is free.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Part:
    """One graph of a bundle.

    Attributes:
        file: the graph's file, a plain name inside the folder.
        format: `onnx`, or later a plan.
        hashes: sha256 of every file that the part needs (graph and external data), by name.
        precision: asked and found, such as {"asked": "fp32", "found": "fp32"}.
        layers: how many layers with weights compute in each precision, such as {"int8": 21}.
        tensors: how many weights are stored in each, such as {"int8": 21, "int32": 21}.
        extra: keys that this version does not know; kept when written again.
    """

    file: str
    format: str
    hashes: dict[str, str]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    precision: dict[str, str]
    layers: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bundle:
    """A manifest, and where it was read.

    Attributes:
        path: the folder.
        model: the architecture, as ModelSettings has it, with a `name`.
        spec: the clips that it takes.
        labels: K names.
        lowering: one of LOWERINGS.
        parts: `router`, `expert0`, ... of `split`; `moe` of a lowering in one file.
        others: the same model in a form that only one engine reads, by that engine's name; no
            part of what is loaded here.
        twin: sha256 of the twin, and `file` where the bundle carries it.
        versions: tools that made it.
        extra: keys that this version does not know; kept when written again.
    """

    path: Path
    model: dict[str, Any]
    spec: ClipSpec
    labels: tuple[str, ...]
    lowering: str
    parts: dict[str, Part]
    twin: dict[str, str]
    versions: dict[str, str]
    others: dict[str, Part] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def experts(self) -> int:
        """How many experts the model has; 1 is a dense model, without a router."""
        return int(self.model["experts"])

    def report(self) -> dict[str, Any]:
        """Return what was measured at export; empty where the report is missing.

        Raises:
            CorruptBundleError: a report that cannot be read, or is none.
        """
        path = self.path / REPORT
        if not path.is_file():
            return {}
        return _json(path)


def sha256(path: Path) -> str:
    """Return the hash of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(bundle: Bundle, folder: Path) -> None:
    """Write a bundle's manifest into a folder (inside of `output.whole_folder`)."""
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "model": bundle.model,
        "clip": to_mapping(bundle.spec),
        "labels": list(bundle.labels),
        "lowering": bundle.lowering,
        "parts": _parts_to_json(bundle.parts),
        **({"others": _parts_to_json(bundle.others)} if bundle.others else {}),
        "twin": bundle.twin,
        "versions": bundle.versions,
        **bundle.extra,
    }
    output.write_json(folder / MANIFEST, manifest)


def require(path: Path) -> None:
    """Refuse a path where no bundle is.

    Raises:
        BundleError: says what is there instead, and what to name or to make.
    """
    if not (path / MANIFEST).is_file():
        raise BundleError(_no_bundle(path))


def read(path: Path) -> Bundle:
    """Read a bundle, and prove it whole before any of its graphs is parsed.

    Args:
        path: the folder.

    Raises:
        BundleError: no bundle there.
        EngineMismatchError: a manifest of another schema version.
        CorruptBundleError: a key or a part is missing, a byte changed, a name leaves the folder.
    """
    require(path)
    manifest = path / MANIFEST
    if manifest.stat().st_size > MAX_MANIFEST_BYTES:
        raise CorruptBundleError(f"{manifest} is over {MAX_MANIFEST_BYTES} bytes: no manifest.")
    values = _json(manifest)
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise EngineMismatchError(
            f"{manifest} has schema version {version}; this vmoe reads {SCHEMA_VERSION}. "
            "Export the model again with this version."
        )
    try:
        bundle = _parse(path, values)
    except (KeyError, TypeError, ValueError, AttributeError, VmoeError) as e:
        why = f"key {e} is missing" if isinstance(e, KeyError) else str(e).rstrip(".")
        raise CorruptBundleError(f"{manifest} is damaged: {why}. Export it again.") from e
    _check_parts(bundle)
    for name, digest in _files(bundle).items():
        _check_file(path, name, digest)
    return bundle


def _parse(path: Path, values: Mapping[str, Any]) -> Bundle:
    known = {
        "schema_version", "model", "clip", "labels", "lowering", "parts", "others", "twin",
        "versions",
    }  # fmt: skip
    model = dict(values["model"])
    if type(model["experts"]) is not int or not 1 <= model["experts"] <= MAX_EXPERTS:
        raise ValueError(f"model.experts is {model['experts']!r}")
    width = model["width"]
    if type(width) not in (int, float) or not 0 < width <= MAX_WIDTH:
        raise ValueError(f"model.width is {width!r}")
    if type(model["classes"]) is not int or model["classes"] < 2:
        raise ValueError(f"model.classes is {model['classes']!r}")
    for key in ("name", "arch"):
        _text(model, key)
    if values["lowering"] not in LOWERINGS:
        raise ValueError(f"lowering is {values['lowering']!r}")
    labels = values["labels"]
    if not labels or type(labels) is not list or not all(type(label) is str for label in labels):
        raise ValueError("labels must be a list of names")
    twin = _texts(values, "twin")
    _check_hash("twin", twin["sha256"])
    return Bundle(
        path=path,
        model=model,
        spec=from_mapping(ClipSpec, values["clip"], MANIFEST),
        labels=tuple(values["labels"]),
        lowering=values["lowering"],
        parts=_parts_from_json(values["parts"]),
        others=_parts_from_json(values.get("others", {})),
        twin=twin,
        versions=_texts(values, "versions"),
        extra={key: value for key, value in values.items() if key not in known},
    )


def part_names(lowering: str, experts: int) -> list[str]:
    """Return the parts that a lowering of so many experts has."""
    if lowering != "split":
        return ["moe"]
    names = [f"expert{i}" for i in range(experts)]
    return names if experts == 1 else ["router", *names]


def _check_parts(bundle: Bundle) -> None:
    for name in part_names(bundle.lowering, bundle.experts):
        if name not in bundle.parts:
            raise CorruptBundleError(f"{bundle.path} lacks part {name!r}. Export it again.")


def _files(bundle: Bundle) -> dict[str, str]:
    files: dict[str, str] = {}
    for name, part in (*bundle.parts.items(), *bundle.others.items()):
        if part.file not in part.hashes:
            raise CorruptBundleError(f"{bundle.path}: part {name!r} has no hash of its file.")
        if any(files.get(file, digest) != digest for file, digest in part.hashes.items()):
            raise CorruptBundleError(f"{bundle.path}: two parts give one file two hashes.")
        files.update(part.hashes)
    if "file" in bundle.twin:
        files[bundle.twin["file"]] = bundle.twin["sha256"]
    return files


def check_part(folder: Path, part: Part) -> None:
    """Prove that a part of a bundle that was read before is still the one that was read.

    Raises:
        CorruptBundleError: a file of it is gone, or another one.
    """
    try:
        for name, digest in part.hashes.items():
            _check_file(folder, name, digest)
    except CorruptBundleError as e:
        raise CorruptBundleError(
            f"{folder} changed since it was loaded: {part.file} is not what it was. Load it again."
        ) from e


def _check_file(folder: Path, name: str, digest: str) -> None:
    if Path(name).name != name or name in ("", ".", "..") or "\\" in name:
        raise CorruptBundleError(f"{folder}: file {name!r} leaves the bundle's folder; refused.")
    path = folder / name
    try:
        if path.is_symlink():
            raise CorruptBundleError(f"{path} is a link; a bundle's files are plain ones. Refused.")
        if not path.is_file():
            raise CorruptBundleError(f"{path} is missing. Export it again, or copy it whole.")
        if sha256(path) != digest:
            raise CorruptBundleError(f"{path} has changed since export (sha256 differs). Refused.")
    except OSError as e:
        raise CorruptBundleError(f"{path} cannot be read: {e.strerror}.") from e


def _no_bundle(path: Path) -> str:
    if path.suffix == ".safetensors" and path.is_file():
        return f"{path} is a checkpoint: not a bundle. Make one of it: vmoe-export {path}"
    if not path.exists():
        near = nearest(str(path), latest.offered())
        return f"{path} does not exist: not a bundle{near} Make one: vmoe-export CKPT --out {path}"
    if not path.is_dir():
        return f"{path} is no folder: not a bundle. {MAKE}"
    if (path / latest.BEST).is_file():
        return f"{path} is a training's folder: not a bundle. Make one of it: vmoe-export {path}"
    held = sorted(str(manifest.parent) for manifest in path.glob(f"*/{MANIFEST}"))
    advice = f"Name one in it: {', '.join(held[:NAMED])}" if held else MAKE
    return f"{path} holds no {MANIFEST}: not a bundle. {advice}"


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise CorruptBundleError(f"{path} cannot be read: {e.strerror}.") from e
    except (ValueError, RecursionError) as e:
        raise CorruptBundleError(f"{path} is not JSON: {e}. Export the bundle again.") from e
    if not isinstance(values, dict):
        raise CorruptBundleError(f"{path} is not a JSON object. Export the bundle again.")
    return values


def _parts_to_json(parts: Mapping[str, Part]) -> dict[str, Any]:
    return {name: _part_to_json(part) for name, part in parts.items()}


def _parts_from_json(values: Mapping[str, Any]) -> dict[str, Part]:
    return {name: _part_from_json(part) for name, part in values.items()}


def _part_to_json(part: Part) -> dict[str, Any]:
    counts = {"layers": part.layers, "tensors": part.tensors}
    return {
        "file": part.file,
        "format": part.format,
        "sha256": part.hashes,
        "precision": part.precision,
        **{key: count for key, count in counts.items() if count},
        "inputs": [_port_to_json(port) for port in part.inputs],
        "outputs": [_port_to_json(port) for port in part.outputs],
        **part.extra,
    }


def _part_from_json(values: Mapping[str, Any]) -> Part:
    known = {
        "file", "format", "sha256", "precision", "layers", "tensors", "inputs", "outputs",
    }  # fmt: skip
    hashes, precision = _texts(values, "sha256"), _texts(values, "precision")
    for name, digest in hashes.items():
        _check_hash(name, digest)
    for key in ("asked", "found"):
        _text(precision, key)
    return Part(
        file=_text(values, "file"),
        format=_text(values, "format"),
        hashes=hashes,
        precision=precision,
        inputs=tuple(_port_from_json(port) for port in values["inputs"]),
        outputs=tuple(_port_from_json(port) for port in values["outputs"]),
        layers=_counts(values, "layers"),
        tensors=_counts(values, "tensors"),
        extra={key: value for key, value in values.items() if key not in known},
    )


def _port_to_json(port: Port) -> dict[str, Any]:
    return {"name": port.name, "dtype": port.dtype, "shape": list(port.shape)}


def _port_from_json(values: Mapping[str, Any]) -> Port:
    name, shape = _text(values, "name"), values["shape"]
    ranked = type(shape) is list and len(shape) == RANKS.get(name, len(shape))
    if not ranked or not all(n is None or (type(n) is int and n > 0) for n in shape):
        raise ValueError(f"{name}'s shape is {shape!r}")
    return Port(name, _text(values, "dtype"), tuple(shape))


def _check_hash(name: str, digest: str) -> None:
    if not SHA256.fullmatch(digest):
        raise ValueError(f"sha256 of {name} is {digest!r}")


def _texts(values: Mapping[str, Any], key: str) -> dict[str, str]:
    found = values[key]
    if type(found) is not dict:
        raise ValueError(f"{key} is {found!r}")
    return {name: _text(found, name) for name in found}


def _counts(values: Mapping[str, Any], key: str) -> dict[str, int]:
    found = values.get(key, {})
    if type(found) is not dict or not all(type(n) is int and n > 0 for n in found.values()):
        raise ValueError(f"{key} is {found!r}")
    return dict(found)


def _text(values: Mapping[str, Any], key: str) -> str:
    value = values[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} is {value!r}")
    return value

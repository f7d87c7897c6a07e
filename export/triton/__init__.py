"""A bundle as a model repository of Triton Inference Server.

    DIR/NAME/              the mixture: a python model that routes and groups by expert
    DIR/NAME_router/       the parts: ONNX or TensorRT plans, as the bundle has them
    DIR/NAME_expert0/ ..
    DIR/NAME_stream/       frames in, answers out: one sequence is one stream

Each is config.pbtxt and a folder whose name, the version, stands for the bundle's bytes
(runtime/served.py). A bundle of the online form has no NAME: its experts take the streams' states.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vmoe import output
from vmoe.bundle import Bundle, Part, check_part
from vmoe.errors import SettingError
from vmoe.runtime import online, served
from vmoe.runtime.served import FORCE, MOE, STREAM

from .pbtxt import Word, to_text

MODELS = Path(__file__).parent / "models"
CONFIG, LABELS = "config.pbtxt", "labels.txt"
ONNXRUNTIME, PYTHON, TENSORRT = "onnxruntime", "python", "tensorrt"
RUNS_ONNX = (ONNXRUNTIME, PYTHON)
PLAN = "plan"  # a TensorRT part's format, and in the manifest what it was built with
MARK = "vmoe"  # the parameter by which a repository of ours is known
STREAMS = 256  # sequences at once, of one instance
IDLE_S = 60  # after which a silent sequence has ended


@dataclass(frozen=True)
class Repository:
    """How a bundle is served.

    Attributes:
        folder: where the repository is written.
        onnx: what runs ONNX parts there: Triton's onnxruntime backend, or onnxruntime in the
            server's Python.
        max_batch: most clips of one request, and of one batch that the server makes of several.
        threads: CPU threads of an ONNX part; 0 is all cores.
    """

    folder: Path
    onnx: str = ONNXRUNTIME
    max_batch: int = 16
    threads: int = 0


def write(bundle: Bundle, how: Repository, *, overwrite: bool = False) -> list[str]:
    """Write a bundle's repository, whole or not at all; return the models' names.

    Raises:
        SettingError: the folder exists, or the bundle has no parts to route between.
        CorruptBundleError: a part changed since the bundle was read.
        OutputError: the folder cannot be written.
    """
    made = configs(bundle, how)
    version = str(served.version(bundle))
    refuse_existing(how.folder, overwrite=overwrite)
    with output.whole_folder(how.folder, overwrite=overwrite, replaces=is_ours) as folder:
        for part, config in made.items():
            place = folder / config["name"]
            (place / version).mkdir(parents=True)
            (place / CONFIG).write_text(to_text(config), encoding="utf-8")
            _fill(bundle, part, config, place / version)
    return [config["name"] for config in made.values()]


def refuse_existing(folder: Path, *, overwrite: bool) -> None:
    """Raise SettingError for a folder that exists, before any work is done."""
    output.refuse_existing(folder, overwrite=overwrite, replaces=is_ours, flag="--triton-repo")


def is_ours(folder: Path) -> bool:
    """Return whether replacing a folder can lose nothing but a repository of ours."""
    models = list(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else [folder]
    return all(
        (model / CONFIG).is_file() and f'key: "{MARK}"' in (model / CONFIG).read_text()
        for model in models
    )


def check_lowering(lowering: str) -> None:
    """Refuse a lowering that leaves a server nothing to route between.

    Raises:
        SettingError: it is one file.
    """
    if lowering != "split":
        raise SettingError(
            f"lowering {lowering} is one file, which routes inside; a server routes between parts. "
            "Export with --lowering split for --triton-repo."
        )


def configs(bundle: Bundle, how: Repository) -> dict[str, dict[str, Any]]:
    """Return the configuration of each model, as config.pbtxt says it, by the part's name.

    Raises:
        SettingError: the bundle routes inside of one file, or a part cannot be served.
    """
    check_lowering(bundle.lowering)
    how = replace(how, max_batch=min([how.max_batch, *_most(bundle)]))
    made = {name: _part(bundle, name, part, how) for name, part in bundle.parts.items()}
    if not online.is_online(bundle):
        made[MOE] = _moe(bundle, how)
    made[STREAM] = _stream(bundle, how)
    return made


def _most(bundle: Bundle) -> list[int]:
    """Return the largest batches of the parts that have one; refuse what no server can run."""
    found = []
    for name, part in bundle.parts.items():
        fixed = [port.shape[0] for port in part.inputs if port.shape[0] is not None]
        built = part.extra.get(PLAN, {})  # of a TensorRT plan
        least, _, most = built.get("batch", (1, 1, None))
        if fixed or least != 1:
            raise SettingError(
                f"{bundle.path}: {name} takes no batch of 1, or no other; a server makes batches "
                "of all sizes. Export it with a free batch."
            )
        if built.get("weights"):
            raise SettingError(
                f"{bundle.path}: {name} is a plan without its weights, which a server cannot put "
                "in. Export it without --strip."
            )
        found += [most] if most else []
    return found


def _part(bundle: Bundle, name: str, part: Part, how: Repository) -> dict[str, Any]:
    onnx = part.format == "onnx"
    config = {
        "name": served.model(bundle, name),
        "backend": how.onnx if onnx else TENSORRT,
        **_batched(how),
        "input": [_port(port.name, port.dtype, port.shape[1:]) for port in part.inputs],
        "output": [_port(port.name, port.dtype, port.shape[1:]) for port in part.outputs],
        "dynamic_batching": {},
        "parameters": [_said(MARK, {"part": name, "sha256": part.hashes[part.file]})],
    }
    if onnx:
        config["parameters"].append(_parameter("intra_op_thread_count", str(how.threads)))
    else:
        config["instance_group"] = [{"kind": Word("KIND_GPU"), "count": 1}]
        config["optimization"] = {"cuda": {"graphs": True}}
    return config


def _moe(bundle: Bundle, how: Repository) -> dict[str, Any]:
    spec, classes = bundle.spec, len(bundle.labels)
    return {
        "name": served.model(bundle, MOE),
        "backend": PYTHON,
        **_batched(how),
        "input": [
            _port("clip", "uint8", spec.shape),
            {**_port(FORCE, "int64", (1,)), "optional": True},
        ],
        "output": [
            {**_port("logits", "float32", (classes,)), "label_filename": LABELS},
            *_routing(bundle),
        ],
        "dynamic_batching": {},
        "instance_group": [{"kind": Word("KIND_CPU"), "count": 2}],  # one waits, one gathers
        "parameters": [_said(MARK, _models(bundle))],
    }


def _stream(bundle: Bundle, how: Repository) -> dict[str, Any]:
    spec, classes = bundle.spec, len(bundle.labels)
    states = [
        [port.name, port.dtype, list(port.shape[1:])]
        for port in online.state_ports(bundle.parts["expert0"])
    ]
    said = {**_models(bundle), "frames": spec.frames, "classes": classes, "states": states}
    return {
        "name": served.model(bundle, STREAM),
        "backend": PYTHON,
        **_batched(how),
        "input": [
            _port("frame", "uint8", spec.shape[1:]),
            {**_port("answer", "bool", (1,)), "optional": True},
        ],
        "output": [
            {**_port("logits", "float32", (classes,)), "label_filename": LABELS},
            *_routing(bundle),
        ],
        "sequence_batching": {
            "max_sequence_idle_microseconds": IDLE_S * 1_000_000,
            "oldest": {"max_candidate_sequences": STREAMS},
        },
        # one process: a sequence's state is in the memory of the instance that began it
        "instance_group": [{"kind": Word("KIND_CPU"), "count": 1}],
        "parameters": [_said(MARK, said)],
    }


def _models(bundle: Bundle) -> dict[str, Any]:
    """Return what a model that asks others has to know of them."""
    experts = [served.model(bundle, f"expert{i}") for i in range(bundle.experts)]
    router = served.model(bundle, "router") if bundle.experts > 1 else None
    return {"router": router, "experts": experts, "version": served.version(bundle)}


def _routing(bundle: Bundle) -> list[dict[str, Any]]:
    return [_port("scores", "float32", (bundle.experts,)), _port("route", "int64", (1,))]


def _batched(how: Repository) -> dict[str, Any]:
    return {"max_batch_size": how.max_batch}


def _port(name: str, dtype: str, shape: tuple[int | None, ...]) -> dict[str, Any]:
    """Return an input or output of one clip: the batch stands in front of it."""
    kind = np.dtype(dtype)
    word = {"u": "UINT", "i": "INT", "f": "FP", "b": "BOOL"}[kind.kind]
    bits = "" if kind.kind == "b" else str(8 * kind.itemsize)
    dims = [-1 if size is None else size for size in shape]
    return {"name": name, "data_type": Word(f"TYPE_{word}{bits}"), "dims": dims}


def _said(key: str, value: Any) -> dict[str, Any]:
    return _parameter(key, json.dumps(value))


def _parameter(key: str, text: str) -> dict[str, Any]:
    return {"key": key, "value": {"string_value": text}}


def _fill(bundle: Bundle, name: str, config: dict[str, Any], place: Path) -> None:
    """Put a model's files into its version's folder."""
    part = bundle.parts.get(name)
    if part is None:
        shutil.copyfile(MODELS / f"{name}.py", place / "model.py")
        labels = place.parent / LABELS
        labels.write_text("".join(f"{label}\n" for label in bundle.labels), encoding="utf-8")
        return
    check_part(bundle.path, part)
    if part.format != "onnx":
        shutil.copyfile(bundle.path / part.file, place / "model.plan")
        return
    # a graph with external data beside it: Triton wants a folder of that name
    graph = place / "model.onnx"
    graph.mkdir()
    for file in part.hashes:
        named = "model.onnx" if file == part.file else file
        shutil.copyfile(bundle.path / file, graph / named)
    if config["backend"] == PYTHON:
        shutil.copyfile(MODELS / "part.py", place / "model.py")

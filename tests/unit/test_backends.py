"""Which backend runs a bundle: asked for, verified at export, or the first that can."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import bundles
from tests.servers import free_port
from vmoe import bundle as reader
from vmoe.clips import ClipSpec
from vmoe.errors import (
    BundleError,
    EngineMismatchError,
    MissingDependencyError,
    ServerError,
    SettingError,
)
from vmoe.runtime import load
from vmoe.runtime.backends import choose, verified


@pytest.fixture
def path(tmp_path: Path, spec: ClipSpec) -> Path:
    return bundles.write(tmp_path / "b", spec)


def reported(path: Path, backends: Any) -> Path:
    """Write what an export would have found."""
    (path / "report.json").write_text(json.dumps({"backends": backends}))
    return path


def entry(latency_ms: float, ok: bool = True, device: str = "cpu") -> dict[str, Any]:
    return {"ok": ok, "device": device, "latency_ms": latency_ms}


def auto(path: Path, device: str = "auto") -> str:
    return choose("auto", reader.read(path), device)


def test_the_fastest_that_was_verified_is_taken(path: Path) -> None:
    pytest.importorskip("openvino")
    assert auto(path) == "onnxruntime"
    assert auto(reported(path, {"onnxruntime": entry(2), "openvino": entry(1)})) == "openvino"
    assert auto(reported(path, {"onnxruntime": entry(1), "openvino": entry(2)})) == "onnxruntime"
    assert auto(reported(path, {"onnxruntime": entry(2), "openvino": entry(1, False)})) == (
        "onnxruntime"
    )
    with load(reported(path, {"onnxruntime": entry(2), "openvino": entry(1)})) as engine:
        assert engine.backend_name == "openvino"


def test_a_server_is_taken_where_one_is_named_alone(path: Path) -> None:
    assert auto(reported(path, {"onnxruntime": entry(2), "triton": entry(1)})) == "onnxruntime"
    with pytest.raises(SettingError, match="backend triton needs the server's address: --server"):
        load(path, backend="triton")
    with pytest.raises(SettingError, match="--server is for --backend triton; onnxruntime runs"):
        load(path, backend="onnxruntime", server="localhost:8000")
    with pytest.raises(ServerError, match="no Triton server answers at http://127"):
        load(path, server=f"127.0.0.1:{free_port()}")


def test_one_that_is_not_installed_is_passed_over(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = reported(path, {"onnxruntime": entry(2), "openvino": entry(1)})
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert auto(both) == "onnxruntime"
    only = reported(path, {"openvino": entry(1)})
    with pytest.raises(MissingDependencyError, match=r"pip install 'vmoe\[openvino\]'"):
        auto(only)  # verified for nothing else
    assert choose("onnxruntime", reader.read(only), "auto") == "onnxruntime"  # who asks, gets it


def test_a_device_that_a_backend_does_not_have_leaves_the_others(path: Path) -> None:
    both = reported(path, {"onnxruntime": entry(2), "openvino": entry(1)})
    assert auto(both, "cuda:0") == "onnxruntime"


@pytest.mark.parametrize(
    "backends",
    [None, [], 3, {}, {"openvino": 1}, {"openvino": {}}, {"openvino": entry("fast")},  # type: ignore[arg-type]
     {"openvino": {"ok": 1, "latency_ms": 1}}, {"openvino": entry(10**400)},
     {"openvino": entry(float("nan"))}, {"openvino": entry(-1)},
     {"../evil": entry(1)}, {"vmoe": entry(1)}],
)  # fmt: skip
def test_a_report_that_says_nothing_usable_is_none(path: Path, backends: Any) -> None:
    assert verified(reader.read(reported(path, backends))) == []
    assert auto(path) == "onnxruntime"


def test_latencies_that_tie_leave_the_order_of_names(path: Path) -> None:
    reported(path, {"openvino": entry(1), "onnxruntime": entry(1.09)})
    assert verified(reader.read(path)) == ["onnxruntime", "openvino"]
    reported(path, {"openvino": entry(1), "onnxruntime": entry(1.11)})
    assert verified(reader.read(path)) == ["openvino", "onnxruntime"]


def test_a_check_on_one_kind_of_device_says_nothing_of_another(path: Path) -> None:
    backends = {"onnxruntime": entry(1, device="cuda:0"), "openvino": entry(2)}
    read = reader.read(reported(path, backends))
    assert verified(read, "cpu") == ["openvino"]
    assert verified(read, "cuda:1") == ["onnxruntime"]
    assert verified(read, "auto") == ["onnxruntime", "openvino"]
    assert verified(reader.read(reported(path, {"onnxruntime": {"ok": True, "latency_ms": 1}})),
                    "cpu") == []  # fmt: skip


def test_one_that_was_found_wrong_is_never_automatic(path: Path) -> None:
    pytest.importorskip("openvino")
    assert auto(reported(path, {"onnxruntime": entry(1, ok=False)})) == "openvino"
    both = reported(path, {name: entry(1, ok=False) for name in ("onnxruntime", "openvino")})
    why = "b was found wrong at export on backend onnxruntime and openvino; .* name a --backend"
    with pytest.raises(EngineMismatchError, match=why):
        auto(both)
    assert auto(both, "cuda:0") == "onnxruntime"  # of another device nothing is known
    assert choose("onnxruntime", reader.read(both), "auto") == "onnxruntime"  # who asks, gets it


def test_a_broken_report_does_not_matter(path: Path) -> None:
    (path / "report.json").write_text("{")
    assert auto(path) == "onnxruntime"


def test_the_reference_is_never_automatic(path: Path) -> None:
    assert auto(reported(path, {"torch": entry(0.1), "onnxruntime": entry(1)})) == "onnxruntime"


def test_a_bundle_without_its_twin_has_no_reference(path: Path) -> None:
    why = r"does not carry its twin.*Use --backend auto, or export it again without --no-twin\.$"
    with pytest.raises(BundleError, match=why):
        load(path, backend="torch")


def test_a_format_that_a_backend_does_not_read(path: Path) -> None:
    manifest = path / "vmoe.json"
    manifest.write_text(manifest.read_text().replace('"format": "onnx"', '"format": "plan"'))
    with pytest.raises(EngineMismatchError, match="parts in plan; backend openvino reads onnx"):
        choose("openvino", reader.read(path), "auto")

"""A model repository: what its configurations say, what cannot be served, and the flags."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from tests import bundles as tiny
from vmoe import bundle as bundles
from vmoe.bundle import Bundle, Port
from vmoe.clips import ClipSpec
from vmoe.errors import CorruptBundleError, MissingDependencyError, SettingError
from vmoe.export.cli import main
from vmoe.export.triton import IDLE_S, MODELS, PYTHON, Repository, configs, is_ours, pbtxt, write
from vmoe.runtime.engines import _kserve
from vmoe.runtime.served import model, version, whole


@pytest.fixture
def bundle(tmp_path: Path, spec: ClipSpec) -> Bundle:
    return bundles.read(tiny.write(tmp_path / "tiny", spec))


def of_plans(bundle: Bundle, **built: Any) -> Bundle:
    """Return a bundle as --trt would have made it."""
    parts = {
        name: dataclasses.replace(
            part, format="plan", extra={"plan": {"batch": [1, 1, 8], "weights": "", **built}}
        )
        for name, part in bundle.parts.items()
    }
    return dataclasses.replace(bundle, parts=parts)


def test_every_configuration_is_one_that_triton_knows(bundle: Bundle, tmp_path: Path) -> None:
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    text_format = pytest.importorskip("google.protobuf.text_format")
    how = Repository(tmp_path / "r")
    for of in (configs(bundle, how), configs(of_plans(bundle), how)):
        assert list(of) == ["router", "expert0", "expert1", "expert2", "moe", "stream"]
        for config in of.values():
            read = text_format.Parse(pbtxt.to_text(config), schema.ModelConfig())
            assert read.name == config["name"]
            assert read.max_batch_size == config["max_batch_size"]
            assert [list(port.dims) for port in read.input] == [p["dims"] for p in config["input"]]
    moe = configs(bundle, how)["moe"]
    read = text_format.Parse(pbtxt.to_text(moe), schema.ModelConfig())
    assert [port.name for port in read.input if port.optional] == ["force_route"]
    said = json.loads(read.parameters["vmoe"].string_value)
    assert said["experts"] == ["tiny_expert0", "tiny_expert1", "tiny_expert2"]
    assert said["version"] == version(bundle)


def test_plans_run_in_triton_s_own_backend_in_batches_that_they_were_built_for(
    bundle: Bundle, tmp_path: Path
) -> None:
    made = configs(of_plans(bundle), Repository(tmp_path / "r", onnx=PYTHON))
    assert made["expert0"]["backend"] == "tensorrt"
    assert made["expert0"]["optimization"] == {"cuda": {"graphs": True}}
    assert {config["max_batch_size"] for config in made.values()} == {8}
    write(of_plans(bundle), Repository(tmp_path / "r"))
    assert (tmp_path / "r" / "tiny_expert0" / str(version(bundle)) / "model.plan").is_file()


def test_a_repository_is_written_whole_and_only_over_one_of_ours(
    bundle: Bundle, tmp_path: Path
) -> None:
    how = Repository(tmp_path / "r")
    names = write(bundle, how)
    at = tmp_path / "r" / "tiny_router" / str(version(bundle)) / "model.onnx" / "model.onnx"
    assert bundles.sha256(at) == bundle.parts["router"].hashes["router.onnx"]
    assert sorted(names) == sorted(path.name for path in how.folder.iterdir())
    assert (how.folder / "tiny" / "labels.txt").read_text() == "still\nmoving\nwaving\n"
    with pytest.raises(SettingError, match=r"r exists\. Choose another --triton-repo, or say"):
        write(bundle, how)
    assert write(bundle, how, overwrite=True) == names
    (how.folder / "another").mkdir()
    assert not is_ours(how.folder)
    with pytest.raises(SettingError, match="holds more than what vmoe-export writes there"):
        write(bundle, how, overwrite=True)
    (bundle.path / "expert1.onnx").write_bytes(b"other")
    with pytest.raises(CorruptBundleError, match=r"expert1\.onnx is not what it was"):
        write(bundle, Repository(tmp_path / "s"))
    assert not (tmp_path / "s").exists()


def test_what_cannot_be_served_is_refused(bundle: Bundle, tmp_path: Path, spec: ClipSpec) -> None:
    how = Repository(tmp_path / "r")
    one_file = bundles.read(tiny.write(tmp_path / "if", spec, lowering="if"))
    with pytest.raises(SettingError, match="lowering if is one file, which routes inside"):
        write(one_file, how)
    fixed = bundles.read(tiny.write(tmp_path / "fixed", spec, batch=2))
    with pytest.raises(SettingError, match="router takes no batch of 1, or no other"):
        write(fixed, how)
    with pytest.raises(SettingError, match="router takes no batch of 1, or no other"):
        write(of_plans(bundle, batch=[2, 4, 8]), how)
    with pytest.raises(SettingError, match=r"a plan without its weights, .* without --strip"):
        write(of_plans(bundle, weights="router.onnx"), how)


def test_a_model_without_a_router_has_none(tmp_path: Path, spec: ClipSpec) -> None:
    alone = bundles.read(tiny.write(tmp_path / "one", spec, experts=1))
    made = configs(alone, Repository(tmp_path / "r"))
    assert list(made) == ["expert0", "moe", "stream"]
    assert json.loads(made["moe"]["parameters"][0]["value"]["string_value"])["router"] is None


def test_the_version_stands_for_the_parts_and_the_labels(bundle: Bundle) -> None:
    assert 1 <= version(bundle) < 2**31
    assert version(bundle) == version(dataclasses.replace(bundle, versions={}))
    assert version(bundle) != version(dataclasses.replace(bundle, labels=("a", "b", "c")))
    less = {name: part for name, part in bundle.parts.items() if name != "expert2"}
    assert version(bundle) != version(dataclasses.replace(bundle, parts=less))
    strange = dataclasses.replace(bundle, model={**bundle.model, "name": "a/b c"})
    assert model(strange, "moe") == "a_b_c"


def test_a_bundle_is_answered_as_one_part_by_its_server(bundle: Bundle) -> None:
    served = whole(bundle)
    assert served.lowering == "if"
    assert served.parts["moe"].inputs == (Port("clip", "uint8", (None, 4, 32, 32, 3)),)
    assert [port.name for port in served.parts["moe"].outputs] == ["logits", "scores", "route"]
    online = dataclasses.replace(bundle, extra={"form": "online"})
    assert whole(online) is online


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("gpu7", "http://gpu7:8000"),
        ("grpc://gpu7", "grpc://gpu7:8001"),
        ("https://models.example/triton/", "https://models.example:443/triton"),
        ("http://[::1]:9000", "http://[::1]:9000"),
    ],
)
def test_addresses(text: str, said: str) -> None:
    assert str(_kserve.address(text)) == said


@pytest.mark.parametrize("text", ["ftp://gpu7", "gpu7:port", "", "http://", "gpu7?x=1", "u:p@gpu7"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="it is HOST:PORT, http://HOST:PORT or grpc://HOST:PORT"):
        _kserve.address(text)


def test_grpc_without_its_client_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kserve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"vmoe\[server\]'. Or use HTTP: --server"):
        _kserve.connect(_kserve.address("grpc://gpu7"), 1)


@pytest.mark.parametrize("body", [b"[]", b"{", b'{"outputs": [{}]}'])
def test_an_answer_of_no_triton_is_refused(body: bytes) -> None:
    with pytest.raises(_kserve.RefusedError, match="its answer is no answer of Triton"):
        _kserve._tensors(body, len(body))


def test_the_command_serves_a_bundle_as_it_is(bundle: Bundle, tmp_path: Path) -> None:
    folder, path = tmp_path / "models", str(bundle.path)

    def run(*args: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, args)
        return result.exit_code, result.output

    code, said = run(path, "--triton-repo", str(folder), "--dry-run")
    assert (code, folder.exists()) == (0, False)
    assert "| tiny_router  | onnxruntime |         16 |" in said
    code, said = run(path, "--triton-repo", str(folder), "--triton-batch", "8", "--json", "-q")
    found = json.loads(said)
    assert (code, found["version"]) == (0, version(bundle))
    assert "max_batch_size: 8" in (folder / "tiny" / "config.pbtxt").read_text()
    code, said = run(path, "--triton-repo", str(folder))
    assert (code, "exists. Choose another --triton-repo" in said) == (2, True)
    code, said = run(path, "--triton-batch", "8", "--triton-backend", "python")
    assert code == 2
    assert "--triton-backend and --triton-batch is for --triton-repo DIR" in said
    code, said = run(path, "--triton-repo", str(tmp_path / "r"), "--lowering", "if")
    assert (code, "lowering if is one file" in said) == (2, True)
    code, said = run(path, "--triton-repo", str(tmp_path / "r"), "--trt", "--from-onnx")
    assert (code, "--from-onnx makes a bundle: serve that" in said) == (2, True)


def test_the_server_keeps_a_stream_longer_than_its_batcher_does(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", ModuleType("utils"))
    stream = runpy.run_path(str(MODELS / "stream.py"))
    config = configs(bundle, Repository(tmp_path / "r"))["stream"]
    said = {one["key"]: one["value"] for one in config["parameters"]}
    made = stream["TritonPythonModel"]()
    made.initialize({"model_config": json.dumps({**config, "parameters": said})})
    now_s = time.monotonic()
    for age_s in (0, 1.5 * IDLE_S, 2.5 * IDLE_S):
        made._streams[age_s] = stream["Stream"](4)
        made._streams[age_s].used_s = now_s - age_s
    made._forget()
    assert list(made._streams) == [0, 1.5 * IDLE_S]


WITHOUT_TORCH = """
import importlib.util, sys
for name in ("torch", "onnx", "onnxscript", "safetensors", "onnxruntime"):
    sys.modules[name] = None
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "torch" else find(name, *a)
import vmoe.__main__
vmoe.__main__.export()
"""


def test_a_bundle_is_served_as_it_is_without_torch(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    command = [sys.executable, "-c", WITHOUT_TORCH]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for named, code in ((bundle.path, 0), (tmp_path / "best.safetensors", 5)):
        done = subprocess.run(
            [*command, str(named), f"--triton-repo={folder}"],
            capture_output=True, text=True, check=False, env=env,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
    assert "is no bundle; exporting a checkpoint needs torch, which is not" in done.stderr
    assert is_ours(folder)
    at = folder / "tiny_expert2" / str(version(bundle)) / "model.onnx" / "model.onnx"
    assert bundles.sha256(at) == bundle.parts["expert2"].hashes["expert2.onnx"]

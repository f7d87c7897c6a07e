"""A bundle on a real Triton server answers as it does here, whatever becomes of the server."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tests import bundles as tiny
from tests import servers, triton_server, videos
from tests.triton_server import CannotRunError, Server
from vmoe import bundle as bundles
from vmoe.bundle import Bundle, Part, Port
from vmoe.clips import Clips, ClipSpec
from vmoe.errors import EngineMismatchError, ServerError
from vmoe.export.triton import PYTHON, Repository, write
from vmoe.runtime import Engine, Pipeline, StreamSettings, load, metrics, sources, watch
from vmoe.runtime.bench.cli import main as bench_command
from vmoe.runtime.cli import _counts
from vmoe.runtime.cli import command as run_command
from vmoe.runtime.engines import triton as backend
from vmoe.runtime.engines._kserve import RefusedError, address, connect
from vmoe.runtime.frames import Stop
from vmoe.runtime.online import Follower
from vmoe.runtime.results import Result
from vmoe.runtime.served import version
from vmoe.runtime.windows import Window

ROOT = Path(__file__).parents[2]
MOST = 4  # clips of one request
MOE = ("tiny_router", "tiny_expert0", "tiny_expert1", "tiny_expert2", "tiny")
ONCE = 1e-6  # of logits: one runtime, one graph


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, spec: ClipSpec) -> Path:
    return tiny.write(tmp_path_factory.mktemp("b") / "tiny", spec)


@pytest.fixture(scope="module")
def online(path: Path, spec: ClipSpec) -> Path:
    """Return a bundle of the online form, by the closed form of `_following`."""
    folder = path.with_name("steady")
    shutil.copytree(path, folder)
    read = bundles.read(folder)
    router = read.parts["router"]
    parts = {"router": router, **{f"expert{i}": _following(folder, i, spec) for i in range(3)}}
    model = {**read.model, "name": "steady"}
    made = dataclasses.replace(read, parts=parts, model=model, extra={"form": "online"})
    bundles.write_manifest(made, folder)
    return folder


def _following(folder: Path, expert: int, spec: ClipSpec) -> Part:
    """Write an expert: 10 * expert + k * green of its last frame + green of the one before."""
    nodes = [
        helper.make_node("Cast", ["clip"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float", "axes"], ["means"], keepdims=0),  # [N, S, 3]
        helper.make_node("Gather", ["means", "green"], ["greens"], axis=2),
        helper.make_node("Concat", ["state0", "greens"], ["all"], axis=1),  # [N, 1 + S]
        helper.make_node("Slice", ["all", "-2", "-1", "1"], ["before"]),
        helper.make_node("Slice", ["all", "-1", "end", "1"], ["next_state0"]),
        helper.make_node("Mul", ["next_state0", "k"], ["scaled"]),
        helper.make_node("Add", ["scaled", "before"], ["sum"]),
        helper.make_node("Add", ["sum", "offset"], ["logits"]),
    ]
    k = np.arange(len(tiny.LABELS), dtype=np.float32)
    values: dict[str, NDArray[Any]] = {
        "axes": np.array([2, 3]), "green": np.array(1), "1": np.array([1]), "-1": np.array([-1]),
        "-2": np.array([-2]), "end": np.array([1 << 30]), "k": k,
        "offset": np.array([10.0 * expert], np.float32),
    }  # fmt: skip
    info, size = helper.make_tensor_value_info, len(tiny.LABELS)
    graph = helper.make_graph(
        nodes,
        f"expert{expert}",
        [info("clip", TensorProto.UINT8, ["N", "S", *spec.shape[1:]]),
         info("state0", TensorProto.FLOAT, ["N", 1])],
        [info("logits", TensorProto.FLOAT, ["N", size]),
         info("next_state0", TensorProto.FLOAT, ["N", 1])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )  # fmt: skip
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", tiny.OPSET)], ir_version=tiny.IR
    )
    file = folder / f"expert{expert}.onnx"
    onnx.save(model, file)
    state = Port("state0", "float32", (None, 1))
    return Part(
        file=file.name,
        format="onnx",
        hashes={file.name: bundles.sha256(file)},
        inputs=(Port("clip", "uint8", (None, None, *spec.shape[1:])), state),
        outputs=(
            Port("logits", "float32", (None, size)),
            dataclasses.replace(state, name="next_state0"),
        ),
        precision={"asked": "fp32", "found": "fp32"},
    )


@pytest.fixture(scope="module")
def server(path: Path, online: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve both bundles."""
    folder = tmp_path_factory.mktemp("repositories")
    for bundle in (path, online):
        how = Repository(folder / bundle.name, onnx=PYTHON, max_batch=MOST, threads=1)
        write(bundles.read(bundle), how)
    try:
        made = Server([folder / path.name, folder / online.name], folder / "server.log")
    except CannotRunError as e:
        pytest.skip(str(e))
    made.start()
    yield made
    made.stop()


@pytest.fixture(params=["http", "grpc"])
def scheme(request: pytest.FixtureRequest) -> str:
    """Return each way to talk to the server that can be gone here."""
    if request.param == "grpc":
        pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
    return str(request.param)


@pytest.fixture
def remote(server: Server, scheme: str, path: Path) -> Iterator[Engine]:
    with load(path, server=server.address(scheme)) as engine:
        yield engine


@pytest.fixture(scope="module")
def here(path: Path) -> Iterator[Engine]:
    with load(path, backend="onnxruntime", device="cpu", threads=1) as engine:
        yield engine


def clips_of(spec: ClipSpec, n: int, seed: int = 0) -> Clips:
    """Return clips whose redness reaches every expert."""
    rng = np.random.default_rng(seed)
    clips = rng.integers(0, 256, (n, *spec.shape), dtype=np.uint8)
    clips[..., 0] = rng.integers(0, 256, (n, 1, 1, 1))
    return clips


def test_mixed_routes_in_more_clips_than_one_request_holds(
    remote: Engine, here: Engine, spec: ClipSpec
) -> None:
    clips = clips_of(spec, 2 * MOST + 3)
    got, wanted = remote.infer(clips), here.infer(clips)
    assert remote.backend_name == "triton"
    assert got.route.tolist() == wanted.route.tolist()
    assert len(set(got.route.tolist())) == 3
    assert (got.logits.dtype, got.scores.dtype, got.route.dtype) == ("f4", "f4", "i8")
    np.testing.assert_allclose(got.logits, wanted.logits, atol=ONCE)
    np.testing.assert_allclose(got.scores, wanted.scores, atol=ONCE)
    forced = [i % 3 for i in range(len(clips))]
    np.testing.assert_allclose(
        remote.infer(clips, forced).logits, here.infer(clips, forced).logits, atol=ONCE
    )
    np.testing.assert_allclose(remote.run_all(clips), here.run_all(clips), atol=ONCE)
    np.testing.assert_allclose(remote.scores(clips), wanted.scores, atol=ONCE)
    assert remote.infer(clips[:0]).logits.shape == (0, 3)
    assert remote.retries == 0


def test_what_a_server_does_not_take_is_one_line(
    server: Server, scheme: str, path: Path, spec: ClipSpec
) -> None:
    client = connect(address(server.address(scheme)), 10)
    good, at = clips_of(spec, 2), version(bundles.read(path))

    def refused(**inputs: NDArray[Any]) -> str:
        with pytest.raises(RefusedError) as e:
            client.infer("tiny", at, inputs, ["logits"])
        assert "\n" not in str(e.value)
        return str(e.value)

    assert "Expected [-1,4,32,32,3], got [2,3,32,32,3]" in refused(clip=good[:, :3])
    assert "data-type" in refused(clip=good.astype(np.float32))
    assert "batch-size must be <= 4" in refused(clip=good.repeat(3, axis=0))
    far = np.array([[0], [7]])
    assert refused(clip=good, force_route=far) == (
        "force_route is 7; this model has experts 0 to 2"
    )
    client.close()
    opened = backend.open(_settings(server.address(scheme), path))
    run = opened.load(bundles.read(path).parts["router"])
    with pytest.raises(EngineMismatchError, match=r"router\.onnx does not run on (http|grpc):"):
        run({"clip": good[:, :3]})
    opened.close()
    opened.close()


def _settings(server: str, path: Path) -> Any:
    from vmoe.runtime.engines import BackendSettings

    return BackendSettings(path, bundle=bundles.read(path), server=server)


def test_clips_of_an_expert_that_is_gone_fail_and_those_of_others_do_not(
    remote: Engine, server: Server, spec: ClipSpec
) -> None:
    clips = tiny.plain_clips(spec, (0, 200, 0), (255, 100, 3))
    server.load("tiny_expert2", un=True)
    try:
        assert remote.infer(clips[:1]).route.tolist() == [0]
        with pytest.raises(EngineMismatchError, match=r"moe does not run on .*tiny_expert2"):
            remote.infer(clips)
    finally:
        server.load("tiny_expert2")
    assert remote.infer(clips).route.tolist() == [0, 2]


def test_another_bundle_of_the_same_name_is_refused(
    server: Server, scheme: str, tmp_path: Path, spec: ClipSpec
) -> None:
    other = tiny.write(tmp_path / "other", spec, experts=2)
    with pytest.raises(EngineMismatchError, match=r"does not serve moe of .*/other, model tiny in"):
        load(other, server=server.address(scheme))


def test_nobody_there_is_one_line_that_says_what_to_do(
    server: Server, scheme: str, path: Path
) -> None:
    nobody = f"{scheme}://127.0.0.1:{servers.free_port()}"
    with pytest.raises(ServerError, match=rf"no Triton server answers at {nobody} \(.*Start it: "):
        load(path, server=nobody)
    wrong = {"http": server.grpc, "grpc": server.http}[scheme]
    with pytest.raises((ServerError, EngineMismatchError)) as e:
        load(path, server=f"{scheme}://127.0.0.1:{wrong}")
    assert "\n" not in str(e.value)
    assert scheme == "grpc" or "grpc://HOST:PORT" in str(e.value)


def test_requests_of_many_clients_become_batches_and_each_gets_its_own(
    server: Server, path: Path, here: Engine, spec: ClipSpec
) -> None:
    clips = clips_of(spec, 120, seed=1)
    wanted, before = here.infer(clips), batches(server, "tiny")
    with load(path, server=server.address("http")) as engine, ThreadPoolExecutor(12) as pool:
        got = list(pool.map(lambda i: engine.infer(clips[i : i + 1]), range(len(clips))))
    assert [int(one.route[0]) for one in got] == wanted.route.tolist()
    np.testing.assert_allclose(
        np.concatenate([one.logits for one in got]), wanted.logits, atol=ONCE
    )
    assert batches(server, "tiny") > before


def batches(server: Server, model: str) -> int:
    """Return how often a model ran so far on more than one clip or frame at once."""
    stats = json.loads(server.ask(f"models/{model}/stats"))["model_stats"][0]["batch_stats"]
    return sum(int(of["compute_infer"]["count"]) for of in stats if int(of["batch_size"]) > 1)


# Streams whose frames go to the server one by one


def frames_of(spec: ClipSpec, n: int, seed: int) -> Clips:
    """Return the frames of a stream whose redness comes and goes, uint8 [n, H, W, 3]."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (n, *spec.shape[1:]), dtype=np.uint8)
    frames[..., 0] = (127 + 127 * np.sin(seed + np.arange(n) / 2)).astype(int)[:, None, None]
    return frames


@pytest.mark.parametrize("name", ["tiny", "steady"])
def test_the_server_holds_what_a_stream_has_of_its_window(
    name: str, server: Server, path: Path, online: Path, spec: ClipSpec
) -> None:
    bundle = bundles.read({"tiny": path, "steady": online}[name])
    streams = {key: frames_of(spec, 14, key) for key in range(1, 7)}
    answers: dict[int, list[dict[str, NDArray[Any]]]] = {key: [] for key in streams}
    client, before = _Sequences(server, bundle), batches(server, f"{name}_stream")
    with ThreadPoolExecutor(len(streams)) as pool:
        for at in range(14):  # at once, so that the server takes some as one batch
            how = {"begins": at == 0, "ends": at == 13}
            sent = {k: pool.submit(client.send, k, f[at], **how) for k, f in streams.items()}
            for key, answer in sent.items():
                answers[key].append(answer.result())
    assert batches(server, f"{name}_stream") > before
    with load(bundle, backend="onnxruntime", device="cpu", threads=1) as engine:
        for key, frames in streams.items():
            clips = np.stack([frames[at - 3 : at + 1] for at in range(3, 14)])
            wanted = engine.infer(clips)
            routes = [int(answer["route"][0, 0]) for answer in answers[key]]
            assert routes == [-1] * 3 + wanted.route.tolist()
            assert len(set(routes)) > 2
            got = np.concatenate([answer["logits"] for answer in answers[key][3:]])
            np.testing.assert_allclose(got, wanted.logits, atol=1e-4)
    client.close()


def test_a_sequence_that_was_not_begun_or_has_ended_is_refused_and_frames_alone_are_taken(
    server: Server, path: Path, spec: ClipSpec
) -> None:
    client, frames = _Sequences(server, bundles.read(path)), frames_of(spec, 6, 3)
    with pytest.raises(RefusedError, match="must specify the START flag"):
        client.send(21, frames[0])
    routes = [
        client.send(21, frames[i], begins=i == 0, ends=i == 5, answer=i != 4)["route"][0, 0]
        for i in range(6)
    ]
    assert [int(route) >= 0 for route in routes] == [False, False, False, True, False, True]
    with pytest.raises(RefusedError, match="must specify the START flag"):
        client.send(21, frames[0])
    client.close()


def test_a_sequence_whose_request_failed_has_ended(
    server: Server, path: Path, spec: ClipSpec
) -> None:
    client, frames = _Sequences(server, bundles.read(path)), frames_of(spec, 9, 3)
    for i in range(3):
        client.send(31, frames[i], begins=i == 0)
    server.load("tiny_router", un=True)
    try:
        with pytest.raises(RefusedError, match="tiny_router"):
            client.send(31, frames[3])
    finally:
        server.load("tiny_router")
    with pytest.raises(RefusedError, match="sequence 31 is not known here; begin it with sequence"):
        client.send(31, frames[3])
    sent = [client.send(31, frames[4 + i], begins=i == 0, ends=i == 3) for i in range(4)]
    assert [int(answer["route"][0, 0]) >= 0 for answer in sent] == [False, False, False, True]
    client.close()


def test_the_client_that_the_documentation_shows(
    server: Server, path: Path, here: Engine, spec: ClipSpec
) -> None:
    pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
    shown = (ROOT / "docs" / "triton.md").read_text().split("```python")[1].split("```")[0]
    for said, there in (
        ("gpu7:8001", f"127.0.0.1:{server.grpc}"),
        ("1234567", str(version(bundles.read(path)))),
        ("mine_stream", "tiny_stream"),
    ):
        assert said in shown
        shown = shown.replace(said, there)
    frames = frames_of(spec, 5, 6)
    for _ in range(2):  # the first has ended: its number is free
        found: dict[str, Any] = {"frames": frames, "camera": 0}
        exec(shown, found)
        found["client"].close()
        assert found["route"] == here.infer(frames[None, -4:]).route[0]


class _Sequences:
    """A client that sends frames, by gRPC as docs/triton.md shows it."""

    def __init__(self, server: Server, bundle: Bundle) -> None:
        grpc = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is missing")
        self._grpc = grpc
        self._client = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}")
        self._model = f"{bundle.model['name']}_stream"

    def send(
        self,
        stream: int,
        frame: NDArray[np.uint8],
        *,
        begins: bool = False,
        ends: bool = False,
        answer: bool = True,
    ) -> dict[str, NDArray[Any]]:
        from tritonclient.utils import InferenceServerException

        given = [self._grpc.InferInput("frame", [1, *frame.shape], "UINT8")]
        given[0].set_data_from_numpy(frame[None])
        if not answer:
            given.append(self._grpc.InferInput("answer", [1, 1], "BOOL"))
            given[1].set_data_from_numpy(np.array([[False]]))
        how = {"sequence_id": stream, "sequence_start": begins, "sequence_end": ends}
        try:
            found = self._client.infer(self._model, given, **how)
        except InferenceServerException as e:
            raise RefusedError(e.message()) from e
        return {name: found.as_numpy(name) for name in ("logits", "scores", "route")}

    def close(self) -> None:
        self._client.close()


def test_an_online_bundle_is_followed_with_the_states_here(
    server: Server, scheme: str, online: Path, spec: ClipSpec
) -> None:
    frames = frames_of(spec, 12, 4)
    windows = [_window(frames[at - 3 : at + 1], at) for at in range(3, 12) if at != 6]
    with (
        load(online, server=server.address(scheme)) as remote,
        load(online, backend="onnxruntime", device="cpu", threads=1) as here,
    ):
        followers = [Follower(remote), Follower(here)]
        for window in windows:
            got, wanted = (follower.infer(window) for follower in followers)
            assert got.route.tolist() == wanted.route.tolist()
            np.testing.assert_allclose(got.logits, wanted.logits, atol=1e-4)
        clips = np.stack([window.clip for window in windows])
        np.testing.assert_allclose(remote.infer(clips).logits, here.infer(clips).logits, atol=1e-4)
    assert followers[0].frames == followers[1].frames < len(windows) * spec.frames


def _window(clip: NDArray[np.uint8], at: int) -> Window:
    return Window(at, clip, 0, 0.0, 0.0, 0, 0, 0.0, False, 0, {}, at)


def test_the_commands_take_a_server(
    server: Server, scheme: str, path: Path, here: Engine, tmp_path: Path
) -> None:
    video, at = videos.write(tmp_path / "a.mp4", 40), server.address(scheme)
    said = tmp_path / "labels.jsonl"
    command = [str(path), "--source", str(video), "--hop", "0.1", "--server", at]
    command += ["--backend", "triton"]
    result = CliRunner().invoke(run_command, [*command, "--jsonl", str(said)], obj=Stop())
    assert result.exit_code == 0, result.output
    assert "tiny on triton sees" in result.stderr
    assert f"next: vmoe-run {path} --hop 0.1" in result.stderr
    found = [json.loads(line) for line in said.read_text().splitlines()]
    wanted = labels(list(watch(here, video, hop_s=0.1)))
    assert [(one["t_s"], one["label"], one["expert"]) for one in found] == [
        (round(t_s, 6), label, expert) for t_s, label, expert in wanted
    ]
    quick = ["--duration", "0", "--iterations", "2", "--warmup", "0", "--force-route", "free"]
    result = CliRunner().invoke(bench_command, [str(path), "--server", at, *quick])
    assert result.exit_code in (0, 3), result.output
    assert "triton" in result.stdout


# What becomes of a stream when the server goes away: the last tests, which stop it


def labels(results: list[Result]) -> list[tuple[float, str, int]]:
    return [(result.t_s, result.label, result.expert) for result in results]


ENDS = [("grpc", "kill"), ("http", "stop")]  # a restart takes seconds: not all four


@pytest.mark.parametrize(("scheme", "end"), ENDS)
def test_a_server_that_is_restarted_loses_no_window_and_mixes_no_label(
    scheme: str, end: str, server: Server, path: Path, here: Engine, tmp_path: Path
) -> None:
    if scheme == "grpc":
        pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
    video = videos.write(tmp_path / "a.mp4", 90)
    wanted = labels(list(watch(here, video, hop_s=0.1)))
    with load(path, server=server.address(scheme)) as engine:
        got, back = [], threading.Timer(0.2, server.start, MOE)
        for number, result in enumerate(watch(engine, video, hop_s=0.1)):
            got.append(result)
            if number == 2:
                getattr(server, end)()
                back.start()
        back.join()
    assert labels(got) == wanted
    assert len(wanted) > 30  # more than wait in the queues
    assert engine.retries > 0


def test_nobody_waits_for_a_lost_server_for_ever_nor_when_the_run_is_ended(
    server: Server, path: Path, spec: ClipSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video, stop, at = videos.write(tmp_path / "a.mp4", 90), Stop(), server.address("http")
    with load(path, server=at, stopping=stop.asked) as engine, load(path, server=at) as patient:
        source = sources.open(str(video))
        pipeline = Pipeline(engine, [source], StreamSettings(hop=0.1), stop=stop)
        for number, _ in enumerate(pipeline.results()):
            if number == 2:
                server.kill()
                threading.Timer(0.5, stop.ask).start()
        monkeypatch.setattr(backend, "PATIENCE_S", 0.2)
        with pytest.raises(ServerError, match=r"was lost \d+ s ago \(.*Start it again"):
            patient.infer(clips_of(spec, 1))
    assert pipeline.tally.windows < 40
    assert pipeline.retries > 0
    assert f"server: away, {pipeline.retries} requests repeated" in _counts(pipeline)
    pytest.importorskip("prometheus_client")
    said = metrics.exposed(pipeline)[0].decode()
    assert f"vmoe_server_retries_total {float(pipeline.retries)}" in said


def test_of_two_runs_that_install_the_server_the_first_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(making: Path) -> None:
        (making / "ready").touch()
        place = tmp_path / f"vmoe-triton-{os.getuid()}-0.7.0"  # which the other run makes now
        place.mkdir()
        (place / "ready").touch()

    monkeypatch.setattr(triton_server.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(triton_server, "_make", make)
    monkeypatch.setattr(triton_server, "_stub", lambda place: place)
    monkeypatch.setattr(triton_server, "_run", lambda *command: "")
    assert triton_server.installed() == tmp_path / f"vmoe-triton-{os.getuid()}-0.7.0"
    assert [path.name for path in tmp_path.iterdir()] == [f"vmoe-triton-{os.getuid()}-0.7.0"]


def test_where_no_server_can_be_installed_the_tests_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_server.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(triton_server.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(triton_server, "PYTHON", tmp_path / "none")
    with pytest.raises(CannotRunError, match=r"no Triton server can be installed here: .*none"):
        triton_server.installed()

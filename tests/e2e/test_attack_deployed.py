"""vmoe-attack on what was deployed, as a user runs it: modes, bundles, codecs, video."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from tests import videos
from tests.twins import lively, random_clips
from vmoe import adversarial, checkpoint
from vmoe.attacks import cli, on_video
from vmoe.attacks.asked import OF_VIDEO
from vmoe.attacks.on_video import read
from vmoe.attacks.straight import source
from vmoe.bundle import read as read_bundle
from vmoe.bundle import sha256
from vmoe.checkpoint import Checkpoint
from vmoe.data.camera_motion import LABELS
from vmoe.export.precision import PrecisionSettings
from vmoe.export.quantise import quantise
from vmoe.runtime.cli import command as watch
from vmoe.runtime.frames import Stop

QUICK = ["--n", "4", "--steps", "2", "--eps", "8", "--no-sanity", "--device", "cpu"]
ASKED = ["--attack", "pgd", "--route-grad", "frozen", "--queries", "60"]
NEEDS_FFMPEG = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(
    *args: str | Path, code: int | None = 0, main: Any = cli.main, obj: object = None
) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args], obj=obj)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert code is None or result.exit_code == code, result.output
    return result


def refused(*args: str | Path, code: int = 2) -> str:
    """Return the one line that refuses a command line."""
    lines = run(*args, code=code).stderr.strip().splitlines()
    (said,) = [line for line in lines if line.startswith("vmoe-attack: ")]
    assert lines[-1] == said
    return said


def other_export(bundle: Path, path: Path) -> Path:
    """Copy a bundle."""
    shutil.copytree(bundle, path)
    return path


def swap_experts(bundle: Path) -> None:
    """Exchange two experts' parts in a manifest, which stays valid."""
    manifest = json.loads((bundle / "vmoe.json").read_text())
    parts = manifest["parts"]
    parts["expert0"], parts["expert1"] = parts["expert1"], parts["expert0"]
    (bundle / "vmoe.json").write_text(json.dumps(manifest))


def as_int8(bundle: Path, path: Path) -> Path:
    """Copy a bundle, its experts in int8, with a manifest that says so."""
    other_export(bundle, path)
    manifest = json.loads((path / "vmoe.json").read_text())
    for name, part in manifest["parts"].items():
        if name != "router":
            plain = onnx.load(path / part["file"])
            clips = random_clips(16, spec=read_bundle(bundle).spec)
            made = quantise(plain, name, clips, PrecisionSettings(int8=True))
            for file in part["sha256"]:
                (path / file).unlink()
            onnx.save(made, path / part["file"])
            part["sha256"] = {part["file"]: sha256(path / part["file"])}
            part["precision"] = {"asked": "int8", "found": "int8"}
    (path / "vmoe.json").write_text(json.dumps(manifest))
    return path


def test_int8_is_attacked_through_its_own_graph(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    int8 = as_int8(tiny_bundle, Path("int8"))
    flags = [*QUICK, "--attack", "pgd", "--route-grad", "frozen", "--mode", "transfer,adaptive"]
    shown = run(tiny_bundle, "--compare", int8, *flags, "--out", "one").stdout
    straight = (
        "split, fp32, int8, on onnxruntime: gradients from its fake-quantised graph, straight"
    )
    assert straight in shown
    rows = json.loads(Path("one/report.json").read_text())["deployed"]["rows"]
    assert [row["engine"] for row in rows] == ["tiny-split", "int8"]
    assert rows[1]["adaptive"]["hits"] <= rows[1]["transfer"]["hits"]
    video = [
        "--video",
        videos.write(Path("in.mkv"), frames=10),
        "--eps",
        "16",
        "--steps",
        "2",
        "--json",
    ]
    found = json.loads(run(int8, *video, "--save-adv", "out.mkv").stdout)
    assert (found["mode"], found["frames"]) == ("adaptive", 10)
    assert 0 < found["linf"] <= 16
    run(int8, "--source", "out.mkv", "--jsonl", "seen.jsonl", main=watch, obj=Stop())
    seen = [json.loads(line) for line in Path("seen.jsonl").read_text().splitlines()]
    labels = [line["label"] for line in seen if "label" in line]
    assert labels == [window["after"] for window in found["said"]]
    model = onnx.load(int8 / "expert2.onnx")
    model.graph.node.append(onnx.helper.make_node("Erf", [model.graph.output[0].name], ["odd"]))
    onnx.save(model, int8 / "expert2.onnx")
    manifest = json.loads((int8 / "vmoe.json").read_text())
    manifest["parts"]["expert2"]["sha256"] = {"expert2.onnx": sha256(int8 / "expert2.onnx")}
    (int8 / "vmoe.json").write_text(json.dumps(manifest))
    shown = run(int8, *flags, "--dry-run").stdout
    assert "gradients from the float twin: Erf of its int8 graphs is not known here" in shown
    whole = dataclasses.replace(read_bundle(int8), lowering="if")
    twin = checkpoint.load(int8 / "twin.safetensors").twin
    assert source(whole, twin) == (
        twin, "gradients from the float twin: its int8 graphs cannot be read part by part",
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert refused(int8, *flags, code=5).endswith(
        "onnx, which reads int8 parts for --mode adaptive, is not installed: pip install "
        "'vmoe[train]'."
    )


def test_clips_of_another_engine_of_the_same_name_are_told_apart(tiny_bundle: Path) -> None:
    flags = [*QUICK, "--attack", "pgd", "--route-grad", "frozen", "--mode", "adaptive"]
    run(tiny_bundle, *flags, "--save-adv", "clips", "--out", "one")
    other = other_export(tiny_bundle, Path("swapped"))
    swap_experts(other)  # alone, both are called `engine`
    replayed = ["--load-adv", "clips", "--json", "--out"]
    own, foreign = (
        json.loads(run(bundle, *replayed, out).stdout)
        for bundle, out in ((tiny_bundle, "two"), (other, "three"))
    )
    assert {row["made_on"] for row in own["rows"]} == {"engine"}
    assert {row["made_on"] for row in foreign["rows"]} == {"another engine"}
    assert own["deployed"]["rows"][0]["adaptive"] is not None
    assert foreign["deployed"]["rows"][0]["adaptive"] is None, "they were made on another engine"


def test_bundles_side_by_side_in_every_mode_then_replayed(tiny_bundle: Path) -> None:
    other = other_export(tiny_bundle, Path("swapped"))
    swap_experts(other)
    flags = [*QUICK, *ASKED, "--save-adv", "clips", "--out", "one", "--gate-robust", "100"]
    result = run(tiny_bundle, "--compare", other, *flags)
    assert "engine tiny-split: " in result.stdout
    assert "fp32, on onnxruntime: gradients from the twin" in result.stdout
    report = json.loads(Path("one/report.json").read_text())
    assert [engine["name"] for engine in report["engines"]] == ["tiny-split", "swapped"]
    made = [(row["attack"], row["mode"], row["made_on"], row["model"]) for row in report["rows"]]
    assert made[:7] == [
        ("pgd", "transfer", "twin", "twin"), ("pgd", "transfer", "twin", "tiny-split"),
        ("pgd", "transfer", "twin", "swapped"), ("pgd", "adaptive", "tiny-split", "twin"),
        ("pgd", "adaptive", "tiny-split", "tiny-split"), ("pgd", "adaptive", "swapped", "twin"),
        ("pgd", "adaptive", "swapped", "swapped"),
    ]  # fmt: skip
    assert {m[:2] for m in made[7:]} == {("square", "query"), ("nes", "query")}
    assert all(row["linf"] <= 8 for row in report["rows"])
    first, second = report["deployed"]["rows"]
    assert first["gap_transfer"]["points"] == 0
    assert second["against"] == "tiny-split"
    checks = {(c["engine"], c["name"]): c["line"] for c in report["deployed"]["sanity"]}
    assert checks["swapped", "the twin's routes"] == "0 of 4 clean clips differ"
    saved = adversarial.load(Path("clips"))
    assert [(a.attack, a.mode, a.against) for a in saved.attacked][:2] == [
        ("pgd", "transfer", ""), ("pgd", "adaptive", "tiny-split"),
    ]  # fmt: skip
    again = json.loads(run(other, "--load-adv", "clips", "--json", "--out", "two").stdout)
    wanted = [r for r in report["rows"] if r["model"] == r["made_on"] == "swapped"]
    found = [r for r in again["rows"] if r["model"] == r["made_on"] == "engine"]
    assert [r["robust"] for r in found] == [r["robust"] for r in wanted]
    assert {r["made_on"] for r in again["rows"]} == {"twin", "tiny-split", "engine"}
    assert again["deployed"]["rows"][0]["adaptive"] == second["adaptive"]
    assert "| engine | clips" in Path("two/report.md").read_text()


def test_a_bundle_that_loses_more_than_its_gate_allows_ends_with_3(tiny_bundle: Path) -> None:
    other = other_export(tiny_bundle, Path("swapped"))
    swap_experts(other)
    flags = ["--n", "20", "--attack", "fgsm", "--eps", "1", "--route-grad", "frozen"]
    flags += ["--mode", "transfer", "--no-sanity", "--gate-robust", "0"]
    result = run(other, *flags, code=3)
    assert "refused: adversarial clips broken on engine alone are " in result.stderr
    assert Path("runs/attack/swapped/report.json").is_file()


def test_a_gate_with_nothing_to_compare_is_told_before_any_work(tiny_bundle: Path) -> None:
    twin, gate = tiny_bundle / "twin.safetensors", ["--no-sanity", "--gate-robust", "0"]
    for target in ([twin], [tiny_bundle, "--mode", "adaptive"]):
        for dry in ([], ["--dry-run"]):
            said = refused(*target, "--n", "4", "--attack", "pgd", *gate, *dry)
            assert "--gate-robust compares an engine with its twin" in said
    assert not list(Path().rglob("report.json"))


def test_what_cannot_be_compared(tiny_bundle: Path) -> None:
    other = json.loads((other_export(tiny_bundle, Path("other")) / "vmoe.json").read_text())
    other["twin"] = {"sha256": "0" * 64}
    Path("other/vmoe.json").write_text(json.dumps(other))
    Path("other/twin.safetensors").unlink()
    said = refused(tiny_bundle, "--compare", "other", *QUICK)
    assert "--compare other was exported from another twin (sha256 000000000000) than" in said
    assert "is a second TARGET; attack it beside with --compare" in refused("a", "b")
    assert "tiny-split twice; name every bundle once" in refused(
        tiny_bundle, "--compare", tiny_bundle, *QUICK
    )
    named = other_export(tiny_bundle, Path("twin"))
    said = refused(tiny_bundle, "--compare", named, *QUICK)
    assert "a bundle called twin cannot be told from the twin: rename its folder" in said
    assert "unknown backend 'onnxruntme': did you mean" in refused(
        tiny_bundle, "--backend", "onnxruntme", *QUICK
    )
    twin = tiny_bundle / "twin.safetensors"
    assert "--mode has no effect: a checkpoint has no engine" in refused(twin, "--mode", "query")
    assert "--compare goes with a bundle" in refused(twin, "--compare", tiny_bundle, *QUICK)
    assert "'adaptiv'" in refused(tiny_bundle, "--mode", "adaptiv")
    said = refused(tiny_bundle, "--n", "2", "--mode", "adaptive", "--attack", "noise")
    assert "--mode adaptive follows gradients, and noise has none" in said
    asked = ["--mode", "adaptive", "--attack", "pgd,square", "--queries", "9"]
    said = refused(tiny_bundle, "--n", "2", *asked)
    assert "--mode adaptive follows gradients, and square has none" in said
    query = [tiny_bundle, "--n", "2", "--mode", "query"]
    assert "--steps has no effect: none of square, nes" in refused(*query, "--steps", "3")
    said = refused(*query, "--codec", "mjpeg:80", "--eot", "2")
    assert "--eot has no effect: no attack that is made follows a gradient" in said
    said = refused(tiny_bundle, "--load-adv", "clips", "--codec", "mjpeg:80", "--eot", "2")
    assert "--eot has no effect: --load-adv clips replays clips as they are" in said
    said = refused(*query, "--attack", "tlga-r,square,pgd")
    assert "--mode query asks for answers alone: it has no use for tlga-r, pgd. Leave" in said
    shown = run(*query, "--attack", "nes,square", "--dry-run").stdout
    assert "attacks: query on engine: nes, square\n" in shown


def test_a_twin_that_does_not_belong_to_the_bundle(tiny_bundle: Path) -> None:
    torn = other_export(tiny_bundle, Path("torn"))
    shutil.copy(tiny_bundle / "router.onnx", torn / "twin.safetensors")
    assert "twin.safetensors has changed since export" in refused(torn, *QUICK, code=1)
    dense = Path("dense.safetensors")
    checkpoint.save(Checkpoint(lively(experts=1, classes=len(LABELS)), LABELS), dense)
    said = refused(tiny_bundle, "--twin", dense, *QUICK, "--attack", "pgd")
    assert "--mode adaptive sends the engine's routes through the twin; dense.safetensors" in said
    assert "has 1 expert(s)" in said


def test_adversarial_video(tiny_bundle: Path) -> None:
    source = videos.write(Path("in.mkv"), frames=14)
    flags = ["--video", source, "--save-adv", "out.mkv", "--eps", "16", "--steps", "4"]
    result = run(tiny_bundle, *flags, "--json")
    report = json.loads(result.stdout)
    assert 0 < report["linf"] <= 16
    assert report["frames"] == 14
    clean, moved = read(source)[0], read(Path("out.mkv"))[0]
    assert int(np.abs(clean.astype(int) - moved).max()) == report["linf"]
    for name, key in ((source, "before"), (Path("out.mkv"), "after")):
        run(tiny_bundle, "--source", name, "--jsonl", f"{key}.jsonl", main=watch, obj=Stop())
        seen = [json.loads(line) for line in Path(f"{key}.jsonl").read_text().splitlines()]
        labels = [line["label"] for line in seen if "label" in line]
        assert labels == [window[key] for window in report["said"]]
    again = run(tiny_bundle, *flags[:2], "--save-adv", "two.mkv", "--eps", "2", "--steps", "1",
                "--to-label", "shake", "--mode", "transfer")  # fmt: skip
    assert "attack: transfer, L-infinity, eps 2/255" in again.stdout
    assert " to shake; " in again.stdout
    assert "the largest change in the saved frames is " in again.stdout


def test_whatever_has_no_effect_on_a_video_is_refused_with_it(tiny_bundle: Path) -> None:
    source = videos.write(Path("in.mkv"), frames=8)
    Path("empty.toml").touch()
    video = [tiny_bundle, "--video", source, "--save-adv", "out.mkv", "--dry-run"]
    values = {
        "attack": "pgd", "eps": "8", "route_grad": "frozen", "mode": "transfer", "device": "cpu",
        "backend": "onnxruntime", "to_label": "shake", "config": "empty.toml",
        "twin": str(tiny_bundle / "twin.safetensors"),
    }  # fmt: skip
    always = {"verbose", "quiet", "version", "target", "video", "save_adv", "dry_run"}
    options = [o for o in cli.main.params if o.name not in always]
    refuses = set()
    for option in options:
        value = [] if getattr(option, "is_flag", False) else [values.get(str(option.name), "1")]
        if isinstance(option.type, click.Choice):
            value = [str(option.type.choices[0])]
        result = run(*video, [*option.opts, *option.secondary_opts][-1], *value, code=None)
        if "has no effect: --video attacks all windows of one video together" in result.stderr:
            assert result.exit_code == 2
            refuses.add(option.name)
        else:
            assert result.exit_code == 0, f"{option.name}: {result.output}"
    assert refuses == {option.name for option in options} - OF_VIDEO
    assert {"seed", "sanity", "queries", "md"} < refuses


def test_a_video_is_attacked_on_one_engine(tiny_bundle: Path) -> None:
    pytest.importorskip("openvino")
    video = ["--video", videos.write(Path("in.mkv"), frames=8), "--save-adv", "out.mkv"]
    said = refused(tiny_bundle, *video, "--backend", "all", "--dry-run")
    assert "--video attacks one engine: leave --compare and --backend all out" in said


def test_video_that_cannot_be_attacked(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = videos.write(Path("in.mkv"), frames=3)
    to = ["--save-adv", "out.mkv"]
    video = [tiny_bundle, "--video", source]
    assert "--video wants --save-adv OUT.mkv" in refused(*video)
    assert "written without loss, to a file out.mkv" in refused(*video, "--save-adv", "out.mp4")
    assert "too short for one window of 0.3 s" in refused(*video, *to)
    assert "unknown label (--to-label) 'shak': did you mean 'shake'?" in refused(
        *video, *to, "--to-label", "shak"
    )
    assert "--to-label has no effect" in refused(tiny_bundle, "--to-label", "shake")
    assert "--video in.mkv needs gradients" in refused(*video, *to, "--mode", "query")
    assert "--n has no effect: --video attacks all windows" in refused(*video, *to, "--n", "3")
    for modes in ("query,transfer", "transfer,adaptive"):
        assert "--mode transfer or adaptive, one" in refused(*video, *to, "--mode", modes)
    twin = tiny_bundle / "twin.safetensors"
    said = refused(twin, "--video", source, *to, "--mode", "adaptive")
    assert "--mode has no effect: a checkpoint has no engine" in said
    assert "--overwrite has no effect: --video" in refused(*video, *to, "--overwrite")
    assert "'nonsense'" in refused(*video, *to, "--to-label", "nonsense", "--dry-run")
    online = other_export(tiny_bundle, Path("online"))
    manifest = json.loads((online / "vmoe.json").read_text())
    (online / "vmoe.json").write_text(json.dumps({**manifest, "form": "online"}))
    said = refused(online, "--video", source, *to, "--dry-run")
    assert "online is of the online form, whose windows share frames" in said
    assert "give one --eps" in refused(*video, *to, "--eps", "1,2")
    assert "--eps is 0.001" in refused(*video, *to, "--eps", "0.001")
    said = refused(tiny_bundle, "--video", "none.mp4", *to, code=4)
    assert "none.mp4: No such file or directory" in said
    with monkeypatch.context() as patched:
        patched.setattr(on_video, "MOST_BYTES", 1 << 20)
        long = videos.write(Path("long.mkv"), frames=40)
        said = refused(tiny_bundle, "--video", long, *to)
        assert "long.mkv has more than 1 MiB of frames (29 are 1.4 s): cut it with ffmpeg" in said
    with monkeypatch.context() as patched:
        lossy = iter([(clean := read(long)[0], 20.0), (255 - clean, 20.0)])
        patched.setattr(on_video, "read", lambda path: next(lossy))
        said = refused(tiny_bundle, "--video", long, *to, "--steps", "1", code=1)
        assert "out.mkv does not read back as it was written: FFV1 is lossy here" in said
    assert "out.mkv exists. Choose another --save-adv" in refused(*video, *to)


@NEEDS_FFMPEG
def test_through_a_codec(tiny_bundle: Path) -> None:
    flags = ["--n", "2", "--steps", "1", *QUICK[4:]]
    flags += ["--attack", "pgd", "--route-grad", "frozen", "--mode", "transfer,adaptive"]
    run(tiny_bundle, *flags, "--codec", "h264:30", "--eot", "2", "--out", "one", "--save-adv", "c")
    report = json.loads(Path("one/report.json").read_text())
    assert report["channel"] == {"codec": "h264", "quality": 30, "camera": None, "draws": 2}
    assert [row["mode"] for row in report["rows"]] == ["transfer"] * 2 + ["adaptive"] * 2
    assert report["rows"][0]["linf"] == 8  # of the clip that was made, before the codec
    assert report["sanity"] is None
    again = json.loads(
        run(tiny_bundle, "--load-adv", "c", "--codec", "h264:30", "--json", "--out", "two").stdout
    )
    assert [r["robust"] for r in again["rows"] if r["made_on"] == "twin"] == [
        r["robust"] for r in report["rows"][:2]
    ]
    assert (
        "channel: h264, quality 30, gradients over 2 qualities" in Path("one/report.md").read_text()
    )


def test_a_codec_that_is_none_or_not_here(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*flags: str, code: int = 2) -> str:
        return refused(tiny_bundle, *QUICK, *flags, code=code)

    assert "unknown codec 'h265'" in said("--codec", "h265:23")
    assert "write h264:QUALITY, a whole number from 0 to 51" in said("--codec", "h264:60")
    assert "write mjpeg:QUALITY, a whole number from 1 to 100" in said("--codec", "mjpeg")
    assert "write WIDTHxHEIGHT, such as 640x480" in said("--camera-size", "big")
    assert "--eot has no effect: no --codec" in said("--eot", "2")
    monkeypatch.setenv("PATH", "/nowhere")
    missing = said("--codec", "h264:23", code=5)
    assert missing.endswith(
        "ffmpeg, which codes --codec h264, is not installed: apt install ffmpeg, or "
        "https://ffmpeg.org/download.html."
    )


def test_the_hash_of_every_engine_is_what_a_run_hangs_on(tiny_bundle: Path) -> None:
    flags = [*QUICK, "--attack", "pgd-r", "--mode", "transfer", "--out", "one"]
    run(tiny_bundle, *flags)
    report = json.loads(Path("one/report.json").read_text())
    assert report["twin"]["sha256"] == sha256(tiny_bundle / "twin.safetensors")
    (engine,) = report["engines"]
    assert (engine["name"], engine["backend"], engine["precision"]) == (
        "engine", "onnxruntime", "fp32",
    )  # fmt: skip

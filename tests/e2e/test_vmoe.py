"""The `vmoe` command: demo, doctor and inspect, on the model that ships."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result

from vmoe import latest, moves
from vmoe.__main__ import main
from vmoe.data.camera_motion import LABELS


def vmoe(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def frames_of(path: Path) -> int:
    capture = cv2.VideoCapture(str(path))
    count = 0
    while capture.read()[0]:
        count += 1
    capture.release()
    return count


def test_demo_watches_known_moves_and_says_how_well(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = vmoe("demo", "--out", str(out), "--rounds", "1")
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    assert report["windows"] == sum(row["windows"] for row in report["labels"])
    assert report["right"] == sum(row["right"] for row in report["labels"])
    assert {row["label"] for row in report["labels"]} == set(LABELS)
    # The model is trained for this: far above a guess of one in ten, on pictures it never saw.
    assert report["right"] / report["windows"] > 0.5
    assert frames_of(out / "annotated.mp4") == frames_of(out / "moves.avi") == 400
    assert (out / "bundle" / "vmoe.json").exists()  # exported here and now
    assert f"next: vmoe-run {out / 'bundle'} --camera 0" in result.output
    again = vmoe("demo", "--out", str(out), "--rounds", "1", "--quiet")
    assert again.exit_code == 0, again.output  # an earlier demo is replaced


def test_demo_takes_the_users_own_video(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    source = tmp_path / "mine.avi"
    writer = cv2.VideoWriter(str(source), cv2.VideoWriter.fourcc(*"MJPG"), 10, (320, 240))
    picture = cv2.resize(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8), (320, 240))
    for _ in range(10):
        writer.write(picture)
    writer.release()
    out = tmp_path / "demo"
    result = vmoe("demo", "--source", str(source), "--out", str(out), "--rounds", "1", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    assert {segment["picture"] for segment in report["segments"]} == {"mine.avi"}


@pytest.mark.parametrize("mine", ["precious.txt", "moves.avi", "report.md", "report.json"])
def test_demo_replaces_nothing_of_the_user(tmp_path: Path, mine: str) -> None:
    (tmp_path / mine).write_text("{}")
    result = vmoe("demo", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "is no folder of an earlier demo; choose another --out." in result.output
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(mine, "{}")]


@pytest.mark.parametrize(
    ("content", "line"),
    [(None, "does not exist"), (b"no video", "cannot be read as a picture or a video")],
)
def test_demo_of_a_bad_source_is_one_line(tmp_path: Path, content: bytes | None, line: str) -> None:
    source = tmp_path / "mine.mp4"
    if content is not None:
        source.write_bytes(content)
    result = vmoe("demo", "--source", str(source), "--out", str(tmp_path / "demo"))
    assert result.exit_code == 2, result.output
    assert line in result.output
    assert not (tmp_path / "demo").exists()


def test_a_window_over_two_moves_is_not_judged() -> None:
    segments = [moves.Segment("static", 0.0, 1.95, "a"), moves.Segment("shake", 2.0, 3.95, "a")]
    assert moves.truth(segments, 0.5, 1.2) is segments[0]
    assert moves.truth(segments, 2.0, 2.7) is segments[1]
    assert moves.truth(segments, 1.6, 2.3) is None
    assert moves.truth(segments, 3.5, 4.2) is None


def test_inspect_shows_what_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a checkout's runs/ may hold a newer bundle
    result = vmoe("inspect")
    assert result.exit_code == 0, result.output
    assert "camera-motion" in result.output
    assert "expert3.onnx" in result.output
    assert "each route over router + expert alone: minima 1.1" in result.output
    assert f"model card: {latest.CARD}" in result.output
    held = json.loads(CliRunner().invoke(main, ["inspect", "--json", "--quiet"]).stdout)
    assert held["labels"] == list(LABELS)
    assert Path(held["card"]) == latest.CARD


def test_the_card_says_what_the_report_says() -> None:
    from vmoe.report import percent

    card = " ".join(latest.CARD.read_text().split())
    held = json.loads(latest.CARD.with_name("training.json").read_text())
    clean, worst = held["clean"], held["robust"]["worst_of"]
    shares = [percent(each["hits"], each["n"]).replace(" ", " % ") for each in (clean, worst)]
    for said in [*shares, f"{held['parameters']:,} parameters", f"{held['flops']['saved']:.0%}"]:
        assert said.replace("68%", "68 %") in card
    manifest = json.loads((latest.SHIPPED / "vmoe.json").read_text())
    assert manifest["twin"]["sha256"] in card


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> object:
        return None if name == "onnxscript" else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    result = vmoe("doctor", "--json", "--quiet")
    assert result.exit_code == 0
    missing = json.loads(result.stdout)["missing"]
    assert missing["vmoe-export"] == ["onnxscript"]
    assert missing["vmoe-run"] == []
    assert "needs onnxscript" in vmoe("doctor").output
    assert f"its card: {latest.CARD}" in vmoe("doctor").output


def test_an_unknown_command_is_one_line() -> None:
    result = vmoe("insp")
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert "did you mean 'inspect'?" in result.output


def test_seed_below_zero_is_refused_before_any_work(tmp_path: Path) -> None:
    result = vmoe("demo", "--seed", "-1", "--out", str(tmp_path / "demo"))
    assert result.exit_code == 2
    assert "--seed" in result.output
    assert not (tmp_path / "demo").exists()


def test_the_model_that_ships_is_small_whole_and_knows_its_recipe() -> None:
    from vmoe import bundle, checkpoint

    read = bundle.read(latest.SHIPPED)  # proves every hash
    assert (read.path / "twin.safetensors").stat().st_size < 3_000_000
    held = checkpoint.load(read.path / "twin.safetensors")
    assert held.recipe["run"]["method"] == "j-tlat-plus"
    assert held.twin.settings.experts == read.experts == 4


@pytest.mark.parametrize("command", ["train", "attack", "export"])
def test_a_command_without_torch_says_what_to_install(command: str) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import importlib.util as u; f = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'torch' else f(n, *a)\n"
        f"import vmoe.__main__ as m; m.{command}()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 5
    assert done.stderr == f"vmoe-{command}: torch not installed: pip install 'vmoe[train,cpu]'.\n"

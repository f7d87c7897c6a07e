"""Bisect: the part, the block and the layer by which a graph leaves its twin."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from onnx import ModelProto, numpy_helper

from tests.experts import clips_for, plain, small_twin, twin_of
from tests.twins import random_clips
from vmoe.export import bisect, half, optimize
from vmoe.export.onnx import Parts
from vmoe.export.precision import PrecisionSettings
from vmoe.export.quantise import quantise


def spoiled(model: ModelProto, weight: str) -> ModelProto:
    """Return a graph one of whose weights is off."""
    made = ModelProto()
    made.CopyFrom(model)
    tensor = next(t for t in made.graph.initializer if t.name.startswith(weight))
    values = numpy_helper.to_array(tensor).copy()
    values[0] += 1 + np.abs(values).max()
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return made


EVEN = {"experts": 1e-4, "router": 1e-4}


@pytest.mark.parametrize(
    ("family", "form", "place", "block"),
    [
        ("tsm", "none", "1.layer2.0.conv1", "1.layer2.0"),
        ("tsm", "flat", "1.conv1", "1"),
        ("small", "none", "1.layer2.conv1.0", "1.layer2"),
        ("small", "joined", "1.stem.0", "1.stem"),
        ("small", "joined", "1.layer1.conv2.0", "1.layer1"),
        ("small", "direct", "1.layer2.conv1.0", "1.layer2"),
        ("small", "winograd", "1.layer1.conv1.0", "1.layer1"),
        ("small", "direct", "1.fc", "1"),
    ],
)
def test_bisect_names_the_block_and_the_layer_that_was_spoiled(
    family: str, form: str, place: str, block: str
) -> None:
    twin, whole = twin_of(family), plain(family)
    lowered = [optimize.lower(expert, form) or expert for expert in whole.experts]
    clips = clips_for(family, 3)
    assert bisect.find(twin, whole, Parts(whole.router, lowered), clips, EVEN).part is None
    broken = Parts(whole.router, [lowered[0], spoiled(lowered[1], f"module.{place}.weight")])
    found = bisect.find(twin, whole, broken, clips, EVEN)
    assert (found.part, found.block) == ("expert1", f"experts.1.{block}")
    assert found.layers == (f"experts.1.{place}",)
    assert found.error > 1e-4 >= found.error_before
    assert f"breaks in experts.1.{block}, at experts.1.{place}: off by " in found.line()
    assert len(found.steps) >= {"tsm": 21, "small": 8}[family]


def test_bisect_finds_what_the_exporter_did_and_names_all_that_it_may_be() -> None:
    whole, clips = plain("small"), clips_for("small", 2)
    down = "module.1.layer2.downsample.0.weight"
    wrong = Parts(whole.router, [spoiled(whole.experts[0], down), whole.experts[1]])
    found = bisect.find(small_twin(), wrong, wrong, clips, EVEN)
    assert (found.part, found.block) == ("expert0", "experts.0.1.layer2")
    assert set(found.layers) == {f"experts.0.1.layer2.{n}.0" for n in ("conv2", "downsample")}


@pytest.mark.parametrize("form", ["none", "joined"])
def test_bisect_tells_what_is_done_to_pixels_from_the_first_layer(form: str) -> None:
    whole, clips = plain("small"), clips_for("small", 2)
    pixels = ModelProto()
    pixels.CopyFrom(whole.experts[1])
    for tensor in pixels.graph.initializer:
        if numpy_helper.to_array(tensor).tolist() == 255:
            tensor.CopyFrom(numpy_helper.from_array(np.float32(256), tensor.name))
    wrong = Parts(whole.router, [whole.experts[0], pixels])
    lowered = [optimize.lower(expert, form) or expert for expert in wrong.experts]
    tested = Parts(wrong.router, lowered)
    found = bisect.find(small_twin(), wrong, tested, clips, EVEN)
    assert (found.part, found.block, found.layers) == ("expert1", "experts.1.1.stem", ())
    assert "what is done to the input of experts.1.1.stem.0, no layer: off by" in found.line()
    assert found.before == "experts.1.1.stem.0"


def test_bisect_holds_each_part_to_its_own_bound() -> None:
    whole, clips = plain("small"), clips_for("small", 2)
    assert whole.router is not None
    weights = [t.name for t in whole.router.graph.initializer if t.name.endswith("weight")]
    parts = Parts(spoiled(whole.router, weights[0]), whole.experts)
    bounds = {"experts": 1e4, "router": 1e-4}
    assert bisect.find(small_twin(), whole, parts, clips, bounds).part == "router"
    assert bisect.find(small_twin(), whole, parts, clips, {**bounds, "router": 1e4}).part is None


def test_bisect_finds_what_int8_and_fp16_break() -> None:
    whole, clips = plain("tsm"), clips_for("tsm", 3)
    settings = PrecisionSettings(int8=True)
    quantised = [
        quantise(model, f"expert{i}", clips, settings)
        for i, model in enumerate([whole.experts[0], spoiled(whole.experts[1],
                                                             "module.1.layer3.0.conv1.weight")])
    ]  # fmt: skip
    bounds = {"experts": 0.12, "router": 1e-4}
    found = bisect.find(twin_of("tsm"), whole, Parts(whole.router, quantised), clips, bounds)
    assert (found.part, found.layers) == ("expert1", ("experts.1.1.layer3.0.conv1",))
    twin = copy.deepcopy(small_twin())
    with torch.no_grad():
        twin.experts[0][1].layer2.conv1[1].weight += 1e6  # beyond the largest half: 65504
    low = half.export(twin, PrecisionSettings(fp16=True), 20)
    found = bisect.find(twin, low, low, random_clips(3), {"experts": 0.01, "router": 1e-4})
    assert (found.part, found.layers) == ("expert0", ("experts.0.1.layer2.conv1.0",))
    assert found.error == float("inf")


def test_bisect_says_where_it_cannot_look() -> None:
    low = half.export(small_twin(), PrecisionSettings(bf16=True), 20)
    found = bisect.find(small_twin(), low, low, random_clips(2), EVEN)
    assert found.part is None
    assert found.line().startswith("bisect: nothing can be said: ONNX Runtime does not run the")

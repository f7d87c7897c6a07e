"""Weights of other libraries: taken by name into every expert, or refused in one line."""

from __future__ import annotations

import json
import logging
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.twins import lived
from vmoe import checkpoint, registry
from vmoe.clips import ClipSpec
from vmoe.errors import SettingError, VmoeError
from vmoe.models import ModelSettings, VideoMoE, build
from vmoe.models.moe import FAMILIES
from vmoe.train import pretrained
from vmoe.train.initial import take_weights

SPEC = ClipSpec(frames=4, height=32, width=32)
PUBLISHED = json.loads((Path(__file__).parents[1] / "torchvision.json").read_text())
State = dict[str, Tensor]


def twin(arch: str = "tsm", width: float = 0.125, experts: int = 2, labels: int = 5) -> VideoMoE:
    return build(ModelSettings(arch, width, experts, labels), SPEC, seed=1)


def weights(arch: str = "tsm", width: float = 0.125, labels: int = 400) -> State:
    """Return the state of a network that somebody trained."""
    torch.manual_seed(7)
    made: nn.Module = registry.load(FAMILIES, arch, "family").build(width, labels)
    return lived(made).state_dict()


def published(name: str) -> State:
    """Return a state of torchvision's names and shapes, which takes no memory."""
    return {
        key: (torch.zeros(1) if shape else torch.tensor(1)).expand(shape)
        for key, shape in PUBLISHED[name].items()
    }


def assert_taken(made: VideoMoE, state: State, *, head: bool = False) -> None:
    fresh = build(made.settings, SPEC, seed=1)
    for expert, before in zip(made.experts, fresh.experts, strict=True):
        for name, value in expert.get_submodule("1").state_dict().items():
            old = before.get_submodule("1").state_dict()[name]
            wanted = old if name.startswith("fc.") and not head else state[name]
            assert torch.equal(value, wanted), name
    router, old_router = made.state_dict(), fresh.state_dict()
    assert all(torch.equal(v, old_router[n]) for n, v in router.items() if n.startswith("router"))


def write(state: Any, path: Path, form: str) -> Path:
    if form == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("arch", ["r3d18", "r2plus1d18", "tsm", "tsm-online"])
def test_every_expert_takes_the_weights_of_any_file(tmp_path: Path, arch: str, form: str) -> None:
    state, made = weights(arch), twin(arch)
    path = write(state, tmp_path / "a.pth", form)
    text = take_weights(made, path)
    count = len(state) - 2
    assert text == (
        f"{count} tensors of {path} in each of 2 expert(s); fresh: the classifier (400 labels "
        "there, 5 here), the router"
    )
    assert_taken(made, state)


def test_a_classifier_of_the_same_labels_is_taken_too(tmp_path: Path) -> None:
    state, made = weights(labels=5), twin(experts=1)
    text = take_weights(made, write(state, tmp_path / "a.pth", "zip"))
    assert text.endswith("in each of 1 expert(s)")
    assert_taken(made, state, head=True)


def test_half_a_classifier_stays_fresh(tmp_path: Path) -> None:
    state, made = weights(labels=5), twin()
    del state["fc.weight"]
    assert "the classifier (none there, 5 here)" in take_weights(
        made, write(state, tmp_path / "a.pth", "zip")
    )
    assert_taken(made, state)


WRAPPED = {
    "module": lambda s: {f"module.{k}": v for k, v in s.items()},
    "backbone and another head": lambda s: {
        **{f"model.backbone.{k}": v for k, v in s.items() if not k.startswith("fc.")},
        "model.head.projection.weight": torch.zeros(3),
    },
    "a trainer's": lambda s: {
        "epoch": 3, "best_acc1": torch.tensor(76.0), "optimizer": {"state": {0: torch.zeros(2)}},
        "state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()},
    },
    "SlowFast's": lambda s: {"cfg": "text", "model_state": s},
    "without counters": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
}  # fmt: skip


@pytest.mark.parametrize("how", WRAPPED)
def test_what_trainers_put_around_weights_is_taken_off(tmp_path: Path, how: str) -> None:
    state, made = weights(), twin()
    text = take_weights(made, write(WRAPPED[how](state), tmp_path / "a", "zip"))
    assert "fresh: the classifier" in text
    assert_taken(made, state)


def test_half_precision_is_taken_as_float32(tmp_path: Path) -> None:
    state, made = weights(), twin()
    halves = {name: v.half() if v.is_floating_point() else v for name, v in state.items()}
    take_weights(made, write(halves, tmp_path / "a", "safetensors"))
    assert_taken(made, {name: v.to(state[name].dtype) for name, v in halves.items()})


def test_public_weights_fit_by_name_at_width_1() -> None:
    for arch, name in (("r3d18", "r3d_18"), ("r2plus1d18", "r2plus1d_18"), ("tsm", "resnet18"),
                       ("tsm-online", "resnet18")):  # fmt: skip
        assert not pretrained._unfit(pretrained._shapes(arch, 1), published(name))


NOT_OURS = "Its tensors fit no family of vmoe; at --width 1, r2plus1d18 takes torchvision's r2p"


@pytest.mark.parametrize(
    ("arch", "width", "state", "message"),
    [
        ("r3d18", 0.125, published("r3d_18"),
         "its stem.0.weight is float32 [64, 3, 3, 7, 7], not float32 [8, 3, 3, 7, 7]. "
         "Its tensors fit --arch r3d18 --width 1."),
        ("r3d18", 0.125, published("resnet18"),
         "it has no stem.0.weight. Its tensors fit --arch tsm --width 1."),
        ("tsm-online", 0.25, published("resnet18"), "Its tensors fit --arch tsm-online --width 1."),
        ("r3d18", 0.125, published("r2plus1d_18"), "Its tensors fit --arch r2plus1d18 --width 1."),
        ("tsm", 0.125, weights("tsm", 0.5), "Its tensors fit --arch tsm --width 0.5."),
        ("slowfast", 0.125, published("r3d_18"), "Its tensors fit --arch r3d18 --width 1."),
        ("tsm", 0.125, {**weights(), "layer1.2.conv1.weight": torch.zeros(1)},
         "it has layer1.2.conv1.weight, which this family has not. " + NOT_OURS),
        ("tsm", 0.125, {"blocks.0.attn.weight": torch.zeros(2)}, "it has no conv1.weight. Its"),
        ("tsm", 0.125, {**weights(), "conv1.weight": torch.zeros(8, 3, 7, 7, dtype=torch.int8)},
         "its conv1.weight is int8 [8, 3, 7, 7], not float32 [8, 3, 7, 7]"),
        ("tsm", 0.125, {**weights(), "conv1.weight": torch.zeros(8, 3, 7, 7).to_sparse()},
         "its conv1.weight is float32 [8, 3, 7, 7] (torch.sparse_coo), not"),
    ],
)  # fmt: skip
def test_another_architecture_or_width_is_refused_with_what_fits(
    arch: str, width: float, state: State, message: str
) -> None:
    made = twin(arch, width)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    with pytest.raises(SettingError) as e:
        pretrained.take(made, state, Path("a.pth"))
    assert str(e.value).startswith(f"--init-from a.pth does not fit --arch {arch} --width {width}:")
    assert message in str(e.value)
    assert "\n" not in str(e.value)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('code was run')",))


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_code_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a.pth"
    if form == "plain":
        path.write_bytes(pickle.dumps(Evil(), protocol=2))
    else:
        write({**weights(), "more": Evil()}, path, form)
    with pytest.raises(VmoeError, match="holds exec, which is no tensor and could run code") as e:
        take_weights(twin(), path)
    assert "\n" not in str(e.value)
    assert e.value.exit_code == 1
    with pytest.raises(VmoeError, match="is a pickle"):  # elsewhere, no pickle at all
        checkpoint.load(path)


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "a.pth")
    with pytest.raises(VmoeError, match=r"holds torch\.nn\.modules\.linear\.Linear, which is no"):
        take_weights(twin(), tmp_path / "a.pth")


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("keep", [3, 40, 1000, -1])
def test_a_damaged_file_is_one_line(tmp_path: Path, form: str, keep: int) -> None:
    path = write(weights(), tmp_path / "a", form)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(VmoeError, match="is damaged") as e:
        take_weights(twin(), path)
    assert "\n" not in str(e.value)
    assert e.value.exit_code == 1


def test_a_script_of_torch_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.ReLU()), tmp_path / "a.pt")  # type: ignore[no-untyped-call]
    with pytest.raises(VmoeError, match=r"is damaged, or no file of torch\.save"):
        take_weights(twin(), tmp_path / "a.pt")


@pytest.mark.parametrize("value", [{}, [1, 2], {"epoch": 3}, {0: torch.zeros(2)}, torch.zeros(2)])
def test_a_file_without_weights(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "a.pth")
    with pytest.raises(VmoeError, match="holds no tensors with names: no weights of a model"):
        take_weights(twin(), tmp_path / "a.pth")


def test_two_models_in_one_file(tmp_path: Path) -> None:
    both = {f"{prefix}.conv1.weight": torch.zeros(2) for prefix in ("module", "backbone")}
    torch.save(both, tmp_path / "a.pth")
    with pytest.raises(VmoeError, match="holds two models, under different prefixes: save one"):
        take_weights(twin(), tmp_path / "a.pth")


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    state, made = weights(), twin(experts=1)
    before = made.experts[0].get_submodule("1").state_dict()
    before = {name: value.clone() for name, value in before.items()}
    state["layer3.0.bn1.running_var"][3] = torch.nan
    with pytest.raises(VmoeError, match=r"its layer3\.0\.bn1\.running_var holds values that are"):
        take_weights(made, write(state, tmp_path / "a", "safetensors"))
    assert_taken(made, before)  # nothing


def test_a_missing_file() -> None:
    with pytest.raises(VmoeError, match=r"cannot read checkpoint none\.pth: No such file"):
        take_weights(twin(), Path("none.pth"))


def test_a_torch_that_weights_only_does_not_protect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(weights(), tmp_path / "a.pth", "zip")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    wanted = r"torch 2\.9\.1\+cpu can be made to run code.*Install torch 2\.10 or newer"
    with pytest.raises(VmoeError, match=wanted):
        take_weights(twin(), tmp_path / "a.pth")
    write(weights(), tmp_path / "a.safetensors", "safetensors")
    take_weights(twin(), tmp_path / "a.safetensors")


def test_it_is_said_how_public_weights_were_normalised(caplog: pytest.LogCaptureFixture) -> None:
    state, settings = published("resnet18"), ModelSettings("tsm", 1.0, 1, 5)
    with caplog.at_level(logging.WARNING):
        pretrained.take(build(settings, SPEC), state, Path("a"))
    assert caplog.messages == [
        "torchvision's or timm's resnet18 was trained with --mean 0.485,0.456,0.406 --std "
        "0.229,0.224,0.225, this run has 0.45,0.45,0.45 and 0.225,0.225,0.225: if these are its "
        "weights, give those flags."
    ]
    caplog.clear()
    spec = ClipSpec(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    pretrained.take(build(settings, spec), state, Path("a"))
    pretrained.take(twin("tsm"), weights("tsm"), Path("a"))  # narrower than any public ones
    assert not caplog.messages
    assert not list(pretrained._public(["slowfast"]))


def test_a_checkpoint_of_another_normalisation_is_refused(tmp_path: Path) -> None:
    other = build(ModelSettings("tsm", 0.125, 1, 2), ClipSpec(mean=(0.1, 0.2, 0.3)))
    checkpoint.save(checkpoint.Checkpoint(other, ("a", "b")), tmp_path / "a.safetensors")
    with pytest.raises(
        SettingError, match=r"was trained with --mean 0\.1,0\.2,0\.3: give that too"
    ):
        take_weights(twin(labels=2), tmp_path / "a.safetensors")

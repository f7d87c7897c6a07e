"""The routed kernels: in Triton's interpreter they compute what torch does; PTX is as it ships."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from vmoe.errors import BundleError, MissingDependencyError, UnknownNameError, VmoeError
from vmoe.export.plugins import compiled, reference
from vmoe.runtime.plugins import calls
from vmoe.runtime.plugins import compiled as shipped
from vmoe.runtime.plugins.calls import Call, Conv3d

INTERPRETER = Path(__file__).parents[1] / "interpreted.py"
EXPERTS = 4
TYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16}
NEAR = {"fp32": 1e-5, "tf32": 1e-5, "fp16": 2e-3}  # the interpreter does not shorten to TF32
# Every variant is compiled as it was for the package where that takes a second or two; the wide
# convolutions take ten each, and are only assembled.
QUICK = ("topk", "routed_linear_fp32", "finish_fp16", "routed_conv3d_fp16_small")

triton = pytest.importorskip("triton", reason="not installed: pip install 'vmoe[kernels]'")


class Wide(Conv3d):
    """A convolution that takes the wide tile, however small it is."""

    tile = "wide"  # type: ignore[assignment]


class Batch:
    """Calls to come, and the tensors that they name."""

    def __init__(self, seed: int) -> None:
        self.make = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}
        self.calls: list[Call] = []
        self.checks: list[Callable[[dict[str, Tensor]], None]] = []

    def hold(self, value: Tensor) -> str:
        name = f"t{len(self.tensors)}"
        self.tensors[name] = value
        return name

    def randn(self, *shape: int, kind: torch.dtype = torch.float32, scale: float = 1) -> Tensor:
        return (scale * torch.randn(shape, generator=self.make)).to(kind)

    def routes(self, rows: int) -> Tensor:
        return torch.randint(0, EXPERTS, (rows,), generator=self.make).int()

    def blank(self, *shape: int, kind: torch.dtype = torch.float32) -> str:
        """Hold an output that is wrong wherever it is not written."""
        value = -1 if kind == torch.int32 else torch.nan
        return self.hold(torch.full(shape, value, dtype=kind))

    def run(self, folder: Path) -> None:
        """Run the calls in one process, and check what they wrote."""
        asked = [[call.kernel, call.grid, call.args] for call in self.calls]
        values = {name: tensor.numpy() for name, tensor in self.tensors.items()}
        np.savez(folder / "calls.npz", calls=np.array(json.dumps(asked)), **values)
        command = [sys.executable, str(INTERPRETER), "calls.npz", "answers.npz"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        with np.load(folder / "answers.npz") as read:
            found = {name: torch.from_numpy(read[name]) for name in read.files}
        for check in self.checks:
            check(found)

    def topk(self, scores: Tensor, k: int) -> None:
        rows, experts = scores.shape
        weights, route = self.blank(rows, k), self.blank(rows, k, kind=torch.int32)
        self.calls += calls.topk(self.hold(scores), weights, route, rows, experts, k)
        wanted = reference.topk(scores, k)

        def check(found: dict[str, Tensor]) -> None:
            assert torch.equal(found[route], wanted[1]), f"{experts} experts, k {k}"
            assert torch.allclose(found[weights], wanted[0], atol=1e-6)

        self.checks.append(check)

    def linear(self, rows: int, inner: int, outer: int, kind: str, relu: bool) -> None:
        x = self.randn(rows, inner, kind=TYPES[kind])
        w = self.randn(EXPERTS, outer, inner, kind=TYPES[kind], scale=inner**-0.5)
        b, expert = self.randn(EXPERTS, outer, kind=TYPES[kind]), self.routes(rows)
        y = self.blank(rows, outer, kind=TYPES[kind])
        held = [self.hold(t) for t in (x, expert, w, b)]
        self.calls += calls.routed_linear(
            *held, y, rows=rows, inner=inner, outer=outer, relu=relu, half=kind == "fp16"
        )
        exact = reference.routed_linear(x.double(), expert, w.double(), b.double(), relu)
        self.near(y, exact, kind, f"linear {rows} {inner} {outer}")

    def conv(self, conv: Conv3d, kind: str) -> None:
        inner = conv.channels * int(np.prod(conv.kernel))
        x = self.randn(conv.clips, conv.channels, *conv.size, kind=TYPES[kind])
        shape = (EXPERTS, conv.outputs, conv.channels, *conv.kernel)
        w = self.randn(*shape, kind=TYPES[kind], scale=inner**-0.5)
        b = self.randn(EXPERTS, conv.outputs, kind=TYPES[kind])
        expert = self.routes(conv.clips)
        y = self.blank(conv.clips, conv.outputs, *conv.out, kind=TYPES[kind])
        room = self.blank(max(1, conv.workspace_bytes // 4))
        held = [self.hold(t) for t in (x, expert, w, b)]
        self.calls += calls.routed_conv3d(conv, *held, y, room, kind)
        exact = reference.routed_conv3d(
            x.double(), expert, w.double(), b.double(), conv.strides, conv.pads, conv.relu
        )
        self.near(y, exact, kind, str(conv))

    def near(self, name: str, exact: Tensor, kind: str, what: str) -> None:
        def check(found: dict[str, Tensor]) -> None:
            error = float((found[name].double() - exact).norm() / exact.norm())
            assert error < NEAR[kind], f"{what} in {kind}: {error}"

        self.checks.append(check)


def test_topk_is_softmax_and_the_lowest_index_on_ties(tmp_path: Path) -> None:
    batch = Batch(0)
    for rows, experts, k in ((1, 1, 1), (5, 4, 1), (3, 7, 3), (2, 64, 2), (4, 5, 5)):
        batch.topk(torch.randint(-2, 3, (rows, experts), generator=batch.make).float(), k)
        batch.topk(batch.randn(rows, experts, scale=10), k)
    batch.topk(torch.tensor([[0.0, -torch.inf, -torch.inf], [-100.0, 100.0, 99.0]]), 3)
    strange = torch.tensor([[1.0, torch.nan, 3.0], [2.0, torch.inf, torch.inf]])
    route = batch.blank(2, 2, kind=torch.int32)
    batch.calls += calls.topk(batch.hold(strange), batch.blank(2, 2), route, 2, 3, 2)

    def still_an_expert(found: dict[str, Tensor]) -> None:
        assert found[route].tolist() == [[1, 2], [1, 2]]
        assert found[route][:, 0].tolist() == strange.argmax(1).tolist()

    batch.checks.append(still_an_expert)
    batch.run(tmp_path)


def test_routed_layers_equal_torch_on_random_shapes(tmp_path: Path) -> None:
    batch, rng = Batch(1), np.random.default_rng(1)
    for kind in ("fp32", "fp16"):
        for relu in (False, True):
            rows, inner, outer = (int(rng.integers(1, most)) for most in (5, 300, 40))
            batch.linear(rows, inner, outer, kind, relu)
    for i in range(6):
        kernel = [(3, 7, 7), (3, 3, 3), (1, 1, 1), (1, 3, 3), (3, 1, 1)][i % 5]
        n, c, o = (int(rng.integers(1, most)) for most in (4, 20, 40))
        size = tuple(int(rng.integers(k, k + 3)) for k in kernel)
        strides = tuple(int(rng.integers(1, 3)) for _ in range(3))
        pads = tuple(int(rng.integers(0, k // 2 + 1)) for k in kernel)
        conv = Conv3d(n, c, size, o, kernel, strides, pads, bool(i % 2))  # type: ignore[arg-type]
        batch.conv(conv, list(TYPES)[i % 3])
    split = Conv3d(1, 48, (1, 3, 3), 33, (3, 3, 3), (1, 1, 1), (1, 1, 1), relu=True)
    assert split.splits > 2
    assert split.workspace_bytes == 4 * split.splits * 33 * 9
    for kind in TYPES:
        batch.conv(split, kind)
    wide = Wide(2, 5, (2, 9, 9), 70, (1, 3, 3), (1, 1, 1), (0, 1, 1))
    for kind in TYPES:
        batch.conv(wide, kind)
    batch.run(tmp_path)


def test_a_convolution_is_cut_only_where_the_gpu_would_be_empty() -> None:
    late = Conv3d(1, 256, (1, 4, 4), 256, (3, 3, 3), (1, 1, 1), (1, 1, 1))
    assert (late.tile, late.splits) == ("small", 27)
    full = replace(late, clips=64, size=(8, 56, 56))
    assert (full.tile, full.splits, full.workspace_bytes) == ("wide", 1, 0)
    assert len(calls.routed_conv3d(full, *range(6))) == 1
    first, second = calls.routed_conv3d(late, *range(6))
    assert first.grid == (1, 8, 27)
    assert (second.kernel, second.args[0]) == ("finish_fp32", 5)
    assert late.out == (1, 4, 4)
    assert replace(late, size=(8, 9, 9), strides=(2, 2, 2)).out == (4, 5, 5)


def entries() -> list[tuple[str, int, shipped.Kernel]]:
    table = shipped.kernels()
    return [(name, arch, each) for name, of in table.items() for arch, each in of.items()]


def test_what_ships_is_every_kernel_for_every_architecture() -> None:
    variants = compiled.variants()
    assert set(shipped.kernels()) == set(variants)
    assert shipped.archs() == compiled.ARCHS == (87, 89, 90)
    for name, arch, kernel in entries():
        text = shipped.text(kernel).decode()
        assert text.endswith("\0")
        assert f".version {compiled.PTX_VERSION / 10}\n" in text  # CUDA 12.6 reads up to 8.5
        target = "sm_90a" if arch == 90 else f"sm_{arch}"
        assert f".target {target}\n" in text
        found = re.search(r"\.entry (\w+)\((.*?)\n\)", text, re.DOTALL)
        assert found is not None
        assert found[1] == kernel.entry
        params = re.findall(r"\.param \.(\w+)", found[2])
        pointers = len(variants[name].types)
        assert params == ["u64"] * pointers + ["u32"] * (kernel.params - pointers)
        assert kernel.pointers == pointers
        assert f".reqntid {32 * kernel.warps}" in text
        assert ".file" not in text, "a path of the machine that compiled it"
        assert kernel.shared_bytes <= 100 * 1024  # of Orin and Ada, 99 KiB and more


def test_what_ships_assembles_to_machine_code(tmp_path: Path) -> None:
    def assemble(entry: tuple[str, int, shipped.Kernel]) -> tuple[int, bytes]:
        _, arch, kernel = entry
        return kernel.params, compiled.cubin(shipped.text(kernel)[:-1].decode(), arch)

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(assemble, entries()))
    assert all(binary[:4] == b"\x7fELF" for _, binary in made)
    params, binary = made[0]
    (tmp_path / "one.cubin").write_bytes(binary)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([tool, "-elf", tmp_path / "one.cubin"], capture_output=True, text=True,
                          check=True).stdout  # fmt: skip
    assert said.count("EIATTR_KPARAM_INFO") == params


@pytest.mark.parametrize("name", QUICK)
def test_the_same_triton_gives_the_same_text(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    for arch in compiled.ARCHS:
        made = compiled.compile_one(name, compiled.variants()[name], arch)
        kernel = shipped.kernel(name, arch)
        facts = {key: value for key, value in vars(kernel).items() if key != "file"}
        if triton.__version__ == "3.6.0":
            assert made.ptx == shipped.text(kernel)[:-1].decode()
            assert made.facts == facts
        assert made.facts["params"] == kernel.params


def test_no_size_of_a_clip_is_compiled_in() -> None:
    """TensorRT keeps a plugin's kernel for all shapes, and so do we: blocks alone are constant."""
    for variant in compiled.variants().values():
        assert set(variant.blocks) <= {"MOST", "BLOCK", "BLOCK_O", "BLOCK_P", "BLOCK_K", "BLOCK_I",
                                       "PRECISION"}  # fmt: skip


ENTRY = ".visible .entry f(\n\t.param .u64 f_0,\n\t.param .u32 f_1,\n\t.param .u64 f_2,\n"
TEXT = ENTRY + "\t.param .u64 f_3\n)\n{ ld.param.b32 %r1, [f_1]; }"


def test_tritons_own_parameters_are_taken_out() -> None:
    plain = compiled.without_scratch(TEXT, 2)
    assert plain == TEXT.replace(",\n\t.param .u64 f_2,\n\t.param .u64 f_3", "")
    for text, params in ((TEXT, 1), (TEXT.replace("f_1]", "f_3]"), 2), ("nothing", 2)):
        with pytest.raises(VmoeError, match=r"parameters for \d of the source, and may read"):
            compiled.without_scratch(text, params)


def test_a_kernel_that_wants_scratch_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = SimpleNamespace(global_scratch_size=16, profile_scratch_size=0)
    monkeypatch.setattr(triton, "compile", lambda *_, **__: SimpleNamespace(metadata=metadata))
    with pytest.raises(VmoeError, match=r"topk for sm_87 wants scratch memory. Compile it with"):
        compiled.compile_one("topk", compiled.variants()["topk"], 87)


def test_text_that_does_not_assemble_is_told() -> None:
    with pytest.raises(VmoeError, match=r"ptxas for sm_87: .*"):
        compiled.cubin("no PTX", 87)


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton.compiler", None)
    with pytest.raises(MissingDependencyError, match=r"triton is not installed: pip install"):
        compiled.compile_one("topk", compiled.variants()["topk"], 87)


def test_the_command_writes_a_folder_that_is_read_as_the_package_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = {"topk": compiled.variants()["topk"]}
    monkeypatch.setattr(compiled, "variants", lambda: only)
    for form, flags in {"ptx": [], "cubin": ["--cubin"]}.items():
        out = tmp_path / form
        done = CliRunner().invoke(compiled.main, ["--arch", "89", "--out", str(out), *flags])
        assert done.exit_code == 0, done.output
        assert done.output == f"1 kernels in {out}\n"
        assert shipped.archs(out) == (89,)
        kernel = shipped.kernel("topk", 89, out)
        assert kernel.file == f"topk.sm_89.{form}"
        assert shipped.text(kernel, out)[:4] == (b"//\n/" if form == "ptx" else b"\x7fELF")
    both = [tmp_path / "a.zip", tmp_path / "b.zip"]
    for path in both:
        done = CliRunner().invoke(compiled.main, ["--arch", "89", "--out", str(path)])
        assert done.exit_code == 0
    assert both[0].read_bytes() == both[1].read_bytes()
    assert shipped.text(shipped.kernel("topk", 89, both[0]), both[0]).startswith(b"//\n")


def test_a_gpu_takes_its_own_kernels_or_the_newest_older_ones() -> None:
    there = (87, 89, 90)
    wanted = {87: 87, 89: 89, 90: 90, 100: 89, 120: 89, 88: 87}  # sm_90a runs on 9.0 alone
    assert {capability: shipped.arch_for(capability, there) for capability in wanted} == wanted
    with pytest.raises(BundleError, match=r"is 7.5; the routed kernels need 8.7 or newer"):
        shipped.arch_for(75, there)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown kernel 'topq': did you mean 'topk'"):
        shipped.kernel("topq", 87)
    with pytest.raises(UnknownNameError, match=r"unknown architecture of topk '75'"):
        shipped.kernel("topk", 75)
    for content in (None, "{}", "nothing", '{"kernels": {"topk": {"87": {"file": "x"}}}}'):
        folder: Any = tmp_path / str(hash(content))
        folder.mkdir()
        if content is not None:
            (folder / shipped.MANIFEST).write_text(content)
        with pytest.raises(BundleError, match=r"holds no compiled kernels. Install vmoe again"):
            shipped.kernels(folder)

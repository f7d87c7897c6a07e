"""The routed kernels on a GPU: launched as TensorRT's plugins launch them, against torch.

Numbers: the error is ||ours - exact|| / ||exact||, exact in float64 by export/plugins/reference.py;
outputs are NaN before each launch. Time: on the GPU, in a CUDA graph of twenty launches.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from figures import Figure
from gpu_timing import Do, Effort, Found, device_us, median, stream
from torch import Tensor, nn
from torch.nn import functional

from vmoe import report
from vmoe.clips import ClipSpec
from vmoe.export.plugins import reference
from vmoe.models import ModelSettings, VideoMoE, build
from vmoe.runtime.plugins import calls, compiled
from vmoe.runtime.plugins.calls import Call, Conv3d

EXPERTS = 4
TYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16}
MOST_WRONG = {"fp32": 1e-5, "tf32": 2e-3, "fp16": 2e-3}
OTHERS = ("topk", "routed_linear_fp32", "routed_conv3d_fp32_small", "routed_conv3d_fp16_wide",
          "finish_fp32")  # fmt: skip
SHAPES = [  # n, channels, size, outputs, kernel, strides, pads, relu
    (2, 3, (4, 33, 35), 20, (3, 7, 7), (1, 2, 2), (1, 3, 3), True),
    (5, 32, (4, 16, 16), 48, (3, 3, 3), (2, 2, 2), (1, 1, 1), False),
    (3, 48, (4, 6, 6), 33, (1, 1, 1), (2, 2, 2), (0, 0, 0), False),
    (1, 256, (1, 4, 4), 256, (3, 3, 3), (1, 1, 1), (1, 1, 1), True),
    (8, 64, (4, 40, 40), 130, (1, 3, 3), (1, 1, 1), (0, 1, 1), False),
]


class Launches(Protocol):
    """What launches: vmoe.runtime.plugins.launch.Launcher."""

    def launch(self, call: Call, stream: int) -> None:
        """Put a call on a stream."""
        ...


def run(launcher: Launches, made: list[Call]) -> None:
    """Launch calls whose pointers are tensors, on the current stream."""
    for call in made:
        args = tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in call.args)
        launcher.launch(call._replace(args=args), stream())


class Case:
    """One convolution of random numbers."""

    def __init__(self, conv: Conv3d, precision: str, device: str, seed: int = 0) -> None:
        """Draw clips, routes and the weights of all experts."""
        self.conv, self.precision = conv, precision
        make = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = scale * torch.randn(shape, generator=make, device=device)
            return drawn.to(TYPES[precision])

        inner = conv.channels * conv.kernel[0] * conv.kernel[1] * conv.kernel[2]
        self.x = draw(conv.clips, conv.channels, *conv.size)
        self.w = draw(EXPERTS, conv.outputs, conv.channels, *conv.kernel, scale=inner**-0.5)
        self.b = draw(EXPERTS, conv.outputs)
        drawn = torch.randint(0, EXPERTS, (conv.clips,), generator=make, device=device)
        self.expert = drawn.int()
        self.y = draw(conv.clips, conv.outputs, *conv.out).fill_(torch.nan)
        room = max(1, conv.workspace_bytes // 4)
        self.parts = torch.full((room,), torch.nan, device=device)

    def launch(self, launcher: Launches) -> None:
        """Run our kernels."""
        made = calls.routed_conv3d(
            self.conv, self.x, self.expert, self.w, self.b, self.y, self.parts, self.precision
        )
        run(launcher, made)

    def torch(self) -> Tensor:
        """Run torch's convolution, with the weights of one expert for all clips."""
        c = self.conv
        y = functional.conv3d(self.x, self.w[0], self.b[0], c.strides, c.pads)
        return y.relu_() if c.relu else y

    def error(self) -> float:
        """Return how far what was launched is from exact."""
        held = [t.double().cpu() for t in (self.x, self.w, self.b, self.y)]
        x, w, b, y = held
        c = self.conv
        exact = reference.routed_conv3d(x, self.expert.cpu(), w, b, c.strides, c.pads, c.relu)
        return relative(y, exact)


def relative(got: Tensor, exact: Tensor) -> float:
    """Return ||got - exact|| / ||exact||; infinity for NaN."""
    error = float((got - exact).norm() / exact.norm())
    return error if error == error else float("inf")


def numbers(device: str, new: Callable[..., Launches]) -> Found:
    """Compare every kernel with torch: the PTX for this GPU, an older GPU's, and machine code.

    Args:
        device: of torch.
        new: makes a launcher; takes `arch` and `folder`.
    """
    found = Found()
    rows: list[list[Any]] = []
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for name, make in ways(new, Path(folder)):
            try:
                launcher = make()
                rows += [[name, *row] for row in errors(launcher, device, every=name == "PTX")]
            except Exception as e:  # one way that fails leaves the others to be told
                rows.append([name, "all", f"{type(e).__name__}: {e}"[:200], None, "NO"])
    found.measured["seconds"] = time.perf_counter() - begin
    found.measured["rows"] = rows
    columns = ["launched", "kernel", "shapes", "error, worst", "ok"]
    found.tables["Kernels against torch in float64"] = report.table(rows, columns)
    bad = sum(row[-1] != "yes" for row in rows)
    found.figures.append(Figure("kernels_wrong", float(bad), "count", 0, n=len(rows)))
    return found


def ways(
    new: Callable[..., Launches], folder: Path
) -> Iterator[tuple[str, Callable[[], Launches]]]:
    """Yield the ways in which kernels are loaded, by name."""
    yield "PTX", new
    yield "PTX of sm_89", partial(new, arch=89)

    def assembled() -> Launches:
        arch = max(compiled.archs())
        assemble(OTHERS, arch, folder)
        return new(arch=arch, folder=folder)

    yield "cubin", assembled


def assemble(names: tuple[str, ...], arch: int, folder: Path) -> None:
    """Write machine code of some kernels, with their manifest."""
    from vmoe.export.plugins.compiled import cubin

    held = {name: compiled.kernel(name, arch) for name in names}
    with ThreadPoolExecutor() as pool:
        made = pool.map(lambda k: cubin(compiled.text(k)[:-1].decode(), arch), held.values())
        for name, binary in zip(names, made, strict=True):
            (folder / f"{name}.cubin").write_bytes(binary)
    table = {name: {str(arch): {**vars(k), "file": f"{name}.cubin"}} for name, k in held.items()}
    (folder / compiled.MANIFEST).write_text(json.dumps({"kernels": table}))


def errors(launcher: Launches, device: str, *, every: bool) -> Iterator[list[Any]]:
    """Yield kernel, how many shapes, the worst error and whether it is small enough."""
    yield _topk_errors(launcher, device)
    for precision in ("fp32", "fp16") if every else ("fp32",):
        yield _linear_errors(launcher, device, precision)
    for precision in TYPES:
        by_tile: dict[str, list[float]] = {}
        for seed, shape in enumerate(SHAPES):
            conv = Conv3d(*shape)
            name = f"routed_conv3d_{precision}_{conv.tile}"
            if every or (name in OTHERS and (conv.splits == 1 or precision == "fp32")):
                case = Case(conv, precision, device, seed)
                case.launch(launcher)
                by_tile.setdefault(name, []).append(case.error())
        for name, worst in by_tile.items():
            ok = max(worst) <= MOST_WRONG[precision]
            yield [name, str(len(worst)), max(worst), "yes" if ok else "NO"]


def _topk_errors(launcher: Launches, device: str) -> list[Any]:
    worst, wrong, shapes = 0.0, 0, [(1, 4, 1), (8, 4, 1), (64, 7, 3), (33, 64, 2), (5, 1, 1)]
    for seed, (n, m, k) in enumerate(shapes):
        make = torch.Generator().manual_seed(seed)
        scores = torch.randint(-3, 4, (n, m), generator=make).float()  # many ties
        weights = torch.full((n, k), torch.nan, device=device)
        route = torch.full((n, k), -1, dtype=torch.int32, device=device)
        run(launcher, calls.topk(scores.to(device), weights, route, n, m, k))
        exact, chosen = reference.topk(scores.double(), k)
        worst = max(worst, relative(weights.double().cpu(), exact))
        wrong += int((route.cpu() != chosen).sum())
    ok = worst <= MOST_WRONG["fp32"] and not wrong
    return ["topk", f"{len(shapes)}, {wrong} routes wrong", worst, "yes" if ok else "NO"]


def _linear_errors(launcher: Launches, device: str, precision: str) -> list[Any]:
    worst, shapes = 0.0, [(1, 256, 10), (8, 256, 400), (5, 37, 11)]
    for seed, (n, i, o) in enumerate(shapes):
        make = torch.Generator().manual_seed(seed)
        kind = TYPES[precision]
        x, w, b = (
            torch.randn(shape, generator=make).to(device, kind)
            for shape in ((n, i), (EXPERTS, o, i), (EXPERTS, o))
        )
        expert = torch.randint(0, EXPERTS, (n,), generator=make).to(device, torch.int32)
        y = torch.full((n, o), torch.nan, dtype=kind, device=device)
        made = calls.routed_linear(
            x, expert, w, b, y, rows=n, inner=i, outer=o, half=precision == "fp16"
        )
        run(launcher, made)
        held = [t.double().cpu() for t in (x, w, b)]
        exact = reference.routed_linear(held[0], expert.cpu(), held[1], held[2])
        worst = max(worst, relative(y.double().cpu(), exact))
    ok = worst <= MOST_WRONG[precision]
    return [f"routed_linear_{precision}", str(len(shapes)), worst, "yes" if ok else "NO"]


def speed(device: str, effort: Effort, new: Callable[..., Launches]) -> Found:
    """Time the kernels against torch's, on the layers of the benchmark's own experts."""
    found = Found()
    launcher = new()
    _small_kernels(found, launcher, device, effort)
    rows: list[list[Any]] = []
    end = time.monotonic() + effort.kernels_s
    for frames, pixels in effort.sizes:
        layers = convolutions(ClipSpec(frames=frames, height=pixels, width=pixels))
        for clips, precision in itertools.product((1, 8), TYPES):
            name = f"convs_vs_torch_{frames}x{pixels}_b{clips}_{precision}"
            if time.monotonic() > end:
                why = f"not begun: {effort.kernels_s:g} s of this section were over"
                found.figures.append(Figure(name, None, "ratio", 1, why=why))
                continue
            total = [0.0, 0.0]
            for layer, count in layers.items():
                conv = Conv3d(clips, *layer)
                ours, torchs = _times(conv, precision, device, effort, launcher)
                total = [total[0] + count * ours, total[1] + count * torchs]
                rows.append([f"{frames}x{pixels}x{pixels}", clips, precision, count,
                             _named(conv), f"{conv.tile}, {conv.splits}", ours, torchs,
                             ours / torchs])  # fmt: skip
            more = {"ours_us": total[0], "torch_us": total[1]}
            value = total[0] / total[1]
            found.figures.append(Figure(name, value, "ratio", 1, n=effort.rounds, more=more))
    columns = ["clips", "N", "precision", "layers", "convolution", "tile, splits", "ours, us",
               "torch, us", "ratio"]  # fmt: skip
    found.tables["Convolutions of one expert, on the GPU"] = report.table(rows, columns)
    found.measured["rows"] = rows
    return found


def _times(
    conv: Conv3d, precision: str, device: str, effort: Effort, launcher: Launches
) -> tuple[float, float]:
    """Return microseconds of our kernels, and of torch's convolution at the same precision."""
    cases = [Case(conv, precision, device, seed) for seed in range(2)]
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    ours = device_us([partial(case.launch, launcher) for case in cases], effort.rounds)
    torchs = device_us([case.torch for case in cases], effort.rounds)
    return ours, torchs


def _small_kernels(found: Found, launcher: Launches, device: str, effort: Effort) -> None:
    """Time top-k and the last layer, and what a launch costs the host."""
    rows: list[list[Any]] = []
    for n in (1, 8):
        scores = torch.randn(n, EXPERTS, device=device)
        weights = torch.empty(n, 1, device=device)
        route = torch.empty(n, 1, dtype=torch.int32, device=device)
        made = calls.topk(scores, weights, route, n, EXPERTS, 1)
        ours = device_us([partial(run, launcher, made)], effort.rounds)
        torchs = device_us([lambda s=scores: s.softmax(1).max(1)], effort.rounds)  # type: ignore[misc]
        rows.append([f"topk, {n} rows", ours, torchs])
        if n == 1:
            host = _host_us(partial(run, launcher, made))
            more = {"torch_us": torchs, "host_us_of_a_launch": host}
            found.figures.append(Figure("topk_us", ours, "us", 10, n=effort.rounds, more=more))
        x, w, b = (torch.randn(shape, device=device) for shape in
                   ((n, 256), (EXPERTS, 10, 256), (EXPERTS, 10)))  # fmt: skip
        y = torch.empty(n, 10, device=device)
        expert = torch.arange(n, device=device).int() % EXPERTS
        made = calls.routed_linear(x, expert, w, b, y, rows=n, inner=256, outer=10)
        ours = device_us([partial(run, launcher, made)], effort.rounds)
        torchs = device_us([partial(functional.linear, x, w[0], b[0])], effort.rounds)
        rows.append([f"routed_linear 256 -> 10, {n} rows", ours, torchs])
    table = report.table(rows, ["kernel", "ours, us", "torch, us"])
    found.tables["Small kernels, on the GPU"] = table
    found.measured["small"] = rows


def _host_us(call: Do) -> float:
    taken = []
    for _ in range(200):
        begin = time.perf_counter()
        call()
        taken.append((time.perf_counter() - begin) * 1e6)
    torch.cuda.synchronize()
    return median(taken)


def convolutions(spec: ClipSpec) -> dict[tuple[Any, ...], int]:
    """Return the convolutions of an expert, all but N of Conv3d's sizes, and how many there are."""
    twin: VideoMoE = build(ModelSettings(experts=1), spec).eval()
    layers: dict[tuple[Any, ...], int] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        assert isinstance(module, nn.Conv3d)
        layer = (module.in_channels, tuple(inputs[0].shape[2:]), module.out_channels,
                 module.kernel_size, module.stride, module.padding)  # fmt: skip
        layers[layer] = layers.get(layer, 0) + 1

    hooks = [m.register_forward_hook(note) for m in twin.modules() if isinstance(m, nn.Conv3d)]
    with torch.inference_mode():
        twin(torch.zeros(1, 3, spec.frames, spec.height, spec.width))
    for hook in hooks:
        hook.remove()
    return layers


def _named(conv: Conv3d) -> str:
    kernel, size = ("x".join(map(str, each)) for each in (conv.kernel, conv.size))
    return f"{conv.channels} -> {conv.outputs}, {kernel} / {conv.strides[-1]} on {size}"

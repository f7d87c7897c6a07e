r"""Compile the routed kernels ahead of time, for every GPU that they are shipped for.

    python -m vmoe.export.plugins.compiled                      # runtime/plugins/kernels.zip
    python -m vmoe.export.plugins.compiled --out DIR --cubin    # a folder; machine code, not text

No GPU is needed, and the same Triton gives the same text. What is shipped is PTX: a driver makes
machine code of it for the GPU that it finds, also for one that is younger than the text.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from vmoe import cli
from vmoe.errors import MissingDependencyError, VmoeError
from vmoe.runtime.plugins import calls
from vmoe.runtime.plugins.compiled import MANIFEST, SHIPPED

ARCHS = (87, 89, 90)  # Orin, Ada, Hopper
PTX_VERSION = 84  # JetPack 6's CUDA 12.6 reads up to 8.5; Triton's own choice may be newer
SCRATCH = ("global_scratch_size", "profile_scratch_size")
TYPES = {"fp32": "*fp32", "fp16": "*fp16"}
DOT = {"fp32": ("*fp32", "tf32x3"), "tf32": ("*fp32", "tf32"), "fp16": ("*fp16", "ieee")}


@dataclass(frozen=True)
class Variant:
    """One kernel as it is compiled.

    Attributes:
        kernel: of kernels.py.
        types: of its arguments, in order; all others are int32.
        blocks: its constants.
        warps: of one program.
        stages: how many steps of its loop are under way.
    """

    kernel: str
    types: tuple[str, ...]
    blocks: dict[str, Any]
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Compiled:
    """One variant for one architecture.

    Attributes:
        name: of the variant.
        arch: 10 times the compute capability.
        ptx: the text, with the parameters of the source and no others.
        facts: what a launch has to know: entry, warps, shared_bytes, params, pointers.
    """

    name: str
    arch: int
    ptx: str
    facts: dict[str, Any] = field(default_factory=dict)


def variants() -> dict[str, Variant]:
    """Return all that is compiled, by the names that calls.py calls."""
    f32, i32 = "*fp32", "*i32"
    made = {"topk": Variant("topk", (f32, f32, i32), {"MOST": calls.MOST_EXPERTS}, warps=1)}
    for name, real in TYPES.items():
        blocks = {"BLOCK_O": calls.LINEAR_O, "BLOCK_I": calls.LINEAR_I}
        linear = (real, i32, real, real, real)
        made[f"routed_linear_{name}"] = Variant("routed_linear", linear, blocks)
        added = (f32, i32, real, real)
        made[f"finish_{name}"] = Variant("finish", added, {"BLOCK": calls.FINISH})
    for precision, (real, dot) in DOT.items():
        for tile_name, tile in calls.TILES.items():
            blocks = dict(zip(("BLOCK_O", "BLOCK_P", "BLOCK_K"), tile, strict=True))
            made[f"routed_conv3d_{precision}_{tile_name}"] = Variant(
                "routed_conv3d", (real, i32, real, real, real, f32), {"PRECISION": dot, **blocks}
            )
    return made


def compile_one(name: str, variant: Variant, arch: int) -> Compiled:
    """Compile one variant for one architecture.

    Raises:
        MissingDependencyError: Triton is not installed.
        VmoeError: Triton wants scratch memory, which a plain launch does not give.
    """
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as e:
        raise MissingDependencyError(
            "triton is not installed: pip install 'vmoe[kernels]' (Linux; no GPU is needed)."
        ) from e
    from vmoe.export.plugins import kernels

    triton.knobs.compilation.disable_line_info = True  # it would hold this machine's paths
    source = getattr(kernels, variant.kernel)
    signature = {
        parameter: "constexpr" if parameter in variant.blocks
        else variant.types[i] if i < len(variant.types) else "i32"
        for i, parameter in enumerate(source.arg_names)
    }  # fmt: skip
    # An engine's and torch's tensors begin at multiples of 16 bytes; of sizes nothing is known.
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(variant.types))}
    made = triton.compile(
        ASTSource(source, signature, variant.blocks, aligned),
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": variant.warps, "num_stages": variant.stages, "ptx_version": PTX_VERSION,
            "enable_fp_fusion": True,
        },
    )  # fmt: skip
    if any(getattr(made.metadata, scratch, 0) for scratch in SCRATCH):
        raise VmoeError(f"{name} for sm_{arch} wants scratch memory. Compile it with Triton 3.6.")
    params = len(signature) - len(variant.blocks)
    facts = {"entry": made.metadata.name, "warps": made.metadata.num_warps,
             "shared_bytes": made.metadata.shared, "params": params,
             "pointers": len(variant.types)}  # fmt: skip
    return Compiled(name, arch, without_scratch(made.asm["ptx"], params), facts)


def without_scratch(ptx: str, params: int) -> str:
    """Return PTX whose entry has so many parameters: Triton adds two pointers that are not read.

    TensorRT's and our own launches give the parameters of the source, and a driver reads as many
    as the entry declares.

    Raises:
        VmoeError: the text is not of that form, or reads one of them.
    """
    found = re.search(r"\.entry \w+\(\n(.*?)\n\)", ptx, re.DOTALL)
    declared = found[1].split(",\n") if found else []
    extra = [line.split()[-1] for line in declared[params:]]
    if found is None or len(extra) != 2 or any(ptx.count(name) > 1 for name in extra):
        raise VmoeError(
            f"Triton's PTX has {len(declared)} parameters for {params} of the source, and may read "
            "the others. Compile it with Triton 3.6."
        )
    return ptx[: found.start(1)] + ",\n".join(declared[:params]) + ptx[found.end(1) :]


def cubin(ptx: str, arch: int) -> bytes:
    """Return what Triton's own `ptxas` makes of a text.

    Raises:
        VmoeError: it does not assemble.
    """
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        text, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        text.write_text(ptx)
        command = [get_ptxas(arch).path, f"--gpu-name={sm_arch_from_capability(arch)}",
                   str(text), "-o", str(binary)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise VmoeError(f"ptxas for sm_{arch}: {done.stderr.strip().splitlines()[0]}")
        return binary.read_bytes()


def compile_all(archs: tuple[int, ...] = ARCHS) -> Iterator[Compiled]:
    """Compile every variant for every architecture."""
    for name, variant in variants().items():
        for arch in archs:
            yield compile_one(name, variant, arch)


def write(made: list[Compiled], place: Path, *, assembled: bool = False) -> None:
    """Write what was compiled, and its manifest, into a folder or a zip file.

    Args:
        made: the kernels.
        place: a zip file where its name ends so; the same kernels give the same bytes.
        assembled: write machine code in the place of PTX.
    """
    import triton

    files: dict[str, bytes] = {}
    table: dict[str, dict[str, Any]] = {}
    for one in made:
        file = f"{one.name}.sm_{one.arch}.{'cubin' if assembled else 'ptx'}"
        files[file] = cubin(one.ptx, one.arch) if assembled else one.ptx.encode()
        table.setdefault(one.name, {})[str(one.arch)] = {"file": file, **one.facts}
    manifest = {"triton": triton.__version__, "ptx": PTX_VERSION / 10, "kernels": table}
    files[MANIFEST] = (json.dumps(manifest, indent=1) + "\n").encode()
    if place.suffix != ".zip":
        place.mkdir(parents=True, exist_ok=True)
        for file, held in files.items():
            (place / file).write_bytes(held)
        return
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for file, held in files.items():
            archive.writestr(zipfile.ZipInfo(file), held, zipfile.ZIP_DEFLATED, 9)


@cli.command(
    "python -m vmoe.export.plugins.compiled",
    "python -m vmoe.export.plugins.compiled",
    "python -m vmoe.export.plugins.compiled --out kernels --cubin",
    "python -m vmoe.export.plugins.compiled --arch 87 --out kernels",
)
@click.option("--out", type=click.Path(path_type=Path), default=SHIPPED, help="Where they go.")
@click.option("--arch", "archs", multiple=True, type=int, default=ARCHS, show_default=True,
              help="Ten times a compute capability; may be given again.")  # fmt: skip
@click.option("--cubin", "assembled", is_flag=True, help="Machine code instead of PTX.")
def main(out: Path, archs: tuple[int, ...], assembled: bool) -> None:
    """Compile the routed kernels to PTX, without a GPU."""
    made = list(compile_all(archs))
    write(made, out, assembled=assembled)
    click.echo(f"{len(made)} kernels in {out}")


if __name__ == "__main__":
    main()

"""Bundles of TensorRT plans, built over the fake TensorRT (the fixture `trt`)."""

from __future__ import annotations

from pathlib import Path

from vmoe import bundle as reader
from vmoe import output
from vmoe.bundle import Bundle
from vmoe.export.tensorrt import plans
from vmoe.export.tensorrt.settings import BuildSettings
from vmoe.runtime.engines import _plan


def built(source: Bundle, settings: BuildSettings | None = None, name: str = "plans") -> Path:
    """Build a bundle of plans beside its source, as this machine's own."""
    settings = settings or BuildSettings()
    out = source.path.with_name(name)
    with output.whole_folder(out) as folder:
        made, _ = plans.write(source, folder, settings, plans.here("auto", settings))
        output.write_json(folder / reader.REPORT, {})
    _plan.note(part.hashes[part.file] for part in made.parts.values())
    return out

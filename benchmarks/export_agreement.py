"""What int8 costs in answers: the model that ships, on clips that nobody has seen.

Exported as vmoe-export --int8 does, but for the gates: those refuse, here it is measured.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from pathlib import Path

import numpy as np
from figures import Figure

from vmoe import bundle, latest, report
from vmoe.clips import Clips
from vmoe.data import DataSettings, open_data
from vmoe.export import calibration, parity, pipeline
from vmoe.export.parity import Ints
from vmoe.export.pipeline import ExportSettings
from vmoe.runtime import load

log = logging.getLogger("vmoe")

SEED = 1000  # of the clips: neither training nor the check of an export draws with it
BACKENDS = ("onnxruntime", "openvino")


def figures(clips: int) -> list[Figure]:
    """Return how many clips get the label in int8 that the twin gives them, per backend."""
    plan = pipeline.plan(latest.shipped() / bundle.TWIN, ExportSettings(int8=True))
    held = plan.checkpoint
    log.info("int8 of the model that ships, on %d clips", clips)
    seen = open_data(calibration.trained_on(held), "val", held.twin.spec,
                     DataSettings(clips=clips, seed=SEED))  # fmt: skip
    taken = [seen[i] for i in range(clips)]
    shown, label = np.stack([clip for clip, _ in taken]), np.array([right for _, right in taken])
    twin = parity.twin_says(held.twin, shown)
    with tempfile.TemporaryDirectory() as folder:
        pipeline.write(plan, pipeline.graphs(plan).parts, Path(folder))
        return [_of(backend, Path(folder), shown, label, twin) for backend in BACKENDS]


def _of(backend: str, folder: Path, clips: Clips, label: Ints, twin: Ints) -> Figure:
    """Let the bundle answer in one backend."""
    name = "int8_top1_agreement" + ("_openvino" if backend == "openvino" else "")
    if importlib.util.find_spec(backend) is None:
        why = f"{backend} is not installed: pip install 'vmoe[{backend}]'"
        return Figure(name, None, "%", 99, "higher", why=why)
    with load(folder, backend, "cpu", threads=1) as engine:
        said: Ints = parity.infer(engine, clips).logits.argmax(axis=1)
    agree, n = int((said == twin).sum()), len(clips)
    low, high = report.wilson(agree, n)
    more = {"interval": f"{100 * low:.2f} to {100 * high:.2f}",
            "accuracy": 100 * float((said == label).mean()),
            "accuracy_twin": 100 * float((twin == label).mean())}  # fmt: skip
    return Figure(name, 100 * agree / n, "%", 99, "higher", n, 50 * (high - low), more=more)

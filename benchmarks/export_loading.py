"""The figures of loading in benchmarks/export.py: processes that load a bundle and run one clip."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from export_forms import Case, write
from figures import Figure

# Loads a bundle in a process of its own and runs one clip; the part `only`, or all through routing.
LOADED = """
import json, sys, time
from pathlib import Path
import numpy as np
from vmoe import bundle as bundles
from vmoe.runtime import load
import onnxruntime

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))

path, cache = sys.argv[1:]
bundle = bundles.read(Path(path))
clip = np.zeros((1, *bundle.spec.shape), np.uint8)
before, begin = resident(), time.process_time()
engine = load(bundle, backend="onnxruntime", device="cpu", threads=1,
              cache=Path(cache) if cache else None)
ms, loaded = (time.process_time() - begin) * 1e3, resident()
engine.infer(clip, 0 if bundle.experts > 1 else None)
after = resident()
print(json.dumps({"ms": ms, "loaded": (loaded - before) / 1024, "after": (after - before) / 1024}))
engine.close()
"""


def figures(case: Case, folder: Path, starts: int) -> list[Figure]:
    """Return the figures of the `if` file: how long it takes to load, and what stays in memory."""
    lowered = write(case, case.lowered, folder / "lowered", "if")
    naive = write(case, case.plain, folder / "naive", "if")
    apart = write(case, case.plain, folder / "apart", "split")
    cold = [loaded(lowered, None)["ms"] for _ in range(starts)]
    loaded(lowered, folder / "cache")  # the first fills it
    warm = [loaded(lowered, folder / "cache") for _ in range(starts)]
    plain = [loaded(naive, folder / "cache") for _ in range(starts)]
    split = [loaded(apart, folder / "cache") for _ in range(starts)]
    ms = [one["ms"] for one in warm]
    load_ms = Figure(
        case.prefix + "if_load_ms", min(ms), "ms", 150, n=len(ms),
        spread=(max(ms) - min(ms)) / 2,
        more={"without_cache": min(cold), "mib_after_one_clip": min(x["after"] for x in warm)},
    )  # fmt: skip
    one, both = (min(x["after"] for x in some) for some in (plain, split))
    memory = Figure(
        case.prefix + "if_memory_mib", one - both, "MiB", 30, n=len(plain),
        spread=(max(x["after"] for x in plain) - one) / 2,
        more={"if_mib": one, "router_and_one_expert_mib": both,
              "if_after_load_mib": min(x["loaded"] for x in plain)},
    )  # fmt: skip
    return [load_ms, memory]


def loaded(bundle: Path, cache: Path | None) -> dict[str, float]:
    """Load a bundle in another process; return CPU ms, and MiB that are resident more."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(bundle), str(cache or "")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout)
    return found

"""Which backend runs a bundle."""

from __future__ import annotations

from types import ModuleType

from vmoe import registry
from vmoe.bundle import Bundle
from vmoe.errors import BundleError, EngineMismatchError, MissingDependencyError

from .engines import TWIN

ENGINES = "vmoe.runtime.engines"
REPORTED = "backends"  # in report.json: what was verified, {name: {ok, latency_ms, ...}}


def choose(backend: str, bundle: Bundle, device: str) -> str:
    """Return the backend that a bundle is run with.

    Args:
        backend: its name, or auto: the fastest here of those that the bundle was verified for;
            where that is not known, the first that reads its parts. The reference is never auto.
        bundle: the manifest.
        device: auto, cpu or cuda:N.

    Raises:
        UnknownNameError: no such backend.
        MissingDependencyError: it is not installed; of auto, none of them is.
        EngineMismatchError: it does not read this bundle's parts.
    """
    if backend != "auto":
        module = registry.load(ENGINES, backend, "backend")
        why = module.why_unavailable()
        if why:
            raise MissingDependencyError(why)
        if not _reads(module, bundle):
            raise EngineMismatchError(
                f"{bundle.path} has parts in {_formats(bundle)}; backend {backend} "
                f"reads {', '.join(module.FORMATS)}. Use --backend auto."
            )
        return backend
    whys = []
    for name in verified(bundle) or registry.names(ENGINES):
        module = registry.load(ENGINES, name, "backend")
        if TWIN not in module.FORMATS and _reads(module, bundle) and _runs_on(module, device):
            why = module.why_unavailable()
            if not why:
                return name
            whys.append(why)
    if whys:
        raise MissingDependencyError(" ".join(whys))
    raise EngineMismatchError(
        f"{bundle.path} has parts in {_formats(bundle)}; no backend here reads them. "
        "Export the model again with --onnx."
    )


def verified(bundle: Bundle) -> list[str]:
    """Return the backends that a bundle was verified for at export, the fastest first.

    By its report, which nothing proves: whatever is in there chooses among our own files alone.
    """
    try:
        found = bundle.report().get(REPORTED)
    except BundleError:  # no report of ours: nothing is known
        return []
    known = registry.names(ENGINES)
    took = {
        name: float(said["latency_ms"])
        for name, said in (found.items() if isinstance(found, dict) else ())
        if name in known
        and isinstance(said, dict)
        and said.get("ok") is True
        and isinstance(said.get("latency_ms"), (int, float))
    }
    return sorted(took, key=took.__getitem__)


def _reads(module: ModuleType, bundle: Bundle) -> bool:
    """Return whether a backend reads a bundle's parts, or (the reference) runs its twin."""
    return TWIN in module.FORMATS or {p.format for p in bundle.parts.values()} <= set(
        module.FORMATS
    )


def _runs_on(module: ModuleType, device: str) -> bool:
    return not device.startswith("cuda") or "cuda" in module.DEVICES


def _formats(bundle: Bundle) -> str:
    return ", ".join(sorted({part.format for part in bundle.parts.values()}))

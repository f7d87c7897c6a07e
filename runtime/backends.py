"""Which backend runs a bundle."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from vmoe import registry
from vmoe.bundle import Bundle
from vmoe.errors import BundleError, EngineMismatchError, MissingDependencyError

from .engines import SERVER, TWIN

ENGINES = "vmoe.runtime.engines"
NEVER_AUTO = {TWIN, SERVER}
REPORTED = "backends"  # in report.json: {name: {ok, device, latency_ms, ...}} of this export
TIE = 1.1  # latencies within this ratio of the least are the same, so that noise seldom decides
MOST_MS = 1e9  # of a latency; what is longer is none


def choose(backend: str, bundle: Bundle, device: str) -> str:
    """Return the backend that a bundle is run with.

    Args:
        backend: its name, or auto: the fastest here of those that the bundle was verified for on
            such a device; where that is not known, the first that reads its parts and was not
            found wrong at export. The reference is never auto, nor is a server.
        bundle: the manifest.
        device: auto, cpu or cuda:N.

    Raises:
        UnknownNameError: no such backend.
        MissingDependencyError: it is not installed; of auto, none of them is.
        EngineMismatchError: it does not read this bundle's parts; of auto, none does, or all that
            do were found wrong at export.
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
    said = _reported(bundle, device)
    wrong = {name for name, of in said.items() if of.get("ok") is False}
    whys, refused = [], []
    for name in verified(bundle, device) or registry.names(ENGINES):
        module = registry.load(ENGINES, name, "backend")
        auto = not NEVER_AUTO & set(module.FORMATS)
        if auto and _reads(module, bundle) and _runs_on(module, device):
            if name in wrong:
                refused.append(name)
                continue
            why = module.why_unavailable()
            if not why:
                return name
            whys.append(why)
    if whys:
        raise MissingDependencyError(" ".join(whys))
    if refused:
        raise EngineMismatchError(
            f"{bundle.path} was found wrong at export on backend {' and '.join(refused)}; no other "
            "here reads its parts. Export the model again, or name a --backend to run it as it is."
        )
    raise EngineMismatchError(
        f"{bundle.path} has parts in {_formats(bundle)}; no backend here reads them. "
        "Export the model again with --onnx."
    )


def verified(bundle: Bundle, device: str = "auto") -> list[str]:
    """Return the backends that a bundle was verified for on such a device, the fastest first.

    Those that tie with the fastest stand in the order of their names. By the bundle's report,
    which nothing proves: whatever is in there chooses among our own files alone.
    """
    took = {
        name: float(of["latency_ms"])
        for name, of in _reported(bundle, device).items()
        if of.get("ok") is True
        and isinstance(of.get("latency_ms"), (int, float))
        and 0 < of["latency_ms"] < MOST_MS
    }
    tied = TIE * min(took.values(), default=0.0)
    return sorted(took, key=lambda name: (max(took[name], tied), name))


def _reported(bundle: Bundle, device: str) -> dict[str, dict[str, Any]]:
    """Return what the report says of each backend that is a file here, on such a device.

    Of device auto, on any: which one it will be is the backend's choice.
    """
    try:
        found = bundle.report().get(REPORTED)
    except BundleError:  # no report of ours: nothing is known
        return {}
    known = registry.names(ENGINES)
    return {
        name: of
        for name, of in (found.items() if isinstance(found, dict) else ())
        if name in known and isinstance(of, dict) and _same_kind(device, of.get("device"))
    }


def _same_kind(device: str, checked: object) -> bool:
    """Return whether a check on a device says something of another: cuda:1 as cuda:0."""
    if device == "auto":
        return True
    return isinstance(checked, str) and checked.partition(":")[0] == device.partition(":")[0]


def _reads(module: ModuleType, bundle: Bundle) -> bool:
    """Return whether a backend reads a bundle's parts, or runs its twin, or has a server do it."""
    formats = set(module.FORMATS)
    return bool(NEVER_AUTO & formats) or {p.format for p in bundle.parts.values()} <= formats


def _runs_on(module: ModuleType, device: str) -> bool:
    kind = device.partition(":")[0]
    return kind in module.DEVICES or kind not in ("cpu", "cuda")  # the backend says what it is not


def _formats(bundle: Bundle) -> str:
    return ", ".join(sorted({part.format for part in bundle.parts.values()}))

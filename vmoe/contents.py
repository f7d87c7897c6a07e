"""What is in a bundle, as text: the manifest, and what its report says was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from vmoe import report
from vmoe.bundle import Bundle, Part

SHOWN = 16  # letters of a hash


def text(bundle: Bundle) -> str:
    """Return everything that is known of a bundle, for people; sections apart by empty lines."""
    said = bundle.report()
    sections = [
        "\n".join(_manifest(bundle)),
        _parts(bundle),
        *_measured(said),
        "\n".join(_origin(bundle, said)),
    ]
    return "\n\n".join(section for section in sections if section)


def _manifest(bundle: Bundle) -> Iterator[str]:
    model, spec = bundle.model, bundle.spec
    lowering = bundle.lowering + (" (a baseline)" if bundle.lowering == "dense" else "")
    yield (
        f"model: {model.get('name', '?')}: {model['arch']}, width {model['width']:g}, "
        f"{bundle.experts} expert(s), lowering {lowering}"
    )
    yield (
        f"clip: {spec.frames} frames, {spec.spacing_s:g} s apart, {spec.height}x{spec.width}, "
        f"a window of {spec.window_s:.2f} s"
    )
    yield f"labels: {', '.join(bundle.labels)}"
    for key, value in bundle.extra.items():
        yield f"{key}: {value}"


def _parts(bundle: Bundle) -> str:
    named = {**bundle.parts, **{f"for {n} alone": part for n, part in bundle.others.items()}}
    rows = [_part_row(bundle, name, part) for name, part in named.items()]
    columns = ["part", "file", "KiB", "asked", "found", "layers", "weights", "sha256"]
    return report.table(rows, columns)


def _part_row(bundle: Bundle, name: str, part: Part) -> list[Any]:
    size = sum((bundle.path / file).stat().st_size for file in part.hashes) / 1024
    precision = [part.precision.get("asked"), part.precision.get("found")]
    counts = [_counts(part.layers), _counts(part.tensors)]
    return [name, part.file, size, *precision, *counts, part.hashes[part.file][:SHOWN]]


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in found.items()) or "-"


def _measured(said: dict[str, Any]) -> Iterator[str]:
    """Yield the sections of a report; what is not as we write it is left out."""
    gates = [gate for gate in _list(said.get("gates")) if isinstance(gate, dict)]
    if gates:
        rows = [
            [g.get("gate"), g.get("what"), g.get("measured"), g.get("bound"), g.get("unit"),
             "ok" if g.get("ok") is True else "REFUSED"]
            for g in gates
        ]  # fmt: skip
        yield report.table(rows, ["gate", "what", "measured", "bound", "unit", "verdict"])
    backends = _dict(said.get("backends"))
    if backends:
        rows = [
            [name, "ok" if _dict(found).get("ok") is True else "not verified",
             _dict(found).get("latency_ms"), _runs_as(_dict(found)), _dict(found).get("why")]
            for name, found in backends.items()
        ]  # fmt: skip
        columns = ["backend", "verdict", "ms a clip, at export", "runs int8 as", "why not"]
        yield report.table(rows, columns)
    lines = []
    for key in ("clean", "robust", "route", "optimize", "calibration"):
        found = _flat(said.get(key))
        if found:
            lines.append(f"{key}: {found}")
    bisect = _dict(said.get("bisect")).get("said")
    if bisect:
        lines.append(str(bisect))
    lines += _routes(_dict(said.get("sparsity")))
    cost = _dict(said.get("flops_per_clip")).get("moe")
    if isinstance(cost, (int, float)):
        lines.append(f"cost: {cost / 1e9:.3g} GFLOP a clip")
    seconds = _flat(said.get("seconds"))
    if seconds:
        lines.append(f"export took, in seconds: {seconds}")
    if said.get("verified_on"):
        lines.append(f"verified on: {said['verified_on']}, seed {said.get('seed')}")
    yield "\n".join(lines)


def _routes(sparsity: dict[str, Any]) -> Iterator[str]:
    """Yield what each route costs; the gate's own figure is below its minima."""
    ratios = [_dict(_dict(route).get("ratio")) for route in _list(sparsity.get("routes"))]
    shown = []
    for kind in ("minima", "medians"):
        values = [ratio.get(kind) for ratio in ratios]
        if values and all(isinstance(value, (int, float)) for value in values):
            shown.append(f"{kind} {', '.join(f'{value:.2f}' for value in values)}")
    if shown:
        yield f"sparsity: each route over router + expert alone: {'; '.join(shown)}"
        yield (
            "          the gate judges the slowest by its minimum, of wall or CPU time, less "
            f"what the host's calls may take (at most {sparsity.get('host_ms')} ms)"
        )


def _runs_as(backend: dict[str, Any]) -> str:
    """Return what a backend makes of all int8 layers; `-` where nothing is said."""
    found = [part for part in _dict(backend.get("runs_as")).values() if part]
    said = [part for part in found if isinstance(part, str)]
    total: Counter[str] = Counter()
    for part in found:
        total.update({k: n for k, n in _dict(part).items() if isinstance(n, int)})
    return said[0] if said else _counts(dict(sorted(total.items())))


def _origin(bundle: Bundle, said: dict[str, Any]) -> Iterator[str]:
    inside = "inside" if "file" in bundle.twin else "not inside"
    yield f"twin: {bundle.twin['sha256'][:SHOWN]}... ({inside})"
    versions = {**bundle.versions, **_dict(said.get("versions"))}
    yield "made with: " + ", ".join(f"{k} {v}" for k, v in versions.items())


def _flat(value: Any) -> str:
    """Return a JSON object as one line, the empty and the nested long ones left out."""
    shown = [
        f"{key} {_flat(member) if isinstance(member, dict) else _said(member)}"
        for key, member in _dict(value).items()
        if member not in (None, {}, []) and key != "layers"
    ]
    return ", ".join(shown)


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "/".join(map(_said, value)) if isinstance(value, list) else str(value)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []

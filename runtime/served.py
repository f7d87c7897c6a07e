"""What a bundle is called on a Triton server: its models, and the version that names its bytes.

    NAME_router, NAME_expert0 ..   the parts
    NAME                           all of them: routes, groups by expert, runs (split bundles)
    NAME_stream                    frames in, answers out; the server holds each stream's window

The version of all is a number made of the parts' hashes and the labels. A request names it, so
that a server that was restarted with another model refuses, and no label is mixed.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace

from vmoe.bundle import Bundle, Part, Port

from .online import is_online

MOE, STREAM = "moe", "stream"
FORCE = "force_route"
VERSION_BITS = 31  # Triton counts versions in 64 bits; Windows and some clients in 32


def model(bundle: Bundle, part: str) -> str:
    """Return the name of a model: of a part, of `moe` or of `stream`."""
    name = re.sub(r"[^\w.-]", "_", bundle.model["name"])
    return name if part == MOE else f"{name}_{part}"


def version(bundle: Bundle) -> int:
    """Return the version that stands for a bundle's bytes and labels, from 1."""
    hashes = {name: sorted(part.hashes.items()) for name, part in bundle.parts.items()}
    text = json.dumps([hashes, bundle.labels], sort_keys=True)
    digest = int(hashlib.sha256(text.encode()).hexdigest(), 16)
    most: int = 2**VERSION_BITS - 1
    return 1 + digest % most


def whole(bundle: Bundle) -> Bundle:
    """Return a bundle as a server answers it: one part `moe`, which routes there.

    One call then takes a clip over the network, where `split` would send it to the router, and
    again to an expert. An online bundle stays as it is: its states are the stream's own.
    """
    if is_online(bundle) or bundle.lowering != "split":
        return bundle
    clip = next(port for part in bundle.parts.values() for port in part.inputs)
    n = clip.shape[0]
    moe = Part(
        file=MOE,
        format="model",
        hashes={},
        inputs=(clip,),
        outputs=(
            Port("logits", "float32", (n, len(bundle.labels))),
            Port("scores", "float32", (n, bundle.experts)),
            Port("route", "int64", (n,)),
        ),
        precision=bundle.parts["expert0"].precision,
    )
    return replace(bundle, lowering="if", parts={**bundle.parts, MOE: moe})

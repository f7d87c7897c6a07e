"""The topics under which `vmoe-attack --help` sets its options."""

from __future__ import annotations

from vmoe import registry
from vmoe.attacks.flags import OURS, fields_of
from vmoe.attacks.methods import METHODS, load

_NAMED = {
    "Clips": ("data", "split", "group", "fold", "n", "load_adv", "save_adv"),
    "Attacks": (
        "attack", "norm", "eps", "steps", "restarts", "random_start", "step", "early_stop",
        "route_grad", "batch", "bf16", "preset", "seed", "device",
    ),
    "Bundles": ("mode", "backend", "twin", "compare", "gate_robust"),
    "Cameras and videos": ("codec", "camera_size", "eot", "video", "to_label"),
    "Report": ("out", "md", "curve", "sanity", "resume", "overwrite", "dry_run", "as_json"),
}  # fmt: skip


def of_methods() -> set[str]:
    """Return the options that only some attacks have, by what their files declare."""
    declared = {
        field for name in registry.names(METHODS) for field in fields_of(load(name).Settings)
    }
    return declared - OURS - {name for names in _NAMED.values() for name in names}


TOPICS = {**_NAMED, "Of single attacks": tuple(sorted(of_methods()))}

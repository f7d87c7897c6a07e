"""Named values of attack settings: preset < `--config` < flags.

`paper` is the literal form of the text of arXiv 2602.01369, as far as the text fixes it:

- `lip=quotient`: L_Lip is differentiated as the quotient that it is written as, its denominator
  included. Our default holds the denominator: differentiated, it is maximised by a small
  perturbation.
- `temporal=iterations`: V_f runs over the iterations of the attack. The text can also be read
  along the frames of one iteration: say `--temporal frames` for that reading.
- `lam` above 0: the Lipschitz term is part of the losses of TLA-R, TLA-E and TLA-M, and through
  them of the joint attacks; our default leaves it out.
- `gamma1` and `gamma2` above 0: J-TLGA is the sum of TLA-M's loss and TLGA-R's, which steers to
  the expert of the lowest score on the clean clip.

The weights themselves (lam, beta, gamma1, gamma2) are ours: the text that we could read gives no
numbers. What the text leaves open stays as it is set: steps, step, start, restarts, route_grad.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from vmoe.errors import UnknownNameError

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper": MappingProxyType(
            {
                "lip": "quotient",
                "lam": 1e-3,
                "temporal": "iterations",
                "beta": 0.9,
                "gamma1": 1.0,
                "gamma2": 0.1,
            }
        )
    }
)


def under(values: Mapping[str, Any], preset: str | None) -> dict[str, Any]:
    """Return settings with a preset under them: what was given stands.

    Args:
        values: by field; None where nothing was given.
        preset: its name; None for none.

    Raises:
        UnknownNameError: no such preset.
    """
    if preset is None:
        return dict(values)
    if preset not in PRESETS:
        raise UnknownNameError("preset", preset, PRESETS)
    given = {name: value for name, value in values.items() if value is not None}
    return {**values, **PRESETS[preset], **given}

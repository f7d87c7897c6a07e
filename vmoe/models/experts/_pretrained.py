"""What is known of the public weights that fit a family by name, at width 1."""

from __future__ import annotations

from typing import NamedTuple

Channels = tuple[float, float, float]  # RGB, pixels in [0, 1]

IMAGENET: tuple[Channels, Channels] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINETICS: tuple[Channels, Channels] = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)


class Pretrained(NamedTuple):
    """Weights that others have trained; a family names them as `PRETRAINED`.

    Attributes:
        name: whose they are.
        mean: per channel, which their clips were normalised with.
        std: per channel, likewise.
    """

    name: str
    mean: Channels
    std: Channels

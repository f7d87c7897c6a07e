"""What a run of vmoe-train is made of: its settings, and what they open and build."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from vmoe import registry
from vmoe.clips import ClipSpec
from vmoe.data import DataSet, DataSettings, open_data
from vmoe.errors import SettingError
from vmoe.models import ModelSettings
from vmoe.settings import Settings, opt, to_mapping
from vmoe.train import loop
from vmoe.train.passes import RecipeSettings, RobustSettings, Walk

RECIPES = "vmoe.train.recipes"


@dataclass(frozen=True)
class RunSettings(Settings):
    """What the command itself takes."""

    method: str = opt("j-tlat", f"recipe: {', '.join(registry.names(RECIPES))}")
    frames: int = opt(8, "frames of a clip", at_least=1)
    spacing: float = opt(0.1, "time between two frames of a clip, in seconds", above=0)
    size: int = opt(64, "height and width of a clip, in pixels", at_least=16)
    mean: tuple[float, ...] = opt(ClipSpec.mean, "mean per channel (RGB), pixels in [0, 1]")
    std: tuple[float, ...] = opt(ClipSpec.std, "deviation per channel (RGB)", above=0)
    val_clips: int = opt(200, "clips of the validation; 0 is all", at_least=0)
    test_clips: int = opt(400, "clips of the report at the end; 0 is all", at_least=0)
    report_steps: int = opt(20, "gradient steps of the report's attacks", at_least=1)

    @property
    def recipe(self) -> ModuleType:
        """The method's file.

        Raises:
            UnknownNameError: no such method.
        """
        return registry.load(RECIPES, self.method, "recipe (--method)")

    @property
    def spec(self) -> ClipSpec:
        """The clips."""
        size = (self.size, self.size)
        return ClipSpec(self.frames, self.spacing, *size, mean=self.mean, std=self.std)


@dataclass(frozen=True)
class Plan:
    """Everything that a run is made of; its mapping is the recipe in the checkpoint.

    Attributes:
        model: as it was asked for; `trained` is what the method makes of it.
    """

    data: str
    run: RunSettings
    model: ModelSettings
    loop: loop.LoopSettings
    clips: DataSettings
    recipe: RecipeSettings
    init_from: str

    @property
    def trained(self) -> ModelSettings:
        """The architecture that is trained: at-s takes one expert, at-d the dense counterpart.

        Raises:
            SettingError: the method cannot train what was asked for.
        """
        of = getattr(self.run.recipe, "model", None)
        made: ModelSettings = self.model if of is None else of(self.model)
        walks = self.walks(0.0)
        if made.experts == 1 and any(each.part == "router" for walk in walks for each in walk):
            raise SettingError(
                f"--method {self.run.method} trains a router, and --experts 1 has none: "
                "give --experts 2 or more, or --method at-m."
            )
        return made

    @property
    def budget(self) -> tuple[float, str]:
        """Of the attack that is trained against, on pixels in [0, 1], and its norm.

        Of clean training, those of the validation.
        """
        if isinstance(self.recipe, RobustSettings):
            return self.recipe.eps, self.recipe.norm
        return self.loop.val_eps, "linf"

    def walks(self, done: float) -> list[Walk]:
        """Return the method's walks where such a share of the training is done."""
        made: list[Walk] = self.run.recipe.walks(self.recipe, done)
        return made

    def mapping(self) -> dict[str, Any]:
        """Return the recipe as JSON holds it, to be shown, kept and compared."""
        parts = {"run": self.run, "model": self.model, "loop": self.loop, "clips": self.clips}
        held = {name: to_mapping(part) for name, part in parts.items()}
        held["clips"].pop("cache")  # changes no clip
        mapped = {"data": self.data, "init_from": self.init_from, **held}
        return mapped | {"method": to_mapping(self.recipe)}

    def open(self, split: str, clips: int) -> DataSet:
        """Open one split of the data."""
        settings = dataclasses.replace(self.clips, clips=clips)
        return open_data(self.data, split, self.run.spec, settings)

"""PyTorch: the reference. It runs the twin that a bundle carries, in the place of its parts.

    part      what runs
    router    the twin's router: clip -> scores
    expertI   its expert I: clip -> logits; of an online bundle: clip, states -> logits, next states
    moe       all of it: clip -> logits, scores, route

Where an engine on another backend disagrees with this one, the lowering or the backend is wrong.
A precision below fp32 is not imitated. Compiled (torch.compile), it is what an engine has to beat.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vmoe import bundle as bundles
from vmoe.bundle import Bundle, Part
from vmoe.errors import BundleError, EngineMismatchError, MissingDependencyError
from vmoe.runtime import online

from . import TWIN, BackendSettings, Outputs, Run

if TYPE_CHECKING:
    from torch import Tensor

    from vmoe.models import VideoMoE

    Tensors = dict[str, Tensor]  # by the names of a part's inputs or outputs
    Answer = Callable[[Tensors], Tensors]

FORMATS = (TWIN,)
DEVICES = ("cpu", "cuda")


def why_unavailable() -> str | None:
    """Return why this backend cannot run here, and what mends it; None where it can."""
    for name in ("torch", "safetensors"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed: pip install 'vmoe[train]'."
    return None


def open(settings: BackendSettings) -> TorchTwin:
    """Open the backend.

    Raises:
        MissingDependencyError: torch is not installed.
        BundleError: the bundle does not carry its twin, or carries another's.
        SettingError: a device that is no device, or is not here.
    """
    why = why_unavailable()
    if why:
        raise MissingDependencyError(why)
    return TorchTwin(settings)


class TorchTwin:
    """A bundle's twin, in eval mode, on one device."""

    def __init__(self, settings: BackendSettings) -> None:
        """Load the twin."""
        import torch

        from vmoe import checkpoint

        self._torch = torch
        self._bundle = settings.bundle or bundles.read(settings.folder)
        self._device = checkpoint.device(settings.device)
        self._threads = settings.threads
        self._twin = checkpoint.load(_path(self._bundle), self._device).twin
        _check(self._twin, self._bundle)
        if settings.compiled:
            _compile(self._twin)

    def load(self, part: Part) -> Run:
        """Take what one part was made from."""
        name = next(name for name, of in self._bundle.parts.items() if of.file == part.file)
        answer = self._answer(name, part)

        def run(inputs: Mapping[str, Any]) -> Outputs:
            try:
                with self._torch.inference_mode(), self._limited():
                    found = answer({key: self.put(value) for key, value in inputs.items()})
            except RuntimeError as e:
                why = str(e).splitlines()[0]
                raise EngineMismatchError(f"{part.file}: its twin does not run: {why}") from e
            return {key: value.cpu().numpy() for key, value in found.items()}

        return run

    def _answer(self, name: str, part: Part) -> Answer:
        """Return what a part does, as the twin does it."""
        twin = self._twin
        if name == "router":
            return lambda given: {"scores": twin.scores(_clip(given))}
        if name == "moe":
            return self._route
        expert = int(name.removeprefix("expert"))
        states = [port.name for port in online.state_ports(part)]
        if not states:
            return lambda given: {"logits": twin.run_expert(expert, _clip(given))}

        normalise, net = twin.experts[expert].children()
        step: Any = net.follow

        def follow(given: Tensors) -> Tensors:
            logits, after = step(normalise(_clip(given)), [given[name] for name in states])
            named = {online.after(name): state for name, state in zip(states, after, strict=True)}
            return {"logits": logits, **named}

        return follow

    def _route(self, given: Tensors) -> Tensors:
        clip = _clip(given)
        scores = self._twin.scores(clip)
        route = scores.argmax(dim=1)
        if "force_route" in given and given["force_route"] >= 0:
            route = given["force_route"].expand_as(route)
        return {"logits": self._twin.run_routed(clip, route), "scores": scores, "route": route}

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        """Give torch, whose threads are one setting for all, as many as were asked for."""
        before = self._torch.get_num_threads()
        try:
            self._torch.set_num_threads(self._threads or before)
            yield
        finally:
            self._torch.set_num_threads(before)

    def put(self, clips: Any) -> Any:
        """Bring clips, uint8 [N, T, H, W, 3], to the device; what is there already stays."""
        if isinstance(clips, self._torch.Tensor):
            return clips
        return self._torch.from_numpy(np.ascontiguousarray(clips)).to(self._device)

    def close(self) -> None:
        """Do nothing: the twin is freed with the backend and its runs."""


def _clip(given: Tensors) -> Tensor:
    """Return float32 [N, 3, T, H, W] with pixels in [0, 1] of the input `clip`."""
    return given["clip"].permute(0, 4, 1, 2, 3).float() / 255


def _compile(twin: VideoMoE) -> None:
    """Have torch compile the router and each expert, when it first sees a batch of a new size."""
    for module in (twin.router, *twin.experts):
        if module is not None:
            module.compile(dynamic=False)


def _path(bundle: Bundle) -> Path:
    if "file" not in bundle.twin:
        raise BundleError(
            f"{bundle.path} does not carry its twin, and backend torch runs nothing else. "
            "Use --backend auto, or export it again without --no-twin."
        )
    return bundle.path / bundle.twin["file"]


def _check(twin: VideoMoE, bundle: Bundle) -> None:
    """Refuse a twin whose answers would not even have the shape of the bundle's."""
    has = (twin.spec, twin.settings.experts, twin.settings.classes)
    if has != (bundle.spec, bundle.experts, len(bundle.labels)):
        raise EngineMismatchError(
            f"the twin in {bundle.path} takes or gives something else than its manifest says. "
            "Export it again."
        )

"""An ONNX Runtime session whose inputs and outputs keep their places, as a CUDA graph needs it.

With its option enable_cuda_graph, ONNX Runtime captures what a session gives the GPU at the first
run, and repeats it from then on: it reads and writes where it did then. So there is one place for
each batch, a graph of its own for each (gpu_graph_id), and clips are copied to it before each run.

Source: ONNX Runtime's documentation of the CUDA execution provider, "Using CUDA Graphs".
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from vmoe.bundle import Part
from vmoe.errors import EngineMismatchError

from . import Outputs

CLIP = "clip"


class Place(NamedTuple):
    """Where one batch goes in and comes out.

    Attributes:
        clip: on the device.
        outputs: on the device, by their names.
        binding: of both to the session.
        options: that name the graph.
    """

    clip: Any
    outputs: dict[str, Any]
    binding: Any
    options: Any


class Bound:
    """One part's session, bound anew for each batch that it sees."""

    def __init__(self, ort: Any, session: Any, part: Part, device: tuple[str, int]) -> None:
        """Take a session.

        Args:
            ort: the module onnxruntime.
            session: of the part.
            part: whose ports say the shapes.
            device: its kind and number, ("cuda", 0).
        """
        self._ort, self._session, self._part, self._device = ort, session, part, device
        self._places: dict[int, Place] = {}
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, Any]) -> Outputs:
        """Answer clips, uint8 [N, T, H, W, 3] on the host; nothing else can go in.

        Raises:
            EngineMismatchError: there are other inputs.
        """
        if set(inputs) != {CLIP}:
            others = ", ".join(sorted(set(inputs) - {CLIP}))
            raise EngineMismatchError(
                f"{self._part.file} takes {others} beside clips, which a CUDA graph here does not. "
                "Leave out --cuda-graph."
            )
        clips = inputs[CLIP]
        with self._lock:
            place = self._places.get(len(clips)) or self._bind(clips.shape)
            place.clip.update_inplace(clips)
            self._session.run_with_iobinding(place.binding, place.options)
            return {name: np.array(value.numpy()) for name, value in place.outputs.items()}

    def _bind(self, shape: tuple[int, ...]) -> Place:
        """Make places for one batch; the run that follows captures the graph."""
        kind, index = self._device
        make = self._ort.OrtValue.ortvalue_from_shape_and_type
        clip = make(list(shape), np.uint8, kind, index)
        outputs = {
            port.name: make([shape[0], *port.shape[1:]], np.dtype(port.dtype).type, kind, index)
            for port in self._part.outputs
        }
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(CLIP, clip)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(len(self._places) + 1))
        place = self._places[shape[0]] = Place(clip, outputs, binding, options)
        return place

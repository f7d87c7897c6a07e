"""Backends, one file each: `why_unavailable()` and `open(settings)`.

A file of this folder also names the `FORMATS` of parts that it reads, such as ("onnx",), and the
`DEVICES` that it runs on, of cpu and cuda; one that can run its parts as CUDA graphs says so by
`CUDA_GRAPHS = True`. Two formats are no part's, and what reads them is never chosen by auto. TWIN:
the backend runs the twin that the bundle carries in the place of each part. SERVER: a server that
the user names has the parts; such a file also says, by `served(bundle)`, as which bundle the server
answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from vmoe.bundle import Bundle, Part
from vmoe.clips import Clips

TWIN, SERVER = "twin", "server"  # formats of no part

Outputs = dict[str, NDArray[Any]]  # by the names that the graph gives them
Run = Callable[[Mapping[str, Any]], Outputs]  # takes inputs by name: numpy, or what `put` gave


@dataclass(frozen=True)
class BackendSettings:
    """What a backend needs to know.

    Attributes:
        folder: the bundle's folder, where the parts' files lie.
        device: auto, cpu or cuda:N.
        threads: CPU threads of one run; None is the backend's own choice.
        bundle: its manifest, for a backend that needs more of it than its parts.
        cache: a folder that outlives this run, for what a backend makes of parts; None for none.
        trust: whether parts that are code, as a plan is, are loaded though made elsewhere.
        server: the address of a server that has the parts; None for none.
        stopping: asked while a backend waits for its server: whether to give up.
        compiled: of torch: compile the twin, anew for each batch.
        cuda_graph: whether parts run as CUDA graphs; None is the backend's own choice.
    """

    folder: Path
    device: str = "auto"
    threads: int | None = None
    bundle: Bundle | None = None
    cache: Path | None = None
    trust: bool = False
    server: str | None = None
    stopping: Callable[[], bool] = lambda: False
    compiled: bool = False
    cuda_graph: bool | None = None


class Times(NamedTuple):
    """What calls took, all parts together, in ms; by the device's own clock but for `enqueue_ms`.

    Attributes:
        h2d_ms: copies of clips to the device.
        enqueue_ms: the host's calls that gave the device its work.
        device_ms: the graphs themselves.
        d2h_ms: copies of answers back.
    """

    h2d_ms: float = 0.0
    enqueue_ms: float = 0.0
    device_ms: float = 0.0
    d2h_ms: float = 0.0


class Backend(Protocol):
    """What runs single graphs; it knows nothing of routes.

    One that can tell copies from work also has `time_calls()`, from which on it notes what runs
    take, and `last_times() -> Times`: of all runs since it was asked last.
    """

    def load(self, part: Part) -> Run:
        """Make one part ready to run; what is read of its files is proven first (`check_part`).

        An expert may be needed hours after its bundle was read, and a folder may be overwritten.

        Raises:
            CorruptBundleError: a file is not the one that the bundle was read with.
        """
        ...

    def put(self, clips: Clips) -> Any:
        """Bring clips, uint8 [N, T, H, W, 3], to the device, once for all parts that see them."""
        ...

    def close(self) -> None:
        """Free what is held; a second call does nothing."""
        ...

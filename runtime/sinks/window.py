"""A window on this machine's screen that shows the annotated stream (`--show`)."""

from __future__ import annotations

import os
import platform
import re
import socket
from types import TracebackType
from typing import Any

from vmoe.errors import MissingDependencyError, SettingError
from vmoe.runtime.frames import Stop
from vmoe.runtime.results import Result

from . import Step, _draw

TITLE = "vmoe-run (q ends it)"
ENDING_KEYS = {ord("q"), 27}  # 27 is Escape


def open(stop: Stop) -> Screen:
    """Return a sink that shows frames; q or Escape in its window asks `stop`.

    Raises:
        SettingError: there is no screen.
    """
    display = os.environ.get("DISPLAY", "")
    if platform.system() == "Linux" and not _answers(display):
        # OpenCV's window system (Qt over X11) would abort the whole process.
        why = f"{display!r} does not answer" if display else "DISPLAY is not set"
        raise SettingError(f"--show: there is no screen here ({why}). Use --save.")
    return Screen(stop)


def _answers(display: str) -> bool:
    """Return whether an X server listens at HOST:N.SCREEN; without a host it is this machine."""
    found = re.fullmatch(r"(?:unix|([^:]*)):(\d+)(?:\.\d+)?", display)
    if not found:
        return False
    host, number = found[1], int(found[2])
    try:
        if host:
            socket.create_connection((host, 6000 + number), timeout=2).close()
            return True
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as local:
            local.connect(f"/tmp/.X11-unix/X{number}")
    except OSError:
        return False
    return True


class Screen:
    """See `Sink`. Steps must be taken in the main thread, as window systems want it."""

    name = "--show"
    wants_frames = True

    def __init__(self, stop: Stop) -> None:
        """Take what a key in the window asks to end."""
        self._stop = stop
        self._results: dict[int, Result | None] = {}  # by stream
        self._cv2: Any = None

    def take(self, step: Step) -> None:
        """Show the frame."""
        result = self._results[step.stream] = step.result or self._results.get(step.stream)
        if step.frame is None:
            return
        cv2 = self._cv2
        drawn = _draw.annotate(step.frame.pixels, result, step.frame.t_s)
        title = TITLE if not step.stream else f"{TITLE} {step.stream}"
        cv2.imshow(title, cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
        if cv2.waitKey(1) & 0xFF in ENDING_KEYS:
            self._stop.ask()

    def __enter__(self) -> Screen:
        os.environ.setdefault("QT_LOGGING_RULES", "default.warning=false")  # it misses its fonts
        import cv2

        self._cv2 = cv2
        try:
            cv2.namedWindow(TITLE, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO)
        except cv2.error as e:
            raise MissingDependencyError(
                "--show: this OpenCV cannot open windows (the headless build): "
                "pip uninstall opencv-python-headless && pip install opencv-python."
            ) from e
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cv2.destroyAllWindows()

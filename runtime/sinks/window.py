"""A window on this machine's screen that shows the annotated stream (`--show`)."""

from __future__ import annotations

import os
import platform
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
    screens = ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM")
    if platform.system() == "Linux" and not any(os.environ.get(name) for name in screens):
        # Qt would abort the whole process.
        raise SettingError("--show: there is no screen here (DISPLAY is not set). Use --save.")
    return Screen(stop)


class Screen:
    """See `Sink`. Steps must be taken in the main thread, as window systems want it."""

    wants_frames = True

    def __init__(self, stop: Stop) -> None:
        """Take what a key in the window asks to end."""
        self._stop = stop
        self._result: Result | None = None
        self._cv2: Any = None

    def take(self, step: Step) -> None:
        """Show the frame."""
        self._result = step.result or self._result
        if step.frame is None:
            return
        cv2 = self._cv2
        drawn = _draw.annotate(step.frame.pixels, self._result, step.frame.t_s)
        cv2.imshow(TITLE, cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
        if cv2.waitKey(1) & 0xFF in ENDING_KEYS:
            self._stop.ask()

    def __enter__(self) -> Screen:
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

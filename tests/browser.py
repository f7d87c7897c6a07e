"""A headless Chromium that looks at a page while it is alive, driven over a pair of pipes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--remote-debugging-pipe",
)  # fmt: skip


def chromium() -> str | None:
    """Return the browser's path; None where there is none."""
    return shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """One tab of a browser."""

    def __init__(self, into: int, out: int) -> None:
        self._into, self._out = into, out
        self._number, self._held, self._session = 0, b"", ""

    def ask(self, method: str, **values: Any) -> dict[str, Any]:
        """Send one command of the DevTools protocol; return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": values}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._into, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._held:
                self._held += os.read(self._out, 1 << 16)
            text, self._held = self._held.split(b"\0", 1)
            answer = json.loads(text)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, url: str, width: int, height: int) -> None:
        """Open a page in a window of this size."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        self.ask("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """Return what a line of JavaScript comes to."""
        got = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        return got["result"].get("value")

    def until(self, expression: str, seconds: float = 20.0) -> None:
        """Wait until a line of JavaScript is true."""
        ends = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < ends, f"never: {expression}\n{self.text()}"
            time.sleep(0.05)

    def text(self) -> str:
        """Return the text that the page shows."""
        return str(self.value("document.body.innerText"))

    def screenshot(self, path: Path) -> None:
        """Write what is seen, as PNG."""
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """Start a browser with a profile of its own; end it with the body."""
    theirs_in, ours_in = os.pipe()
    ours_out, theirs_out = os.pipe()
    theirs = {theirs_in: 103, theirs_out: 104}
    high = [os.dup2(fd, place, inheritable=True) for fd, place in theirs.items()]
    command = [str(chromium()), *FLAGS, f"--user-data-dir={profile}"]
    line = 'exec 3<&103 4>&104 103<&- 104>&-; exec "$0" "$@"'
    process = subprocess.Popen(
        ["bash", "-c", line, *command], pass_fds=high,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for fd in [*theirs, *high]:
        os.close(fd)
    try:
        yield Browser(ours_in, ours_out)
    finally:
        process.terminate()
        process.wait(20)
        os.close(ours_in)
        os.close(ours_out)

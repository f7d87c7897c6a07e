"""tegrastats: the power of a Jetson, as NVIDIA's tool prints it, summed up.

    ... tj@48.843C VDD_IN 5704mW/5704mW VDD_CPU_GPU_CV 831mW/831mW VDD_SOC 1624mW/1624mW
    ... thermal@41C POM_5V_IN 900/943 POM_5V_GPU 0/0 POM_5V_CPU 123/123

A rail's first number is what it draws now, in mW, the second the mean since the tool began. VDD_IN
(Orin Nano and NX, Xavier NX, TX2, TX1) and POM_5V_IN (Nano) are the whole module; the others are
parts of it. A board that prints only parts (AGX Xavier, AGX Orin) is not measured: which of its
rails hold which others differs from board to board.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading

from vmoe.errors import MissingDependencyError, VmoeError

from ._sampled import Integral

TOOL = "tegrastats"
WHOLE = ("VDD_IN", "POM_5V_IN")
RAIL = re.compile(r"\b([A-Z][A-Z0-9_]+) (\d+)(?:mW)?/(\d+)(?:mW)?(?=\s|$)")
STEP_MS = 100
FIRST_LINE_S = 10.0


def open_meter(device: str) -> Tegrastats:
    """Start the tool; it counts the whole module, whatever the device is.

    Raises:
        MissingDependencyError: it is not installed.
        VmoeError: it prints no rail of the whole module.
    """
    if shutil.which(TOOL) is None:
        raise MissingDependencyError(f"{TOOL} is not here: it comes with JetPack, on a Jetson.")
    return Tegrastats()


def rails(line: str) -> dict[str, float]:
    """Return what each rail of a line draws now, in watts."""
    return {name: int(now) / 1000 for name, now, _ in RAIL.findall(line)}


class Tegrastats:
    """The tool in a process of its own, and a thread that reads it."""

    def __init__(self) -> None:
        """Start it, and wait for its first line."""
        self.step_s = STEP_MS / 1000
        self._sum = Integral()
        self._first = threading.Event()
        self._line = ""
        self._rail = ""
        self._process = subprocess.Popen(
            [TOOL, "--interval", str(STEP_MS)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace",
        )  # fmt: skip
        self._thread = threading.Thread(target=self._read, name=TOOL, daemon=True)
        self._thread.start()
        self._first.wait(FIRST_LINE_S)
        if not self._rail:
            self.close()
            raise VmoeError(self._why())
        self.covers = f"the whole module ({self._rail}), by {TOOL}"

    def joules(self) -> float:
        """Return the energy since it was opened."""
        code = self._process.poll()
        if code is not None:
            raise VmoeError(f"{TOOL} ended in the middle, with {code}. Use --power none.")
        return self._sum.joules()

    def close(self) -> None:
        """End the process and the thread; a second call does nothing."""
        if self._process.poll() is None:
            self._process.terminate()
        self._thread.join()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                found = rails(line)
                if not self._first.is_set():
                    self._line = line
                    self._rail = next((name for name in WHOLE if name in found), "")
                if self._rail in found:
                    self._sum.add(found[self._rail])
                self._first.set()
        self._first.set()

    def _why(self) -> str:
        names = ", ".join(rails(self._line))
        if not self._line:
            return f"{TOOL} printed nothing in {FIRST_LINE_S:g} s. Use --power none."
        if not names:
            return f"{TOOL} prints no power here: some boards show it to root alone. Run as root."
        return (
            f"{TOOL} prints no rail of the whole module ({' or '.join(WHOLE)}), only {names}, "
            "which are parts of it. Use --power none, or a meter at the plug."
        )

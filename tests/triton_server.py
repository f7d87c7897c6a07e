"""A real Triton server: the one that nvidia-pytriton bundles, in a venv of the system's Python.

It has the python backend alone, so that ONNX parts run in its Python. Its numpy is below 2, and so
it is never installed beside ours. The venv is kept in the temporary folder, for the next run.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from tests.servers import free_port

WANTED = ("nvidia-pytriton==0.7.0", "numpy==1.26.4", "onnxruntime")
PYTHON = Path("/usr/bin/python3")  # the server's stub loads this one's library
READY_S, END_S = 60.0, 20.0
PIP = ("-m", "pip", "install", "-q", "--disable-pip-version-check")


class CannotRunError(Exception):
    """Why no server runs here."""


def installed() -> Path:
    """Return the venv that has the server.

    Raises:
        CannotRunError: none can be made here.
    """
    place = Path(tempfile.gettempdir()) / f"vmoe-triton-{os.getuid()}-{WANTED[0].split('==')[1]}"
    if not (place / "ready").exists():
        making = Path(tempfile.mkdtemp(prefix="vmoe-triton-making-"))
        try:
            _make(making)
            making.rename(place)
        except (OSError, subprocess.SubprocessError) as e:
            if (place / "ready").exists():  # another run was as fast
                return installed()
            said = getattr(e, "stderr", b"") or str(e).encode()
            last = said.decode(errors="replace").strip().splitlines()[-1:]
            raise CannotRunError(f"no Triton server can be installed here: {''.join(last)}") from e
        finally:
            shutil.rmtree(making, ignore_errors=True)
    missing = re.findall(r"(\S+) => not found", _run("ldd", str(_stub(place))))
    if missing:
        raise CannotRunError(
            f"Triton's python backend needs {', '.join(missing)}, which is not here"
        )
    return place


def _make(place: Path) -> None:
    _run(str(PYTHON), "-m", "venv", str(place))
    python = str(place / "bin" / "python")
    _run(python, *PIP, "--no-deps", WANTED[0])  # the server; not what its Python API wants
    _run(python, *PIP, *WANTED[1:])
    backend = place / "backends" / "python"
    shutil.copytree(_bundled(place) / "backends" / "python", backend)
    shutil.copy(_stub(place), backend)
    (place / "ready").touch()


def _run(*command: str) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        command, check=True, capture_output=True, timeout=300, env=env
    ).stdout.decode()


def _packages(place: Path) -> Path:
    return next((place / "lib").glob("python3.*")) / "site-packages"


def _bundled(place: Path) -> Path:
    return _packages(place) / "pytriton" / "tritonserver"


def _stub(place: Path) -> Path:
    version = _packages(place).parent.name.removeprefix("python")
    return _bundled(place) / "python_backend_stubs" / version / "triton_python_backend_stub"


class Server:
    """A server of some repositories, on ports of loopback that stay its own when it is restarted.

    Models are loaded and unloaded by name. Each is a process or two, which is what a start costs.
    """

    def __init__(self, repositories: Sequence[Path], log: Path) -> None:
        self._venv = installed()
        self._repositories, self._log = repositories, log
        self.http, self.grpc = free_port(), free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def address(self, scheme: str) -> str:
        """Return what --server takes."""
        return f"{scheme}://127.0.0.1:{self.http if scheme == 'http' else self.grpc}"

    def start(self, *models: str) -> None:
        """Start it with these models, by default all, and wait until they are ready."""
        packages = _packages(self._venv)
        env = {
            "PATH": f"{self._venv / 'bin'}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"),
            "OMP_NUM_THREADS": "1",
        }
        command = [
            str(_bundled(self._venv) / "bin" / "tritonserver"),
            *(f"--model-repository={path}" for path in self._repositories),
            f"--backend-directory={self._venv / 'backends'}",
            f"--backend-config=python,shm-region-prefix-name={self._prefix}",
            "--http-address=127.0.0.1", f"--http-port={self.http}",
            "--grpc-address=127.0.0.1", f"--grpc-port={self.grpc}",
            "--allow-metrics=false", "--exit-timeout-secs=2", "--model-control-mode=explicit",
            *(f"--load-model={model}" for model in models or ("*",)),
        ]  # fmt: skip
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=env, start_new_session=True
            )
        until_s = time.monotonic() + READY_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > until_s:
                self.kill()
                raise RuntimeError(f"Triton did not start:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        try:
            self.ask("health/ready")
        except (urllib.error.URLError, OSError):
            return False
        return True

    def ask(self, path: str, body: bytes | None = None) -> bytes:
        """Ask by HTTP what is no inference; a body is posted."""
        url = f"http://127.0.0.1:{self.http}/v2/{path}"
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=30) as answer:
            found: bytes = answer.read()
        return found

    def load(self, model: str, *, un: bool = False) -> None:
        """Load a model, or unload it."""
        self.ask(f"repository/models/{model}/{'un' if un else ''}load", b"{}")

    def stop(self) -> None:
        """Ask it to end, and wait for it."""
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
            self.kill()

    def kill(self) -> None:
        """End it and all of its processes at once, as a machine that loses its power."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        for left in Path("/dev/shm").glob(f"{self._prefix}*"):
            left.unlink(missing_ok=True)

    @property
    def _prefix(self) -> str:
        return f"vmoe_triton_{self.http}_"

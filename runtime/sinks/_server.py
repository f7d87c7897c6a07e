"""The web server of the live page: the standard library's, with limits.

A viewer is a connection that stays (a stream, events). There are at most VIEWERS of them, and
CONNECTIONS of all: one more takes the place of the oldest that has not asked yet for anything, or
is turned away at once. A peer that takes nothing for TIMEOUT_S is cut off. Where only this machine
is listened to, only its own names are answered, so that no page of the web can read the stream by
a name that it makes point here.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import ipaddress
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from vmoe import report

if TYPE_CHECKING:
    from .page import Page, View

VIEWERS, CONNECTIONS = 32, 64
TIMEOUT_S = 10.0
SEND_BUFFER_BYTES = 128 * 1024  # so that a slow viewer's frames are not old ones
FRAME_S, STATE_S = 1 / 25, 0.5  # at most so often
IDLE_S = 5.0  # events say at least so often that they are alive
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline'; frame-ancestors 'none'",
}


class Server(ThreadingHTTPServer):
    """Serves one page until `finish`."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = CONNECTIONS

    def __init__(self, page: Page) -> None:
        """Bind; may raise OSError."""
        self.page = page
        self.loopback = _is_loopback(page.host)
        self.address_family = socket.AF_INET6 if ":" in page.host else socket.AF_INET
        self.ending = threading.Event()
        self._count = threading.Lock()
        self._connections = self._viewers = 0
        self._silent: dict[socket.socket, None] = {}  # those that have not asked yet, oldest first
        super().__init__((page.host, page.port), Handler)
        self._thread = threading.Thread(
            target=self.serve_forever, args=(0.1,), name="vmoe-page", daemon=True
        )

    @property
    def url(self) -> str:
        """Where the page is."""
        host = f"[{self.page.host}]" if ":" in self.page.host else self.page.host
        return f"http://{host}:{self.server_port}{'/' if self.page.shows else '/metrics'}"

    def server_bind(self) -> None:
        """Bind without asking for the machine's name, as HTTPServer would: that may take long."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.page.host, self.server_address[1]

    def begin(self) -> None:
        """Start to answer."""
        self._thread.start()

    def finish(self) -> None:
        """End: viewers are let go, the port is free."""
        self.ending.set()
        for view in self.page.views:
            with view.changed:
                view.changed.notify_all()
        self.shutdown()
        self.server_close()
        self._thread.join()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Turn away what is too much; who holds a place and asks for nothing gives it up."""
        with self._count:
            room = self._connections < CONNECTIONS
            if not room and self._silent:
                oldest = next(iter(self._silent))
                del self._silent[oldest]
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread ends
                room = True
            if room:
                self._connections += 1
                self._silent[request] = None
                return True
        with contextlib.suppress(OSError):
            request.settimeout(0.1)
            request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\n\r\n")
        return False

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one connection, and count it out."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._count:
                self._connections -= 1
                self._silent.pop(request, None)

    def heard(self, request: socket.socket) -> None:
        """Note that a connection has asked for something."""
        with self._count:
            self._silent.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A viewer that leaves is no error; anything else is told by the log of the run."""

    @contextlib.contextmanager
    def viewer(self) -> Any:
        """Count one viewer in; yields whether there is room."""
        with self._count:
            room = self._viewers < VIEWERS
            self._viewers += room
        try:
            yield room
        finally:
            with self._count:
                self._viewers -= room


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    server: Server
    server_version, sys_version = "vmoe-run", ""
    timeout = TIMEOUT_S

    def setup(self) -> None:
        """Keep what waits for a slow viewer small."""
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        super().setup()

    def do_GET(self) -> None:
        """Answer by the path."""
        self.server.heard(self.request)
        page, path = self.server.page, urlsplit(self.path).path
        if not self._is_meant_for_us():
            self._text(403, "this name is not served here\n")
        elif path == "/healthz":
            states = {lane.source.name: lane.source.state for lane in _lanes(page)}
            healthy = page.healthy()
            body = {"status": "ok" if healthy else "unhealthy", "sources": states}
            self._send(200 if healthy else 503, "application/json", report.to_json(body) + "\n")
        elif path == "/metrics":
            self._metrics()
        elif page.shows and path == "/":
            self._send(200, "text/html; charset=utf-8", self._html())
        elif page.shows and path == "/state.json":
            self._send(200, "application/json", json.dumps(page.state()))
        elif page.shows and path == "/events":
            self._viewed(self._events)
        elif page.shows and (found := re.fullmatch(r"/(stream|frame)/(\d+)\.(mjpg|jpg)", path)):
            number = int(found[2])
            if number >= len(page.views):
                self._text(404, f"there is no stream {number}\n")
            elif found[1] == "frame":
                self._frame(page.views[number])
            else:
                self._viewed(lambda: self._stream(page.views[number]))
        else:
            self._text(404, "not here\n")

    def _html(self) -> str:
        """Return the page with the state of now in it, so that it shows something at once."""
        text = importlib.resources.files(__package__).joinpath("page.html").read_text("utf-8")
        state = json.dumps(self.server.page.state()).replace("<", "\\u003c")
        return text.replace("/*STATE*/", state, 1)

    def _is_meant_for_us(self) -> bool:
        """Return whether the name asked for is this machine's own, where only it may ask."""
        if not self.server.loopback:
            return True
        host = urlsplit("//" + self.headers.get("Host", "")).hostname or ""
        return host == "localhost" or _is_loopback(host)

    def _viewed(self, answer: Any) -> None:
        with self.server.viewer() as room:
            if room:
                answer()
            else:
                self._text(503, f"{VIEWERS} viewers are here already\n")

    def _metrics(self) -> None:
        from vmoe.errors import MissingDependencyError
        from vmoe.runtime import metrics

        try:
            text, kind = metrics.exposed(self.server.page.pipeline)
        except MissingDependencyError as e:
            self._text(501, f"{e}\n")
        else:
            self._send(200, kind, text)

    def _frame(self, view: View) -> None:
        number, jpeg = view.next_jpeg(0, 2.0)
        if number:
            self._send(200, "image/jpeg", jpeg)
        else:
            self._text(503, "no frame yet\n")

    def _stream(self, view: View) -> None:
        """Send frames until the viewer leaves; who is slow gets fewer, and always the newest.

        The boundary follows its frame at once: browsers show a frame when they have seen it.
        """
        self._head(200, "multipart/x-mixed-replace; boundary=frame")
        self.wfile.write(b"--frame\r\n")
        number = 0
        while not self.server.ending.is_set():
            began = time.monotonic()
            newest, jpeg = view.next_jpeg(number, 1.0)
            if newest == number:
                continue
            number = newest
            head = f"Content-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
            self.wfile.write(head.encode() + jpeg + b"\r\n--frame\r\n")
            self.server.ending.wait(max(0.0, began + FRAME_S - time.monotonic()))

    def _events(self) -> None:
        """Send the state whenever it changed."""
        self._head(200, "text/event-stream")
        said, said_s = "", 0.0
        while not self.server.ending.is_set():
            state = self.server.page.state()
            now, shown = state.pop("time", 0), json.dumps(state)
            if shown != said:
                self.wfile.write(f"data: {json.dumps({**state, 'time': now})}\n\n".encode())
                said, said_s = shown, time.monotonic()
            elif time.monotonic() - said_s > IDLE_S:
                self.wfile.write(b": alive\n\n")
                said_s = time.monotonic()
            self.server.ending.wait(STATE_S)

    def _head(self, code: int, kind: str, length: int | None = None) -> None:
        self.send_response(code)
        for key, value in {**HEADERS, "Content-Type": kind, "Connection": "close"}.items():
            self.send_header(key, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send(self, code: int, kind: str, body: str | bytes) -> None:
        data = body.encode() if isinstance(body, str) else body
        self._head(code, kind, len(data))
        self.wfile.write(data)

    def _text(self, code: int, text: str) -> None:
        self._send(code, "text/plain; charset=utf-8", text)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal is the results'."""


def _lanes(page: Page) -> Any:
    return page.pipeline.lanes if page.pipeline is not None else ()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

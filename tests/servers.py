"""Real servers on loopback that send numbered frames: RTSP, MJPEG and files by HTTP, UDP."""

from __future__ import annotations

import contextlib
import functools
import re
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests import videos

TS_PACKET, AT_ONCE = 188, 7  # an RTP or UDP packet holds so many packets of MPEG-TS
FPS = 20.0


class Rtsp:
    """An RTSP server: MPEG-TS in RTP, interleaved in the TCP connection, in the video's own time.

    Every client sees the video from its start. `video` may be exchanged while it stands still.
    """

    def __init__(self, video: Path, frames: int, port: int = 0) -> None:
        self._data, self._seconds = video.read_bytes(), frames / FPS
        self._listening = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listening.getsockname()[1]
        self.url = f"rtsp://viewer:sesame@127.0.0.1:{self.port}/live"
        self.frozen = threading.Event()
        self.sent_at: list[float] = []  # when each client got its first packet
        self._clients: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def kill(self) -> None:
        """End as a process does that is killed: every connection is reset."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.frozen.clear()
        for client in self._clients:
            with contextlib.suppress(OSError):
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.shutdown(socket.SHUT_RDWR)
            client.close()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Rtsp:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                self._clients.append(client)
                thread = threading.Thread(target=self._serve, args=(client,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client.makefile("rb") as asked:
            while line := asked.readline():
                method = line.split()[0].decode(errors="replace")
                head = b"".join(iter(asked.readline, b"\r\n")).decode()
                number = re.search(r"CSeq: *(\d+)", head)
                extra = self._answer(method, head)
                cseq = number[1] if number else "0"
                client.sendall(f"RTSP/1.0 200 OK\r\nCSeq: {cseq}\r\n{extra}\r\n".encode())
                if method == "DESCRIBE":
                    client.sendall(SDP)
                if method == "PLAY":
                    self._play(client)
                    return

    def _answer(self, method: str, head: str) -> str:
        if method == "OPTIONS":
            return "Public: DESCRIBE, SETUP, PLAY, TEARDOWN\r\n"
        if method == "DESCRIBE":
            return f"Content-Type: application/sdp\r\nContent-Length: {len(SDP)}\r\n"
        if method == "SETUP":
            assert "RTP/AVP/TCP" in head, head
            return "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n"
        return "Session: 1\r\n"

    def _play(self, client: socket.socket) -> None:
        began = time.monotonic()
        self.sent_at.append(began)
        for number, (due_s, packets) in enumerate(paced(self._data, self._seconds)):
            time.sleep(max(0.0, began + due_s - time.monotonic()))
            while self.frozen.is_set():
                time.sleep(0.02)
            stamp = int(due_s * 90000) & 0xFFFFFFFF
            rtp = struct.pack(">BBHII", 0x80, 33, number & 0xFFFF, stamp, 1) + packets
            client.sendall(struct.pack(">cBH", b"$", 0, len(rtp)) + rtp)


GSTREAMER = """
import sys
import gi
gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
server = GstRtspServer.RTSPServer(address="127.0.0.1", service=sys.argv[2])
factory = GstRtspServer.RTSPMediaFactory()
factory.set_launch(
    f"( filesrc location={sys.argv[1]} ! avidemux ! jpegdec ! videoconvert "
    "! x264enc tune=zerolatency speed-preset=ultrafast key-int-max=10 "
    "! rtph264pay name=pay0 pt=96 config-interval=-1 )"
)
server.get_mount_points().add_factory("/live", factory)
assert server.attach(None)
print("ready", flush=True)
GLib.MainLoop().run()
"""
SYSTEM_PYTHON = "/usr/bin/python3"  # Debian's, which has gir1.2-gst-rtsp-server-1.0


def has_gstreamer() -> bool:
    """Return whether GStreamer's RTSP server is here, as Debian packages it."""
    code = "import gi; gi.require_version('GstRtspServer', '1.0')"
    with contextlib.suppress(OSError):
        return not subprocess.run([SYSTEM_PYTHON, "-c", code], stderr=subprocess.DEVNULL).returncode
    return False


@contextlib.contextmanager
def gstreamer(video: Path, port: int) -> Iterator[str]:
    """Serve an AVI of JPEGs as H.264 by GStreamer's RTSP server; it is killed at the end."""
    command = [SYSTEM_PYTHON, "-c", GSTREAMER, str(video), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            yield f"rtsp://127.0.0.1:{port}/live"
        finally:
            process.kill()


SDP = (
    b"v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\ns=live\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\n"
    b"m=video 0 RTP/AVP 33\r\na=rtpmap:33 MP2T/90000\r\na=control:track1\r\n"
)


def paced(data: bytes, seconds: float) -> Iterator[tuple[float, bytes]]:
    """Yield packets of MPEG-TS, and when each is due, in seconds from the first."""
    size = TS_PACKET * AT_ONCE
    for at in range(0, len(data), size):
        yield seconds * at / len(data), data[at : at + size]


@contextlib.contextmanager
def udp(video: Path, frames: int, port: int) -> Iterator[threading.Event]:
    """Send MPEG-TS by UDP again and again, until the body ends or sets the event."""
    done = threading.Event()
    data = video.read_bytes()

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
            while not done.is_set():
                began = time.monotonic()
                for due_s, packets in paced(data, frames / FPS):
                    if done.wait(max(0.0, began + due_s - time.monotonic())):
                        return
                    out.sendto(packets, ("127.0.0.1", port))

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield done
    finally:
        done.set()
        thread.join()


def free_port() -> int:
    """Return a port of loopback that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextlib.contextmanager
def broker(loses: int = 0) -> Iterator[tuple[int, list[tuple[str, bytes]]]]:
    """Be an MQTT 3.1.1 broker that takes what is published; yield its port, and what it took.

    It hangs up, once, instead of confirming the message of the number `loses`.
    """
    taken: list[tuple[str, bytes]] = []
    server = socket.create_server(("127.0.0.1", 0))

    def packet(client: socket.socket) -> tuple[int, bytes]:
        kind, length, shift = client.recv(1)[0], 0, 0
        while True:
            byte = client.recv(1)[0]
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return kind, client.recv(length, socket.MSG_WAITALL) if length else b""

    def talk(client: socket.socket) -> None:
        while True:
            kind, body = packet(client)
            if kind >> 4 == 1:  # connect
                client.sendall(b"\x20\x02\x00\x00")
            elif kind >> 4 == 3:  # publish
                size = int.from_bytes(body[:2], "big")
                taken.append((body[2 : 2 + size].decode(), body[4 + size :]))
                if len(taken) == loses:
                    return
                client.sendall(b"\x40\x02" + body[2 + size : 4 + size])
            elif kind >> 4 == 12:  # ping
                client.sendall(b"\xd0\x00")

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = server.accept()
                with client, contextlib.suppress(OSError, IndexError):
                    talk(client)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server.getsockname()[1], taken
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


@contextlib.contextmanager
def hook(*answers: int) -> Iterator[tuple[int, list[tuple[str | None, bytes]]]]:
    """Take POSTs, and answer these codes, then 204; yield the port, and what came."""
    taken: list[tuple[str | None, bytes]] = []
    codes = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            taken.append((self.headers.get("Authorization"), body))
            self.send_response(codes.pop(0) if codes else 204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_port, taken
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def live_hls(folder: Path, video: Path, frames: int) -> Iterator[str]:
    """Serve MPEG-TS as live HLS does: the newest three pieces of a second each, until its end."""
    data, pieces = video.read_bytes(), round(frames / FPS)
    packets = len(data) // TS_PACKET
    cuts = [TS_PACKET * (packets * i // pieces) for i in range(pieces + 1)]
    done = threading.Event()

    def list_until(last: int) -> None:
        first = max(0, last - 2)
        lines = ["#EXTM3U", "#EXT-X-VERSION:3", "#EXT-X-TARGETDURATION:1",
                 f"#EXT-X-MEDIA-SEQUENCE:{first}"]  # fmt: skip
        for piece in range(first, last + 1):
            lines += ["#EXTINF:1.0,", f"{piece}.ts"]
        part = folder / "a.part"
        part.write_text("\n".join([*lines, ""]))
        part.replace(folder / "a.m3u8")

    def publish() -> None:
        for piece in range(pieces):
            (folder / f"{piece}.ts").write_bytes(data[cuts[piece] : cuts[piece + 1]])
            if piece >= 2:
                list_until(piece)
                if done.wait(1.0):
                    return

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        with http(folder) as root:
            while not (folder / "a.m3u8").exists():
                time.sleep(0.01)
            yield f"{root}/a.m3u8"
    finally:
        done.set()
        thread.join()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class _Mjpeg(BaseHTTPRequestHandler):
    frames, fps = 40, FPS

    def do_GET(self) -> None:
        import cv2

        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        with contextlib.suppress(OSError):
            for number in range(self.frames):
                bgr = cv2.cvtColor(videos.picture(number), cv2.COLOR_RGB2BGR)
                jpeg = cv2.imencode(".jpg", bgr)[1].tobytes()
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                self.wfile.write(head.encode() + jpeg + b"\r\n")
                time.sleep(1 / self.fps)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def http(folder: Path | None = None) -> Iterator[str]:
    """Serve a folder's files by HTTP, or without one MJPEG; yield the address of its root."""
    handler = _Mjpeg if folder is None else functools.partial(_Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()

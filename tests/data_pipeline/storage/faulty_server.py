"""A range server that fails as it is told, request by request."""

import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from tools.support.range_server import RangeServer

Fault = Callable[[Any], None]
"""Answers one request in place of the server."""


def status(code: int, **headers: str) -> Fault:
    """An answer without content; header names with _ for -."""
    return lambda request: request.refuse(
        code, {name.replace("_", "-"): value for name, value in headers.items()}
    )


def dropped(request: Any) -> None:
    """The connection is reset without an answer."""
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.close_connection = True
    request.connection.close()
    raise ConnectionResetError


def short(request: Any) -> None:
    """Half of the body, then the connection is closed."""
    request.send_file(cut=0.5)


def shifted(request: Any) -> None:
    """Another range than was asked for, and saying so."""
    request.send_file(shift=7)


def whole(request: Any) -> None:
    """Status 200 and the whole file, as a server without ranges answers."""
    del request.headers["Range"]
    request.send_file()


def garbled(request: Any) -> None:
    """The right headers, and zeros in place of the bytes."""
    request._send_body = lambda file, begin, end: request.wfile.write(bytes(end - begin))
    try:
        request.send_file()
    finally:
        del request._send_body  # the connection stays open


def anonymous(request: Any) -> None:
    """The right answer, with nothing that tells this version of the file from another."""
    request.send_header = lambda name, value: (
        None
        if name in ("ETag", "Last-Modified")
        else type(request).send_header(request, name, value)
    )
    try:
        request.send_file()
    finally:
        del request.send_header


def slow(seconds: float) -> Fault:
    """Silence, then the right answer (to nobody, if the client has left)."""

    def fault(request: Any) -> None:
        time.sleep(seconds)
        request.send_file()

    return fault


def login_page(request: Any) -> None:
    """What a proxy sends in place of a file when it wants to know who asks."""
    request.send_response(200)
    request.send_header("Content-Length", "5000")
    request.end_headers()
    request.wfile.write(b"<html>Who are you?</html>".ljust(5000))


def refusing_what_is_absent(request: Any) -> None:
    """403 in place of 404, as stores answer to those who may not list."""
    if (request.server.folder / request.name).is_file():
        request.send_file()
    else:
        request.refuse(403, {})


def compressed(request: Any) -> None:
    """A body that a proxy has compressed."""
    request.refuse(206, {"Content-Encoding": "gzip", "Content-Range": "bytes 0-0/1"})


class FaultyServer(RangeServer):
    """Answers the next requests for names that end in `of` with `faults`, all others well.

    Attributes:
        asked: (name, Range header) of all requests so far.
        connections: how many were opened.
        busiest: most requests at a time.
    """

    def __init__(self, folder: Any, port: int = 0) -> None:
        super().__init__(folder, port)
        self.faults: deque[Fault] = deque()
        self.of = ".tar"
        self.always: Fault | None = None
        self.asked: list[tuple[str, str]] = []
        self.connections = self.busiest = self._busy = 0
        self._lock = threading.Lock()

    def get_request(self) -> Any:
        self.connections += 1
        return super().get_request()

    def answer(self, request: Any) -> None:
        with self._lock:
            self.asked.append((request.name, request.headers.get("Range", "")))
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
            concerned = request.name.endswith(self.of)
            fault = self.faults.popleft() if concerned and self.faults else None
        try:
            if fault or (concerned and self.always):
                (fault or self.always)(request)
            else:
                super().answer(request)
        finally:
            with self._lock:
                self._busy -= 1


class CountingServer(FaultyServer):
    """Takes 10 ms for each request, and counts those that it has at a time until they end.

    `busiest` counts them until their answer is sent, when the client may have asked again.
    """

    most = now = 0

    def answer(self, request: Any) -> None:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.01)
        with self._lock:
            self.now -= 1
        super().answer(request)

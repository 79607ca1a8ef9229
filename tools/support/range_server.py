"""A small web server for a folder of shards: byte ranges, entity tags, connections that stay open.

For tests and for teaching; a real one (nginx, an object store) is faster and safer. It can be made
slow and unreliable on purpose, to see what a run does then.
"""

import email.utils
import os
import random
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_PIECE = 1 << 18


class RangeServer(ThreadingHTTPServer):
    """Serves the files below a folder, each request in a thread of its own."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        folder: str | os.PathLike[str],
        port: int = 0,
        host: str = "127.0.0.1",
        *,
        delay_s: float = 0.0,
        fail_fraction: float = 0.0,
        verbose: bool = False,
    ) -> None:
        """Listen, but do not answer before `serve_forever` or `start`.

        Args:
            port: 0 takes a free one; `url` tells which.
            delay_s: seconds before each answer.
            fail_fraction: share of requests that are answered 503, or cut off half-way.
            verbose: log each request.
        """
        self.folder = Path(folder).resolve()
        self.delay_s, self.fail_fraction, self.verbose = delay_s, fail_fraction, verbose
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        """Where the folder is found."""
        host, port = self.server_address[:2]
        return f"http://{host}:{port}"

    def start(self) -> "RangeServer":
        """Answer in a thread; `with` stops it."""
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __enter__(self) -> "RangeServer":
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are no news."""

    def answer(self, request: "_Handler") -> None:
        """Answer a request; made for being overridden by a server with faults."""
        time.sleep(self.delay_s)
        if random.random() < self.fail_fraction:
            if random.random() < 0.5:
                request.refuse(503)
            else:
                request.send_file(cut=0.5)
            return
        request.send_file()


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: RangeServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two packets: the second would wait 40 ms
    timeout = 60

    def do_GET(self) -> None:
        self.server.answer(self)

    def do_HEAD(self) -> None:
        self.server.answer(self)

    @property
    def name(self) -> str:
        """The file that is asked for, below the folder."""
        return unquote(urlsplit(self.path).path).lstrip("/")

    def send_file(self, cut: float = 1.0, shift: int = 0) -> None:
        """Send the file, or the range that was asked for.

        Args:
            cut: share of the body that is sent before the connection is closed.
            shift: send another range than was asked for, so many bytes further.
        """
        path = (self.server.folder / self.name).resolve()
        if not path.is_relative_to(self.server.folder) or not path.is_file():
            self.refuse(404)
            return
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            span = self._span(status.st_size)
            if span is None:
                self.refuse(416, {"Content-Range": f"bytes */{status.st_size}"})
                return
            begin, end = span[0] + shift, span[1] + shift
            is_range = self._asked_range() is not None
            self.send_response(206 if is_range else 200)
            self.send_header("Content-Length", str(end - begin))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", f'"{status.st_size:x}-{status.st_mtime_ns:x}"')
            modified = email.utils.formatdate(status.st_mtime, usegmt=True)
            self.send_header("Last-Modified", modified)
            if is_range:
                content_range = f"bytes {begin}-{end - 1}/{status.st_size}"
                self.send_header("Content-Range", content_range)
            self.end_headers()
            if self.command != "HEAD":
                self._send_body(file, begin, begin + int(cut * (end - begin)))
        if cut < 1.0:
            self.close_connection = True

    def refuse(self, status: int, headers: dict[str, str] | None = None) -> None:
        """Answer with a status and no content."""
        self.send_response(status)
        self.send_header("Content-Length", "0")
        for header, value in (headers or {}).items():
            self.send_header(header, value)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Log a request if the server is to."""
        if self.server.verbose:
            super().log_message(format, *arguments)

    def _asked_range(self) -> tuple[str, str] | None:
        """First and last byte as the request has them; None for the whole file, which also answers
        several ranges at once and what cannot be understood."""
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        return None if match is None or match.groups() == ("", "") else match.groups()

    def _span(self, size: int) -> tuple[int, int] | None:
        """First byte, and byte behind the last one, that are asked for; None if there are none."""
        asked = self._asked_range()
        if asked is None:
            return 0, size
        first, last = asked
        if not first:
            return (max(size - int(last), 0), size) if int(last) and size else None
        end = min(int(last) + 1 if last else size, size)
        return (int(first), end) if int(first) < end else None

    def _send_body(self, file: Any, begin: int, end: int) -> None:
        file.seek(begin)
        while begin < end and (piece := file.read(min(end - begin, _PIECE))):
            self.wfile.write(piece)
            begin += len(piece)

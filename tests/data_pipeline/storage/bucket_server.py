"""Folders of a disk as buckets of object stores: as much of their protocols as reading takes.

Signatures are not looked at. Fails as a FaultyServer does.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.data_pipeline.storage.faulty_server import Fault, FaultyServer


def listed(folder: Path, prefix: str, delimiter: str) -> tuple[list[str], list[str]]:
    """Keys of a bucket that begin with a prefix, and, in place of those that go on with the
    delimiter, how they begin."""
    keys = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    keys = [key for key in keys if key.startswith(prefix)]
    if not delimiter:
        return keys, []
    rests = [key[len(prefix) :] for key in keys]
    deeper = {prefix + rest.split(delimiter)[0] + delimiter for rest in rests if delimiter in rest}
    found = [k for k, rest in zip(keys, rests, strict=True) if delimiter not in rest]
    return found, sorted(deeper)


class BucketServer(FaultyServer):
    """S3: /BUCKET/KEY is the file KEY of the folder BUCKET.

    Attributes: may_list: False: who asks may not list buckets, nor hear what they do not hold.
    """

    may_list = True

    def answer(self, request: Any) -> None:
        query = parse_qs(urlsplit(request.path).query)
        lists, there = "list-type" in query, (self.folder / request.name).is_file()
        if not self.may_list and (lists or not there):
            self.asked.append((request.name, ""))
            refused(403, "AccessDenied")(request)
        elif lists:
            self._list(request, query.get("prefix", [""])[0], query.get("delimiter", [""])[0])
        elif not there:
            refused(404, "NoSuchKey")(request)
        else:
            super().answer(request)

    def _list(self, request: Any, prefix: str, delimiter: str) -> None:
        folder = self.folder / request.name.strip("/")
        if not folder.is_dir():
            refused(404, "NoSuchBucket")(request)
            return
        found, deeper = listed(folder, prefix, delimiter)
        files = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{(folder / key).stat().st_size}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;x&quot;</ETag>"
            "</Contents>"
            for key in found
        )
        folders = "".join(
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in deeper
        )
        send_xml(
            request,
            200,
            f"<ListBucketResult><KeyCount>{len(found) + len(deeper)}</KeyCount>"
            f"<IsTruncated>false</IsTruncated>{files}{folders}</ListBucketResult>",
        )


class GoogleBucketServer(FaultyServer):
    """Google's JSON protocol: metadata under /storage/v1/b/BUCKET/o/KEY, bytes behind /download."""

    def answer(self, request: Any) -> None:
        parts = urlsplit(request.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        _, _, _, _, bucket, _, *key = parts.path.removeprefix("/download").split("/")
        folder, name = self.folder / bucket, unquote("/".join(key))
        if not folder.is_dir() or (name and not (folder / name).is_file()):
            send_json(request, 404, {"error": {"code": 404, "message": "no such thing"}})
        elif query.get("alt") == "media":
            request.path = f"/{bucket}/{name}"
            super().answer(request)
        elif name:
            send_json(request, 200, self._about(bucket, name))
        else:
            found, deeper = listed(folder, query.get("prefix", ""), query.get("delimiter", ""))
            items = [self._about(bucket, each) for each in found]
            send_json(request, 200, {"items": items, "prefixes": deeper})

    def _about(self, bucket: str, name: str) -> dict[str, str]:
        state = (self.folder / bucket / name).stat()
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(state.st_size),
            "etag": f"{state.st_size:x}-{state.st_mtime_ns:x}",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }


class MachineCredentials:
    """What a machine of Amazon's asks for its credentials; away for the first `failures` times."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Its URL, while it answers."""
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                if service.failures:
                    service.failures -= 1
                    _send(self, 503, "text/plain", "")
                else:
                    self._send_with_ttl("token")

            def do_GET(self) -> None:
                role = self.path.rpartition("/")[2]
                found = {
                    "Code": "Success",
                    "AccessKeyId": "machine",
                    "SecretAccessKey": "hush",
                    "Token": "t",
                    "Expiration": "2099-01-01T00:00:00Z",
                }
                _send(self, 200, "text/plain", json.dumps(found) if role else "role")

            def _send_with_ttl(self, text: str) -> None:
                self.send_response(200)
                self.send_header("x-aws-ec2-metadata-token-ttl-seconds", "300")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args: Any) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            Thread(target=server.serve_forever, daemon=True).start()
            try:
                yield f"http://127.0.0.1:{server.server_port}"
            finally:
                server.shutdown()


def refused(status: int, code: str) -> Fault:
    """An answer with one of S3's codes of errors."""
    return lambda request: send_xml(
        request, status, f"<Error><Code>{code}</Code><Message>no</Message></Error>"
    )


def send_xml(request: Any, status: int, text: str) -> None:
    """Answer with a document (without it where only headers were asked for)."""
    _send(request, status, "application/xml", f'<?xml version="1.0" encoding="UTF-8"?>{text}')


def send_json(request: Any, status: int, content: Any) -> None:
    """Answer with an object."""
    _send(request, status, "application/json", json.dumps(content))


def _send(request: Any, status: int, kind: str, text: str) -> None:
    body = text.encode()
    request.send_response(status)
    request.send_header("Content-Type", kind)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)

"""Folders of a disk as buckets of an object store: as much of S3's protocol as reading takes.

Signatures are not looked at. Fails as a FaultyServer does.
"""

from typing import Any
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

from tests.data_pipeline.faulty_server import Fault, FaultyServer


class BucketServer(FaultyServer):
    """/BUCKET/KEY is the file KEY of the folder BUCKET."""

    def answer(self, request: Any) -> None:
        query = parse_qs(urlsplit(request.path).query)
        if "list-type" in query:
            self._list(request, query.get("prefix", [""])[0], query.get("delimiter", [""])[0])
        elif not (self.folder / request.name).is_file():
            refused(404, "NoSuchKey")(request)
        else:
            super().answer(request)

    def _list(self, request: Any, prefix: str, delimiter: str) -> None:
        folder = self.folder / request.name.strip("/")
        if not folder.is_dir():
            refused(404, "NoSuchBucket")(request)
            return
        keys = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        keys = [key for key in keys if key.startswith(prefix)]
        deeper = {
            prefix + key[len(prefix) :].split(delimiter)[0] + delimiter
            for key in keys
            if delimiter and delimiter in key[len(prefix) :]
        }
        found = [key for key in keys if not any(key.startswith(name) for name in deeper)]
        files = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{(folder / key).stat().st_size}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;x&quot;</ETag>"
            "</Contents>"
            for key in found
        )
        folders = "".join(
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
            for name in sorted(deeper)
        )
        send_xml(
            request, 200,
            f"<ListBucketResult><KeyCount>{len(found) + len(deeper)}</KeyCount>"
            f"<IsTruncated>false</IsTruncated>{files}{folders}</ListBucketResult>",
        )  # fmt: skip


def refused(status: int, code: str) -> Fault:
    """An answer with one of S3's codes of errors."""
    return lambda request: send_xml(
        request, status, f"<Error><Code>{code}</Code><Message>no</Message></Error>"
    )


def send_xml(request: Any, status: int, text: str) -> None:
    """Answer with a document (without it where only headers were asked for)."""
    body = f'<?xml version="1.0" encoding="UTF-8"?>{text}'.encode()
    request.send_response(status)
    request.send_header("Content-Type", "application/xml")
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)

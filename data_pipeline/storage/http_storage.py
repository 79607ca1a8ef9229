"""Files of web servers: ranges over connections that stay open."""

import logging
import random
import socket
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from urllib.parse import urljoin, urlsplit

import urllib3

from data_pipeline.storage.errors import ShardError
from data_pipeline.storage.http_connections import Connections, cause_of, host_of
from data_pipeline.storage.limits import HostLimits
from data_pipeline.storage.locations import without_secrets
from data_pipeline.storage.retry import Interrupted, Retrier, RetryPolicy, repeated, resumed
from data_pipeline.storage.storage import FileState

_PIECE = 1 << 18
_MOST_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_TRANSIENT = (408, 421, 425, 429, 500, 502, 503, 504, 507, 509)
# A signed address may be refused while clocks differ or a proxy renews it; not for long.
_ATTEMPTS_IF_REFUSED = 4
# The name of a host that has not answered yet may be mistyped.
_ATTEMPTS_IF_UNKNOWN = 6
# What is left of an answer is read up to here, so that the connection can be used again.
_LARGEST_REST = 64 * 1024
# How often a file is asked for that has another version than before, until the one before is seen:
# of three mirrors that answer at random, so many looks miss one less than once in 100,000 times.
_LOOKS = 30
_BETWEEN_LOOKS_S = 0.02  # at most; at random, or mirrors in turn could be met in step with others
_CUT_OFF = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)

_NONE: Mapping[str, str] = MappingProxyType({})

_log = logging.getLogger(__name__)


class HttpStorage:
    """A Storage for http and https.

    Redirects are followed; proxies are those of the environment, credentials those of ~/.netrc
    (or $NETRC), authorities those of the system (or $SSL_CERT_FILE, $SSL_CERT_DIR). For any number
    of threads, but not across a fork.
    """

    def __init__(self, retry: RetryPolicy, limits: HostLimits) -> None:
        """`limits` may be shared with other storages."""
        self.retries = 0
        self._retry, self._limits = retry, limits
        self._lock = threading.Lock()
        self.connections = Connections(limits.requests)
        self._mirrored: dict[str, set[str]] = defaultdict(set)
        self.answered: set[tuple[str, str]] = set()
        """(scheme, host and port) of those that did."""

    def state(self, url: str, patient: bool = True) -> FileState:
        """Size and version (entity tag or time of modification), by a request for one byte.

        patient: as in Storage.

        Raises:
            FileNotFoundError, PermissionError, ShardError, TransientReadError
        """
        return repeated(lambda timeout_s: self._state(url, timeout_s, patient), self._retrier(url))

    def read(self, url: str, begin: int, end: int, expected: FileState | None = None) -> bytes:
        """Exactly the bytes [begin, end); errors as `state`, and ShardError if the file changed."""
        return b"".join(self.chunks(url, begin, end, expected))

    def chunks(
        self, url: str, begin: int, end: int, expected: FileState | None = None
    ) -> Iterator[bytes]:
        """The bytes [begin, end) as they arrive, from one version of the file; errors as `read`."""
        seen: list[FileState] = [] if expected is None else [expected]
        return resumed(
            lambda first, last, timeout_s: self._range(url, first, last, timeout_s, seen),
            begin,
            end,
            self._retrier(url),
        )

    def close(self) -> None:
        """Close idle connections."""
        self.connections.close()

    def _retrier(self, url: str) -> Retrier:
        return Retrier(url, self._retry, self._count_retry)

    def _count_retry(self) -> None:
        with self._lock:
            self.retries += 1

    def _state(
        self, url: str, timeout_s: float, patient: bool, headers: Mapping[str, str] = _NONE
    ) -> FileState:
        # By GET: an address that is signed for GET refuses HEAD.
        headers = {"Range": "bytes=0-0", **headers}
        with closing(_Exchange(self, url, headers, timeout_s)) as exchange:
            answer = exchange.answer
            if answer.status == 416 and answer.headers.get("Content-Range") == "bytes */0":
                return FileState(0, _version(answer))
            if answer.status == 403 and not patient:
                shown = without_secrets(url)
                raise PermissionError(f"{shown}: HTTP 403 {answer.reason}: access is refused")
            _raise_for_status(answer, url)
            _, _, total = _content_range(answer, url, 0)
            return FileState(total, _version(answer))

    def _range(
        self, url: str, begin: int, end: int, timeout_s: float, seen: list[FileState]
    ) -> Iterator[bytes]:
        """The bytes [begin, end) by one request; `seen` holds the state of the file once known."""
        headers = {"Range": f"bytes={begin}-{end - 1}"}
        with closing(_Exchange(self, url, headers, timeout_s)) as exchange:
            answer = exchange.answer
            if answer.status == 416:
                raise _too_short(url, begin, end, answer.headers.get("Content-Range", ""))
            _raise_for_status(answer, url)
            first, behind, total = _content_range(answer, url, begin)
            self._check_same(url, FileState(total, _version(answer)), seen, exchange)
            if end > total:
                raise _too_short(url, begin, end, f"bytes */{total}")
            # A server without ranges sends all: good for the beginning of a file.
            if first != begin or behind < end or (behind > end and answer.status != 200):
                raise Interrupted(
                    f"asked for the bytes {begin}-{end - 1}, the server sent {first}-{behind - 1}"
                )
            left = end - begin
            while left:
                piece = exchange.receive(min(left, _PIECE))
                left -= len(piece)
                yield piece

    def _check_same(
        self, url: str, found: FileState, seen: list[FileState], exchange: "_Exchange"
    ) -> None:
        """Compare with what is known of the file; what is seen first is what later answers must be.

        Mirrors of one file may have versions of their own. If both are told in turn, sums decide.
        """
        if not seen:
            seen.append(found)
        known = seen[0]
        if not known.version:
            known = seen[0] = FileState(known.size, found.version)
        if known.size == found.size:
            if not found.version or known.version == found.version:
                return
            with self._lock:
                if {known.version, found.version} <= self._mirrored[url]:
                    return
            exchange.close()  # or there may be no place for another request
            if self._is_mirrored(url, known, found):
                raise Interrupted("the server tells two versions of the file in turn")
        raise ShardError(
            f"{without_secrets(url)}: was replaced: it has {found.size} bytes and version "
            f"{found.version or '?'}, expected were {known.size} and {known.version or '?'}. "
            "Restore it, or begin a new run"
        )

    def _is_mirrored(self, url: str, known: FileState, found: FileState) -> bool:
        """Whether the server tells both versions in turn."""
        if not any(self._look(url) == known for _ in range(_LOOKS)):
            return False
        with self._lock:
            self._mirrored[url] |= {known.version, found.version}
        _log.warning(
            "%s: two versions in turn, %s and %s, of the same size: mirrors? They are taken for "
            "one file; the checksums of its index tell if they are not",
            without_secrets(url),
            known.version,
            found.version,
        )
        return True

    def _look(self, url: str) -> FileState:
        """`state` by another connection than the next one: an open one may lead to one mirror."""
        time.sleep(random.uniform(0.0, _BETWEEN_LOOKS_S))
        headers = {"Connection": "close"}
        return repeated(lambda s: self._state(url, s, True, headers), self._retrier(url))

    @property
    def limits(self) -> HostLimits:
        """What this process may ask of a host."""
        return self._limits


class _Exchange:
    """One request, redirects included, and its answer; holds a place at its host until closed."""

    def __init__(
        self, storage: HttpStorage, url: str, headers: dict[str, str], timeout_s: float
    ) -> None:
        self._storage, self._timeout_s = storage, timeout_s
        self._place = ExitStack()
        self.answer: urllib3.BaseHTTPResponse
        at = url
        try:
            for _ in range(_MOST_REDIRECTS + 1):
                self._request(at, headers)
                storage.answered.add(self._key)
                target = self.answer.headers.get("Location")
                if self.answer.status not in _REDIRECTS or not target:
                    return
                self.close()
                at = _redirected(at, target)
        except urllib3.exceptions.HTTPError as error:
            self._place.close()
            raise self._fault(url, error) from cause_of(error)
        except BaseException:
            self._place.close()
            raise
        raise ShardError(f"{without_secrets(url)}: more than {_MOST_REDIRECTS} redirects")

    def _fault(self, url: str, error: urllib3.exceptions.HTTPError) -> Exception:
        """Sort requests without an answer into what may heal and what will not."""
        shown, host, cause = without_secrets(url), self._key[1], cause_of(error)
        if isinstance(error, urllib3.exceptions.LocationValueError):
            return ShardError(f"{shown}: is no valid URL")  # the error's own text has the query
        if isinstance(cause, ssl.SSLCertVerificationError):
            return PermissionError(
                f"{shown}: the certificate of {host} is not accepted ({cause.verify_message}). If "
                "it is to be trusted, name a file with the certificates of its authority: "
                "SSL_CERT_FILE=FILE"
            )
        text = f"{type(cause).__name__}: {cause}"
        if isinstance(error, urllib3.exceptions.ProxyError):
            text = f"no connection to the proxy of the environment: {text}"
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, _CUT_OFF):
            refused = PermissionError(f"{shown}: no https with {host}: {cause}")
            return Interrupted(text, attempts=_ATTEMPTS_IF_REFUSED, otherwise=refused)
        nameless = isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME
        if nameless and self._key not in self._storage.answered:
            return Interrupted(text, attempts=_ATTEMPTS_IF_UNKNOWN)
        return Interrupted(text)

    def receive(self, size: int) -> bytes:
        """At least one and at most `size` bytes of the answer."""
        try:
            piece = self.answer.read1(size)
        except urllib3.exceptions.HTTPError as error:
            cause = cause_of(error)
            raise Interrupted(f"{type(cause).__name__}: {cause}") from cause
        if not piece:
            raise Interrupted("the server closed the connection before the end of its answer")
        self._storage.limits.received(self._key[1], len(piece))
        return piece

    def close(self) -> None:
        """Give the connection back if it can be used again, and the place in any case."""
        rest = self.answer.length_remaining
        if rest is not None and rest <= _LARGEST_REST:
            self.answer.drain_conn()
            self.answer.release_conn()
        else:
            self.answer.close()
        self._place.close()

    def _request(self, url: str, headers: dict[str, str]) -> None:
        parts = urlsplit(url)
        self._key = parts.scheme, host_of(parts)
        self._place.enter_context(self._storage.limits.request(self._key[1]))
        self.answer = self._storage.connections.get(url, headers, self._timeout_s)


def _redirected(url: str, target: str) -> str:
    """Where a redirect leads to."""
    new = urljoin(url, target)
    if urlsplit(new).scheme != "https" and new.split("://")[0] != urlsplit(url).scheme:
        raise ShardError(
            f"{without_secrets(url)}: is redirected to {without_secrets(new)}, which leaves https"
        )
    return new


def _raise_for_status(answer: urllib3.BaseHTTPResponse, url: str) -> None:
    """Sort answers that hold no data into what may heal and what will not."""
    status, shown = answer.status, without_secrets(url)
    if status in (200, 206):
        return
    text = f"HTTP {status} {answer.reason}"
    if status in (404, 410):
        raise FileNotFoundError(f"{shown}: {text}: there is no such file on the server")
    if status in _TRANSIENT or status > 511:
        raise Interrupted(text, retry_after_s=_retry_after(answer))
    # Some stores answer 400 where a signature is out of date: that says nothing about the data.
    refused = PermissionError(
        f"{shown}: {text}: the server refuses access, also at {_ATTEMPTS_IF_REFUSED} attempts. "
        "Is a signature in the URL out of date, or an entry missing in ~/.netrc?"
    )
    raise Interrupted(text, attempts=_ATTEMPTS_IF_REFUSED, otherwise=refused)


def _retry_after(answer: urllib3.BaseHTTPResponse) -> float:
    """Seconds that the server asks to wait; 0 if it says nothing that can be understood."""
    value = answer.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return 0.0


def _content_range(answer: urllib3.BaseHTTPResponse, url: str, begin: int) -> tuple[int, int, int]:
    """First byte, byte behind the last, and size of the file, as the answer has them."""
    shown = without_secrets(url)
    if _encoded(answer):
        raise ShardError(
            f"{shown}: the server sends it compressed ({answer.headers['Content-Encoding']}), so "
            "that bytes cannot be addressed"
        )
    length = answer.headers.get("Content-Length", "")
    if answer.status == 200:
        if begin == 0 and length.isdigit():
            return 0, int(length), int(length)
        raise Interrupted(
            "the server sent the whole file in place of a range",
            attempts=_ATTEMPTS_IF_REFUSED,
            otherwise=ShardError(
                f"{shown}: the server does not answer byte ranges; copy the shard, or read it as a "
                "stream (data.stream)"
            ),
        )
    try:
        unit, _, rest = answer.headers["Content-Range"].partition(" ")
        span, total = rest.split("/")
        first, last = map(int, span.split("-"))
        if unit != "bytes" or last < first:
            raise ValueError
        return first, last + 1, int(total)
    except (TypeError, ValueError, KeyError, AttributeError):
        raise Interrupted(
            f"an answer with Content-Range {answer.headers.get('Content-Range')!r}"
        ) from None


def _too_short(url: str, begin: int, end: int, content_range: str) -> ShardError:
    total = content_range.rpartition("/")[2]
    return ShardError(
        f"{without_secrets(url)}: has {total or 'fewer'} bytes, the bytes {begin}-{end - 1} are "
        "not there: truncated or replaced"
    )


def _version(answer: urllib3.BaseHTTPResponse) -> str:
    """ETag or time of change; weak tags are as good here, since bytes have their own sums."""
    tag = answer.headers.get("ETag", "").strip().removeprefix("W/")
    return tag or answer.headers.get("Last-Modified") or ""


def _encoded(answer: urllib3.BaseHTTPResponse) -> bool:
    return answer.headers.get("Content-Encoding", "identity") != "identity"

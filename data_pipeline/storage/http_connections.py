"""Connections to web servers, through the proxies and with the credentials of the environment."""

import base64
import functools
import http.client
import netrc
import os
import ssl
import urllib.request
from typing import Any, NamedTuple
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

# Left as they are in a path: what may stand in one, and what is escaped already.
_IN_PATHS = "/%!$&'()*+,;=:@~-._"


class Connection(NamedTuple):
    """A connection and how to ask it."""

    client: http.client.HTTPConnection
    headers: dict[str, str]
    """For every request."""
    whole_urls: bool
    """Whether it leads to a proxy that wants URLs in place of paths."""

    def get(self, url: str, headers: dict[str, str], timeout_s: float) -> http.client.HTTPResponse:
        """Ask for `url`; the answer's body is not read yet.

        Raises OSError, http.client.HTTPException.
        """
        self.client.timeout = timeout_s
        if self.client.sock is not None:
            self.client.sock.settimeout(timeout_s)
        parts = urlsplit(url)
        path = quote(parts.path or "/", safe=_IN_PATHS)
        place = (parts.scheme, host_of(parts)) if self.whole_urls else ("", "")
        self.client.request(
            "GET", urlunsplit((*place, path, parts.query, "")), headers=headers | self.headers
        )
        return self.client.getresponse()

    def close(self) -> None:
        """Close it."""
        self.client.close()


def host_of(parts: SplitResult) -> str:
    """Host and port of a URL, without user name and password."""
    return parts.netloc.rsplit("@", 1)[-1]


def open_connection(parts: SplitResult, timeout_s: float) -> Connection:
    """A connection for URLs of one scheme and host; it connects with the first request.

    Args:
        parts: of the URL.
        timeout_s: seconds of silence until it fails with TimeoutError.
    """
    secure = parts.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    options: dict[str, Any] = {"timeout": timeout_s} | ({"context": _tls()} if secure else {})
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or urllib.request.proxy_bypass(host_of(parts)):
        return Connection(kind(parts.hostname or "", parts.port, **options), {}, False)
    through = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    client = kind(through.hostname or "", through.port or 80, **options)
    allowed = _basic(through.username, through.password)
    headers = {"Proxy-Authorization": allowed} if allowed else {}
    if not secure:
        return Connection(client, headers, True)
    client.set_tunnel(parts.hostname or "", parts.port or 443, headers)
    return Connection(client, {}, False)


def authorization(parts: SplitResult) -> dict[str, str]:
    """The Authorization header for a URL: its own user name, or the entry of ~/.netrc."""
    own = _basic(parts.username, parts.password) or _from_netrc(parts.hostname or "")
    return {"Authorization": own} if own else {}


@functools.cache
def _from_netrc(host: str) -> str:
    path = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    try:
        found = netrc.netrc(path).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return ""
    return _basic(found[0], found[2]) if found else ""


def _basic(user: str | None, password: str | None) -> str:
    if not user:
        return ""
    text = f"{unquote(user)}:{unquote(password or '')}"
    return "Basic " + base64.b64encode(text.encode()).decode()


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()

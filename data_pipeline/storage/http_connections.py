"""Connections to web servers, through the proxies and with the credentials of the environment."""

import functools
import http.client
import logging
import netrc
import os
import re
import ssl
import threading
import urllib.request
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

import urllib3

# Left as they are in a path or a query, beside letters and digits; "%" begins what is escaped
# already, and urllib3 would escape all of them again if one began nothing.
_AS_THEY_ARE = "/%!$&'()*+,;=:@~-._?"
_STRAY_PERCENT = re.compile("%(?![0-9a-fA-F]{2})")
# Hosts whose connections are kept. Redirects may lead to many.
_MOST_HOSTS = 64


class Connections:
    """Connections that stay open. For any number of threads, but not across a fork."""

    def __init__(self, at_a_time: int) -> None:
        """Nothing is opened before it is used; `at_a_time` connections of a host are kept."""
        self._at_a_time = at_a_time
        self._lock = threading.Lock()
        self._by_proxy: dict[str, urllib3.PoolManager] = {}
        # Its warnings hold whole URLs, and queries of URLs are secrets.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)

    def get(self, url: str, headers: dict[str, str], timeout_s: float) -> urllib3.BaseHTTPResponse:
        """One answer to one request for `url`, its body not read yet.

        Raises urllib3.exceptions.HTTPError; PermissionError for a proxy of an unknown kind.
        """
        parts = urlsplit(url)
        path, query = _escaped(parts.path) or "/", _escaped(parts.query)
        ask = functools.partial(
            self._pools(parts).request,
            "GET",
            urlunsplit((parts.scheme, host_of(parts), path, query, "")),
            headers={"User-Agent": "omnipretrain"} | _authorization(parts) | headers,
            timeout=urllib3.Timeout(connect=timeout_s, read=timeout_s),
            retries=False,
            preload_content=False,
            decode_content=False,
        )
        try:
            return ask()
        except urllib3.exceptions.ProtocolError as error:
            # A server may close a connection for its age while the request is on its way.
            if not isinstance(cause_of(error), ConnectionError | http.client.BadStatusLine):
                raise
            return ask()

    def close(self) -> None:
        """Close those that nobody uses."""
        with self._lock:
            for pools in self._by_proxy.values():
                pools.clear()

    def _pools(self, parts: SplitResult) -> urllib3.PoolManager:
        """Those that go through the proxy of a URL, or through none."""
        proxy = urllib.request.getproxies().get(parts.scheme, "")
        if proxy and urllib.request.proxy_bypass(host_of(parts)):
            proxy = ""
        with self._lock:
            if proxy not in self._by_proxy:
                self._by_proxy[proxy] = self._through(proxy, parts.scheme)
            return self._by_proxy[proxy]

    def _through(self, proxy: str, kind: str) -> urllib3.PoolManager:
        options = {"num_pools": _MOST_HOSTS, "maxsize": self._at_a_time, "ssl_context": self._tls}
        if not proxy:
            return urllib3.PoolManager(**options)
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        bare = f"{parts.scheme}://{host_of(parts)}"
        try:
            return urllib3.ProxyManager(
                bare,
                proxy_headers=_basic("proxy-authorization", parts.username, parts.password),
                proxy_ssl_context=self._tls,
                **options,
            )
        except urllib3.exceptions.LocationValueError:
            raise PermissionError(
                f"the proxy of the environment, {bare}, is none for http: unset {kind}_proxy, or "
                "set it to http://HOST:PORT or https://HOST:PORT"
            ) from None

    @functools.cached_property
    def _tls(self) -> ssl.SSLContext:
        # One for all: reading the authorities of the system takes longer than a request.
        return ssl.create_default_context()


def host_of(parts: SplitResult) -> str:
    """Host and port of a URL, without user name and password."""
    return parts.netloc.rsplit("@", 1)[-1]


def cause_of(error: BaseException) -> BaseException:
    """What the system, TLS or the protocol said, below what urllib3 wraps it in."""
    while isinstance(error, urllib3.exceptions.HTTPError):
        below = error.__cause__ or error.__context__
        if below is None:
            break
        error = below
    return error


def _escaped(text: str) -> str:
    return _STRAY_PERCENT.sub("%25", quote(text, safe=_AS_THEY_ARE))


def _authorization(parts: SplitResult) -> dict[str, str]:
    """The header for a URL: by its own user name, or by the entry of ~/.netrc."""
    own = _basic("authorization", parts.username, parts.password)
    return own or _from_netrc(parts.hostname or "")


@functools.cache
def _from_netrc(host: str) -> dict[str, str]:
    path = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    try:
        found = netrc.netrc(path).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return {}
    return _basic("authorization", found[0], found[2]) if found else {}


def _basic(header: str, user: str | None, password: str | None) -> dict[str, str]:
    if not user:
        return {}
    # urllib3 writes latin-1, servers of today read UTF-8.
    text = f"{unquote(user)}:{unquote(password or '')}".encode().decode("latin-1")
    return {header: urllib3.make_headers(basic_auth=text)["authorization"]}

"""Paths and URLs of shards, taken apart the same way.

A query (`?sig=...`) belongs to the server, not to the name: the files beside a shard are asked for
with the same query, and messages never show it, since signatures and tokens stand there.
"""

import functools
import os
import re
from urllib.parse import urlsplit, urlunsplit

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")


def is_url(path: str) -> bool:
    """Whether `path` is a URL (scheme://...) and not a path of this machine."""
    return _SCHEME.match(path) is not None


def scheme(url: str) -> str:
    """What stands before `://`, in lower case."""
    return url.split("://", 1)[0].lower()


def base_name(path: str) -> str:
    """File name without folders and query."""
    return os.path.basename(_path_of(path) if is_url(path) else path)


def folder_of(path: str) -> str:
    """The folder that a file lies in; a URL keeps its query."""
    if not is_url(path):
        return os.path.dirname(path)
    return _with_path(path, _path_of(path).rsplit("/", 1)[0])


def inside(folder: str, name: str) -> str:
    """The file `name` in `folder`; a URL keeps its query."""
    if not is_url(folder):
        return os.path.join(folder, name)
    return _with_path(folder, f"{_path_of(folder).rstrip('/')}/{name}")


def beside(path: str, suffix: str) -> str:
    """`path` with a suffix behind its name; a URL keeps its query."""
    return _with_path(path, _path_of(path) + suffix) if is_url(path) else path + suffix


@functools.lru_cache(maxsize=4096)  # every sample that is read names its shard
def without_secrets(path: str) -> str:
    """A URL without user name, password, query values and fragment, for messages and names."""
    if not is_url(path):
        return path
    start, rest = path.split("://", 1)
    rest, query, _ = rest.split("#", 1)[0].partition("?")
    host, slash, name = rest.partition("/")
    return f"{start}://{host.rsplit('@', 1)[-1]}{slash}{name}" + ("?..." if query else "")


def identity(url: str) -> str:
    """What names the file itself: the URL without credentials and query."""
    return without_secrets(url).removesuffix("?...")


def _path_of(url: str) -> str:
    """Host and path: schemes of object stores have no host in the sense of a network."""
    if scheme(url) in ("http", "https"):
        return urlsplit(url).path
    return url.split("://", 1)[1]


def _with_path(url: str, path: str) -> str:
    if scheme(url) in ("http", "https"):
        return urlunsplit(urlsplit(url)._replace(path=path))
    return f"{url.split('://', 1)[0]}://{path}"

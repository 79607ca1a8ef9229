"""Files of object stores and everything else that fsspec has a driver for."""

import errno
import threading
import time
from collections.abc import Iterator
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.exceptions import FSTimeoutError

from data_pipeline.storage.errors import ShardError
from data_pipeline.storage.limits import HostLimits
from data_pipeline.storage.locations import without_secrets
from data_pipeline.storage.retry import Interrupted, Patience, RetryPolicy, repeated, resumed
from data_pipeline.storage.storage import FileState

_PIECE = 1 << 20
# Bytes of one request of `chunks`: drivers return a range as a whole.
_REQUEST = 8 << 20
_DRIVERS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "hf": "huggingface_hub",
    "oss": "ossfs",
    "webhdfs": "requests",
    "hdfs": "pyarrow",
    "sftp": "paramiko",
    "ssh": "paramiko",
}
_VERSIONS = (
    "ETag",
    "etag",
    "version_id",
    "md5Hash",
    "content_md5",
    "LastModified",
    "last_modified",
    "mtime",
    "modified",
    "updated",
    "created",
)
# What a server says about itself and not about the file, in errors of a driver's own kind.
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
# And what it says about the request (a wrong region, a token that is none), which drivers put into
# errors of the system's kind.
_NEVER_HEALS = {
    number
    for name in ("EINVAL", "ENOSYS", "ENAMETOOLONG", "EMSGSIZE", "EREMCHG", "EOPNOTSUPP")
    if (number := getattr(errno, name, None))
}
# Refused access may heal (clocks, tokens being renewed, a service of credentials that is away), and
# so may errors of a driver's own kind, which cannot be told from wrong settings: neither is tried
# for long.
_ATTEMPTS_IF_UNCLEAR = 5
_RENEW_S = 60.0


class FsspecStorage:
    """A Storage for the URLs of one fsspec driver, which finds credentials by itself.

    A driver has time-outs and attempts of its own, which `retries` does not count. Those that are
    asynchronous, as the ones of object stores are, are ended at the deadline; with others it holds
    between attempts. For any number of threads, but not across a fork.
    """

    def __init__(self, protocol: str, retry: RetryPolicy, limits: HostLimits) -> None:
        """Load the driver of URLs that begin with `protocol://`.

        Raises:
            ShardError: there is no such driver; the text has the command that installs it.
        """
        self.retries = 0
        self._retry, self._limits = retry, limits
        self._lock = threading.Lock()
        self._renew_at = 0.0
        _check_driver(protocol)

    def state(self, url: str, patient: bool = True) -> FileState:
        """Size and version; FileNotFoundError, PermissionError, ShardError, TransientReadError.

        patient: as in Storage.
        """
        patience = self._patience(url)
        return repeated(lambda _: self._state(url, patience.left_s, patient), patience)

    def read(self, url: str, begin: int, end: int, expected: FileState | None = None) -> bytes:
        """Exactly the bytes [begin, end); errors as `state`, and ShardError if the file changed."""
        return b"".join(self.chunks(url, begin, end, expected))

    def chunks(
        self, url: str, begin: int, end: int, expected: FileState | None = None
    ) -> Iterator[bytes]:
        """The bytes [begin, end) in pieces; errors as `read`.

        Drivers do not say which version a range is of, so the state is asked before and, after
        more than one request, behind them.
        """
        patience = self._patience(url)
        expected = self._same(url, expected)
        if end > expected.size:
            raise ShardError(
                f"{without_secrets(url)}: has {expected.size} bytes, the bytes {begin}-{end - 1} "
                "are not there: truncated or replaced"
            )
        yield from resumed(
            lambda first, last, _: self._range(url, first, last, patience), begin, end, patience
        )
        if end - begin > _REQUEST:
            self._same(url, expected)

    def glob(self, pattern: str) -> list[str]:
        """URLs that match a pattern, sorted; errors as `state`."""
        return repeated(lambda _: sorted(self._call(pattern, "glob")), self._patience(pattern))

    def _patience(self, url: str) -> Patience:
        return Patience(url, self._retry, self._count_retry)

    def _count_retry(self) -> None:
        with self._lock:
            self.retries += 1

    def _same(self, url: str, expected: FileState | None) -> FileState:
        """The state of the file now; ShardError if it is not the expected one."""
        found = self.state(url)
        if expected is None:
            return found
        changed = expected.version and found.version and expected.version != found.version
        if expected.size != found.size or changed:
            raise ShardError(
                f"{without_secrets(url)}: was replaced: it has {found.size} bytes and version "
                f"{found.version or '?'}, expected were {expected.size} and "
                f"{expected.version or '?'}. Restore it, or begin a new run"
            )
        return found

    def _state(self, url: str, timeout_s: float, patient: bool) -> FileState:
        info = self._call(url, "info", timeout_s, patient)
        if info.get("type") == "directory" or info.get("size") is None:
            raise FileNotFoundError(f"{without_secrets(url)}: is not a file")
        version = next((info[name] for name in _VERSIONS if info.get(name)), "")
        return FileState(int(info["size"]), str(version))

    def _range(self, url: str, begin: int, end: int, patience: Patience) -> Iterator[bytes]:
        while begin < end:
            stop = min(begin + _REQUEST, end)
            data = self._call(url, "cat_file", patience.left_s, start=begin, end=stop)
            if len(data) > stop - begin:
                raise Interrupted(f"asked for {stop - begin} bytes, the driver gave {len(data)}")
            for at in range(0, len(data), _PIECE):
                yield data[at : at + _PIECE]
            begin += len(data)
            if begin < stop:
                return  # `resumed` asks again from here

    def _call(
        self,
        url: str,
        method: str,
        timeout_s: float | None = None,
        patient: bool = True,
        **options: int,
    ) -> Any:
        """Ask the driver; sort its errors into what may heal and what will not."""
        shown = without_secrets(url)
        host = shown.split("://", 1)[1].split("/", 1)[0]
        filesystem = None
        try:
            with self._limits.request(host):
                # Driver instances are kept by fsspec, one for each set of options in the URL.
                filesystem, path = fsspec.core.url_to_fs(url)
                if method in ("info", "glob"):
                    filesystem.invalidate_cache()  # listings may be old
                if timeout_s is not None and isinstance(filesystem, AsyncFileSystem):
                    call = getattr(filesystem, f"_{method}")
                    found = sync(filesystem.loop, call, path, timeout=timeout_s, **options)
                else:
                    found = getattr(filesystem, method)(path, **options)
                if method == "glob":
                    found = [filesystem.unstrip_protocol(name) for name in found]
                if method == "cat_file":
                    self._limits.received(host, len(found))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise FileNotFoundError(f"{shown}: there is no such file") from error
        except FSTimeoutError as error:  # ours, at the deadline
            raise Interrupted(f"the driver came to no end in {timeout_s:.1f} s") from error
        except Exception as error:
            refused = _refusal(error)
            if not patient and (_denied(error) or _code(error) == 403):
                raise PermissionError(f"{shown}: {refused}") from error
            if refused and filesystem is not None:
                self._renew(filesystem, error)
            raise Interrupted(
                f"{type(error).__name__}: {_in_a_line(error)}",
                attempts=None if _heals(error) else _ATTEMPTS_IF_UNCLEAR,
                otherwise=PermissionError(f"{shown}: {refused}") if refused else None,
            ) from error
        return found

    def _renew(self, filesystem: fsspec.AbstractFileSystem, error: Exception) -> None:
        """Let the driver look for credentials anew: its instances keep those that they found, or
        that there were none."""
        now = time.monotonic()
        with self._lock:
            # Some stores refuse what is not there, file after file; an instance costs a second.
            if isinstance(error, OSError) and now < self._renew_at:
                return
            self._renew_at = now + _RENEW_S
        filesystem.clear_instance_cache()


def _refusal(error: Exception) -> str:
    """What to say if a driver means that access is refused; "" if it means something else."""
    text = f"access is refused: {_in_a_line(error)}"
    if _denied(error):
        return text
    if "Credential" in type(error).__name__ or _code(error) in (401, 403):
        return (
            f"{text} ({type(error).__name__}). The driver looks for credentials as its "
            "documentation says, for s3:// in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "~/.aws and what the machine may use; for public data of s3:// set FSSPEC_S3_ANON=true"
        )
    return ""


def _denied(error: Exception) -> bool:
    """Whether a driver says so by an error of the system's kind."""
    # gcsfs raises an OSError of this text.
    by_text = type(error) is OSError and str(error).startswith("Forbidden")
    return isinstance(error, PermissionError) or by_text


def _heals(error: Exception) -> bool:
    """Whether it is worth while to ask again until the deadline."""
    if isinstance(error, OSError):  # time-outs of the driver's own, too
        return not _refusal(error) and error.errno not in _NEVER_HEALS
    return _code(error) in _TRANSIENT


def _code(error: Exception) -> int | None:
    """Of the server's answer, where a driver's own kind of error has it."""
    return getattr(error, "status_code", getattr(error, "code", None))


def _in_a_line(error: Exception) -> str:
    """What drivers say, without the lines that some of them break it into."""
    return " ".join(str(error).split())


def _check_driver(protocol: str) -> None:
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package = _DRIVERS.get(protocol)
        how = f"`pip install {package}`" if package else str(error)
        raise ShardError(f"{protocol}:// needs a driver that is not installed: {how}") from error
    except ValueError as error:  # fsspec does not know the protocol
        raise ShardError(
            f"{protocol}:// is not a kind of storage that is known: {error}"
        ) from error

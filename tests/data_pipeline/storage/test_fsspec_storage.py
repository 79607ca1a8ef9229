"""Files of any fsspec driver: faults that heal change nothing, those that stay end with their
reason."""

import errno

import fsspec
import pytest

from data_pipeline.reading.reader import SampleReader
from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.storage.errors import ShardError
from data_pipeline.storage.fsspec_storage import FsspecStorage
from data_pipeline.storage.limits import HostLimits
from data_pipeline.storage.remote import RemoteSettings
from data_pipeline.storage.retry import RetryPolicy
from data_pipeline.storage.storage import FileState, TransientReadError
from tests.data_pipeline.small_shards import sample, write_shards

CONTENT = bytes(range(256)) * 100_000


class FlakyFiles(fsspec.AbstractFileSystem):
    """A driver whose calls fail as it is told."""

    protocol = "flaky"
    files: dict = {}  # noqa: RUF012
    faults: list = []  # noqa: RUF012
    calls: list = []  # noqa: RUF012
    tag = "v1"

    def info(self, path, **options):
        self._fail("info")
        if path not in self.files:
            raise FileNotFoundError(path)
        size = len(self.files[path])
        return {"name": path, "size": size, "type": "file", "ETag": type(self).tag}

    def cat_file(self, path, start=None, end=None, **options):
        short = self._fail("cat")
        data = self.files[path][start:end]
        return data[: len(data) // 2] if short else data

    def ls(self, path, detail=True, **options):
        return []

    def _fail(self, what):
        self.calls.append(what)
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        return fault


@pytest.fixture
def flaky():
    fsspec.register_implementation("flaky", FlakyFiles, clobber=True)
    FlakyFiles.files = {"bucket/x.tar": CONTENT}
    FlakyFiles.faults, FlakyFiles.calls, FlakyFiles.tag = [], [], "v1"
    return FlakyFiles


def storage(deadline_s=5.0) -> FsspecStorage:
    return FsspecStorage("flaky", RetryPolicy(deadline_s, 5.0, 0.001, 0.01), HostLimits())


def test_ranges(flaky):
    url = "flaky://bucket/x.tar"
    state = storage().state(url)
    assert state == FileState(len(CONTENT), "v1")
    assert storage().read(url, 10, 99, state) == CONTENT[10:99]
    pieces = list(storage().chunks(url, 1, len(CONTENT), state))
    assert b"".join(pieces) == CONTENT[1:] and max(map(len, pieces)) <= 1 << 20


def test_bytes_are_booked_and_questions_are_not(flaky, monkeypatch):
    limits, booked = HostLimits(), []
    monkeypatch.setattr(limits, "received", lambda host, count: booked.append((host, count)))
    files = FsspecStorage("flaky", RetryPolicy(5.0, 5.0, 0.001, 0.01), limits)
    assert files.read("flaky://bucket/x.tar", 0, 10_000_000) == CONTENT[:10_000_000]
    assert booked == [("bucket", 1 << 23), ("bucket", 10_000_000 - (1 << 23))]


@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.EIO, "flaky"),
        TimeoutError("late"),
        ConnectionResetError("reset"),
        PermissionError("clock skew"),
        RuntimeError("of the driver"),
    ],
)
def test_faults_that_heal_change_nothing(flaky, fault):
    files = storage()
    flaky.faults = [fault, fault, None, fault, "short", fault]
    assert files.read("flaky://bucket/x.tar", 5, 20_000_005) == CONTENT[5:20_000_005]
    assert files.retries == 5


class ErrorOfADriver(Exception):
    """As those of Azure's and Google's."""

    status_code = 429


def test_servers_that_are_busy_for_long_are_waited_for(flaky):
    files = storage()
    flaky.faults = [ErrorOfADriver("too many")] * 20
    assert files.read("flaky://bucket/x.tar", 0, 9) == CONTENT[:9]
    assert files.retries == 20


def test_faults_that_stay(flaky):
    url = "flaky://bucket/x.tar"
    flaky.faults = [PermissionError("no")] * 99
    with pytest.raises(PermissionError, match=r"flaky://bucket/x\.tar: access is refused: no"):
        storage().read(url, 0, 9)
    assert len(flaky.calls) == 5
    flaky.faults = [RuntimeError("no\n  credentials")] * 99
    with pytest.raises(TransientReadError, match=r"RuntimeError: no credentials .tried 5 times"):
        storage().read(url, 0, 9)
    flaky.faults = [OSError(errno.EIO, "away")] * 9999
    with pytest.raises(TransientReadError, match=r"x\.tar: OSError: .*away .*deadline 0\.1 s"):
        storage(0.1).read(url, 0, 9)
    flaky.faults = []
    with pytest.raises(FileNotFoundError, match=r"flaky://bucket/y\.tar: there is no such file"):
        storage().state("flaky://bucket/y.tar")


class NoCredentialsError(Exception):
    """As that of Amazon's."""


class HttpError(Exception):
    """As that of Google's."""

    code = 401


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (NoCredentialsError("none"), r"refused: none \(NoCredentialsE.* FSSPEC_S3_ANON=true"),
        (HttpError("who are you"), r"refused: who are you \(HttpError\)\..* documentation"),
        (OSError("Forbidden: b/x\nyou may not"), r"refused: Forbidden: b/x you may not$"),
    ],
)
def test_who_is_refused_is_told_so_and_soon(flaky, fault, text):
    flaky.faults = [fault] * 99
    with pytest.raises(PermissionError, match=r"flaky://bucket/x\.tar: access is " + text):
        storage().read("flaky://bucket/x.tar", 0, 9)
    assert len(flaky.calls) == 5
    flaky.faults = [fault] * 99
    quick = RemoteSettings(retry_first_wait_s=0.001, retry_longest_wait_s=0.01)
    with pytest.raises(PermissionError, match=r"bucket/set/manifest\.json: access is refused"):
        ShardSet.open("flaky://bucket/set", quick)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EREMCHG])
def test_a_request_that_is_wrong_is_not_repeated_for_minutes(flaky, number):
    """What s3fs makes of a token that is none, or of a bucket in another region."""
    flaky.faults = [OSError(number, "of the request")] * 99
    with pytest.raises(TransientReadError, match=r"OSError: .* of the request .tried 5 times"):
        storage().read("flaky://bucket/x.tar", 0, 9)
    assert len(flaky.calls) == 5


def test_credentials_that_come_late_are_found(flaky):
    """Drivers keep those with which they began, and also that there were none."""

    class WithCredentials(FlakyFiles):
        protocol = "flaky"
        there, began = False, 0

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.found = type(self).there
            type(self).began += 1

        def info(self, path, **options):
            type(self).there = True  # the service comes back
            if not self.found:
                raise NoCredentialsError
            return super().info(path, **options)

    fsspec.register_implementation("flaky", WithCredentials, clobber=True)
    files = storage()
    assert files.read("flaky://bucket/x.tar", 5, 9) == CONTENT[5:9]
    assert files.retries == 1 and WithCredentials.began == 2
    # A store that refuses what is not there, file after file, does not cost an instance for each.
    flaky.faults = [PermissionError("no")] * 99
    for name in "abc":
        with pytest.raises(PermissionError):
            files.state(f"flaky://bucket/{name}.tar")
    assert WithCredentials.began == 2
    files = storage()
    with pytest.raises(PermissionError):
        files.state("flaky://bucket/a.tar")
    assert files.retries == 4 and WithCredentials.began == 3


def test_a_file_that_changes_is_named(flaky):
    url, files = "flaky://bucket/x.tar", storage()
    state = files.state(url)
    pieces = files.chunks(url, 0, len(CONTENT), state)
    next(pieces)
    flaky.tag = "v2"
    with pytest.raises(ShardError, match=r"bucket/x\.tar: was replaced: .* version v2, .* and v1"):
        list(pieces)
    with pytest.raises(ShardError, match="was replaced"):
        files.read(url, 0, 9, state)
    with pytest.raises(ShardError, match=r"the bytes 0-25600000 are not there"):
        files.read(url, 0, len(CONTENT) + 1)


def test_missing_drivers_say_how_to_get_them():
    for url, text in (
        ("s3://b/x.tar", "pip install s3fs"),
        ("gs://b/x.tar", "pip install gcsfs"),
        ("az://b/x.tar", "pip install adlfs"),
        ("nonsense://b/x.tar", "nonsense:// is not a kind of storage"),
    ):
        try:
            fsspec.get_filesystem_class(url.split(":")[0])
        except (ImportError, ValueError):
            with pytest.raises(ShardError, match=text):
                ShardSet.open(url)


def test_shards_of_any_driver(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path / "cache"))
    local = write_shards(tmp_path / "set", 10, 4)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "set"), "/shelf", recursive=True)
    try:
        for specs in (
            "memory://shelf",
            "memory://shelf/train-00000{0..2}.tar",
            "memory://shelf/*.tar",
            f"file://{tmp_path}/set",
        ):
            opened = ShardSet.open(specs)
            assert opened.fingerprint == local.fingerprint
        memory.rm("/shelf/manifest.json")
        opened = ShardSet.open("memory://shelf")
        assert opened.fingerprint == local.fingerprint
        assert SampleReader(opened).read(7).members == sample(7)[1]
        memory.pipe("/shelf/packing.json", b"{}")
        with pytest.raises(ShardError, match="memory://shelf: its packing was not finished"):
            ShardSet.open("memory://shelf")
        with pytest.raises(FileNotFoundError, match=r"memory://shelf/y-\*\.tar: no file matches"):
            ShardSet.open("memory://shelf/y-*.tar")
    finally:
        memory.rm("/shelf", recursive=True)

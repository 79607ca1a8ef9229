"""Object stores with their real drivers, against servers of our own and, for s3, against moto.

What is not installed is left out: s3fs, gcsfs, moto.
"""

import contextlib
import logging
import os
import shutil
import time
from pathlib import Path

import fsspec
import pytest

from data_pipeline.cache.cache import CachedShards, CacheSettings
from data_pipeline.reading.reader import BadSample, SampleReader
from data_pipeline.shards.index_file import headers_digest
from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.storage.errors import ShardError
from data_pipeline.storage.remote import RemoteSettings, UrlStorage
from data_pipeline.storage.storage import TransientReadError
from tests.data_pipeline.loader.test_loader import contents, loader
from tests.data_pipeline.photos import pack
from tests.data_pipeline.small_shards import sample, write_shards
from tests.data_pipeline.storage.bucket_server import (
    BucketServer,
    GoogleBucketServer,
    MachineCredentials,
    refused,
)
from tests.data_pipeline.storage.faulty_server import dropped, garbled, short, slow, status, whole

s3fs = pytest.importorskip("s3fs", reason="pip install s3fs")

QUICK = RemoteSettings(
    retry_first_wait_s=0.01, retry_longest_wait_s=0.05, timeout_s=2.0, retry_deadline_s=30.0
)


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def www(tmp_path):
    write_shards(tmp_path / "www" / "bucket" / "set", 100, 40)
    return tmp_path / "www"


@pytest.fixture
def server(www, monkeypatch):
    with BucketServer(www) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server


@contextlib.contextmanager
def moto(www: Path):
    """The same folders as buckets of moto."""
    moto_server = pytest.importorskip("moto.server", reason="pip install 'moto[server]'")
    boto3 = pytest.importorskip("boto3")
    server = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    try:
        client = boto3.client("s3", endpoint_url=url)
        for bucket in www.iterdir():
            client.create_bucket(Bucket=bucket.name)
            for path in bucket.rglob("*.*"):
                client.upload_file(str(path), bucket.name, str(path.relative_to(bucket)))
        yield url
    finally:
        server.stop()


def is_whole(shards: ShardSet) -> bool:
    with SampleReader(shards) as reader:
        found = [reader.read(row) for row in range(len(shards))]
    return [(read.key, read.members) for read in found] == [sample(n) for n in range(len(shards))]


@pytest.mark.parametrize("store", ["ours", "moto"])
def test_shards_of_buckets(store, www, monkeypatch, request):
    local = ShardSet.open(www / "bucket" / "set")
    raw = www / "raw"
    raw.mkdir()
    for path in (www / "bucket" / "set").glob("*.tar"):
        shutil.copy(path, raw)
    with contextlib.ExitStack() as stack:
        url = (
            request.getfixturevalue("server").url
            if store == "ours"
            else (stack.enter_context(moto(www)))
        )
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        for specs in (
            "s3://bucket/set",
            "s3://bucket/set/",
            "s3://bucket/set/*.tar",
            "s3://bucket/set/train-00000{0..2}.tar",
        ):
            opened = ShardSet.open(specs, QUICK)
            assert opened.fingerprint == local.fingerprint and is_whole(opened)
        weak = ShardSet.open("s3://raw", QUICK)  # indexed by its headers
        assert is_whole(weak) and not weak.index(0).payloads_hashed
        assert weak.index(0).keys() == local.index(0).keys()
        full = QUICK.model_copy(update={"foreign_index": "full"})
        assert ShardSet.open("s3://raw/*.tar", full).fingerprint == local.fingerprint
        storage = weak.storage
        for name in ("raw/none.tar", "raw/none", "none/x.tar", "raw"):
            with pytest.raises(FileNotFoundError, match=f"s3://{name}: "):
                storage.state(f"s3://{name}")
        for specs in ("s3://raw/none", "s3://raw/none-*.tar", "s3://none/*.tar"):
            with pytest.raises(FileNotFoundError, match=r"s3://.*: (no file matches|there is no)"):
                ShardSet.open(specs, QUICK)
        assert storage.retries == 0


def test_a_bucket_that_may_not_be_listed(server, www, caplog):
    """403 for what is not there; asked for again, and said, once."""
    local = ShardSet.open(www / "bucket" / "set")
    digests = [headers_digest(local.index(number)) for number in range(3)]
    for path in (www / "bucket" / "set").iterdir():
        if path.suffix != ".tar":
            path.unlink()
    server.may_list = False
    caplog.set_level(logging.WARNING)
    opened = ShardSet.open("s3://bucket/set/train-00000{0..2}.tar", QUICK)
    assert [opened.index(number).digest for number in range(3)] == digests and is_whole(opened)
    asked = [name for name, _ in server.asked if name.endswith(".idx")]
    assert sorted(asked) == [f"bucket/set/train-00000{number}.tar.idx" for number in range(3)]
    texts = [record.getMessage() for record in caplog.records]
    assert sum("s3://bucket/set: indices are refused" in text for text in texts) == 1
    with pytest.raises(PermissionError, match=r"s3://bucket/none\.tar: access is refused"):
        ShardSet.open("s3://bucket/none.tar", QUICK)


FAULTS = [
    dropped,
    short,
    refused(503, "SlowDown"),
    refused(500, "InternalError"),
    status(429),
    whole,
    refused(403, "RequestTimeTooSkewed"),
    refused(400, "RequestTimeout"),
    garbled,
]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_equal_the_local_ones_whatever_heals(tmp_path, monkeypatch, caplog, workers):
    caplog.set_level(logging.CRITICAL)
    expected = contents(loader(pack(tmp_path / "www" / "bucket", 60), workers=0))
    with BucketServer(tmp_path / "www") as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        opened = ShardSet.open("s3://bucket", QUICK)
        server.faults.extend(FAULTS)
        assert contents(loader(opened, workers=workers)) == expected
        assert not server.faults


def test_a_cache_of_an_object_store(server, tmp_path):
    shards = ShardSet.open("s3://bucket/set", QUICK)
    cache = CachedShards(shards, CacheSettings(folder=str(tmp_path / "blocks"), max_gib=0.1))
    reader = SampleReader(shards, cache)
    server.faults.extend([garbled, refused(503, "SlowDown")])
    for _ in range(2):
        assert [reader.read(n).members for n in range(100)] == [sample(n)[1] for n in range(100)]
    assert not server.faults and cache.counters["cache_hits"] > 100
    server.asked.clear()
    assert reader.read(50).members == sample(50)[1] and not server.asked


def test_what_will_not_heal(server, www):
    shards = ShardSet.open("s3://bucket/set", QUICK)
    shards.fetch_indices(range(3))
    path = www / "bucket" / "set" / "train-000000.tar"
    # Without a manifest a file has a version from the moment on at which it was opened.
    (path.parent / "manifest.json").unlink()
    versioned = ShardSet.open("s3://bucket/set", QUICK)
    content = path.read_bytes()
    path.write_bytes(content[::-1])
    os.utime(path, (1, 1))
    with pytest.raises(BadSample, match=r"s3://bucket/set/train-000000\.tar: was replaced: it has"):
        SampleReader(versioned).read(0)
    path.write_bytes(content[:1000])
    with pytest.raises(BadSample, match=r"train-000000\.tar: has 1000 bytes, but its index"):
        SampleReader(shards).read(0)
    path.unlink()
    with pytest.raises(BadSample, match=r"s3://bucket/set/train-000000\.tar: there is no such"):
        SampleReader(shards).read(0)
    server.always = refused(403, "AccessDenied")
    with pytest.raises(TransientReadError, match=r"train-000001\.tar: access is refused"):
        SampleReader(shards).read(50)


@pytest.mark.parametrize("fault", [slow(60), status(503)])
def test_the_deadline_holds_whatever_patience_the_driver_has(server, fault):
    """Its own attempts, and its time-outs of minutes, are ended."""
    storage = UrlStorage(QUICK.model_copy(update={"retry_deadline_s": 1.0}))
    url = "s3://bucket/set/train-000000.tar"
    patient = UrlStorage(QUICK)  # beginning alone may take the driver more than a second
    patient.state(url)
    server.always = fault
    started = time.monotonic()
    with pytest.raises(TransientReadError, match=r"train-000000\.tar: .*deadline 1 s") as caught:
        storage.read(url, 0, 9)
    assert time.monotonic() - started < 50
    assert "hush" not in str(caught.value)
    server.always = None
    assert len(patient.read(url, 0, 9)) == 9


def test_without_credentials(server, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", "/nowhere")
    with pytest.raises(PermissionError, match=r"s3://bucket/x: .*credentials .*S3_ANON=true"):
        UrlStorage(QUICK).state("s3://bucket/x")
    # A machine that has the right to read: the service that tells so is away at first.
    machine = MachineCredentials(failures=1)
    with machine.serving() as url:
        monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", url)
        assert is_whole(ShardSet.open("s3://bucket/set", QUICK))
    assert machine.failures == 0


def test_google_buckets(www, monkeypatch):
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # gRPC; read at its import
    gcsfs = pytest.importorskip("gcsfs", reason="pip install gcsfs")
    gcsfs.GCSFileSystem.clear_instance_cache()
    local = ShardSet.open(www / "bucket" / "set")
    with GoogleBucketServer(www) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        for specs in (
            "gs://bucket/set",
            "gs://bucket/set/*.tar",
            "gs://bucket/set/train-00000{0..2}.tar",
        ):
            opened = ShardSet.open(specs, QUICK)
            assert opened.fingerprint == local.fingerprint and is_whole(opened)
        with pytest.raises(FileNotFoundError, match=r"gs://bucket/none\.tar: there is no"):
            opened.storage.state("gs://bucket/none.tar")
        server.faults.extend([status(503), dropped, short, status(403), whole])
        assert is_whole(ShardSet.open("gs://bucket/set", QUICK)) and not server.faults
        path = www / "bucket" / "set" / "train-000000.tar"
        state = opened.storage.state("gs://bucket/set/train-000000.tar")
        path.write_bytes(path.read_bytes()[::-1])
        with pytest.raises(ShardError, match=r"train-000000\.tar: was replaced"):
            opened.storage.read("gs://bucket/set/train-000000.tar", 0, 9, state)
        server.always = status(403)
        with pytest.raises(PermissionError, match=r"train-000001\.tar: access is refused"):
            opened.storage.read("gs://bucket/set/train-000001.tar", 0, 9)

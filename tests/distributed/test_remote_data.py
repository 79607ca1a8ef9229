"""Runs on data behind a web server, and on streams: equal losses, clear ends, honest resumes."""

import contextlib
import importlib.util
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from pretrain.engine.checkpoint.files import read_manifest
from tests.data_pipeline.storage.bucket_server import BucketServer
from tests.data_pipeline.storage.faulty_server import FaultyServer, dropped, short, status
from tests.data_pipeline.storage.test_tls import FILES as TLS_FILES
from tests.data_pipeline.storage.test_tls import TlsServer
from tests.distributed.launch import run_ranks, tails
from tests.tiny_run import pack_scenes, tiny_recipe, write_recipe

pytestmark = pytest.mark.slow

REMOTE = {"retry_first_wait_s": 0.05, "retry_deadline_s": 30.0, "timeout_s": 5.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    pack_scenes(folder)
    return folder


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


def train(data: Path, folder: Path, shards: dict, world: int = 2, **changes) -> list[int]:
    recipe = tiny_recipe(data, folder / "run", **changes)
    recipe["tasks"]["caption"]["data"] |= shards
    return run_ranks(
        "pretrain.train", [write_recipe(folder / "r.yaml", recipe)], world, folder / "out"
    )


def test_losses_over_any_network_equal_the_local_ones(data, tmp_path, monkeypatch):
    """http, https and, where its driver is installed, s3."""
    monkeypatch.setenv("SSL_CERT_FILE", str(TLS_FILES / "test_authority.pem"))
    for name, value in (
        ("ACCESS_KEY_ID", "a"),
        ("SECRET_ACCESS_KEY", "b"),
        ("DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    servers = {"local": None, "http": FaultyServer, "https": TlsServer}
    if importlib.util.find_spec("s3fs"):
        servers["s3"] = BucketServer
    found = {}
    for name, kind in servers.items():
        folder = tmp_path / name
        folder.mkdir()
        shards = {}
        with contextlib.ExitStack() as stack:
            if kind is not None:
                server = stack.enter_context(kind(data.parent if name == "s3" else data))
                server.faults.extend([dropped, short, status(503), status(429), short])
                monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
                place = f"s3://{data.name}" if name == "s3" else server.url
                shards = {"shards": [place + "/train"]}
            loader = {"workers": 1, "remote": REMOTE}
            codes = train(data, folder, shards, loader=loader)
            assert kind is None or not server.faults
        assert codes == [0, 0], tails(folder / "out")
        found[name] = losses(folder / "run")
    assert len(found["local"]) > 10
    assert all(each == found["local"] for each in found.values())


def test_a_server_that_goes_away_ends_all_ranks(data, tmp_path):
    with FaultyServer(data) as server:
        remote = REMOTE | {"retry_deadline_s": 2.0}
        server.of = "train-000001.tar"
        server.always = status(503)
        started = time.monotonic()
        codes = train(
            data,
            tmp_path,
            {"shards": [server.url + "/train"]},
            loader={"workers": 1, "remote": remote},
        )
    assert codes == [1, 1], tails(tmp_path / "out")
    assert time.monotonic() - started < 120
    reasons = " ".join(
        json.loads(path.read_text())["reason"]
        for path in (tmp_path / "run/control").glob("failure_rank_*.json")
    )
    assert "train-000001.tar: HTTP 503" in reasons and "deadline 2 s" in reasons


def test_a_run_on_a_stream_and_its_resume(data, tmp_path):
    stream = {
        "shards": None,
        "stream": {
            "shards": [f"pipe:cat {data}/train/train-00000{{0..2}}.tar"],
            "samples": 60,
            "shuffle_samples": 10,
        },
    }
    assert train(data, tmp_path, stream, steps=6) == [0, 0], tails(tmp_path / "out")
    out = (tmp_path / "run/logs/rank_00000.log").read_text()
    assert "task caption: read as a stream of 3 shards, which promises less" in out
    shutil.rmtree(tmp_path / "run/checkpoints/step_000000006")  # as if it had ended before
    codes = run_ranks("pretrain.train", ["--resume", tmp_path / "run"], 2, tmp_path / "out2")
    assert codes == [0, 0], tails(tmp_path / "out2")
    out = (tmp_path / "run/logs/rank_00000.log").read_text()
    assert "goes on at step 4 with another part of its stream" in out
    steps = [line["step"] for line in metrics(tmp_path / "run") if line["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_run_goes_on_where_full_indices_were_put_beside_its_shards(data, tmp_path):
    shutil.copytree(data, tmp_path / "www")
    www = tmp_path / "www" / "train"
    indices = {path: path.read_bytes() for path in www.glob("*.idx")}
    for path in (*indices, www / "manifest.json"):
        path.unlink()
    with FaultyServer(tmp_path / "www") as server:
        shards = {"shards": [server.url + "/train/train-00000{0..2}.tar"]}
        loader = {"workers": 1, "remote": REMOTE}
        assert train(data, tmp_path, shards, 1, loader=loader) == [0], tails(tmp_path / "out")
        expected = losses(tmp_path / "run")
        for path, content in indices.items():
            path.write_bytes(content)
        for path in (tmp_path / "cache" / "indices").iterdir():
            os.utime(path, (1, 1))  # long ago
        shutil.rmtree(tmp_path / "run/checkpoints/step_000000012")  # as if it had ended before
        (tmp_path / "run/metrics.jsonl").unlink()
        codes = run_ranks("pretrain.train", ["--resume", tmp_path / "run"], 1, tmp_path / "out2")
    assert codes == [0], tails(tmp_path / "out2")
    assert losses(tmp_path / "run") == expected[8:]
    ledger = read_manifest(tmp_path / "run/checkpoints/step_000000012")["trainer"]["ledger"]
    assert [entry["step"] for entry in ledger if entry["kind"] == "data"] == [0, 8]

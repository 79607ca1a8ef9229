"""Training from a server, with a cache: it fails for a while, for good, and is there again."""

import json
import time
from pathlib import Path

import pytest

from tests.data_pipeline.storage.faulty_server import (
    CountingServer,
    dropped,
    garbled,
    short,
    status,
)
from tests.distributed.launch import kill_ranks, run_ranks, start_ranks, tails
from tests.tiny_run import pack_scenes, tiny_recipe, write_recipe

STEPS = 40


def losses(run: Path) -> dict[tuple[int, str], float]:
    """By step and kind."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(line["step"], line["kind"]): line["loss"] for line in lines}


def test_a_server_that_goes_away_ends_all_ranks_and_a_resume_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path / "indices"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    data, local, run = tmp_path / "data", tmp_path / "local", tmp_path / "run"
    pack_scenes(data)
    same = {"steps": STEPS, "tasks__caption__objective__decoder__dropout": 0.0}
    alone = write_recipe(tmp_path / "local.yaml", tiny_recipe(data, local, **same))
    assert run_ranks("pretrain.train", [alone], 1, tmp_path / "1") == [0], tails(tmp_path / "1")

    recipe = tiny_recipe(data, run, **same)
    task = recipe["tasks"]["caption"]
    recipe["loader"] |= {
        # A cap of a few samples: most are asked for in every epoch.
        "cache": {"folder": str(tmp_path / "cache"), "max_gib": 3e-5, "block_mib": 0.004},
        # Of both ranks, their workers and the read-ahead together.
        "remote": {"retry_deadline_s": 3.0, "retry_first_wait_s": 0.05, "requests_per_host": 2},
    }
    with CountingServer(data) as server:
        task["data"]["shards"] = [server.url + "/train"]
        task["evaluation"]["shards"] = [server.url + "/heldout"]
        # Wrong bytes only once: a sample that gets them twice is a bad one.
        server.faults.extend([garbled, *[status(503), dropped, short] * 3])
        arguments = [str(write_recipe(tmp_path / "run.yaml", recipe))]
        ranks = start_ranks("pretrain.train", arguments, 2, tmp_path / "2")
        try:
            until = time.monotonic() + 120
            while (5, "train") not in losses(run) and time.monotonic() < until:
                time.sleep(0.01)
            most = server.most
            server.always = status(503)
            assert [rank.wait(60) for rank in ranks] == [1, 1], tails(tmp_path / "2")
        finally:
            kill_ranks(ranks)
        assert not server.faults and most == 2
        said = json.loads((run / "control/status.json").read_text())
        newest = (run / "checkpoints/latest").read_text().strip()
        assert said["state"] == "failed" and said["step"] == int(newest.removeprefix("step_"))
        assert 4 <= said["step"] < STEPS
        notes = [json.loads(p.read_text()) for p in (run / "control").glob("failure_rank_*.json")]
        gone = next(note for note in notes if "TransientReadError" in note["reason"])
        assert "\n" not in gone["reason"]
        assert f"{server.url}/train/train-00000" in gone["reason"] and "503" in gone["reason"]
        assert "_read_once" in gone["stack"]  # where the worker was

        server.always, server.of = None, "heldout-000000.tar"
        seen = max(step for step, _ in losses(run))
        (rank,) = start_ranks("pretrain.train", ["--resume", str(run)], 1, tmp_path / "3")
        try:
            until = time.monotonic() + 120
            while (seen + 1, "train") not in losses(run) and time.monotonic() < until:
                time.sleep(0.01)
            # After the start's look at samples: the evaluation meets these.
            server.faults.extend([status(503), status(429)])
            assert rank.wait(120) == 0, tails(tmp_path / "3")
        finally:
            kill_ranks([rank])
        assert not server.faults
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["kind"], last["read_retries"]) == ("evaluation", 2)
    assert not [line for p in (run / "faults").iterdir() for line in p.read_text().splitlines()]
    assert losses(run) == pytest.approx(losses(local), abs=1e-5)

"""Runs over damaged data: bad rows are left out from the next epoch on, whatever happens to a run.

60 samples, batches of 8, checkpoints after every 4 steps: an epoch is 7.5 steps, so that rows met
in steps 1 to 4 leave at sample 60, those of steps 5 to 8 one epoch later.
"""

import json
import time
from pathlib import Path

import pytest

from pretrain.engine.checkpoint.files import newest_whole, read_manifest
from pretrain.engine.quarantine_files import Edit, append_edits, read_list
from tests.data_pipeline.photos import damage_key
from tests.distributed.launch import kill_ranks, run_ranks, start_ranks, tails
from tests.distributed.test_resume import assert_same_run, finish, kill_when, steps_logged
from tests.tiny_run import pack_scenes, tiny_recipe, write_recipe

BAD = (3, 17, 18, 44, 59)
STEPS = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    pack_scenes(folder)
    for number in BAD:
        damage_key(folder / "train", f"{number:06d}")
    return folder


def recipe(data: Path, run: Path, **changes) -> dict:
    always = {
        "steps": STEPS,
        "tasks__caption__objective__decoder__dropout": 0.0,
        "loader__max_bad_fraction": 1.0,
    }
    return tiny_recipe(data, run, **{**always, **changes})


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    finish(write_recipe(folder / "r.yaml", recipe(data, folder / "run")), folder)
    return folder / "run"


def ledger(run: Path) -> list[dict]:
    state = read_manifest(newest_whole(run / "checkpoints"))["trainer"]
    return [entry for entry in state["ledger"] if entry["kind"] == "quarantine"]


def faults(run: Path) -> list[dict]:
    lines = [
        line
        for path in sorted(run.glob("faults/rank_*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return sorted((json.loads(line) for line in lines), key=lambda f: (f["step"], f["position"]))


def training(run: Path) -> list[tuple]:
    """Faults of training, without the path of the shards; evaluation positions are row numbers."""
    return [
        (f["step"], f["position"], f["attempt"], f["row"], f["key"])
        for f in faults(run)
        if "train-" in f["shard"]
    ]


def test_bad_rows_are_met_once_and_then_left_out(straight):
    entries = ledger(straight)
    assert sorted(row for e in entries for a, b in e["excluded"] for row in range(a, b)) == [*BAD]
    since = {
        row: e["from_position"] for e in entries for a, b in e["excluded"] for row in range(a, b)
    }
    met = {row: [p for _, p, _, r, _ in training(straight) if r == row] for row in BAD}
    for row in BAD:
        assert met[row] and max(met[row]) < since[row]
    # What a checkpoint before the first border knew leaves there.
    assert min(since.values()) == 60
    for entry in entries:
        assert entry["step"] * 8 <= entry["from_position"]
    listed = read_list(straight)
    assert [entry.row for entry in listed] == [*BAD]
    assert [entry.key for entry in listed] == [f"{row:06d}" for row in BAD]
    assert {entry.row: entry.from_position for entry in listed} == since
    assert all("crc32" in entry.reason and "train-" in entry.shard for entry in listed)


def test_every_fault_is_in_the_files_of_the_ranks(straight):
    found = faults(straight)
    assert all(f["action"] == "replaced" and f["reason"] and f["shard"] for f in found)
    metrics = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in metrics if line["kind"] == "train"][-1]
    assert last["replaced_samples"] == len({f["position"] for f in found})
    assert {f["step"] for f in found} <= set(range(1, STEPS + 1))
    assert last["quarantined_samples"] == len(BAD) and last["read_retries"] == 0
    assert last["read_mb_per_second"] > 0 and "cache_hits" not in last  # nothing is cached here


def test_killed_and_resumed(data, straight, tmp_path):
    run = tmp_path / "run"
    path = write_recipe(tmp_path / "r.yaml", recipe(data, run))
    processes = start_ranks("pretrain.train", [path], 2, tmp_path / "start")
    assert kill_when(lambda: steps_logged(run) >= 10, processes)
    finish(Path("--resume"), tmp_path / "last", str(run))
    assert_same_run(straight, run)
    assert ledger(run) == ledger(straight)
    assert training(run) == training(straight)


@pytest.mark.slow
def test_stopped_between_planned_checkpoints_and_resumed_in_another_world(data, straight, tmp_path):
    """A save that somebody asks for must not decide from which epoch on a row is left out."""
    run = tmp_path / "run"
    path = write_recipe(tmp_path / "r.yaml", recipe(data, run))
    processes = start_ranks("pretrain.train", [str(path)], 2, tmp_path / "first")
    until = time.monotonic() + 120
    while steps_logged(run) < 5 and time.monotonic() < until:
        time.sleep(0.005)
    (run / "control/stop").touch()
    try:
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        kill_ranks(processes)
    assert codes == [0, 0], tails(tmp_path / "first")
    assert read_manifest(newest_whole(run / "checkpoints"))["step"] < STEPS
    finish(Path("--resume"), tmp_path / "again", str(run), world=1)
    assert ledger(run) == ledger(straight)
    assert training(run) == training(straight)


@pytest.mark.slow
def test_killed_and_resumed_in_another_world_with_repeats(data, tmp_path):
    """Four images of two views a step: an epoch is 15 steps."""
    runs = {}
    for name in ("one", "other"):
        runs[name] = tmp_path / name / "run"
        runs[name].parent.mkdir()
        changes = recipe(data, runs[name], steps=28, tasks__caption__data__repeats=2)
        path = write_recipe(runs[name].parent / "r.yaml", changes)
        if name == "one":
            finish(path, tmp_path / "first", world=1)
            continue
        processes = start_ranks("pretrain.train", [path], 2, tmp_path / "second")
        assert kill_when(lambda: steps_logged(runs["other"]) >= 10, processes)
        finish(Path("--resume"), tmp_path / "last", str(runs["other"]), world=3)
    entries = ledger(runs["one"])
    assert {entry["from_position"] for entry in entries} == {60}
    assert sorted(r for e in entries for a, b in e["excluded"] for r in range(a, b)) == [*BAD]
    assert ledger(runs["other"]) == entries
    assert training(runs["other"]) == training(runs["one"])
    met = [
        (position % 8 % 4, row, position // 8) for _, position, _, row, _ in training(runs["one"])
    ]
    assert all(step <= 15 for *_, step in met)
    assert len(met) == 2 * len(set(met))  # each of the copies meets the same
    lines = [json.loads(line) for line in (runs["one"] / "metrics.jsonl").read_text().splitlines()]
    epochs = [line["epoch"] for line in lines if line["kind"] == "train"]
    assert epochs[14] == 1.0 and epochs[-1] == pytest.approx(1 + 13 * 4 / 55)


@pytest.mark.slow
def test_switched_off(data, straight, tmp_path):
    run = tmp_path / "run"
    path = write_recipe(tmp_path / "r.yaml", recipe(data, run, loader__quarantine=False))
    finish(path, tmp_path, world=1)
    assert not ledger(run) and not (run / "quarantine.jsonl").exists()
    assert len(training(run)) > len(training(straight))


@pytest.mark.slow
def test_edits_are_taken_in_at_the_next_planned_checkpoint(data, straight, tmp_path):
    run = tmp_path / "run"
    path = write_recipe(tmp_path / "r.yaml", recipe(data, run, steps=8))
    finish(path, tmp_path, world=1)
    (released, *_) = [entry for entry in read_list(run) if entry.from_position is not None]
    good = Edit("caption", "?", "000030", 30, True)
    append_edits(run, [Edit(*released[:4], False), good])
    text = (run / "recipe.yaml").read_text().replace("steps: 8", f"steps: {STEPS}", 1)
    (run / "recipe.yaml").write_text(text)
    finish(Path("--resume"), tmp_path / "again", str(run), world=1)
    entry = next(e for e in ledger(run) if e["released"])
    assert entry["released"] == [[released.row, released.row + 1]]
    assert any(first <= 30 < stop for first, stop in entry["excluded"])
    (listed,) = [entry for entry in read_list(run) if entry.row == 30]
    assert listed.reason == "excluded by hand" and listed.key == "000030"


@pytest.mark.slow
def test_an_edit_of_a_sample_that_is_not_there(data, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    append_edits(run, [Edit("caption", "x.tar", "k", 60, True)])
    path = write_recipe(tmp_path / "r.yaml", recipe(data, run, steps=8))
    assert run_ranks("pretrain.train", [path], 2, tmp_path) == [1, 1]
    assert "names no sample of this run" in tails(tmp_path)

"""Runs that are resumed another way than they went: longer, from further back, at another rate."""

import json
import os
import re
import time
from pathlib import Path

import pytest

from pretrain.engine.checkpoint.files import newest_whole, read_manifest
from pretrain.engine.control.ownership import claim
from pretrain.engine.run_record import RunDirError
from pretrain.recipe.overlay import RecipeError
from pretrain.train import main, parse_arguments, read_recipe
from tests.distributed.launch import kill_ranks, run_ranks, start_ranks, tails
from tests.distributed.test_resume import assert_same_run, metrics
from tests.tiny_run import pack_scenes, tiny_recipe, write_recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    pack_scenes(folder)
    return folder


def start(logs: Path, *arguments, expected: int = 0) -> str:
    assert run_ranks("pretrain.train", arguments, 1, logs) == [expected], tails(logs)
    return tails(logs)


def ledger(run: Path) -> list[dict]:
    return read_manifest(newest_whole(run / "checkpoints"))["trainer"]["ledger"]


def recipe_of_length(data: Path, run: Path, steps: int) -> dict:
    recipe = tiny_recipe(data, run, steps=steps, optimizer__weight_decay=0.0)
    recipe["schedule"] = {"kind": "wsd", "warmup_steps": 2, "decay_steps": 3}
    return recipe


@pytest.fixture(scope="module")
def ended(data, tmp_path_factory):
    """A run of 8 steps, the last three of which decay; its recipe was edited while it ran."""
    folder = tmp_path_factory.mktemp("ended")
    run = folder / "run"
    path = write_recipe(folder / "recipe.yaml", recipe_of_length(data, run, 8))
    ranks = start_ranks("pretrain.train", [path], 1, folder)
    try:
        until = time.monotonic() + 120
        while not (run / "starts.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.005)
        with (run / "recipe.yaml").open("a", encoding="utf-8") as file:
            file.write("# by hand\n")
        assert ranks[0].wait(timeout=240) == 0, tails(folder)
    finally:
        kill_ranks(ranks)
    return run


def test_what_a_run_was_trained_with_is_in_its_checkpoints(ended, capsys):
    """Not what somebody wrote into its folder, before or after; and that is what a resume obeys."""
    resolved = ended / "recipe.yaml"
    assert "# by hand" in resolved.read_text()
    for folder in (ended / "checkpoints").glob("step_*"):
        assert "# by hand" not in (folder / "recipe.yaml").read_text()
    before = resolved.read_text()
    resolved.write_text(
        before.replace("global_batch: 8", "global_batch: 16").replace("kind: adamw", "kind: sgd")
    )
    recorded = metrics(ended)
    try:
        assert main(["--resume", str(ended)]) == 2
        said = capsys.readouterr().err
        assert "tasks.caption.global_batch: 8 in checkpoints/step_000000008, 16 now" in said
        assert "optimizer.kind: adamw in checkpoints/step_000000008, sgd now" in said
        assert main(["--resume", str(ended), "--from-step", "5"]) == 2
        assert "no checkpoint of step 5 (--from-step): there are 4, 8" in capsys.readouterr().err
        (cut_off := ended / "checkpoints/going_back_to_step_000000004").mkdir()
        assert main(["--resume", str(ended)]) == 2
        assert f"end it with --resume {ended} --from-step 4 " in capsys.readouterr().err
        cut_off.rmdir()
    finally:
        resolved.write_text(before)
    assert main(["--resume", str(ended), "steps=7"]) == 2
    assert "the run has taken 8 steps already" in capsys.readouterr().err
    assert metrics(ended) == recorded


def test_ranks_that_torchrun_starts_anew_go_on(ended, monkeypatch):
    """Without --start-or-resume, too; a first start of the same words is refused."""
    for name, value in {"MASTER_ADDR": "h", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    claim(ended, os.environ).leave()
    words = parse_arguments([str(ended / "recipe.yaml")])
    with pytest.raises(RunDirError, match="already holds a run"):
        read_recipe(words)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    recipe, resume = read_recipe(words)
    assert resume and recipe.run_dir == str(ended)
    with pytest.raises(RecipeError, match="seed: 3 in"):
        read_recipe(parse_arguments([str(ended / "recipe.yaml"), "seed=4"]))


def test_longer_from_the_stable_phase_then_diverged_then_as_the_advice_says(ended, data, tmp_path):
    longer = tmp_path / "longer"
    start(tmp_path, write_recipe(tmp_path / "r.yaml", recipe_of_length(data, longer, 12)))
    cut_off = ended / "checkpoints/going_back_to_step_000000004"  # by a crash, which this ends
    cut_off.mkdir()
    (ended / "checkpoints/step_000000008").rename(cut_off / "step_000000008")
    said = start(tmp_path / "1", "--resume", ended, "--from-step", "4", "steps=12")
    assert "gone back from step 8 to step 4" in said and "rate jumps" not in said
    assert_same_run(longer, ended)
    aside = ended / "checkpoints/aside_1_after_step_000000004"
    assert read_manifest(aside / "step_000000008")["step"] == 8
    assert [json.loads(line)["step"] for line in (aside / "metrics.jsonl").open()][-1] == 8
    assert ledger(ended)[-2:] == [
        {"kind": "return", "step": 4, "from_step": 8},
        {"kind": "settings", "step": 4, "changed": {"steps": [8, 12]}},
    ]

    said = start(
        tmp_path / "2",
        "--resume",
        ended,
        "steps=20",
        "schedule.kind=constant",
        "schedule.decay_steps=null",
        "optimizer.lr=1e30",
        "checkpoint.every_steps=1",
        "failure.max_skipped_steps=3",
        expected=1,
    )
    assert re.search(r"learning rate jumps: step 12 would have had 0 before .* has 1e\+30", said)
    advice = re.search(r"(--resume \S+ --from-step \d+) optimizer\.lr=1e\+29", said)
    assert advice, said
    command = advice[1].split()
    assert command[-1] == "12"  # what follows has weights of 1e30
    kept = sorted(path.name[-2:] for path in (ended / "checkpoints").glob("step_*"))
    assert kept == ["12", "13", "15", "16"]
    said = start(tmp_path / "3", *command, "optimizer.lr=1e-3", "optimizer.weight_decay=0.05")
    assert "optimizer.weight_decay was 0.0 and is 0.05" in said
    lines = [line for line in metrics(ended) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert not any(line["skipped"] for line in lines) and lines[-1]["loss"] < 20
    newest = newest_whole(ended / "checkpoints")
    partitions = json.loads((newest / "rank_00000.json").read_text())["partitions"]
    assert len(partitions) == 2  # without decay it was one
    assert [partition["scalars"] for partition in partitions] == [{"step": 20.0}] * 2

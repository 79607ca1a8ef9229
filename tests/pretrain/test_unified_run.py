"""The recipe uniperceiver_v2_digits in small: it trains all tasks, evaluates, and resumes."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from pretrain.engine.checkpoint.files import newest_whole, read_full_state
from pretrain.recipe.load import SHIPPED
from tests.distributed.launch import ROOT, free_port, rank_environment
from tests.tiny_run import pack_scenes, write_recipe
from tools.make_shards.__main__ import main as make_shards

HEADER = (SHIPPED / "uniperceiver_v2_digits.yaml").read_text(encoding="utf-8").split("\n\n")[0]


def captions_as_text(data) -> str:
    """What the recipe's own command prints."""
    command = re.search(r"python -c '(.*?)' >", HEADER, re.DOTALL)[1].replace("\n#", "\n")
    command = command.replace("data/digits", str(data))
    command = " ".join(line.strip() for line in command.splitlines())
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def small_recipe(data, run_dir) -> dict:
    """The shipped one, with smaller modules, for a few steps."""
    text = (SHIPPED / "uniperceiver_v2_digits.yaml").read_text(encoding="utf-8")
    recipe = yaml.safe_load(text.replace("data/digits", str(data)))
    recipe |= {"steps": 8, "run_dir": str(run_dir), "evaluation_every_steps": 8}
    shape = {"width": 32, "layers": 1, "heads": 2}
    encoders = recipe["model"]["encoders"]
    for name in encoders:
        encoders[name] |= shape | ({"hidden": 64} if name != "image" else {})
    encoders["image"] |= {"image_size": 32, "patch_size": 8}
    for task in recipe["tasks"].values():
        task |= {"global_batch": 8, "micro_batch": 4}
        if "image" in task["data"]:
            task["data"]["image"]["size"] = 32
    recipe["tasks"]["mlm"]["evaluation"] = {
        "shards": [str(data / "text" / "train")],
        "max_samples": 12,
    }
    recipe["checkpoint"]["every_steps"], recipe["schedule"]["warmup_steps"] = 4, 2
    recipe["logging"] = {"every_steps": 1, "tensorboard": False}
    return recipe


def train(*arguments) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pretrain.train", *map(str, arguments)],
        cwd=ROOT,
        env=rank_environment(0, 1, free_port()),
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_all_tasks_train_evaluate_and_resume(tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    pack_scenes(data)
    (data / "captions.txt").write_text(captions_as_text(data), encoding="utf-8")
    assert (
        make_shards(
            [
                "text",
                "--input",
                str(data / "captions.txt"),
                "--tokenizer",
                str(data / "tokenizer"),
                "--tokens",
                "32",
                "--out",
                str(data / "text"),
                "--licence",
                "CC0-1.0",
            ]
        )
        == 0
    )
    train(write_recipe(tmp_path / "recipe.yaml", small_recipe(data, run)))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = {line["task"] for line in lines if line["kind"] == "train"}
    evaluated = {line["task"]: line for line in lines if line["kind"] == "evaluation"}
    assert trained == evaluated.keys() == {"classify", "retrieve", "caption", "mlm"}
    assert 0 <= evaluated["classify"]["top5"] <= 1
    assert 0 < evaluated["retrieve"]["image_to_text_r10"] <= 1
    assert evaluated["caption"]["cross_entropy"] > 0 and evaluated["mlm"]["perplexity"] > 1
    state = read_full_state(newest_whole(run / "checkpoints"), "master")
    again = tmp_path / "again"
    shutil.copytree(run, again)
    train("--resume", again, "--from-step", 4)
    resumed = read_full_state(newest_whole(again / "checkpoints"), "master")
    assert state.keys() == resumed.keys()
    assert all(torch.equal(state[name], resumed[name]) for name in state)

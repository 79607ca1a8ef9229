"""`tools.finetune`: steps, processes, resume, and the folders that come out."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    GitForCausalLM,
)

from data_pipeline.shards.packer import ShardWriter
from tests.distributed.launch import ROOT, without_ranks
from tools.finetune.__main__ import main
from tools.finetune.classify import layer_of
from tools.finetune.place import split_rows
from tools.make_shards.scenes import make_scene, scene_members

COLOURS = {"blue": (30, 30, 220), "green": (20, 200, 40), "red": (220, 30, 30)}


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """A folder per class: 12 noisy pictures of each of three colours."""
    root, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for number in range(12):
            pixels = np.clip(np.array(colour) + rng.normal(0, 30, (32, 32, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A folder of transformers with a tiny vision transformer."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    config = CLIPVisionConfig(**shape, num_attention_heads=2, image_size=32, patch_size=8)
    CLIPVisionModel(config).save_pretrained(folder)
    return folder


def words(encoder: Path, colours: Path, out: Path, *more: str) -> list[str]:
    """A training of 8 steps with everything that draws numbers."""
    return [
        *("classify", str(encoder), "--data", str(colours), "--out", str(out), "epochs=4"),
        *("batch=16", "lr=3e-3", "mixup=0.8", "cutmix=1.0", "workers=0", "save_steps=3"),
        *("holdout=0.2", "ema=0.5", "warmup=0.2", *more),
    ]


def losses(out: Path) -> list[float]:
    lines = (out / "finetune" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def start(command: list[str]) -> subprocess.Popen:
    environment = without_ranks() | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    return subprocess.Popen([sys.executable, "-m", *command], env=environment, **pipes)


def run(command: list[str]) -> None:
    """In a process of its own: what other tests have set in this one changes last bits."""
    process = start(["tools.finetune", *command])
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text


@pytest.fixture(scope="module")
def whole(encoder, colours, tmp_path_factory) -> Path:
    """A fine-tuning in one process, from beginning to end."""
    out = tmp_path_factory.mktemp("whole") / "model"
    run(words(encoder, colours, out))
    assert len(losses(out)) == 8
    return out


def test_two_processes_of_torchrun_have_the_losses_of_one(whole, encoder, colours, tmp_path):
    out = tmp_path / "two"
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = start([*launcher, "-m", "tools.finetune", *words(encoder, colours, out)])
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert re.search(r"^2 processes on cpu$", text, re.M)
    assert losses(out) == pytest.approx(losses(whole), rel=1e-5)
    metrics = [json.loads(line) for line in (out / "finetune/log.jsonl").open(encoding="utf-8")]
    assert metrics[-1]["images"] == 6  # 2 of each class, each counted once


def test_killed_and_started_again_it_has_the_same_later_losses(whole, encoder, colours, tmp_path):
    out = tmp_path / "killed"
    process = start(["tools.finetune", *words(encoder, colours, out)])
    checkpoint = out / "finetune" / "last.pt"
    while not checkpoint.is_file():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert torch.load(checkpoint, weights_only=True)["step"] < 8
    run(words(encoder, colours, out))
    assert losses(out) == losses(whole)
    found, wanted = (load_file(folder / "model.safetensors") for folder in (out, whole))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_the_folder_loads_without_us_and_its_page_is_right(whole, monkeypatch, tmp_path, capsys):
    model = AutoModelForImageClassification.from_pretrained(whole)
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    page = (whole / "README.md").read_text(encoding="utf-8")
    head, snippet = re.match(r"---\n(.*?)---\n.*```python\n(.*?)```", page, re.S).groups()
    assert "library_name: transformers\npipeline_tag: image-classification" in head
    assert "omnipretrain" not in snippet
    monkeypatch.chdir(whole)
    Image.new("RGB", (40, 50), COLOURS["red"]).save("picture.jpg")
    exec(snippet, {})
    assert capsys.readouterr().out.strip() == "red"
    assert list((whole / "finetune" / "tensorboard").rglob("events.*"))


def test_what_is_written_is_the_average(whole):
    state = torch.load(whole / "finetune" / "last.pt", weights_only=True)
    model = AutoModelForImageClassification.from_pretrained(whole)
    written = dict(model.named_parameters())
    assert len(state["average"]) > 40
    for name, value in state["average"].items():
        torch.testing.assert_close(written[name].detach(), value)
        assert not torch.equal(value, state["model"][name])


def test_another_request_for_the_same_folder_is_refused(whole, encoder, colours, capsys):
    assert main(words(encoder, colours, whole, "layer_decay=0.5")) == 1
    assert f"{whole} holds a fine-tuning with another layer_decay" in capsys.readouterr().err


def test_a_run_and_a_probe_of_it_on_few_labels(run_dir, scenes, tmp_path, capsys):
    out = tmp_path / "probe"
    asked = ["classify", str(run_dir), "--data", str(scenes / "train"), "--out", str(out)]
    asked += ["--per-class", "1", "--test", str(scenes / "heldout"), "--probe", "workers=0"]
    assert main([*asked, "epochs=2", "lr=0.1"]) == 0
    assert "1 process on cpu" in capsys.readouterr().out
    ours = CLIPVisionModel.from_pretrained(out / "finetune" / "source").state_dict()
    model = AutoModelForImageClassification.from_pretrained(out)
    tower = model.vision_model.state_dict()
    assert tower.keys() == ours.keys()
    for name in ours:
        assert torch.equal(tower[name], ours[name]), name
    assert model.classifier.weight.abs().sum() > 0
    record = json.loads((out / "omnipretrain.json").read_text(encoding="utf-8"))
    assert [one["shards"] for one in record["training_shards"]] == [[str(scenes / "train")]] * 2


def test_captions_of_a_coco_file_beside_its_images(export, colours, tmp_path, monkeypatch, capsys):
    paths = sorted(colours.rglob("*.png"))
    images = [{"id": n, "file_name": str(p.relative_to(colours))} for n, p in enumerate(paths)]
    texts = [
        {"image_id": n, "id": n, "caption": f"all {p.parent.name}"} for n, p in enumerate(paths)
    ]
    coco = colours / "captions.json"
    coco.write_text(json.dumps({"images": images, "annotations": texts}), encoding="utf-8")
    out = tmp_path / "captioner"
    asked = ["caption", str(export), "--data", str(coco), "--out", str(out), "workers=0"]
    try:
        assert main([*asked, "epochs=12", "batch=16", "lr=1e-2", "evaluate_epochs=6"]) == 0
    finally:
        coco.unlink()
    lines = [json.loads(line) for line in (out / "finetune/log.jsonl").open(encoding="utf-8")]
    scores = [line["cider_d"] for line in lines if line["kind"] == "evaluation"]
    assert len(scores) == 2 and scores[-1] > scores[0] - 1e-9
    GitForCausalLM.from_pretrained(out)
    page = (out / "README.md").read_text(encoding="utf-8")
    snippet = re.search(r"```python\n(.*?)```", page, re.S)[1]
    monkeypatch.chdir(out)
    Image.new("RGB", (32, 32), COLOURS["blue"]).save("picture.jpg")
    capsys.readouterr()
    exec(snippet, {})
    assert capsys.readouterr().out.strip().startswith("all ")


@given(
    labels=st.lists(st.integers(-1, 3), min_size=1, max_size=80),
    seed=st.integers(0, 9),
    holdout=st.floats(0.0, 0.6),
)
def test_fewer_labels_are_a_part_of_more_and_never_held_out(labels, seed, holdout):
    labels = np.array(labels)
    everything = split_rows(labels, holdout, None, seed)
    assert not (everything.train & everything.test).any()
    assert np.array_equal(everything.train | everything.test, labels >= 0)
    most = min((everything.train & (labels == c)).sum() for c in set(labels) - {-1} or {0})
    before = np.zeros(len(labels), bool)
    for count in range(1, int(most) + 1):
        rows = split_rows(labels, holdout, count, seed)
        assert np.array_equal(rows.test, everything.test)
        assert (rows.train >= before).all()
        for label in set(labels) - {-1}:
            assert (rows.train & (labels == label)).sum() == count
        before = rows.train


def test_layers_are_counted_from_the_embedding_to_the_head(whole):
    model = AutoModelForImageClassification.from_pretrained(whole)
    layers, last = layer_of(model)
    found = {
        last: [n for n in layers if "classifier" in n or "post_layernorm" in n],
        0: [n for n in layers if "embeddings" in n or "pre_layrnorm" in n],
        2: [n for n in layers if ".layers.1." in n],
    }
    assert last == 4
    for number, names in found.items():
        assert names and {layers[name] for name in names} == {number}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"source": "scratch"}, "with --like SOURCE"),
        ({"source": "nowhere"}, "nowhere: there is no such folder"),
        ({"source": "{colours}"}, "no run (checkpoints/) and no folder of transformers"),
        ({"data": "{encoder}"}, "neither shards (*.tar) nor a folder of images for each class"),
        ({"more": ["rate=3"]}, "rate: no such setting; there are epochs, batch"),
        ({"more": ["batch=3"]}, "batch=3: must be even"),
        ({"more": ["--per-class", "40"]}, "--per-class 40: class 0 has"),
        ({"more": ["image.mode=keep_aspect"]}, "image.mode=keep_aspect"),
    ],
)
def test_what_cannot_be_is_told(changes, says, encoder, colours, tmp_path, capsys):
    places = {"encoder": encoder, "colours": colours}
    source = changes.get("source", "{encoder}").format(**places)
    data = changes.get("data", "{colours}").format(**places)
    asked = ["classify", source, "--data", data, "--out", str(tmp_path / "out")]
    assert main([*asked, *changes.get("more", [])]) == 1
    assert says in capsys.readouterr().err


def test_samples_without_a_class_are_counted(encoder, tmp_path, capsys):
    with ShardWriter(tmp_path / "set") as writer:
        for number in range(12):
            members = {"jpg": scene_members(make_scene(number, split="train", seed=0))["jpg"]}
            members |= {"cls": b"%d" % (number % 2)} if number > 2 else {}
            writer.write(f"{number:03d}", members)
    settings = ("epochs=1", "batch=4", "workers=0", "holdout=0.2")
    command = ("classify", encoder, "--data", tmp_path / "set", "--out", tmp_path / "out")
    assert main([str(word) for word in (*command, *settings)]) == 0
    said = capsys.readouterr().out
    assert "3 of 12 samples have no class at cls: left out" in said
    assert "7 samples to learn from, 2 held out" in said

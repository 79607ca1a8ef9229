"""Captioning of clips as a run: packed frames, two ranks against one, partitioned weights."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.distributed.launch import run_ranks, tails
from tests.tiny_run import pack_scenes, tiny_recipe, write_recipe
from tools.make_shards.__main__ import main as make_shards
from tools.make_shards.scenes import make_scene


def pack_clips(folder: Path, count: int, split: str) -> None:
    """Clips of three digit scenes, with captions of the last one."""
    captions = {}
    for number in range(count):
        place = folder / "frames" / split / f"clip{number:03d}"
        place.mkdir(parents=True)
        for frame in range(3):
            scene = make_scene(3 * number + frame, split=split, size=32)
            Image.fromarray(scene.image).save(place / f"{frame}.png")
        captions[place.name] = list(scene.captions)
    table = folder / f"{split}.json"
    table.write_text(json.dumps(captions))
    arguments = [
        "frames",
        "--out",
        folder,
        "--split",
        split,
        "--images",
        place.parent,
        "--captions",
        table,
    ]
    assert make_shards([*map(str, arguments)]) == 0


def test_two_ranks_with_partitioned_weights_equal_one(tmp_path):
    pack_scenes(tmp_path / "scenes", train=30, heldout=2)
    for split, count in (("train", 24), ("heldout", 5)):
        pack_clips(tmp_path / "clips", count, split)
    found = {}
    for world, stage in ((1, "zero2"), (2, "zero3")):
        run = tmp_path / f"run{world}"
        recipe = tiny_recipe(
            tmp_path / "clips",
            run,
            deepspeed=stage,
            steps=4,
            tokenizer__path=str(tmp_path / "scenes" / "tokenizer"),
            tasks__caption__data__frames=2,
            tasks__caption__objective__decoder__frames=3,
            tasks__caption__objective__decoder__dropout=0.0,
        )
        path, out = write_recipe(tmp_path / f"{world}.yaml", recipe), tmp_path / f"out{world}"
        assert run_ranks("pretrain.train", [path], world, out) == [0] * world, tails(out)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[world] = [line["loss"] for line in lines]
        assert lines[-1]["kind"] == "evaluation" and lines[-1]["images"] == 5
    assert len(found[1]) == 5 and found[2] == pytest.approx(found[1], abs=1e-5)

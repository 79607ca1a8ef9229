"""`tools.evaluate --metrics`: moves of images, and what is said of runs and of folders."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPConfig, CLIPForImageClassification

from data_pipeline.images.transforms import ImageSettings, ImageTransform
from data_pipeline.reading.reader import SampleReader
from data_pipeline.shards.packer import ShardWriter
from data_pipeline.shards.shard_set import ShardSet
from tools.convert.export_git import image_processor
from tools.evaluate import main
from tools.judge.moves import DIRECTIONS, MOVES, amounts, directions, moved, still
from tools.judge.prompts import read_prompts
from tools.make_shards.scenes import make_scene, scene_members


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """A folder of transformers with a tiny classifier of ten classes, of random weights."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(2)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    model = CLIPForImageClassification(CLIPConfig(vision_config=vision, num_labels=10))
    model.classifier.weight.data.normal_()
    model.save_pretrained(folder)
    processor = image_processor(ImageSettings(size=32))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return folder


def found(source: Path, metrics: str, scenes: Path, out: Path, *more: object) -> dict:
    shards = ["--shards", scenes / "heldout", "--workers", 0, "--json", out / "m.json"]
    words = [source, "--metrics", metrics, *shards, *more]
    assert main([str(word) for word in words]) == 0
    return json.loads((out / "m.json").read_text(encoding="utf-8"))


def test_a_classifier_of_transformers(classifier, scenes, tmp_path, capsys):
    picture = tmp_path / "p.png"
    wanted = "top5,resolutions,invariance,knn"
    more = ("--plot", picture, "--train", scenes / "train", "--sizes", 24, 32)
    content = found(classifier, wanted, scenes, tmp_path, *more)
    metrics = content["metrics"]
    reader = SampleReader(ShardSet.open(str(scenes / "heldout")))
    samples = [reader.read(row).members for row in range(10)]
    settings = ImageSettings(size=32, mode="center_crop")
    model = CLIPForImageClassification.from_pretrained(classifier)
    table = np.zeros((10, 10), int)
    for members in (one for one in samples if "cls" in one):
        pixels = torch.from_numpy(ImageTransform(settings)(members["jpg"], None)).permute(2, 0, 1)
        mean, std = (torch.tensor(v)[:, None, None] for v in (settings.mean, settings.std))
        scores = model(pixel_values=((pixels / 255 - mean) / std)[None]).logits
        table[int(members["cls"]), scores.argmax().item()] += 1
    assert metrics["confusion"] == table.tolist()
    assert metrics["top1"] == pytest.approx(np.trace(table) / table.sum())
    assert metrics["images"] == table.sum() > 0 and metrics["top1"] <= metrics["top5"] <= 1
    assert metrics["resolutions"]["size"] == [24, 32]
    assert metrics["resolutions"]["top1"][1] == pytest.approx(metrics["top1"])
    for move in MOVES:
        alone = metrics[move]["amount"].index(still(move))
        assert metrics[move]["agreement"][alone] == 1.0
        assert metrics[move]["top1"][alone] == pytest.approx(metrics["top1"])
        assert min(metrics[move]["cross_entropy"]) == metrics[move]["cross_entropy"][alone]
    assert min(metrics["rotation"]["agreement"]) < 1.0
    words = [classifier, "--metrics", "knn", "--shards", scenes / "heldout", "--pool", "head"]
    assert main([str(word) for word in words]) == 1
    assert "take --pool mean or class_token" in capsys.readouterr().err.replace("\n", " ")
    assert content["images_are"] == "unknown"
    assert Image.open(picture).format == "PNG"


def test_a_run_says_whether_the_images_are_its_own(run_dir, scenes, tmp_path, capsys):
    more = ("--train", scenes / "train")
    assert found(run_dir, "knn", scenes, tmp_path, *more)["images_are"] == "held-out"
    of_training = ("--shards", scenes / "train")
    assert found(run_dir, "knn", scenes, tmp_path, *more, *of_training)["images_are"] == "training"
    assert "training images" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("source", "metrics", "says"),
    [
        ("run", "top1", "top1 does not fit it; what does: knn, linear; top1, resolutions"),
        ("run", "zeroshot", "zeroshot and retrieval are for contrastive tasks"),
        ("run", "knn", "give them with --train"),
        ("scenes", "knn", "SOURCE is a run (`python -m pretrain.train RECIPE`), an export"),
        ("nowhere", "knn", "there is no such folder"),
        ("export", "knn", "is a captioner: `--metrics captions` judges it"),
    ],
)
def test_what_does_not_fit_is_told(source, metrics, says, run_dir, export, scenes, capsys):
    places = {"run": run_dir, "scenes": scenes, "export": export, "nowhere": Path("nowhere")}
    words = [places[source], "--metrics", metrics, "--shards", scenes / "heldout"]
    assert main([str(word) for word in words]) == 1
    assert says in capsys.readouterr().err.replace("\n", " ")


def test_images_that_take_no_part_are_counted(classifier, tmp_path, capsys):
    """One without a class, one that is no image; by shards, on the screen and in the JSON."""
    rows = []
    for number in range(120):
        scene = scene_members(make_scene(number, split="heldout", seed=0, size=32))
        members = {"jpg": scene["jpg"], "cls": b"%d" % (number % 10)}
        if number == 3:
            del members["cls"]
        if number == 7:
            members["jpg"] = scene["jpg"][:100]
        rows.append(members)
    with ShardWriter(tmp_path / "set") as writer:
        for number, members in enumerate(rows):
            writer.write(f"{number:03d}", members)
    words = [classifier, "--metrics", "top1", "--shards", tmp_path / "set", "--workers", 0]
    assert main([str(word) for word in [*words, "--json", tmp_path / "m.json"]]) == 0
    content = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))
    assert content["metrics"]["images"] == 118
    assert content["left_out"] == {str(tmp_path / "set"): {"bad": 1, "without a class": 1}}
    said = capsys.readouterr().out.replace("\n", " ")
    assert "are left out: bad" in said and "are left out: without a class" in said


def test_all_eight_directions_are_drawn_alike():
    drawn = directions(range(4000))
    assert set(drawn) == set(DIRECTIONS) and len(DIRECTIONS) == 8
    assert min(drawn.count(way) for way in DIRECTIONS) > 400
    assert drawn == directions(range(4000))


@given(st.integers(0, 7), st.integers(0, 5))
def test_a_translation_by_whole_pixels_copies_them(way, amount):
    pixels = torch.rand(1, 3, 12, 16)
    down, right = (amount * sign for sign in DIRECTIONS[way])
    wanted = torch.zeros_like(pixels)
    for y in range(12):
        for x in range(16):
            if 0 <= y - down < 12 and 0 <= x - right < 16:
                wanted[..., y, x] = pixels[..., y - down, x - right]
    shifted = moved(pixels, "translation", float(amount), [DIRECTIONS[way]])
    torch.testing.assert_close(shifted, wanted, rtol=0, atol=1e-4)


def test_a_quarter_turn_and_a_zoom():
    pixels = torch.rand(2, 3, 8, 8)
    turned = moved(pixels, "rotation", 90.0, [(0, 1), (0, -1)])
    torch.testing.assert_close(turned[0], pixels[0].rot90(1, (1, 2)), rtol=0, atol=1e-4)
    torch.testing.assert_close(turned[1], pixels[1].rot90(-1, (1, 2)), rtol=0, atol=1e-4)
    half = moved(torch.ones(1, 3, 8, 8), "scale", 2.0, [(0, 1)])
    assert half[..., 2:6, 2:6].eq(1).all() and half.sum() == 3 * 16
    for move in MOVES:
        assert still(move) in amounts(move, 224)
    assert amounts("translation", 224) == [4.0 * step for step in range(17)]


def test_prompts_are_read_and_wrong_ones_named(tmp_path):
    file = tmp_path / "p.yaml"
    file.write_text("classes: [daisy, rose]\ntemplates: ['a {}.', 'one {}']\n", encoding="utf-8")
    assert read_prompts(file).texts() == [["a daisy.", "one daisy"], ["a rose.", "one rose"]]
    file.write_text("classes: [daisy, rose]\ntemplates: [a flower]\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"p\.yaml: templates: .* needs one \{\}"):
        read_prompts(file)

"""Folders, COCO and tables become the samples that were meant; mistakes name file and line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline.reading.reader import SampleReader
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.shard_set import ShardSet
from tools.make_shards.__main__ import main
from tools.make_shards.coco import coco_source
from tools.make_shards.images import BuildImage, item_bytes


def photo(path: Path, width: int = 40, height: int = 30, seed: int = 0, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments] + ["--processes", "1"])


def read_all(folder: Path) -> dict:
    """Key -> (members, parsed json) of a packed folder, in storage order."""
    shards = ShardSet.open(folder)
    reader = SampleReader(shards)
    samples = [reader.read(row) for row in range(len(shards))]
    return {s.key: (s.members, json.loads(s.members["json"])) for s in samples}


@pytest.fixture
def flowers(tmp_path) -> Path:
    root = tmp_path / "flowers"
    for number, name in enumerate(["rose/1.jpg", "rose/2.v1.PNG", "daisy/x/3.webp", "daisy/1.jpg"]):
        photo(root / name, seed=number)
    photo(root / "daisy" / "1.png", seed=9)
    (root / "daisy" / "notes.txt").write_text("no image")
    (root / "daisy" / "._1.jpg").write_text("no image")
    return root


def test_folder(tmp_path, flowers):
    assert run("folder", "--out", tmp_path / "out", "--images", flowers, "--licence", "CC0") == 0
    found = read_all(tmp_path / "out" / "train")
    # Equal names with different suffixes get the suffix into the key; dots vanish from it.
    assert set(found) == {"rose/1", "rose/2_v1", "daisy/x/3", "daisy/1_jpg", "daisy/1_png"}
    members, record = found["daisy/x/3"]
    assert list(members) == ["webp", "json", "cls"] and members["cls"] == b"0"
    assert members["webp"] == (flowers / "daisy/x/3.webp").read_bytes()
    assert record == {
        "file": "daisy/x/3.webp",
        "class": "daisy",
        "width": 40,
        "height": 30,
        "label": 0,
    }
    assert found["rose/2_v1"][1]["label"] == 1 and "png" in found["rose/2_v1"][0]
    manifest = Manifest.load(tmp_path / "out" / "train")
    assert manifest.classes == ["daisy", "rose"] and manifest.licence == "CC0"
    assert ShardSet.open(tmp_path / "out" / "train").column("label").sum() == 2


def test_folder_with_given_label_order(tmp_path, flowers):
    (tmp_path / "classes.txt").write_text("tulip\nrose\ndaisy\n")
    arguments = ["folder", "--images", flowers, "--classes", tmp_path / "classes.txt", "--out"]
    assert run(*arguments, tmp_path / "out", "--split", "val") == 0
    assert read_all(tmp_path / "out" / "val")["rose/1"][1]["label"] == 1
    (tmp_path / "classes.txt").write_text("rose\n")
    assert run(*arguments, tmp_path / "other") == 1


def test_folder_without_classes(tmp_path, capsys):
    photo(tmp_path / "in" / "a.jpg")
    assert run("folder", "--out", tmp_path / "out", "--images", tmp_path / "in") == 1
    assert "each sub-folder is a class" in capsys.readouterr().err
    for source in (["folder"], ["coco", "--captions", tmp_path / "in" / "a.jpg"]):
        assert run(*source, "--out", tmp_path / "out", "--images", tmp_path / "on") == 1
        assert f"{tmp_path / 'on'}: is not a folder" in capsys.readouterr().err


def test_links_that_lead_nowhere_and_folders_that_look_like_images(tmp_path, flowers, capsys):
    (flowers / "rose" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (flowers / "rose" / "folder.jpg").mkdir()
    arguments = ["folder", "--out", tmp_path / "out", "--images", flowers]
    assert run(*arguments) == 1
    message = capsys.readouterr().err
    assert "1 images are missing" in message and f"{flowers / 'rose' / 'gone.jpg'}: No" in message
    assert run(*arguments, "--on-missing", "skip") == 0
    assert len(read_all(tmp_path / "out" / "train")) == 5
    assert Manifest.load(tmp_path / "out" / "train").details["missing"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux only")
def test_names_that_are_not_utf8(tmp_path, capsys):
    path = photo(tmp_path / "in" / "a" / "b.jpg")
    os.rename(path, os.fsencode(path.parent) + b"/\xff.jpg")
    assert run("folder", "--out", tmp_path / "out", "--images", tmp_path / "in") == 1
    assert "xff.jpg': its name is not UTF-8: rename it" in capsys.readouterr().err


def test_the_seed_decides_the_order(tmp_path):
    for number in range(30):
        photo(tmp_path / "in" / "a" / f"{number:02d}.jpg", 8, 8)
    orders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        arguments = ["--out", tmp_path / name, "--images", tmp_path / "in", "--seed", seed]
        assert run("folder", *arguments, "--max-samples", 7) == 0
        orders.append(list(read_all(tmp_path / name / "train")))
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) != orders[0]
    assert len(Manifest.load(tmp_path / "a" / "train").shards) == 5


@pytest.fixture
def coco(tmp_path) -> dict[str, Path]:
    for number, (width, height) in enumerate([(40, 30), (30, 40), (50, 50)]):
        photo(tmp_path / "images" / f"{number}.jpg", width, height, seed=number)
    licences = [{"id": 4, "name": "CC BY", "url": "http://cc/by"}]

    def image(number, width, height):
        return {
            "id": number,
            "file_name": f"{number}.jpg",
            "width": width,
            "height": height,
            "license": 4,
            "flickr_url": f"http://f/{number}",
        }

    images = [image(0, 40, 30), image(1, 30, 40), image(2, 50, 50)]
    captions = {
        "licenses": licences,
        "images": images,
        "annotations": [
            {"image_id": 1, "id": 10, "caption": "a tree"},
            {"image_id": 0, "id": 11, "caption": "a dog"},
            {"image_id": 1, "id": 12, "caption": "ein Baum \u2013 grün"},
        ],
    }
    run_lengths = {"size": [30, 40], "counts": [0, 1200]}
    instances = {
        "licenses": licences,
        "images": images[:2],
        "categories": [{"id": 90, "name": "dog"}, {"id": 7, "name": "tree"}],
        "annotations": [
            {
                "image_id": 0,
                "id": 1,
                "category_id": 90,
                "bbox": [1, 2, 10, 20.5],
                "area": 99.5,
                "iscrowd": 0,
                "segmentation": [[1, 2, 11, 2, 11, 22.5]],
            },
            {
                "image_id": 0,
                "id": 2,
                "category_id": 7,
                "bbox": [0, 0, 40, 30],
                "area": 1200,
                "iscrowd": 1,
                "segmentation": run_lengths,
            },
        ],
    }
    paths = {"images": tmp_path / "images"}
    for name, content in (("captions", captions), ("instances", instances)):
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(json.dumps(content))
    return paths


def coco_arguments(coco, out) -> list:
    return ["coco", "--out", out, *(w for n, p in coco.items() for w in (f"--{n}", p))]


def test_coco(tmp_path, coco):
    assert run(*coco_arguments(coco, tmp_path / "out")) == 0
    found = read_all(tmp_path / "out" / "train")
    assert set(found) == {"000000000000", "000000000001", "000000000002"}
    members, record = found["000000000000"]
    assert members["jpg"] == (coco["images"] / "0.jpg").read_bytes()
    assert record == {
        "image_id": 0,
        "file": "0.jpg",
        "width": 40,
        "height": 30,
        "licence": "CC BY http://cc/by",
        "source": "http://f/0",
        "captions": ["a dog"],
        "boxes": [[1, 2, 11, 22.5], [0, 0, 40, 30]],
        "labels": [1, 0],
        "crowd": [0, 1],
        "areas": [99.5, 1200],
        "segmentations": [[[1, 2, 11, 2, 11, 22.5]], {"size": [30, 40], "counts": [0, 1200]}],
    }
    assert found["000000000001"][1]["captions"] == ["a tree", "ein Baum \u2013 grün"]
    # Listed among the instances without any: no objects. Not listed: nobody has looked.
    assert found["000000000001"][1]["boxes"] == []
    assert "boxes" not in found["000000000002"][1]
    manifest = Manifest.load(tmp_path / "out" / "train")
    assert manifest.classes == ["tree", "dog"] and manifest.licence == "CC BY http://cc/by"
    urls = [str(p) for p in (tmp_path / "out" / "train").glob("*.tar")]
    theirs = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg", "json")
    assert {j["image_id"]: i.size for i, j in theirs} == {0: (40, 30), 1: (30, 40), 2: (50, 50)}


def test_a_missing_image_is_an_error_or_left_out(tmp_path, coco, capsys):
    (coco["images"] / "1.jpg").unlink()
    arguments = coco_arguments(coco, tmp_path / "out")
    assert run(*arguments) == 1
    message = capsys.readouterr().err
    assert "1 images are missing" in message and "captions.json, image 1:" in message
    assert "images/1.jpg: No such file" in message
    assert run(*arguments, "--on-missing", "skip") == 0
    assert "left out: 1 items (1 missing" in capsys.readouterr().err
    manifest = Manifest.load(tmp_path / "out" / "train")
    assert manifest.samples == 2 and manifest.details["missing"] == 1


def test_an_image_that_is_none_is_an_error_or_left_out(tmp_path, coco, capsys):
    (coco["images"] / "2.jpg").write_bytes(b"<html>not found</html>")
    arguments = coco_arguments(coco, tmp_path / "out")
    assert run(*arguments) == 1
    message = capsys.readouterr().err
    assert "captions.json, image 2: cannot use" in message
    assert "2.jpg: not a readable image" in message
    (coco["images"] / "2.jpg").write_bytes(b"")
    assert run(*coco_arguments(coco, tmp_path / "empty")) == 1
    assert "2.jpg: the file is empty" in capsys.readouterr().err
    assert run(*arguments, "--on-missing", "skip") == 0
    assert Manifest.load(tmp_path / "out" / "train").details["left_out"] == 1


def test_annotations_of_another_image_are_noticed(tmp_path, coco, capsys):
    photo(coco["images"] / "0.jpg", 41, 30)
    assert run(*coco_arguments(coco, tmp_path / "out")) == 1
    assert "are for 40 x 30: not the same image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "captions",
            lambda c: c["annotations"][2].pop("caption"),
            r"annotations\[2\].*'caption'",
        ),
        (
            "captions",
            lambda c: c["annotations"][1].update(image_id=5),
            r"annotations\[1\]: .*image 5 is not in images",
        ),
        (
            "captions",
            lambda c: c["annotations"][1].update(caption=None),
            r"annotations\[1\]: .*caption None is not a string",
        ),
        (
            "captions",
            lambda c: c["images"].append(c["images"][0] | {"file_name": "x.jpg"}),
            r"images\[3\]: .*id 0 stands for '0\.jpg' already",
        ),
        ("captions", lambda c: c.pop("images"), "no list 'images'"),
        ("captions", lambda c: c.update(images={}), "no list 'images'"),
        ("captions", lambda c: c["annotations"].append(7), r"annotations\[3\]"),
        ("instances", lambda c: c["annotations"][1].update(bbox=[1, 2]), r"annotations\[1\]"),
        ("instances", lambda c: c["annotations"][0].update(category_id=1), r"annotations\[0\]"),
        ("instances", lambda c: c["images"][0].pop("file_name"), r"images\[0\]: .*'file_name'"),
    ],
)
def test_malformed_annotations_name_file_and_entry(coco, name, change, message):
    content = json.loads(coco[name].read_text())
    change(content)
    coco[name].write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{name}\.json.*{message}"):
        coco_source(coco["images"], coco["captions"], coco["instances"])


def test_identifiers_may_be_texts(tmp_path, coco):
    content = json.loads(coco["captions"].read_text().replace('"id": 1,', '"id": "a-1",'))
    for entry in content["annotations"]:
        entry["image_id"] = {1: "a-1"}.get(entry["image_id"], entry["image_id"])
    content["annotations"][0]["caption"] += " \ud83d"  # half a character, as JSON can have it
    coco["captions"].write_text(json.dumps(content))
    del coco["instances"]
    assert run(*coco_arguments(coco, tmp_path / "out")) == 0
    found = read_all(tmp_path / "out" / "train")
    assert set(found) == {"000000000000", "a-1", "000000000002"}
    assert found["a-1"][1]["captions"][0] == "a tree \ud83d"


def test_coco_needs_annotations(tmp_path, coco, capsys):
    assert run("coco", "--out", tmp_path / "out", "--images", coco["images"]) == 1
    assert "--captions or --instances" in capsys.readouterr().err


def test_short_side(tmp_path, coco):
    photo(coco["images"] / "0.jpg", 40, 30, exif=exif_rotated())
    del coco["instances"]
    assert run(*coco_arguments(coco, tmp_path / "out"), "--short-side", 15) == 0
    found = read_all(tmp_path / "out" / "train")
    sizes = [(r["width"], r["height"]) for _, (_, r) in sorted(found.items())]
    assert sizes == [(15, 20), (15, 20), (15, 15)]  # the first was shown turned by 90 degrees
    assert run(*coco_arguments(coco, tmp_path / "large"), "--short-side", 400) == 0
    members, _ = read_all(tmp_path / "large" / "train")["000000000002"]
    assert members["jpg"] == (coco["images"] / "2.jpg").read_bytes()  # never enlarged


def exif_rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_short_side_does_not_go_with_boxes(tmp_path, coco, capsys):
    assert run(*coco_arguments(coco, tmp_path / "out"), "--short-side", 15) == 1
    assert "leave resizing to the loader" in capsys.readouterr().err


@pytest.fixture
def table(tmp_path) -> Path:
    for number in range(3):
        photo(tmp_path / "t" / "img" / f"{number}.jpg", seed=number)
    path = tmp_path / "t" / "pairs.csv"
    path.write_text(
        "path,caption,score,kind\n"
        'img/0.jpg,"a dog, running",1.5,dog\n'
        'img/1.jpg,"two\nlines",,cat\n'
        "img/2.jpg,007,3,dog\n",
        encoding="utf-8-sig",
    )
    return path


def test_table_of_csv(tmp_path, table):
    arguments = ["table", "--out", tmp_path / "out", "--table", table, "--image-field", "path"]
    assert run(*arguments, "--number-fields", "score", "--label-field", "kind") == 0
    found = read_all(tmp_path / "out" / "train")
    records = [record for _, (_, record) in sorted(found.items())]
    assert [r["caption"] for r in records] == ["a dog, running", "two\nlines", "007"]
    assert [r["score"] for r in records] == [1.5, None, 3]
    assert [r["label"] for r in records] == [1, 0, 1]
    assert [r["file"] for r in records] == [f"img/{n}.jpg" for n in range(3)]
    column = ShardSet.open(tmp_path / "out" / "train").column("score")
    np.testing.assert_array_equal(np.sort(column), [1.5, 3, np.nan])


def test_table_of_json_lines(tmp_path, table):
    lines = [{"file": f"{n}.jpg", "captions": ["a", "b"], "n": n} for n in range(3)]
    path = tmp_path / "list.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)))
    arguments = ["table", "--out", tmp_path / "out", "--table", path]
    assert run(*arguments, "--images", table.parent / "img") == 0
    found = read_all(tmp_path / "out" / "train")
    assert sorted(record["n"] for _, record in found.values()) == [0, 1, 2]
    assert set(found) == {"000000001", "000000003", "000000005"}  # line numbers


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "path,score\nimg/0.jpg,high\n",
            ["--number-fields", "score"],
            "line 2: score 'high' is",
        ),
        ("path,score\nimg/0.jpg\n", [], "line 2: not 2 fields"),
        ("path,score\n,1\n", [], "line 2: no 'path'"),
        ("file,score\nimg/0.jpg,1\n", [], "line 2: no 'path'; it has file, score"),
        ("path,score\nimg/0.jpg,1\nimg/9.jpg,2\n", [], "pairs.csv, line 3: "),
        ("path\nimg/0.jpg\n", ["--number-fields", "score"], "has no fields ['score']"),
        ("path\n", [], "has no rows"),
        ("path,n,n\nimg/0.jpg,1,2\n", [], "has the fields ['n'] twice"),
        ("path\nimg/\udcff.jpg\n", [], "pairs.csv, line 2: byte 0xff is not UTF-8"),
    ],
)
def test_bad_tables_name_the_line(tmp_path, table, capsys, text, options, message):
    table.write_text(text, encoding="utf-8", errors="surrogateescape")
    arguments = ["table", "--out", tmp_path / "out", "--table", table, "--image-field", "path"]
    assert run(*arguments, *options) == 1
    assert message in capsys.readouterr().err


def test_scenes_are_packed_the_same_by_any_number_of_processes(tmp_path):
    command = ["scenes", "--count", "40", "--max-samples", "15", "--split", "heldout", "--out"]
    assert main([*command, str(tmp_path / "one"), "--processes", "1"]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "tools.make_shards", *command, tmp_path / "two", "--processes", "2"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "40/40" in done.stderr and "40 samples in 3 shards" in done.stderr
    one, two = (
        {p.name: p.read_bytes() for p in (tmp_path / name / "heldout").iterdir()}
        for name in ("one", "two")
    )
    assert one == two and len(one) == 7
    manifest = Manifest.load(tmp_path / "one" / "heldout")
    assert manifest.fields["jpg"] == manifest.fields["json"] == 40 > manifest.fields["cls"]
    assert "--split heldout" in manifest.command and "--processes" not in manifest.command
    assert "CC BY 4.0" in manifest.licence


def test_max_bytes_is_kept(tmp_path, flowers):
    for number in range(20):
        photo(flowers / "rose" / f"many{number}.jpg", 60, 60, seed=number, quality=95)
    arguments = ["folder", "--out", tmp_path / "out", "--images", flowers]
    assert run(*arguments, "--max-bytes", "20k") == 0
    shards = Manifest.load(tmp_path / "out" / "train").shards
    assert len(shards) > 4 and all(s.bytes <= 20_000 for s in shards)


def test_the_size_estimate_is_an_upper_bound(coco):
    source = coco_source(coco["images"], coco["captions"], coco["instances"])
    for item in source.items:
        members = BuildImage()(item)
        exact = sum(512 + -(-len(data) // 512) * 512 for data in members.values())
        assert exact <= item_bytes(item) <= exact + 1536


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-bytes", "many"),
        ("--max-bytes", "infG"),
        ("--max-samples", "0"),
        ("--seed", "-1"),
        ("--split", "../x"),
        ("--split", ""),
    ],
)
def test_wrong_options_are_usage_errors(tmp_path, option, value):
    with pytest.raises(SystemExit) as stopped:
        run("folder", "--out", tmp_path, "--images", tmp_path, option, value)
    assert stopped.value.code == 2


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_named_and_leaves_no_litter(tmp_path, flowers, processes):
    """A limit on the size of files stands for the disk."""
    photo(flowers / "rose" / "large.jpg", 600, 600)
    options = ["--images", flowers, "--max-samples", "2", "--processes", str(processes)]
    command = [sys.executable, "-m", "tools.make_shards", "folder", *options]
    command += ["--out", tmp_path / "out"]
    limited = ["bash", "-c", 'trap "" XFSZ; ulimit -f 100; exec "$@"', "-", *command]
    root = Path(__file__).parents[3]
    done = subprocess.run(limited, cwd=root, capture_output=True, text=True)
    folder = tmp_path / "out" / "train"
    assert done.returncode == 1
    assert "File too large" in done.stderr and f"{folder}/train-00000" in done.stderr
    assert not list(folder.glob(".*")) and not (folder / "manifest.json").exists()
    assert subprocess.run(command, cwd=root, capture_output=True).returncode == 0
    assert run("folder", *options[:-2], "--out", tmp_path / "whole") == 0
    for path in (tmp_path / "whole" / "train").iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()

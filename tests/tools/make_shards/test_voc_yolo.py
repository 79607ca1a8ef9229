"""Pascal VOC and YOLO annotations, right and wrong ones, written by hand."""

import json
from pathlib import Path

import pytest

from data_pipeline.shards.manifest import Manifest
from tests.tools.make_shards.test_make_shards import exif_rotated, photo, read_all, run
from tools.make_shards.coco import coco_source
from tools.make_shards.voc_yolo import YoloForm, voc_source, yolo_source


def voc_object(name: str, box: tuple[int, ...], extra: str = "") -> str:
    corners = "".join(
        f"<{side}>{value}</{side}>"
        for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>"


def write_voc(root: Path, stem: str, objects: str, size: tuple[int, int] = (40, 30)) -> None:
    root.mkdir(exist_ok=True)
    (root / f"{stem}.xml").write_text(
        f"<annotation><filename>{stem}.jpg</filename><size><width>{size[0]}</width>"
        f"<height>{size[1]}</height><depth>3</depth></size>{objects}</annotation>"
    )


@pytest.fixture
def voc(tmp_path) -> tuple[Path, Path]:
    images, annotations = tmp_path / "JPEGImages", tmp_path / "Annotations"
    for number in range(3):
        photo(images / f"{number}.jpg", 40, 30, seed=number)
    hard = "<difficult>1</difficult><truncated>1</truncated>"
    write_voc(
        annotations,
        "0",
        voc_object("dog", (1, 1, 40, 30), hard) + voc_object("cat", (11, 6, 20, 15)),
    )
    write_voc(annotations, "1", "")
    write_voc(annotations, "2", voc_object("dog", (2, 3, 4, 5)))
    return images, annotations


def arguments_of(kind: str, tmp_path: Path, **options) -> list:
    words = [kind, "--out", tmp_path / "out"]
    return words + [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", v)]


def test_voc(tmp_path, voc):
    assert run(*arguments_of("voc", tmp_path, images=voc[0], annotations=voc[1])) == 0
    found = read_all(tmp_path / "out" / "train")
    assert found["0"][1] == {
        "file": "0.jpg",
        "width": 40,
        "height": 30,
        # Its first pixel is number 1, and the last one is inside of the box.
        "boxes": [[0, 0, 40, 30], [10, 5, 20, 15]],
        "labels": [1, 0],
        "crowd": [0, 0],
        "areas": [1200, 100],
        "difficult": [1, 0],
        "truncated": [1, 0],
    }
    assert found["1"][1]["boxes"] == [] and found["1"][1]["labels"] == []
    assert Manifest.load(tmp_path / "out" / "train").classes == ["cat", "dog"]


def test_voc_of_a_list_with_given_classes(tmp_path, voc):
    (tmp_path / "train.txt").write_text("0  1\n2 -1\n\n")
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    options = {"images": voc[0], "annotations": voc[1], "list": tmp_path / "train.txt"}
    options |= {"classes": tmp_path / "classes.txt", "first_pixel": 0}
    assert run(*arguments_of("voc", tmp_path, **options), "--on-bad-box", "drop") == 0
    found = read_all(tmp_path / "out" / "train")
    assert sorted(found) == ["0", "2"]
    assert found["2"][1]["boxes"] == [[2, 3, 5, 6]] and found["2"][1]["labels"] == [0]


def test_voc_lists_name_what_is_there(tmp_path, voc, capsys):
    images, annotations = voc
    photo(images / "a dog 1.jpg", 40, 30)
    write_voc(annotations, "a dog 1", "")
    (tmp_path / "train.txt").write_text("a dog 1\n0 1\n")
    options = {"images": images, "annotations": annotations, "list": tmp_path / "train.txt"}
    assert run(*arguments_of("voc", tmp_path, **options)) == 0
    assert sorted(read_all(tmp_path / "out" / "train")) == ["0", "a dog 1"]
    (tmp_path / "train.txt").write_text("0\na cat\n")
    assert run(*arguments_of("voc", tmp_path / "other", **options)) == 1
    assert "--list names 'a cat'" in capsys.readouterr().err
    (tmp_path / "train.txt").write_text("0\n0 1\n")
    assert run(*arguments_of("voc", tmp_path / "other", **options)) == 1
    assert "train.txt: names ['0'] twice" in capsys.readouterr().err


def test_bad_boxes_are_named_or_dropped(tmp_path, voc, capsys):
    images, annotations = voc
    (tmp_path / "classes.txt").write_text("dog\n")
    bad = voc_object("dog", (5, 5, 60, 10)) + voc_object("dog", (9, 5, 3, 10))
    write_voc(annotations, "1", bad)
    options = {"images": images, "annotations": annotations, "classes": tmp_path / "classes.txt"}
    assert run(*arguments_of("voc", tmp_path, **options)) == 1
    message = capsys.readouterr().err
    assert "3 of 5 boxes are bad" in message
    assert "0.xml, object 2: class 'cat' is not in the classes" in message
    assert "1.xml, object 1: box 4, 4, 60, 10 is outside of the image of 40 x 30" in message
    assert "1.xml, object 2: box 8, 4, 3, 10 is empty" in message
    assert run(*arguments_of("voc", tmp_path, **options), "--on-bad-box", "drop") == 0
    assert "dropped boxes: 3" in capsys.readouterr().err
    assert read_all(tmp_path / "out" / "train")["1"][1]["boxes"] == []


def test_a_voc_annotation_of_another_image_is_noticed(tmp_path, voc, capsys):
    write_voc(voc[1], "1", "", size=(41, 30))
    assert run(*arguments_of("voc", tmp_path, images=voc[0], annotations=voc[1])) == 1
    assert "1.xml: " in (message := capsys.readouterr().err)
    assert "annotations are for 41 x 30: not the same image" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>", "1.xml: malformed VOC annotation: no element found"),
        ("<annotation/>", "1.xml: malformed VOC annotation: no filename"),
        (voc_object("dog", (1, 2, 3, "x")), "1.xml, object 1: malformed VOC annotation: could not"),
        (voc_object("", (1, 2, 3, 4)), "1.xml, object 1: malformed VOC annotation: no name"),
    ],
)
def test_malformed_voc_is_named(voc, text, message):
    if text.startswith("<object>"):
        write_voc(voc[1], "1", text)
    else:
        (voc[1] / "1.xml").write_text(text)
    with pytest.raises(ValueError, match=message):
        voc_source(*voc)


@pytest.fixture
def yolo(tmp_path) -> dict[str, Path]:
    images, labels = tmp_path / "images", tmp_path / "labels"
    photo(images / "a" / "0.jpg", 40, 20)
    photo(images / "1.jpg", 40, 20, exif=exif_rotated())
    photo(images / "2.jpg", 40, 20)
    (labels / "a").mkdir(parents=True)
    (labels / "a" / "0.txt").write_text("1 0.5 0.5 0.5 0.5\n\n0 0 0 1 0 0.5 0.5\n")
    (labels / "1.txt").write_text("0 0.5 0.5 1 1\n")
    (tmp_path / "data.yaml").write_text("task: segment\nnames:\n  0: cat\n  1: dog\n")
    return {"images": images, "labels": labels, "classes": tmp_path / "data.yaml"}


def test_yolo(tmp_path, yolo):
    assert run(*arguments_of("yolo", tmp_path, **yolo)) == 0
    found = read_all(tmp_path / "out" / "train")
    record = found["a/0"][1]
    assert record["boxes"] == [[10, 5, 30, 15], [0, 0, 40, 10]] and record["labels"] == [1, 0]
    assert record["segmentations"] == [None, [[0, 0, 40, 0, 20, 10]]]
    # Coordinates are those of the image as it is shown.
    assert found["1"][1]["boxes"] == [[0, 0, 20, 40]] and found["1"][1]["width"] == 20
    assert found["2"][1]["boxes"] == []  # no label file: no objects
    manifest = Manifest.load(tmp_path / "out" / "train")
    assert manifest.classes == ["cat", "dog"] and manifest.details["without_label_file"] == 1


def test_a_folder_that_labels_none_of_the_images_is_refused(yolo):
    with pytest.raises(ValueError, match="has a label file for none of the 3 images"):
        yolo_source(yolo["images"], yolo["images"], ["cat", "dog"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2 0.5 0.5 0.5 0.5", "2.txt, line 1: class 'number 2' is not in the classes"),
        ("0 0.5 0.5 1.2 0.5", "2.txt, line 1: box -4, 5, 44, 15 is outside of the image"),
        ("0 nan 0.5 0.2 0.5", "2.txt, line 1: box nan, 5, nan, 15 is not of finite numbers"),
        ("0 0.5 0.5", "2.txt, line 1: malformed YOLO label: 2 numbers behind the class"),
        ("cat 0.5 0.5 0.5 0.5", "2.txt, line 1: malformed YOLO label: invalid literal"),
    ],
)
def test_bad_yolo_labels_are_named(yolo, text, message):
    (yolo["labels"] / "2.txt").write_text(text + "\n")
    with pytest.raises(ValueError, match=message):
        yolo_source(yolo["images"], yolo["labels"], ["cat", "dog"], form=YoloForm(polygons=True))


@pytest.mark.parametrize(
    ("shape", "line"),
    [
        ([2, 2], "0 0.5 0.5 0.4 0.6 0.45 0.3 0.55 0.35"),
        ([2, 3], "0 0.5 0.5 0.4 0.6 0.45 0.3 2 0.55 0.35 1"),
    ],
)
def test_yolo_key_points(tmp_path, shape, line):
    photo(tmp_path / "images" / "0.jpg", 100, 100)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "0.txt").write_text(f"\ufeff{line}\n0 0.5 0.5 0.4 0.6\n", "utf-8")
    (tmp_path / "data.yaml").write_text(f"names: [person]\nkpt_shape: {shape}\n")
    paths = {
        "images": tmp_path / "images",
        "labels": tmp_path / "labels",
        "classes": tmp_path / "data.yaml",
    }
    assert run(*arguments_of("yolo", tmp_path, **paths)) == 0
    ((_, record),) = read_all(tmp_path / "out" / "train").values()
    assert record["boxes"] == [[30, 20, 70, 80]] * 2 and "segmentations" not in record
    points = [[45, 30, 2], [55, 35, 1]]
    assert record["key_points"] == [[point[: shape[1]] for point in points], None]
    # A box, a confidence and a track number; a box and a confidence; a point too few.
    for wrong in ("0 0.5 0.5 0.4 0.6 0.93 1", "0 0.5 0.5 0.4 0.6 0.93", line.rsplit(" ", 1)[0]):
        (tmp_path / "labels" / "0.txt").write_text(wrong)
        with pytest.raises(ValueError, match=r"0\.txt, line 1: malformed YOLO label: \d numbers"):
            yolo_source(paths["images"], paths["labels"], ["person"], form=YoloForm((2, shape[1])))


def test_yolo_classes_may_be_a_list_and_must_be_there(tmp_path, yolo, capsys):
    yolo["classes"].write_text("names: [cat, dog]\n")
    arguments = arguments_of("yolo", tmp_path, **yolo)
    assert run(*arguments) == 1
    message = capsys.readouterr().err  # nothing is guessed from six numbers
    assert "a/0.txt, line 3: malformed YOLO label: 6 numbers" in message
    assert "say --segments" in message
    assert run(*arguments, "--segments") == 0
    yolo["classes"].write_text("nc: 2\n")
    assert run(*arguments_of("yolo", tmp_path / "other", **yolo)) == 1
    assert "has no list `names`" in capsys.readouterr().err


def test_boxes_do_not_shrink(tmp_path, yolo, capsys):
    assert run(*arguments_of("yolo", tmp_path, **yolo), "--short-side", 10) == 1
    assert "--short-side with yolo" in capsys.readouterr().err


def test_coco_boxes_are_checked_as_the_others(tmp_path, capsys):
    """Each bad box is named with its annotation, or left out and counted; the good ones stay."""
    for number in range(4):
        photo(tmp_path / "images" / f"{number}.jpg", 100, 80, seed=number)

    def annotation(image: int, box: list, segmentation=None, category=1) -> dict:
        return {
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "segmentation": segmentation,
        }

    runs = {"size": [80, 100], "counts": [8000]}
    entries = [
        annotation(0, [10, 10, 30, 30], [[10, 10, 30, 10, 30, 30]]),
        annotation(0, [10, 10, 30, 0]),
        annotation(0, [60, 50, 80, 60]),
        annotation(0, [50, 50, -20, 20]),
        annotation(0, [10, 10, float("nan"), 20]),
        annotation(0, [10, 10, 20, 20], [[10, 10, 30, 30]]),
        annotation(0, [10, 10, 20, 20], {**runs, "counts": [7]}),
        annotation(0, [10, 10, 20, 20], category=91),
        annotation(1, [-5, -5, 30, 30]),
        annotation(2, [0, 0, 100.5, 80], []),
        annotation(3, [0, 0, 9, 9], []),
        annotation(2, [1, 1, 2, 2], runs),
    ]
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 100, "height": 80} for n in range(4)]
    images[2] = {"id": 2, "file_name": "2.jpg"}  # the file says how large it is
    content = {"images": images, "categories": [{"id": 1, "name": "cup "}], "annotations": entries}
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(content), "utf-8-sig")
    arguments = arguments_of("coco", tmp_path, images=tmp_path / "images", instances=path)
    assert run(*arguments) == 1
    message = capsys.readouterr().err
    assert "8 of 12 boxes are bad" in message and "--on-bad-box drop" in message
    assert "boxes.json, annotations[1]: box 10, 10, 40, 10 is empty" in message
    with pytest.raises(ValueError, match=r"annotations\[0\]: category 91 is not in categories"):
        path.write_text(json.dumps({**content, "annotations": [entries[7]]}))
        coco_source(tmp_path / "images", None, path)
    path.write_text(json.dumps(content))
    assert run(*arguments, "--on-bad-box", "drop") == 0
    found = [record for _, (_, record) in sorted(read_all(tmp_path / "out" / "train").items())]
    assert [record["boxes"] for record in found] == [
        [[10, 10, 40, 40]],
        [],
        [[0, 0, 100, 80], [1, 1, 3, 3]],
        [[0, 0, 9, 9]],
    ]
    assert [r["segmentations"] for r in found[1:]] == [[], [None, runs], [None]]
    manifest = Manifest.load(tmp_path / "out" / "train")
    assert manifest.classes == ["cup"] and manifest.details["dropped_boxes"] == 8
    assert manifest.details["images_left_without_boxes"] == 1

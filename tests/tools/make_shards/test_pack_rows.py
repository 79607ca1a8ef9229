"""What goes into a packer comes out of it: as a sample, or named and counted."""

import base64
import csv
import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.plain_text import decoded, json_bytes, parsed_json, read_names
from data_pipeline.shards.manifest import Manifest
from tests.tools.make_shards.test_make_shards import photo, read_all, run
from tests.tools.make_shards.test_voc_yolo import voc_object, write_voc
from tools.make_shards.options import unique_keys
from tools.make_shards.run import LEFT_OUT_NAME
from tools.make_shards.tables import table_source
from tools.make_shards.walk import walk_images

# What people's texts hold, and what readers of tables stumble over.
HOSTILE = [
    '"',
    '""',
    '"open',
    'close"',
    '12" vinyl',
    "a,b",
    "'",
    "\\",
    "\\N",
    "#",
    " x ",
    "é",
    "\u2028",
    "\x0b",
    "NaN",
    "null",
    "=1+1",
    '"Sunset" over a bay',
    "\ufeffmark",
    "\x1c",
]
ROWS = 12
BROKEN = {2, 7}
"""Numbers of rows whose image is missing."""


def texts(seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(HOSTILE, k=3)) for _ in range(ROWS)]


def photos(root: Path) -> list[Path]:
    paths = [root / f"{number}.jpg" for number in range(ROWS)]
    for number in set(range(ROWS)) - BROKEN:
        photo(paths[number], seed=number)
    return paths


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def table_tsv(root: Path, captions: list[str]) -> list:
    photos(root)
    lines = [f"{number}.jpg\t{caption}" for number, caption in enumerate(captions)]
    (root / "t.tsv").write_text("\n".join(["path\tcaption", *lines]), "utf-8", newline="\n")
    return ["table", "--table", root / "t.tsv", "--image-field", "path"]


def table_csv(root: Path, captions: list[str]) -> list:
    photos(root)
    with open(root / "t.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "caption"])
        writer.writerows([f"{number}.jpg", caption] for number, caption in enumerate(captions))
    return ["table", "--table", root / "t.csv", "--image-field", "path"]


def table_quoted_tsv(root: Path, captions: list[str]) -> list:
    arguments = table_csv(root, captions)
    rows = list(csv.reader((root / "t.csv").read_text("utf-8-sig").split("\n")))
    with open(root / "t.tsv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(filter(None, rows))
    return [*arguments[:2], root / "t.tsv", *arguments[3:], "--quoted"]


def table_jsonl(root: Path, captions: list[str]) -> list:
    photos(root)
    lines = [json.dumps({"path": f"{n}.jpg", "caption": c}) for n, c in enumerate(captions)]
    (root / "t.jsonl").write_text("\n".join(lines), "utf-8-sig")
    return ["table", "--table", root / "t.jsonl", "--image-field", "path"]


def coco(root: Path, captions: list[str]) -> list:
    photos(root / "im")
    content = {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(ROWS)],
        "annotations": [{"image_id": n, "caption": c} for n, c in enumerate(captions)],
    }
    (root / "c.json").write_text(json.dumps(content), "utf-8-sig")
    return ["coco", "--images", root / "im", "--captions", root / "c.json"]


def git_tsv(root: Path, captions: list[str]) -> list:
    data = base64.b64encode(jpeg())
    lines = [b"k.%d\t%s" % (n, b"!" if n in BROKEN else data) for n in range(ROWS)]
    (root / "i.tsv").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    texts = [f"k.{number}\t{json.dumps([caption])}" for number, caption in enumerate(captions)]
    (root / "c.tsv").write_text("\n".join(texts), "utf-8", newline="\n")
    return ["tsv", "--images", root / "i.tsv", "--captions", root / "c.tsv"]


def img2dataset(root: Path, captions: list[str]) -> list:
    with tarfile.open(root / "00000.tar", "w") as tar:
        for number, caption in enumerate(captions):
            record = json.dumps({"caption": caption, "width": 4000}).encode()
            members = {"json": record} | ({} if number in BROKEN else {"jpg": jpeg()})
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (root / "00000_stats.json").write_text(json.dumps({"successes": ROWS}))
    return ["img2dataset", "--images", root]


def parquet(root: Path, captions: list[str]) -> list:
    pyarrow = pytest.importorskip("pyarrow")
    files = pytest.importorskip("pyarrow.parquet")
    photos(root)
    paths = [f"{number}.jpg" for number in range(ROWS)]
    table = pyarrow.table({"image": paths, "caption": captions})
    files.write_table(table, root / "t.parquet")
    return ["parquet", "--table", root / "t.parquet"]


def voc(root: Path, captions: list[str]) -> list:
    photos(root / "im")
    for number in range(ROWS):
        write_voc(root / "an", str(number), voc_object("dog", (1, 1, 9, 9)))
    return ["voc", "--images", root / "im", "--annotations", root / "an"]


def files(root: Path) -> None:
    """ROWS files that say they are images; the broken ones are links that lead nowhere."""
    for path in photos(root):
        if not path.exists():
            path.symlink_to(root / "nowhere")


def folder(root: Path, captions: list[str]) -> list:
    files(root / "im" / "dog")
    return ["folder", "--images", root / "im"]


def yolo(root: Path, captions: list[str]) -> list:
    files(root / "im")
    (root / "la").mkdir()
    (root / "la" / "0.txt").write_text("0 0.5 0.5 0.5 0.5")
    (root / "names.txt").write_text("dog\n")
    return [
        "yolo",
        "--images",
        root / "im",
        "--labels",
        root / "la",
        "--classes",
        root / "names.txt",
    ]


def frames(root: Path, captions: list[str]) -> list:
    for number in range(ROWS):
        path = photo(root / "im" / str(number) / "0.jpg", seed=number)
        if number in BROKEN:
            path.write_bytes(b"<html>")
    names = {str(number): [caption] for number, caption in enumerate(captions)}
    (root / "c.json").write_text(json.dumps(names), "utf-8-sig")
    return ["frames", "--images", root / "im", "--captions", root / "c.json"]


PACKERS = [
    table_tsv,
    table_csv,
    table_quoted_tsv,
    table_jsonl,
    coco,
    git_tsv,
    img2dataset,
    parquet,
    voc,
    folder,
    yolo,
    frames,
]


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_row_is_packed_or_named(tmp_path, packer: Callable[..., list], seed, capsys):
    """Texts arrive as they stand; what has no image is an error, or counted and named."""
    captions = texts(seed)
    (tmp_path / "in").mkdir()
    arguments = [*packer(tmp_path / "in", captions), "--out", tmp_path / "out"]
    assert run(*arguments) == 1
    assert "error: " in capsys.readouterr().err
    assert run(*arguments, "--on-missing", "skip") == 0
    records = [record for _, record in read_all(tmp_path / "out" / "train").values()]
    details = Manifest.load(tmp_path / "out" / "train").details
    named = (tmp_path / "out" / "train" / LEFT_OUT_NAME).read_text().splitlines()
    assert details["rows"] == ROWS
    assert len(records) == ROWS - len(BROKEN)
    assert details["missing"] + details["left_out"] == len(named) == len(BROKEN)
    if packer not in (voc, folder, yolo):
        # A mark at the beginning of a caption is one only at the beginning of the file.
        found = [r["caption"] if "caption" in r else r["captions"][0] for r in records]
        assert sorted(found) == sorted(captions[n] for n in set(range(ROWS)) - BROKEN)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('path\n0.jpg\n"1.jpg\n2.jpg\n', 3),
        ('path,c\n0.jpg,"open\n1.jpg,a\n2.jpg,12" x\n', 2),
        ('path,c\n0.jpg,a\n1.jpg,"a" b\n', 3),
        ('path,c\n0.jpg,"' + "x\n" * 100_000, 2),
    ],
)
def test_a_quote_that_does_not_close_names_its_row(tmp_path, text, line):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"t\.csv, line {line}: a quote that|line {line}: '"):
        table_source(path, image_field="path")


def test_rows_of_several_lines_are_counted(tmp_path):
    photo(tmp_path / "0.jpg")
    (tmp_path / "t.csv").write_text('path,c\n0.jpg,a\n0.jpg,"b\n0.jpg,c"\n')
    source = table_source(tmp_path / "t.csv", image_field="path")
    assert [item.record["c"] for item in source.items] == ["a", "b\n0.jpg,c"]
    assert source.account["rows_of_several_lines"] == {"rows": 1, "first": [3]}


def test_quotes_of_a_tsv_are_text_and_said(tmp_path):
    photo(tmp_path / "0.jpg")
    path = tmp_path / "t.tsv"
    path.write_text('path\tc\n0.jpg\t"a ""b"" c"\n0.jpg\t"Sun" set\n')
    source = table_source(path, image_field="path")
    assert [item.record["c"] for item in source.items] == ['"a ""b"" c"', '"Sun" set']
    assert source.account["texts_in_quotes"] == {"texts": 1, "without them": "--quoted"}
    path.write_text('path\tc\n0.jpg\t"a\tb"\n')
    with pytest.raises(ValueError, match=r"line 2: not 2 fields.*\(--quoted if texts"):
        table_source(path, image_field="path")
    (item,) = table_source(path, image_field="path", quoted=True).items
    assert item.record["c"] == "a\tb"


def test_own_columns_stay_beside_ours(tmp_path):
    photo(tmp_path / "0.jpg", 40, 30)
    row = {
        "path": "0.jpg",
        "width": 4000,
        "height": None,
        "file": "my id",
        "label": "dog",
        "columns": [1],
        "score": float("nan"),
    }
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    arguments = ["table", "--out", tmp_path / "out", "--table", tmp_path / "t.jsonl"]
    assert run(*arguments, "--image-field", "path", "--label-field", "label") == 0
    ((members, record),) = read_all(tmp_path / "out" / "train").values()
    assert record == {
        "file": "0.jpg",
        "width": 40,
        "height": 30,
        "label": 0,
        "score": None,
        "columns": {"width": 4000, "file": "my id", "label": "dog", "columns": [1]},
    }
    assert b"NaN" not in members["json"]


def test_the_walk_takes_images_and_counts_the_rest(tmp_path):
    root = tmp_path / ".hidden root" / "in"
    taken = ["a/1.JPG", "a/saved.jfif", "b/x.y/old.jpe", "b/plain"]
    passed = [
        ".git/1.jpg",
        "a/.ipynb_checkpoints/1.jpg",
        "__MACOSX/a/1.jpg",
        "a/@eaDir/1.jpg",
        "lost+found/1.jpg",
        "a/._1.jpg",
    ]
    for name in [*taken, *passed]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg())
    for suffix, kind in {"avif": "AVIF", "no": "JPEG2000", "tga": "QOI", "data": "PPM"}.items():
        Image.new("RGB", (4, 3)).save(root / f"b/of.{suffix}", kind)
        taken.append(f"b/of.{suffix}")
    (root / "a" / "Thumbs.db").write_bytes(jpeg())
    (root / "a" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (root / "a" / "notes.txt").write_text("P6 of the notes")
    Image.new("RGB", (4, 3)).save(root / "a" / "raw.NEF", "TIFF")  # of a camera: its preview
    os.mkfifo(root / "a" / "pipe")
    (root / "a" / "gone.md").symlink_to(root / "nowhere")
    (tmp_path / "elsewhere").mkdir()
    photo(tmp_path / "elsewhere" / "2.jpg")
    (root / "c").symlink_to(tmp_path / "elsewhere")  # as a folder of a shared data set
    found = walk_images(root)
    assert [path.as_posix() for path in found.files] == sorted([*taken, "c/2.jpg"])
    assert found.account() == {
        "hidden": {".jpg": 3},
        "of a system": {".db": 1, ".jpg": 3},
        "of another kind": {".heic": 1, ".nef": 1, ".txt": 1, "no suffix": 1},
        "unreadable": {".md": 1},
    }
    (root / "a" / "round").symlink_to(root)
    with pytest.raises(ValueError, match="is a link to a folder that it lies in"):
        walk_images(root)


def test_folders_without_images_are_no_classes(tmp_path, capsys):
    root = tmp_path / "in"
    for name in ("dog", "cat"):
        photo(root / name / "1.jpg")
    for name in ("lost+found", "__MACOSX", "apple", ".git"):
        (root / name).mkdir()
    photo(root / "loose.jpg")
    arguments = ["folder", "--images", root]
    assert run(*arguments, "--out", tmp_path / "out") == 0
    manifest = Manifest.load(tmp_path / "out" / "train")
    assert manifest.classes == ["cat", "dog"]
    assert manifest.details["passed_over"] == {"in no class folder": {".jpg": 1}}
    assert manifest.details["folders_without_images"] == ["apple"]
    assert 'passed over: {"in no class folder"' in capsys.readouterr().err
    (tmp_path / "names.txt").write_text("apple \r\ncat\r\n\r\ndog", "utf-8-sig")
    options = ["--out", tmp_path / "named", "--classes", tmp_path / "names.txt"]
    assert run(*arguments, *options) == 0
    assert Manifest.load(tmp_path / "named" / "train").classes == ["apple", "cat", "dog"]


def test_keys_are_unique_and_those_that_are_stay():
    wanted = ["a/x.1", "a/x_1", "a.b/x", "y-2", "y", "y", "y"]
    assert unique_keys(wanted) == ["a/x_1", "a/x_1-2", "a.b/x", "y-2", "y", "y-3", "y-4"]


def test_text_and_json_of_other_people(tmp_path):
    assert decoded(b"\xef\xbb\xbfa\xef\xbb\xbf") == "a\ufeff"
    for data, what in ((b"a\nb\xff", "here, line 2: byte 0xff"), ("x".encode("utf-16"), "UTF-16")):
        with pytest.raises(ValueError, match=what):
            decoded(data, "here")
    value = parsed_json(b'\xef\xbb\xbf{"a": [NaN, -Infinity, 1e999, 1.5], "b": 10}')
    assert value == {"a": [None, None, None, 1.5], "b": 10}
    nested = {"a": [float("inf"), (float("nan"), 1)], "t": "\ud83d"}
    assert json_bytes(nested) == b'{"a":[null,[null,1]],"t":"\\ud83d"}'
    (tmp_path / "n.txt").write_text("cup\n table \ncup", "utf-8-sig")
    with pytest.raises(ValueError, match=r"n\.txt, line 3: 'cup' is the class of line 1"):
        read_names(tmp_path / "n.txt")

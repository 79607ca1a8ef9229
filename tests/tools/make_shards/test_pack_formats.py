"""Sources of make_shards in other people's formats: TSV, img2dataset, frames, Parquet."""

import base64
import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset

from data_pipeline.reading.reader import SampleReader
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.shard_set import ShardSet
from tests.tools.make_shards.test_make_shards import photo, read_all, run
from tools.make_shards.frames import frames_source
from tools.make_shards.tsv import tsv_source


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    return [
        photo(tmp_path / "in" / f"p{n}.{'png' if n == 2 else 'jpg'}", 20 + n, 30, seed=n)
        for n in range(5)
    ]


# ---- TSV -----------------------------------------------------------------------------------------


def write_tsv(path: Path, rows: list[list[str]], newline: str = "\n") -> Path:
    path.write_bytes("".join("\t".join(row) + newline for row in rows).encode())
    return path


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


@pytest.fixture
def tsv(tmp_path, photos) -> dict[str, Path]:
    images = [[f"k/{n}.x", encoded(path)] for n, path in enumerate(photos)]
    captions = [[f"k/{n}.x", json.dumps([{"caption": f"photo {n}"}])] for n in range(5)]
    captions[1][1] = json.dumps(["eins", "zwei"])
    captions[2][1] = json.dumps([{"caption": "a", "question_id": 7}, {"question": "why?"}])
    captions.reverse()  # joined by key: the order of lines does not matter
    return {
        "images": write_tsv(tmp_path / "a.tsv", images, "\r\n"),
        "captions": write_tsv(tmp_path / "captions.tsv", captions),
    }


def test_tsv(tmp_path, tsv, photos):
    offsets, at = [], 0
    for line in tsv["images"].read_bytes().splitlines(keepends=True):
        offsets.append(at)
        at += len(line)
    (tmp_path / "a.lineidx").write_text("".join(f"{offset}\n" for offset in offsets))
    arguments = [word for name, path in tsv.items() for word in (f"--{name}", path)]
    assert run("tsv", "--out", tmp_path / "out", *arguments) == 0
    found = read_all(tmp_path / "out" / "train")
    assert sorted(found) == [f"k/{n}_x" for n in range(5)]
    for number, path in enumerate(photos):
        members, record = found[f"k/{number}_x"]
        assert members["png" if number == 2 else "jpg"] == path.read_bytes()
        assert (record["width"], record["height"]) == (20 + number, 30)
        assert record["key"] == f"k/{number}.x" and record["file"] == f"a.tsv:{number + 1}"
    assert found["k/0_x"][1]["captions"] == ["photo 0"]
    assert found["k/1_x"][1]["captions"] == ["eins", "zwei"]
    assert found["k/2_x"][1]["captions"] == ["a"]
    assert found["k/2_x"][1]["annotations"][1] == {"question": "why?"}


def test_tsv_images_alone_in_another_column(tmp_path, photos):
    path = write_tsv(tmp_path / "a.tsv", [["0", "[]", encoded(photos[0])]])
    assert run("tsv", "--out", tmp_path / "out", "--images", path, "--image-column", 3) == 0
    assert read_all(tmp_path / "out" / "train")["0"][0]["jpg"] == photos[0].read_bytes()


def test_tsv_lines_without_a_partner_are_named(tmp_path, tsv, capsys):
    lines = tsv["captions"].read_text().splitlines()
    lines[0] = lines[0].replace("k/4.x", "k/9.x")
    tsv["captions"].write_text("\n".join(lines) + "\n")
    arguments = [word for name, path in tsv.items() for word in (f"--{name}", path)]
    assert run("tsv", "--out", tmp_path / "out", *arguments) == 1
    message = capsys.readouterr().err
    assert "a.tsv, line 5: key 'k/4.x' has no captions" in message
    assert "captions.tsv, line 1: key 'k/9.x' has no image" in message
    assert run("tsv", "--out", tmp_path / "out", *arguments, "--on-missing", "skip") == 0
    manifest = Manifest.load(tmp_path / "out" / "train")
    assert (manifest.samples, manifest.details["missing"]) == (4, 2)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("images", "a\tAA==\na\tAA==\n", "a.tsv, line 2: key 'a' is there already: a.tsv, line 1"),
        ("images", "a\n", "a.tsv, line 1: has no column 2"),
        ("captions", "a\t{}\n", "captions.tsv, line 1: not a JSON list of captions: it is dict"),
        ("captions", "a\t[1]\n", "captions.tsv, line 1: not a JSON list"),
        ("captions", "a\n", "captions.tsv, line 1: not a JSON list"),
        ("captions", "a\t[]\na\t[]\n", "captions.tsv, line 2: key 'a' is there already"),
        ("captions", "\t[]\n", "captions.tsv, line 1: has no key"),
    ],
)
def test_malformed_tsv_is_named(tsv, name, text, message):
    tsv[name].write_text(text)
    captions = [] if name == "images" else [tsv["captions"]]
    with pytest.raises(ValueError, match=message):
        tsv_source([tsv["images"]], captions)


@pytest.mark.parametrize("index", ["0\n6\n", "0\n", "0\nx\n", "0\n7\n14\n"])
def test_a_line_index_that_does_not_fit_is_noticed(tmp_path, index):
    path = write_tsv(tmp_path / "a.tsv", [["a", "AA=="], ["b", "AA=="]])
    (tmp_path / "a.tsv.lineidx").write_text(index)
    with pytest.raises(ValueError, match=r"lineidx"):
        tsv_source([path], [])


def test_a_binary_line_index(tmp_path, photos):
    path = write_tsv(tmp_path / "a.tsv", [["a", "AA=="], ["b", "AA=="]])
    index = tmp_path / "a.lineidx.8b"
    index.write_bytes(b"".join(at.to_bytes(8, "little") for at in (0, 7)))
    assert len(tsv_source([path], []).items) == 2
    index.write_bytes(bytes(16))
    with pytest.raises(ValueError, match="does not fit line 2"):
        tsv_source([path], [])
    index.write_bytes(bytes(15))
    with pytest.raises(ValueError, match=r"a\.lineidx\.8b: has 15 bytes"):
        tsv_source([path], [])


def test_base64_that_is_none_is_a_fault_of_the_sample(tmp_path, photos, capsys):
    rows = [["good", encoded(photos[0])], ["bad", "no base64!"], ["text", "aGVsbG8="]]
    path = write_tsv(tmp_path / "a.tsv", rows)
    assert run("tsv", "--out", tmp_path / "out", "--images", path) == 1
    assert "a.tsv, line" in capsys.readouterr().err
    assert run("tsv", "--out", tmp_path / "out", "--images", path, "--on-missing", "skip") == 0
    assert list(read_all(tmp_path / "out" / "train")) == ["good"]


# ---- img2dataset ---------------------------------------------------------------------------------


def members_of(number: int, path: Path, **changes) -> dict[str, bytes]:
    record = {
        "caption": f"photo {number}",
        "url": f"http://x/{number}",
        "status": "success",
        "width": None,
        "sha256": "ab",
        **changes,
    }
    return {"jpg": path.read_bytes(), "txt": b"txt", "json": json.dumps(record).encode()}


@pytest.fixture
def downloads(tmp_path, photos) -> Path:
    """Two tars of three and two samples, as img2dataset leaves them."""
    root = tmp_path / "laion"
    root.mkdir()
    for part, numbers in (("00000", [0, 1, 3]), ("00001", [4])):
        with tarfile.open(root / f"{part}.tar", "w") as tar:
            for number in numbers:
                for extension, data in members_of(number, photos[number]).items():
                    info = tarfile.TarInfo(f"{part}{number:04d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        stats = {
            "count": 5,
            "successes": len(numbers),
            "failed_to_download": 5 - len(numbers),
            "status_dict": {"success": len(numbers), "HTTP Error 404": 2},
        }
        (root / f"{part}_stats.json").write_text(json.dumps(stats))
    return root


def test_img2dataset_tars(tmp_path, downloads, photos, capsys):
    assert run("img2dataset", "--out", tmp_path / "out", "--images", downloads) == 0
    assert '"HTTP Error 404": 4' in capsys.readouterr().err
    found = read_all(tmp_path / "out" / "train")
    assert sorted(found) == ["000000000", "000000001", "000000003", "000010004"]
    members, record = found["000010004"]
    assert members["jpg"] == photos[4].read_bytes()
    assert record == {
        "file": "00001.tar/000010004.jpg",
        "caption": "photo 4",
        "url": "http://x/4",
        "status": "success",
        "sha256": "ab",
        "width": 24,
        "height": 30,
    }
    counted = Manifest.load(tmp_path / "out" / "train").details["input"]
    assert (counted["count"], counted["successes"], counted["failed_to_download"]) == (10, 4, 6)


def test_img2dataset_files(tmp_path, photos):
    root = tmp_path / "files"
    (root / "00000").mkdir(parents=True)
    for number in range(3):
        status = {"status": "failed_to_resize"} if number == 1 else {}
        for extension, data in members_of(number, photos[number], **status).items():
            (root / "00000" / f"{number:09d}.{extension}").write_bytes(data)
    (root / "00000" / "000000002.json").unlink()
    (root / "00000_stats.json").write_text('{"count": 3}')
    assert run("img2dataset", "--out", tmp_path / "out", "--images", root) == 0
    found = read_all(tmp_path / "out" / "train")
    assert sorted(found) == ["000000000", "000000002"]
    assert found["000000002"][1]["caption"] == "txt"
    assert Manifest.load(tmp_path / "out" / "train").details["input"]["not_success"] == 1


def test_unfinished_and_damaged_parts_are_named(tmp_path, downloads, capsys):
    data = (downloads / "00000.tar").read_bytes()
    (downloads / "00000.tar").write_bytes(data[:2000])
    (downloads / "00001_stats.json").unlink()
    assert run("img2dataset", "--out", tmp_path / "out", "--images", downloads) == 1
    message = capsys.readouterr().err
    assert "00000.tar: byte" in message and "truncated" in message
    assert "00001.tar: no 00001_stats.json: img2dataset has not finished it" in message
    (downloads / "00001_stats.json").write_text('{"successes": 3}')
    assert run("img2dataset", "--out", tmp_path / "out", "--images", downloads) == 1
    assert "00001.tar: has 1 samples, and 3 by its statistics" in capsys.readouterr().err
    arguments = ["img2dataset", "--out", tmp_path / "out", "--images", downloads]
    assert run(*arguments, "--on-missing", "skip") == 0
    assert list(read_all(tmp_path / "out" / "train")) == ["000010004"]


def test_a_folder_that_is_no_output_of_img2dataset(tmp_path, capsys):
    assert run("img2dataset", "--out", tmp_path / "out", "--images", tmp_path / "no") == 1
    assert "holds neither 00000.tar" in capsys.readouterr().err


# ---- frames --------------------------------------------------------------------------------------


@pytest.fixture
def clips(tmp_path) -> Path:
    root = tmp_path / "clips"
    for clip, count in (("dog/v.1", 12), ("cat/v2", 3)):
        for number in range(count):
            photo(root / clip / f"frame{number}.jpg", 16, 12, seed=number)
    return root


def test_frames(tmp_path, clips):
    arguments = ["frames", "--out", tmp_path / "out", "--images", clips]
    assert run(*arguments, "--class-folders", "--max-frames", 4, "--fps", 30) == 0
    found = read_all(tmp_path / "out" / "train")
    members, record = found["dog/v_1"]
    assert list(members) == ["f000.jpg", "f001.jpg", "f002.jpg", "f003.jpg", "json", "cls"]
    for place, frame in enumerate([1, 4, 7, 10]):  # in time: frame 10 comes behind frame 9
        expected = (clips / f"dog/v.1/frame{frame}.jpg").read_bytes()
        assert members[f"f{place:03d}.jpg"] == expected
    assert record == {
        "file": "dog/v.1",
        "frames_before": 12,
        "fps": 10.0,
        "class": "dog",
        "frames": 4,
        "width": 16,
        "height": 12,
        "label": 1,
    }
    assert [e for e in found["cat/v2"][0] if e.startswith("f")] == [f"f00{n}.jpg" for n in range(3)]
    assert ShardSet.open(tmp_path / "out" / "train").column("frames").tolist().count(3) == 1


def test_webdataset_groups_and_decodes_the_frames(tmp_path, clips):
    assert run("frames", "--out", tmp_path / "out", "--images", clips, "--every", 6) == 0
    urls = [str(path) for path in (tmp_path / "out" / "train").glob("*.tar")]
    theirs = webdataset.WebDataset(urls, shardshuffle=False).decode("pil")
    samples = {sample["__key__"]: sample for sample in theirs}
    assert set(samples) == {"dog/v_1", "cat/v2"}
    assert samples["dog/v_1"]["f001.jpg"].size == (16, 12) and "f001.jpg" not in samples["cat/v2"]


def test_captions_of_clips(tmp_path, clips, capsys):
    names = [item.record["file"] for item in frames_source(clips).items]
    captions = {name: [f"a {name}", "something moves"] for name in names}
    file = tmp_path / "captions.json"
    arguments = ["frames", "--out", tmp_path / "out", "--images", clips, "--captions", file]
    for content, message in (
        (captions | {"cat/v9": ["a"]}, "1 clips have captions, but no folder with images: cat/v9"),
        ({names[0]: ["a"]}, f"clips have no captions: {names[1]}"),
        (captions | {names[0]: "a"}, f"captions.json: {names[0]!r} has no list of captions"),
        (captions | {names[0]: []}, f"captions.json: {names[0]!r} has no list of captions, but []"),
        ([1], "captions.json: is no JSON object of clips"),
    ):
        file.write_text(json.dumps(content))
        assert run(*arguments) == 1
        assert message in " ".join(capsys.readouterr().err.split())
    file.write_text(json.dumps(captions))
    assert run(*arguments) == 0
    shards = ShardSet.open(tmp_path / "out" / "train")
    reader = SampleReader(shards)
    records = [json.loads(reader.read(row).members["json"]) for row in range(len(shards))]
    assert {record["file"]: record["captions"] for record in records} == captions


def test_frames_of_another_size_and_misplaced_clips_are_named(tmp_path, clips, capsys):
    photo(clips / "cat/v2/frame9.jpg", 17, 12)
    assert run("frames", "--out", tmp_path / "out", "--images", clips) == 1
    message = capsys.readouterr().err
    assert "frame9.jpg has 17 x 12 pixels, unlike the frames before it" in message
    photo(clips / "frame.jpg")  # directly in the root: belongs to no clip
    assert len(frames_source(clips).items) == 2
    photo(clips / "alone" / "frame.jpg")
    with pytest.raises(ValueError, match="alone: clips lie in CLASS/CLIP/"):
        frames_source(clips, class_folders=True)
    (clips / "alone" / "frame.jpg").unlink()
    with pytest.raises(ValueError, match="'cat' is not in the list of classes"):
        frames_source(clips, class_folders=True, classes=["dog"])


# ---- Parquet -------------------------------------------------------------------------------------


def write_table(path: Path, columns: dict) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_of_bytes(tmp_path, photos):
    import datetime

    for part, numbers in (("a", [0, 1, 2]), ("b", [3, 4])):
        write_table(
            tmp_path / f"{part}.parquet",
            {
                "image": [{"bytes": photos[n].read_bytes(), "path": f"{n}.jpg"} for n in numbers],
                "kind": ["even" if n % 2 == 0 else "odd" for n in numbers],
                "texts": [[f"photo {n}"] * n for n in numbers],
                "score": [float("nan") if n == 0 else n / 2 for n in numbers],
                "when": [datetime.date(2024, 1, 1 + n) for n in numbers],
                "vector": [bytes(8) for _ in numbers],
            },
        )
    arguments = ["parquet", "--out", tmp_path / "out", "--table", tmp_path, "--bundle", 2]
    assert run(*arguments, "--label-field", "kind") == 0
    found = read_all(tmp_path / "out" / "train")
    assert sorted(found) == [f"{n:09d}" for n in range(5)]
    for number, path in enumerate(photos):
        members, record = found[f"{number:09d}"]
        assert members["png" if number == 2 else "jpg"] == path.read_bytes()
        assert members["cls"] == b"%d" % (number % 2)
        assert record == {
            "file": f"{number}.jpg",
            "kind": ["even", "odd"][number % 2],
            "texts": [f"photo {number}"] * number,
            "score": number / 2 if number else None,
            "when": f"2024-01-{1 + number:02d}",
            "width": 20 + number,
            "height": 30,
            "label": number % 2,
        }
    assert Manifest.load(tmp_path / "out" / "train").classes == ["even", "odd"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train"]  # no copy is left


def test_parquet_of_paths(tmp_path, photos, capsys):
    table = write_table(
        tmp_path / "t.parquet", {"path": ["p0.jpg", "p9.jpg", None], "label": [1, 0, 0]}
    )
    arguments = ["parquet", "--out", tmp_path / "out", "--table", table]
    arguments += ["--images", tmp_path / "in", "--image-field", "path", "--label-field", "label"]
    assert run(*arguments) == 1
    message = capsys.readouterr().err
    assert "2 images are missing" in message and "t.parquet, row 2: no image in 'path'" in message
    assert run(*arguments, "--on-missing", "skip") == 0
    assert read_all(tmp_path / "out" / "train")["000000000"][0]["cls"] == b"1"


def test_malformed_tables_are_named(tmp_path, photos, capsys):
    table = write_table(tmp_path / "t.parquet", {"image": [1], "kind": [None]})
    arguments = ["parquet", "--out", tmp_path / "out", "--table"]
    assert run(*arguments, table) == 1
    assert "t.parquet, row 0: the image is int" in capsys.readouterr().err
    assert run(*arguments, table, "--label-field", "class") == 1
    assert "has no field 'class'; it has image, kind" in capsys.readouterr().err
    (tmp_path / "t" / "test").mkdir(parents=True)  # another split: named, not read
    (tmp_path / "t" / "test" / "1.parquet").write_bytes(table.read_bytes())
    assert run(*arguments, tmp_path / "t") == 1
    assert "no *.parquet in it; passed over: {" in (message := capsys.readouterr().err)
    assert "{'in a sub-folder': {'.parquet': 1}}" in message
    table.write_bytes(table.read_bytes()[:-20])
    assert run(*arguments, table) == 1
    assert "t.parquet: cannot be read" in capsys.readouterr().err


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"")
    assert run("parquet", "--out", tmp_path / "out", "--table", tmp_path / "t.parquet") == 1
    assert "pip install pyarrow" in capsys.readouterr().err

"""Grids of pictures with text."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from data_pipeline.reading.reader import BadSample, SampleReader
from data_pipeline.shards.packer import ShardWriter
from data_pipeline.shards.shard_set import ShardSet
from tools.shards.__main__ import main
from tools.shards.sheet import cells_of_shards
from tools.support import contact_sheet as sheets
from tools.support.contact_sheet import Cell, _cut, _font, _free_place, contact_sheet

LONG = "a very long caption about a red seven that stands between many other words " * 3


def pixels(value: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.full((height, width, 3), value, dtype=np.uint8)


def colours(sheet: Image.Image) -> set[str]:
    return {f"#{bytes(colour).hex()}" for _, colour in sheet.getcolors(1 << 24)}


def test_grid_of_rows_and_columns() -> None:
    cells = [Cell(pixels(i * 20), f"{i}", "a two", ["a three"]) for i in range(6)]
    sheet = contact_sheet(cells, title="title", subtitle="scores")
    one_row = contact_sheet(cells[:4], title="title", subtitle="scores")
    assert sheet.width == one_row.width
    assert one_row.height < sheet.height < 2 * one_row.height
    assert contact_sheet(cells[:1]).width < sheet.width / 3
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])


def test_predicted_and_reference_have_colours_of_their_own() -> None:
    both = colours(contact_sheet([Cell(pixels(9), "", "a two", ["a three"])]))
    assert {sheets._PREDICTED, sheets._REFERENCE} <= both
    shard = colours(contact_sheet([Cell(pixels(9), "", None, ["a three"])]))
    assert sheets._PREDICTED not in shard and sheets._REFERENCE in shard
    silent = colours(contact_sheet([Cell(pixels(9), "", "", [])]))
    assert sheets._PREDICTED in silent  # an empty caption is shown as one


def test_small_pictures_grow_in_whole_pixels() -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    grown = sheets._scaled(image)
    assert grown.size == (256, 192)
    assert np.array_equal(np.asarray(grown)[::4, ::4], image)
    assert np.array_equal(np.asarray(grown)[3::4, 3::4], image)


@pytest.mark.parametrize("shape", [(8, 8), (90, 100), (129, 100), (600, 800), (3, 400), (400, 3)])
def test_every_picture_is_large_enough_and_fits(shape: tuple[int, int]) -> None:
    size = sheets._scaled(pixels(7, *shape)).size
    assert 160 <= max(size) <= 256 and min(size) >= 1


def test_text_is_wrapped_within_its_width() -> None:
    font = sheets._font(14, None)
    for text in (LONG, "x" * 300, "short", "", "two  spaces\nand lines"):
        lines = sheets._wrap(text, font, 256)
        assert 1 <= len(lines) <= 6
        assert all(font.getlength(line) <= 256 for line in lines)
    assert sheets._wrap("two  spaces\nand lines", font, 256) == ["two spaces and lines"]
    assert "".join(sheets._wrap("y" * 60, font, 256)) == "y" * 60
    assert sheets._wrap(LONG * 3, font, 256)[-1].endswith(" ...")


def test_a_font_that_is_none(tmp_path) -> None:
    (tmp_path / "f.ttf").write_bytes(b"no font")
    with pytest.raises(ValueError, match="give a TrueType file"):
        contact_sheet([Cell(pixels(1))], font=tmp_path / "f.ttf")


def test_boxes_lie_where_they_are_and_keep_to_the_picture() -> None:
    image = pixels(255, 32, 64)  # grows four times
    box = sheets.Box([8, 4, 24, 20], "", 1)
    picture = np.asarray(_drawn(image, [box])).astype(int)
    marked = np.argwhere((picture != 255).any(-1))
    assert marked.min(0).tolist() == [16, 32] and marked.max(0).tolist() == [79, 95]
    assert (picture[40, 60] == 255).all()  # its inside stays as it was
    inside = _drawn(image, [sheets.Box([-50, -50, 500, 500], "a name", 0)])
    assert inside.size == (256, 128) and inside.getpixel((255, 127)) != (255, 255, 255)
    untouched = _drawn(image, [sheets.Box([70, 2, 80, 9]), sheets.Box([9, -20, 12, -5])])
    assert (np.asarray(untouched) == 255).all()
    named = [sheets.Box([8, 20, 24, 30], "cat", 1), sheets.Box([8, 0, 24, 6], "dog", 2)]
    assert len(set(_drawn(image, named).get_flattened_data())) > 4


def _drawn(image: np.ndarray, boxes: list[sheets.Box]) -> Image.Image:
    picture = sheets._scaled(image)
    sheets._draw_boxes(picture, boxes, picture.width / image.shape[1], sheets._font(11, None))
    return picture


def run(*arguments) -> int:
    return main(["sheet", *(str(argument) for argument in arguments)])


def test_shards_from_the_command_line(scenes, tmp_path, capsys) -> None:
    out = tmp_path / "look.png"
    options = ("--caption-source", "json:captions", "--count", 5, "--columns", 3)
    assert run(scenes / "train", "--out", out, *options) == 0
    assert "5 pictures" in capsys.readouterr().err
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.width < 3 * 300 + 100


def test_what_cannot_be_drawn(scenes, tmp_path, capsys) -> None:
    out = tmp_path / "look.png"
    assert run(tmp_path / "absent", "--out", out) == 1
    assert "error: " in capsys.readouterr().err
    assert run(scenes / "train", "--out", out, "--caption-source", "txt") == 1  # have no txt member
    assert "none of the samples could be drawn" in capsys.readouterr().err


def test_unreadable_samples_are_left_out(tmp_path, capsys) -> None:
    picture = io.BytesIO()
    Image.fromarray(pixels(90)).save(picture, "PNG")
    with ShardWriter(str(tmp_path / "odd"), "train", max_samples=10) as writer:
        for number, image in enumerate((picture.getvalue(), b"no image")):
            writer.write(f"{number}", {"png": image, "txt": b"a grey square"})
        writer.write("2", {"txt": b"nothing to see"})
    assert run(tmp_path / "odd", "--out", tmp_path / "look.png") == 0
    error = " ".join(capsys.readouterr().err.split())
    assert "left out 2 of 3 samples" in error and "'1'" in error and "1 pictures" in error


def test_cells_have_captions_labels_and_boxes_where_the_samples_do(scenes, tmp_path) -> None:
    shards = ShardSet.open(scenes / "train")
    cells = list(cells_of_shards(shards, None, 60))
    reader = SampleReader(shards)
    for row, cell in enumerate(cells):
        record = json.loads(reader.read(row).members["json"])
        assert list(cell.references) == record["captions"]
        assert [list(box.corners) for box in cell.boxes] == record["boxes"]
        assert [box.group for box in cell.boxes] == record["labels"]
        assert cell.name.endswith(f"{row:06d}")
        assert ("label" in record) == cell.name.startswith("class ")
    frame = io.BytesIO()
    Image.fromarray(pixels(90)).save(frame, "PNG")
    with ShardWriter(tmp_path / "clips", classes=["cat"]) as writer:
        members = {"f001.png": b"later", "f000.png": frame.getvalue(), "json": b'{"boxes": 7}'}
        writer.write("bad", members)
        writer.write("clip", members | {"json": b"{}", "cls": b"0"})
    bad, clip = cells_of_shards(ShardSet.open(tmp_path / "clips"), None, 5)
    assert isinstance(bad, BadSample) and bad.key == "bad"
    assert clip.name == "cat: clip" and not clip.boxes and clip.image.shape == (32, 32, 3)


@pytest.mark.parametrize("option", ["--count", "--columns"])
def test_a_sheet_of_nothing_is_wrong_usage(option, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--out", tmp_path / "look.png", option, 0)
    assert stop.value.code == 2
    assert "is not a number from 1 on" in capsys.readouterr().err


def test_labels_of_crowded_boxes_do_not_overprint():
    taken = []
    for shift in range(12):
        box = (20.0 + shift, 30.0 + shift, 60.0 + shift, 60.0 + shift)
        place = _free_place(box, (50, 13), (255, 199), taken)
        if place is None:
            continue
        assert place[0] >= 0 and place[2] <= 255 and place[1] >= 0 and place[3] <= 199
        for other in taken:
            apart = place[0] > other[2] or other[0] > place[2]
            assert apart or place[1] > other[3] or other[1] > place[3]
        taken.append(place)
    assert len(taken) >= 3


def test_long_keys_are_cut_in_the_middle():
    font = _font(11, None)
    key = "coco/train2017/" + "very_long_" * 20 + "000123"
    line = _cut(key, font, 256)
    assert line.startswith("coco/") and line.endswith("000123") and "..." in line
    assert font.getlength(line) <= 256
    assert _cut("short", font, 256) == "short" and _cut("", font, 256) == ""

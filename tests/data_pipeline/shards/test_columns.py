"""Which numbers of samples become columns, and that old indices keep their worth."""

import dataclasses
import json

import numpy as np
import pytest

from data_pipeline.filters.expressions import ExpressionError
from data_pipeline.filters.select import select_rows
from data_pipeline.shards.columns import (
    MISSING_TEXT,
    ColumnBuilder,
    column_names,
    column_of,
    text_names,
    texts_of,
)
from data_pipeline.shards.index import MAX_COLUMNS, MAX_TEXTS, ShardIndex, index_path
from data_pipeline.shards.index_builder import build_index
from data_pipeline.shards.index_file import load_index, save_index
from data_pipeline.shards.packer import ShardWriter
from data_pipeline.shards.shard_set import CACHE_VARIABLE, ShardSet
from data_pipeline.storage.errors import ShardError
from tests.data_pipeline.small_shards import write_shards
from tools.shards.__main__ import main as shards_tool

NAN = np.nan


def index_of(tmp_path, records: list[dict[str, bytes]]) -> ShardIndex:
    with ShardWriter(tmp_path / "data", "x", max_samples=1000) as writer:
        for number, members in enumerate(records):
            writer.write(f"{number}", members)
    path = tmp_path / "data" / "x-000000.tar"
    written = load_index(index_path(path))
    assert build_index(path).digest == written.digest
    return written


def test_every_kind_of_column(tmp_path):
    records = [
        {
            "width": 3,
            "crowd": True,
            "exif": {"iso": 100, "gps": {"lat": 1.5, "deep": {"er": {"x": 1}}}},
            "title": "  a red\n bird ",
            "captions": ["one", "two words", ""],
            "tags": [],
            "mixed": True,
        },
        {
            "width": 4,
            "crowd": False,
            "exif": {"iso": 200, "flash": False, "lenses": [1, 2]},
            "title": "",
            "captions": ["é"],
            "tags": ["a", 1],
            "mixed": 7,
        },
        {"width": 5, "crowd": True, "exif": {"iso": 70_000}, "captions": "plain", "mixed": 2.5},
    ]
    index = index_of(tmp_path, [{"json": json.dumps(r).encode(), "txt": b"x  yy"} for r in records])
    wanted = {
        "width": [3, 4, 5],
        "crowd": [1, 0, 1],
        "exif.iso": [100, 200, 70_000],
        "exif.gps.lat": [1.5, NAN, NAN],
        "exif.flash": [NAN, 0, NAN],
        "exif.lenses.count": [NAN, 2, NAN],
        "title.characters": [10, 0, NAN],
        "title.words": [3, 0, NAN],
        "captions.count": [3, 1, NAN],
        "tags.count": [0, 2, NAN],
        "captions.words.min": [0, 1, NAN],
        "captions.words.max": [2, 1, NAN],
        "captions.characters.min": [0, 1, NAN],
        "captions.characters.max": [9, 1, NAN],
        "captions.words": [NAN, NAN, 1],
        "captions.characters": [NAN, NAN, 5],
        "txt.words": [2, 2, 2],
        "txt.characters": [4, 4, 4],
        "mixed": [1, 7, 2.5],
        "bytes:txt": [5, 5, 5],
        "bytes:json": [len(json.dumps(r)) for r in records],
    }
    assert column_names(index) == set(wanted)
    for name, values in wanted.items():
        column = column_of(index, name)
        np.testing.assert_array_equal(column, values, name)
        whole = all(value == value // 1 for value in values)
        assert column.dtype == (np.int64 if whole else np.float64), name
    assert column_of(index, "no such") is None and column_of(index, "bytes:jpg") is None
    stored = index.derived.columns
    assert [stored[n].dtype for n in ("crowd", "exif.iso", "exif.flash")] == [
        np.uint8,
        np.uint32,
        np.float64,
    ]


def test_texts_that_are_few_and_short(tmp_path):
    records = [
        {
            "class": ["owl", "emu"][n % 2],
            "url": f"u/{n}",
            "note": "x" * (101 * (n == 7)),
            "o": {"nsfw": "NO"},
            "odd": "a \ud83d",
            **({"licence": "CC BY"} if n % 3 else {}),
        }
        for n in range(MAX_TEXTS + 1)
    ]
    index = index_of(tmp_path, [{"json": json.dumps(r).encode(), "txt": b"x"} for r in records])
    assert text_names(index) == {"class", "licence", "url", "note", "o.nsfw", "odd"}
    assert texts_of(index, "class").tolist() == ["owl", "emu"] * 128
    assert texts_of(index, "o.nsfw").tolist() == ["NO"] * 256
    licences = texts_of(index, "licence").tolist()
    assert licences[:4] == [MISSING_TEXT, "CC BY", "CC BY", MISSING_TEXT]
    assert texts_of(index, "txt") is None and texts_of(index, "class.words") is None
    for name in ("url", "note", "odd"):
        with pytest.raises(ValueError, match=f"'{name}' has more than 255 different texts, or one"):
            texts_of(index, name)


def test_sizes_of_members_that_not_every_sample_has(tmp_path):
    index = index_of(tmp_path, [{"jpg": b"1"}, {"png": b"22"}, {"jpg": b"333", "png": b""}])
    np.testing.assert_array_equal(column_of(index, "bytes:jpg"), [1, NAN, 3])
    np.testing.assert_array_equal(column_of(index, "bytes:png"), [NAN, 2, 0])


def test_their_number_is_bounded(tmp_path):
    record = {"o": {f"n{n:03d}": n for n in range(MAX_COLUMNS + 7)}, "width": 1}
    index = index_of(tmp_path, [{"json": json.dumps(record).encode()}])
    assert len(index.derived.columns) == MAX_COLUMNS and index.derived.dropped == 7
    assert list(index.columns) == ["width"] and index.dropped_columns == 0


@pytest.fixture
def old(tmp_path, monkeypatch) -> ShardSet:
    """A packed folder of which one index is from before there were derived columns."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    shards = write_shards(tmp_path / "old", 40, 20)
    plain = dataclasses.replace(shards.index(1), derived=None)
    save_index(plain, index_path(shards.shards[1].path))
    return ShardSet(shards.shards)


def test_old_indices_are_read_and_are_those_of_their_shards(old):
    assert old.index(1).derived is None
    assert old.column("width").tolist() == list(range(10, 50))
    assert select_rows(old, "width > 40 and bytes:jpg > 0").n_kept == 9


@pytest.mark.parametrize("where", ["captions.words.max > 0", "captions.word.max > 0"])
def test_columns_that_only_newer_indices_have_are_an_error_until_made(old, where):
    with pytest.raises(ExpressionError, match=r"1 shard\(s\), .*train-000001\.tar among them, are"):
        select_rows(old, where)
    assert shards_tool(["index", "--force", old.shards[1].path]) == 0
    again = ShardSet.open(old.shards[0].path.rpartition("/")[0])
    assert again.fingerprint == old.fingerprint  # the manifest still names this index
    if where == "captions.words.max > 0":
        assert select_rows(again, where).n_kept == 30
    else:
        with pytest.raises(ExpressionError, match=r"did you mean 'captions\.words\.max'"):
            select_rows(again, where)


def test_a_flipped_bit_in_a_derived_column_is_found(tmp_path):
    shards = write_shards(tmp_path, 20, 20)
    path = index_path(shards.shards[0].path)
    whole = path.read_bytes()
    values = shards.index(0).derived.columns["captions.words.max"].tobytes()
    at = whole.rindex(values)
    path.write_bytes(whole[: at + 3] + bytes([whole[at + 3] ^ 2]) + whole[at + 4 :])
    with pytest.raises(ShardError, match="digest of its derived columns"):
        load_index(path)
    for name in (b"derived_digest", b"dropped_derived", b"derived_texts"):
        path.write_bytes(whole.replace(name, name.swapcase()))
        with pytest.raises(ShardError, match="damaged or foreign index"):
            load_index(path)


def test_an_index_reads_what_the_loader_reads():
    """A byte order mark is no part of a text; UTF-16, which the loader refuses, says nothing."""
    builder = ColumnBuilder()
    for row, text in enumerate(['{"n": 3}', '\ufeff{"n": 4}']):
        builder.add(row, "json", text.encode())
        builder.add(row, "txt", "\ufeffa chair".encode())
    builder.add(2, "json", '{"n": 5}'.encode("utf-16"))
    stated, _, derived = builder.finish(3)
    np.testing.assert_array_equal(stated["n"], [3, 4, np.nan])
    np.testing.assert_array_equal(derived.columns["txt.characters"], [7, 7, np.nan])

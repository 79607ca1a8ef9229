"""Samples that meet a condition: found in the indices, kept for the next start, read alone."""

import json
import logging
import os

import numpy as np
import pytest

from data_pipeline.filters import select as filters
from data_pipeline.filters.expressions import ExpressionError
from data_pipeline.filters.select import select_rows
from data_pipeline.order.kept_order import KeptOrder
from data_pipeline.order.plan import plan_order
from data_pipeline.order.sources import concatenated, open_source, open_sources
from data_pipeline.samples.captions import CaptionDataSettings
from data_pipeline.shards.index import index_path
from data_pipeline.shards.packer import ShardWriter
from data_pipeline.shards.shard_set import CACHE_VARIABLE, ShardSet
from data_pipeline.storage.errors import ShardError
from tests.data_pipeline.small_shards import sample, write_shards

SAMPLES = 95


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "selections"


@pytest.fixture
def shards(tmp_path) -> ShardSet:
    return write_shards(tmp_path / "data", SAMPLES, 20)


def kept(shards: ShardSet, where: str) -> list[int]:
    selection = select_rows(shards, where)
    return selection.select(np.arange(selection.n_kept)).tolist()


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ("width >= 50 and captions.count > 0", lambda n: n >= 40 and n % 4 > 0),
        ("cls in [0, 3] or score < 1", lambda n: n % 5 in (0, 3) or n / 3 < 1),
        ("bytes:jpg > 1000", lambda n: len(sample(n)[1]["jpg"]) > 1000),
        ("not missing(bytes:json) and missing(bytes:jpg)", None),
        ("shard == 'train-000001.tar'", lambda n: 20 <= n < 40),
        ("key >= '000090' and '3' in key", lambda n: n == 93),
    ],
)
def test_conditions_keep_the_samples_that_meet_them(shards, where, wanted):
    if wanted is None:
        with pytest.raises(ExpressionError, match="none of the 95 samples meets it"):
            select_rows(shards, where)
    else:
        assert kept(shards, where) == [n for n in range(SAMPLES) if wanted(n)]


def test_shards_that_lack_a_column_have_it_missing(tmp_path, shards):
    both = ShardSet([*shards.shards, *write_other(tmp_path / "other").shards])
    assert kept(both, "height > 1") == [SAMPLES + 2, SAMPLES + 3]
    assert kept(both, "missing(height) and width < 12") == [0, 1]
    with pytest.raises(ExpressionError, match="'heigth'; did you mean 'height'"):
        select_rows(both, "heigth > 1")


def test_texts_of_samples(tmp_path, shards):
    both = ShardSet([*shards.shards, *write_other(tmp_path / "other").shards])
    assert kept(both, "kind == 'even'") == [SAMPLES, SAMPLES + 2]
    assert kept(both, "kind != 'even'") == [SAMPLES + 1, SAMPLES + 3]
    assert kept(both, "missing(kind) and width < 12") == [0, 1]
    assert kept(both, "not missing(kind)") == [SAMPLES + n for n in range(4)]
    for where, message in (
        ("kind > 3", "'kind' is a column of texts, not of numbers"),
        ("height == 'x'", "'height' is a column of numbers, not of texts"),
        ("kin == 'even'", "unknown column 'kin'; did you mean 'kind'"),
        ("name == 'even'", r"other-000000\.tar: 'name' has more than 255 different texts, or one"),
    ):
        with pytest.raises(ExpressionError, match=message):
            select_rows(both, where)


def write_other(folder) -> ShardSet:
    with ShardWriter(folder, "other", max_samples=10) as writer:
        for number in range(4):
            kind = "odd" if number % 2 else "even"
            record = {"height": number, "kind": kind, "name": "x" * 60 * number}
            writer.write(f"o{number}", {"jpg": b"x", "json": json.dumps(record).encode()})
    return ShardSet.open(folder)


def test_the_answer_is_kept_by_data_and_condition(shards, cache, monkeypatch, tmp_path):
    first = kept(shards, "width > 50")
    (file,) = cache.glob("*.kept")
    monkeypatch.setattr(filters, "_evaluate", lambda *_: pytest.fail("evaluated again"))
    assert kept(shards, "width > 50") == first
    monkeypatch.undo()
    monkeypatch.setenv(CACHE_VARIABLE, str(cache.parent))
    assert kept(shards, "width > 60") != first
    fewer = write_shards(tmp_path / "fewer", 60, 20)
    assert kept(fewer, "width > 50") == [n for n in first if n < 60]
    assert len(list(cache.iterdir())) == 3  # and no lock or temporary file

    file.write_bytes(file.read_bytes()[:-9])
    assert kept(shards, "width > 50") == first
    assert file.stat().st_size > 100


def test_a_cache_that_cannot_be_written_costs_time_only(shards, cache, caplog):
    cache.parent.mkdir(parents=True)
    cache.write_text("no folder")
    with caplog.at_level(logging.WARNING):
        assert kept(shards, "width > 100") == list(range(91, SAMPLES))
    assert "is not kept for the next start" in caplog.text
    # A run writes down what comes under its own name.
    assert {record.name for record in caplog.records} == {"omnipretrain.data"}


def test_with_a_progress_bar(shards, cache, monkeypatch, capfd):
    monkeypatch.setattr(filters, "_SHARDS_OF_A_BAR", 1)
    assert kept(shards, "width > 100") == list(range(91, SAMPLES))
    assert capfd.readouterr().out == ""


def test_a_damaged_index_is_an_error_and_leaves_nothing_behind(shards, cache):
    path = index_path(shards.shards[3].path)
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"train-000003\.tar\.idx: damaged or foreign index"):
        select_rows(shards, "width > 50")
    assert list(cache.iterdir()) == []


def test_sources_read_kept_rows_only(tmp_path, shards):
    write_other(tmp_path / "other")
    data = CaptionDataSettings(
        sources={
            "a": {"shards": [str(tmp_path / "data")], "where": "cls == 2", "weight": 3},
            "b": {"shards": [str(tmp_path / "other")], "where": "height > 0"},
        }
    )
    sources = open_sources(data)
    assert [source.samples for source in sources] == [19, 3]
    order = plan_order(sources, 8, 0, "task")
    assert (order.n_rows, order.stored_rows) == (22, len(concatenated(sources)))
    rows = order.rows(np.arange(8 * 19))
    of_a = rows[rows < SAMPLES]
    assert len(of_a) == 6 * 19 and (of_a % 5 == 2).all()
    assert np.array_equal(np.bincount(of_a)[2::5], np.full(19, 6))  # six whole epochs
    assert sorted(set(rows[rows >= SAMPLES].tolist())) == [SAMPLES + n for n in (1, 2, 3)]
    assert order.epochs(8 * 19) == {"a": 6.0, "b": 38 / 3}
    substitutes = order.rows(np.arange(50), attempt=1)
    assert (substitutes[substitutes < SAMPLES] % 5 == 2).all()


def test_what_takes_part_is_told_apart(shards):
    orders = [
        plan_order([open_source([os.path.dirname(shards.shards[0].path)], where)], 8, 0, "t")
        for where in (None, "width > 50", "width > 51", "50 < width", "width > 0")
    ]
    assert isinstance(orders[1], KeptOrder) and not isinstance(orders[4], KeptOrder)
    told = [order.taking_part for order in orders]
    assert told[0] == told[4] and told[1] == told[3]
    assert len(set(told)) == 3


def test_settings_refuse_faulty_conditions():
    with pytest.raises(ValueError, match="character 7: to compare, write =="):
        CaptionDataSettings(shards=["x"], where="width = 3")
    with pytest.raises(ValueError, match="a key of each of them"):
        CaptionDataSettings(sources={"a": {"shards": ["x"]}}, where="width > 3")


def test_messages_name_the_source(tmp_path, shards):
    data = CaptionDataSettings(
        sources={"big": {"shards": [str(tmp_path / "data")], "where": "widht > 3"}}
    )
    with pytest.raises(ExpressionError, match=r"^source big: where: condition `widht > 3`: char"):
        open_sources(data)

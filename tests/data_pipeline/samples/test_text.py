"""Rows of token ids: packed from documents, and read as batches."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.loader.loader import LoaderSettings, StepLoader, StepSampler, TaskStream
from data_pipeline.loader.stream import DataError
from data_pipeline.order.order import Order
from data_pipeline.reading.reader import BadSample, Sample, SampleReader
from data_pipeline.samples.text import TextDataSettings, TextProcessor
from data_pipeline.samples.tokenizer import Tokenizer, train_byte_level_bpe
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.shard_set import ShardSet
from tools.make_shards import text as pack_text
from tools.make_shards.__main__ import main

WORDS = ["red", "seven", "above", "the", "blue", "nine", "é", "数字"]
LENGTH = 16


def document(number: int) -> str:
    rng = np.random.default_rng(number)
    return " ".join(rng.choice(WORDS, 1 + number * 7 % 40))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_byte_level_bpe([document(n) for n in range(40)], 300).save(folder)
    return folder


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> dict[str, Path]:
    """The same 40 documents in three forms."""
    root = tmp_path_factory.mktemp("documents")
    texts = [document(n) for n in range(40)]
    (root / "folder" / "deep").mkdir(parents=True)
    for number, text in enumerate(texts):
        file = root / "folder" / ("deep" if number % 2 else "") / f"{number:02d}.txt"
        file.write_text(text, encoding="utf-8")
    (root / "lines.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    rows = [json.dumps({"body": text, "id": n}) for n, text in enumerate(texts)]
    (root / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {name: root / name for name in ("folder", "lines.txt", "rows.jsonl")}


def pack_rows(source: Path, tokenizer: Path, out: Path, *options) -> int:
    arguments = [
        "text",
        "--input",
        source,
        "--tokenizer",
        tokenizer,
        "--tokens",
        LENGTH,
        "--out",
        out,
        "--processes",
        1,
        *options,
    ]
    return main([str(argument) for argument in arguments])


def unpack(folder: Path, kind: str = "<u2") -> tuple[list[int], list[int]]:
    """All ids in the order of their keys, and where documents begin in them."""
    shards = ShardSet.open(folder)
    reader = SampleReader(shards)
    ids, starts = [], []
    for sample in sorted(map(reader.read, range(len(shards))), key=lambda sample: sample.key):
        record = json.loads(sample.members["json"])
        found = np.frombuffer(sample.members["u16"], kind).tolist()
        assert record["tokens"] == len(found)
        starts += [len(ids) + start for start in record["starts"]]
        ids += found
    return ids, starts


@pytest.mark.parametrize("form", ["folder", "lines.txt", "rows.jsonl"])
def test_nothing_is_lost_between_the_documents_and_the_rows(tmp_path, documents, tokenizer, form):
    options = ["--text-field", "body", "--max-samples", 7]
    assert pack_rows(documents[form], tokenizer, tmp_path, *options) == 0
    loaded = Tokenizer.load(tokenizer)
    ids, starts = unpack(tmp_path / "train")
    ends = [*starts[1:], len(ids)]
    assert starts[0] == 0 and all(ids[end - 1] == loaded.eos_id for end in ends)
    found = [loaded.decode(ids[begin:end]) for begin, end in zip(starts, ends, strict=True)]
    assert sorted(found) == sorted(document(n) for n in range(40))
    assert found != sorted(found)
    manifest = Manifest.load(tmp_path / "train")
    assert manifest.samples == -(-len(ids) // LENGTH) and len(manifest.shards) > 1
    assert manifest.details["documents"] == 40 and manifest.details["tokens"] == len(ids)
    lengths = sorted(ShardSet.open(tmp_path / "train").column("tokens").tolist())
    assert set(lengths[1:]) == {LENGTH}  # only the last row is shorter
    assert [path.name for path in tmp_path.iterdir()] == ["train"]  # the list of ids is gone


def test_seed_separator_and_bundles(tmp_path, documents, tokenizer):
    source = documents["lines.txt"]
    results = {}
    for name, options in {
        "a": [],
        "b": [],
        "seed": ["--seed", 1],
        "none": ["--separator", "none"],
        "bundle": ["--bundle", 8],
    }.items():
        assert pack_rows(source, tokenizer, tmp_path / name, *options) == 0
        results[name] = unpack(tmp_path / name / "train")
    assert results["a"] == results["b"] == results["bundle"] != results["seed"]
    eos = Tokenizer.load(tokenizer).eos_id
    assert results["none"][0] == [i for i in results["a"][0] if i != eos]
    a, b = (tmp_path / n / "train" / "train-000000.tar" for n in "ab")
    assert a.read_bytes() == b.read_bytes()
    bundle = tmp_path / "bundle" / "train" / "train-000000.tar"
    assert bundle.stat().st_size < a.stat().st_size / 4


def test_started_again_it_does_not_tokenise_again(tmp_path, documents, tokenizer, monkeypatch):
    def killed(job, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("tools.make_shards.run.pack", killed)
        assert pack_rows(documents["lines.txt"], tokenizer, tmp_path) == 130
    assert len(list(tmp_path.glob(".train-documents-*.json"))) == 1
    with monkeypatch.context() as patched:
        patched.setattr(pack_text, "_texts", None)  # must not be needed
        assert pack_rows(documents["lines.txt"], tokenizer, tmp_path) == 0
    whole = unpack(tmp_path / "train")
    assert pack_rows(documents["lines.txt"], tokenizer, tmp_path / "other") == 0
    assert unpack(tmp_path / "other" / "train") == whole


def test_documents_that_are_none_are_named(tmp_path, tokenizer, capsys):
    rows = ['{"text": "a b"}', '{"text": 5}', '{"body": "x"}', "{", '{"text": ""}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert pack_rows(tmp_path / "rows.jsonl", tokenizer, tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert "3 documents cannot be read" in message
    assert "rows.jsonl, line 2: 'text' is int, not a text" in message
    assert "rows.jsonl, line 3: no field 'text'" in message
    skip = ["--on-missing", "skip"]
    assert pack_rows(tmp_path / "rows.jsonl", tokenizer, tmp_path / "out", *skip) == 0
    details = Manifest.load(tmp_path / "out" / "train").details
    assert (details["missing"], details["empty_documents"], details["documents"]) == (3, 1, 1)
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    assert pack_rows(tmp_path / "empty.txt", tokenizer, tmp_path / "none") == 1
    assert "no text in 0 documents of 1 files" in capsys.readouterr().err
    assert pack_rows(tmp_path / "rows.csv", tokenizer, tmp_path / "none") == 1
    assert "must be a folder, or end in .txt or .jsonl" in capsys.readouterr().err


# ---- reading -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory, documents, tokenizer) -> ShardSet:
    out = tmp_path_factory.mktemp("rows")
    assert pack_rows(documents["folder"], tokenizer, out) == 0
    return ShardSet.open(out / "train")


def stream(rows: ShardSet, tokenizer: Path, length: int = LENGTH) -> TaskStream:
    fields = TextProcessor(
        TextDataSettings(shards=["unused"], text_length=length), Tokenizer.load(tokenizer)
    )
    order = Order.plan(len(rows), 0, 4)
    return TaskStream("words", SampleReader(rows), order, fields, 0, 4, 4)


def test_a_loader_gives_batches_of_rows(rows, tokenizer):
    length, reader = LENGTH + 4, SampleReader(rows)
    task = stream(rows, tokenizer, length)
    steps = -(-len(rows) // 4)
    loader = StepLoader(
        {"words": task}, lambda step: ("words", step), LoaderSettings(workers=0), 0, 1, 0, steps
    )
    seen = set()
    for window in loader:
        batch = window.micro_batches[0]
        assert {batch[n].shape for n in ("tokens", "mask", "documents")} == {(4, length)}
        assert batch["tokens"].dtype == torch.int64 and batch["mask"].dtype == torch.bool
        for place, row in enumerate(batch["row"].tolist()):
            members = reader.read(row).members
            ids = np.frombuffer(members["u16"], "<u2").tolist()
            starts = json.loads(members["json"])["starts"]
            mask = batch["mask"][place]
            assert mask.tolist() == [n < len(ids) for n in range(length)]
            assert batch["tokens"][place, mask].tolist() == ids
            assert (batch["tokens"][place, ~mask] == task.fields.tokenizer.pad_id).all()
            numbers = batch["documents"][place].tolist()
            assert numbers[len(ids) :] == [-1] * (length - len(ids))
            inner = [n for n in range(1, len(ids)) if numbers[n] != numbers[n - 1]]
            assert numbers[0] == 0 and inner == [start for start in starts if start > 0]
            seen.add(row)
    assert seen == set(range(len(rows)))


def test_padding_rows_have_no_tokens(rows, tokenizer):
    fields = stream(rows, tokenizer).fields
    batch = fields.collate([None], [False])
    assert not batch["mask"].any() and not batch["valid"].any()
    assert (batch["documents"] == -1).all()


def made(tokenizer: Path, ids: bytes | None, record: object) -> Sample:
    mark = Tokenizer.load(tokenizer).mark
    if isinstance(record, dict):
        record = {"starts": [], "tokenizer": mark, **record}
    members = {"json": json.dumps(record).encode()} | ({} if ids is None else {"u16": ids})
    return Sample(0, "x.tar", "0", members)


@pytest.mark.parametrize(
    ("ids", "record", "message"),
    [
        (None, {}, "has no member u16 or u32"),
        (b"", {}, "its member u16 has 0 bytes"),
        (b"\1\0\2", {}, "its member u16 has 3 bytes"),
        (b"\xff\xff", {}, "out of range"),
        (b"\1\0", {"starts": [1]}, "out of range"),
        (b"\1\0", {"starts": [[0]]}, "out of range"),
        (b"\1\0", {"starts": ["x"]}, "its json is not that of a row"),
        (b"\1\0", {"starts": None}, "its json is not that of a row|out of range"),
        (b"\1\0", [], "its json is not that of a row"),
    ],
)
def test_damaged_rows_are_bad_samples(rows, tokenizer, ids, record, message):
    with pytest.raises(BadSample, match=message):
        stream(rows, tokenizer).fields.sample(made(tokenizer, ids, record), None)


def test_rows_of_another_tokenizer_or_length_stop_the_run(tmp_path, rows, tokenizer):
    train_byte_level_bpe([document(1)] * 3, 300).save(tmp_path)
    request = next(iter(step_sampler(stream(rows, tokenizer))))
    with pytest.raises(DataError, match="the row was made with tokenizer"):
        stream(rows, tmp_path).load(request)
    with pytest.raises(DataError, match=rf"has {LENGTH} tokens and data.text_length is 8"):
        stream(rows, tokenizer, 8).load(request)


def step_sampler(task: TaskStream) -> StepSampler:
    return StepSampler(lambda step: ("words", step), {"words": task}, 0, 1, 0, 1)

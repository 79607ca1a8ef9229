"""From a sample to arrays, and from arrays to a batch."""

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from data_pipeline.images.transforms import ImageSettings
from data_pipeline.reading.reader import BadSample, Sample
from data_pipeline.rng import sample_rng
from data_pipeline.samples.caption_texts import CaptionSource
from data_pipeline.samples.captions import CaptionDataSettings, CaptionProcessor
from tests.data_pipeline.photos import encoded, jpeg, picture, tokenizer

TOKENIZER = tokenizer()
PAD, BOS, EOS = TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id


def sample(**members: bytes) -> Sample:
    return Sample(3, "a.tar", "key", {"jpg": jpeg(picture(1)), **members})


def rng_for(purpose: str) -> np.random.Generator:
    return sample_rng(0, "caption", 0, purpose)


def fields(train: bool = True, **options) -> CaptionProcessor:
    options = {"image": ImageSettings(size=16), "shards": ["x"], **options}
    return CaptionProcessor(CaptionDataSettings(**options), TOKENIZER, train)


def tokens_of(maker: CaptionProcessor, item: dict) -> list[list[int]]:
    """Rows of the only sample of a batch."""
    return maker.collate([item], [True])["tokens"][0].tolist()


def many(*captions: str) -> bytes:
    return json.dumps({"captions": captions}).encode()


def test_one_caption():
    maker = fields(text_length=12)
    found = maker.sample(sample(txt=b"a  red\nbird "), rng_for)
    assert found["images"].shape == (16, 16, 3)
    assert found["captions"] == ["a red bird"]
    ids = TOKENIZER.encode("a red bird")
    tail = [PAD] * (8 - len(ids) - 2)
    assert tokens_of(maker, found) == [[BOS, *ids, EOS, *tail]]


def test_long_captions_lose_their_end():
    maker = fields(text_length=5)
    found = maker.sample(sample(txt=b"a red bird on a small table"), rng_for)
    assert tokens_of(maker, found) == [[BOS, *TOKENIZER.encode("a red bird on")[:3], EOS]]


def test_a_book_as_a_caption_is_cut_before_it_is_encoded(monkeypatch):
    lengths = []
    encode = TOKENIZER.encode
    monkeypatch.setattr(TOKENIZER, "encode", lambda text: lengths.append(len(text)) or encode(text))
    maker = fields(text_length=8)
    found = maker.sample(sample(txt=b"a red bird " * 100_000), rng_for)
    assert tokens_of(maker, found) == [[BOS, *encode("a red bird a red bird")[:6], EOS]]
    assert lengths == [8 * 256]


def test_half_characters_make_a_bad_sample():
    source = CaptionSource("json:captions")
    assert source.read(sample(json=many("a \U0001f600"))) == ["a \U0001f600"]
    with pytest.raises(BadSample, match="half a surrogate pair"):
        source.read(sample(json=many("a bird", "a \ud83d")))


def test_missing_captions_carry_no_loss():
    several = fields(captions_per_image=3, caption_source="json:captions", text_length=16)
    item = several.sample(sample(json=many("a bird", "a boat")), rng_for)
    batch = several.collate([item], [True])
    assert batch["loss_mask"][0].any(1).tolist() == [True, True, False]
    assert batch["tokens"].shape == batch["loss_mask"].shape == (1, 3, 8)
    assert batch["tokens"][0, 2, :3].tolist() == [BOS, EOS, PAD]
    assert not batch["loss_mask"][0, 2].any()


def test_choice_of_captions_follows_the_seed_and_reaches_all():
    source = {"caption_source": "json:captions", "captions_per_image": 2}
    data = sample(json=many("a bird", "a boat", "a tree", "a table"))

    def chosen(position: int, train: bool = True) -> list[str]:
        maker = fields(train, **source)
        item = maker.sample(data, lambda purpose: sample_rng(0, "caption", position, purpose))
        return [TOKENIZER.decode(row) for row in tokens_of(maker, item)]

    assert chosen(1) == chosen(1)
    draws = [tuple(chosen(position)) for position in range(100)]
    assert len(set(draws)) == 12  # all ordered pairs
    assert all(a != b for a, b in draws)
    assert chosen(5, train=False) == ["a bird", "a boat"]


def test_batch():
    maker = fields(text_length=20)
    items = [
        maker.sample(sample(txt=b"a bird"), rng_for),
        None,
        maker.sample(sample(txt=b"a small red bird on a table"), rng_for),
    ]
    batch = maker.collate(items, [True, False, True])
    assert batch["images"].shape == (3, 3, 16, 16)
    assert batch["images"].dtype == torch.uint8
    assert batch["images"].is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(batch["images"][0].permute(1, 2, 0).numpy(), items[0]["images"])
    assert not batch["images"][1].any()
    assert batch["valid"].tolist() == [True, False, True]
    assert batch["tokens"].dtype == torch.int64
    lengths = [len(TOKENIZER.encode(item["captions"][0])) + 2 for item in (items[0], items[2])]
    assert batch["tokens"].shape[2] == -(-lengths[1] // 8) * 8
    expected = [[False] + [True] * (length - 1) for length in lengths]
    for row, mask in zip((0, 2), expected, strict=True):
        assert batch["loss_mask"][row, 0].tolist()[: len(mask)] == mask
        assert not batch["loss_mask"][row, 0, len(mask) :].any()
        supervised = batch["tokens"][row, 0][batch["loss_mask"][row, 0]]
        assert supervised[-1] == EOS
        assert BOS not in supervised and PAD not in supervised
    assert not batch["loss_mask"][1].any()
    assert "captions" not in batch


def test_text_length_bounds_the_width():
    maker = fields(text_length=11)
    item = maker.sample(sample(txt=b"a bird on a small red table under a tree"), rng_for)
    assert maker.collate([item], [True])["tokens"].shape == (1, 1, 11)


def test_evaluation_keeps_all_references_and_draws_nothing():
    def forbidden(purpose: str):
        raise AssertionError(f"drew {purpose}")

    maker = fields(False, caption_source="json:captions")
    item = maker.sample(sample(json=many("a bird", " a  boat")), forbidden)
    assert maker.collate([item, None], [True, False])["captions"] == [["a bird", "a boat"], []]


def test_written_in_place():
    maker = fields()
    shape = maker.buffers(2)["images"]
    buffers = {"images": torch.full(shape, 9, dtype=torch.uint8)}
    out = {"images": buffers["images"].numpy()[1]}
    item = maker.sample(sample(txt=b"a bird"), rng_for, out)
    batch = maker.collate([None, item], [False, True], buffers)
    assert batch["images"].data_ptr() == buffers["images"].data_ptr()
    assert not batch["images"][0].any()
    fresh = maker.sample(sample(txt=b"a bird"), rng_for)["images"]
    assert np.array_equal(batch["images"][1].permute(1, 2, 0).numpy(), fresh)


def test_images_of_different_size_need_batches_of_one():
    maker = fields(image=ImageSettings(size=16, mode="keep_aspect"))
    assert maker.buffers(2) == {}
    wide = maker.sample(sample(jpg=encoded(picture(1, 20, 40), "PNG"), txt=b"a"), rng_for)
    high = maker.sample(sample(jpg=encoded(picture(1, 40, 20), "PNG"), txt=b"a"), rng_for)
    assert maker.collate([wide, None], [True, False])["images"].shape == (2, 3, 16, 32)
    with pytest.raises(ValueError, match="set micro_batch to 1"):
        maker.collate([wide, high], [True, True])


def test_first_image_extension_present_is_taken():
    members = {"png": encoded(picture(5), "PNG"), "txt": b"a"}
    both = Sample(0, "a.tar", "k", {"webp": b"broken", **members})
    order = fields(image_extensions=["jpg", "png", "webp"])
    assert order.extensions == {"jpg", "png", "webp", "txt"}
    order.sample(both, rng_for)
    with pytest.raises(BadSample, match="not a readable image"):
        fields(image_extensions=["webp", "png"]).sample(both, rng_for)
    with pytest.raises(BadSample, match="has no member jpg or jpeg"):
        fields(image_extensions=["jpg", "jpeg"]).sample(both, rng_for)


@pytest.mark.parametrize(
    ("source", "members", "message"),
    [
        ("txt", {}, "has no member txt"),
        ("txt", {"txt": b" \n "}, "holds no caption"),
        ("txt", {"txt": b"\xff\xfe"}, "txt: line 1: it is UTF-16"),
        ("json:captions", {"json": b"{"}, "JSONDecodeError"),
        ("json:captions", {"json": b"{}"}, "KeyError: 'captions'"),
        ("json:captions", {"json": b"[1]"}, "TypeError"),
        ("json:captions", {"json": b'{"captions": 3}'}, "neither a string nor a list"),
        ("json:captions", {"json": b'{"captions": ["a", 3]}'}, "neither a string nor a list"),
        ("json:captions", {"json": b'{"captions": ["", " "]}'}, "holds no caption"),
        ("json:c", {"json": b'{"c":' + b"[" * 100_000}, "json:c: "),
    ],
)
def test_bad_captions_name_the_sample(source, members, message):
    with pytest.raises(BadSample, match=message) as caught:
        fields(caption_source=source).sample(sample(**members), rng_for)
    assert (caught.value.shard, caught.value.key, caught.value.row) == ("a.tar", "key", 3)


def test_nested_keys_and_single_strings():
    source = CaptionSource("json:a.b")
    assert source.extension == "json"
    assert source.read(sample(json=b'{"a": {"b": "one  text"}}')) == ["one text"]


@pytest.mark.parametrize("source", ["", ":captions", "json:", "json:a..b"])
def test_impossible_sources_are_refused(source):
    with pytest.raises(ValidationError, match="write an extension, or json:KEY"):
        CaptionDataSettings(shards=["x"], caption_source=source)


@pytest.mark.parametrize("source", ["txt", "json:c", "json:many"])
def test_a_byte_order_mark_is_no_part_of_a_caption(source):
    """Of the member, and where another tool has left it inside of the JSON."""
    members = {
        "txt": b"\xef\xbb\xbfa red chair",
        "json": b'\xef\xbb\xbf{"c": "\\ufeffa red chair", "many": ["\\ufeffa red chair"]}',
    }
    assert CaptionSource(source).read(Sample(0, "a.tar", "key", members)) == ["a red chair"]

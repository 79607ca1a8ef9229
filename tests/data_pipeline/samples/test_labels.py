"""Class labels: what is read, what is refused, and the batch."""

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from data_pipeline.images.formats import MEMBERS
from data_pipeline.images.transforms import ImageSettings
from data_pipeline.reading.reader import BadSample, Sample
from data_pipeline.rng import sample_rng
from data_pipeline.samples.labels import LabelDataSettings, LabelProcessor
from tests.data_pipeline.photos import encoded, jpeg, picture


def sample(**members: bytes) -> Sample:
    return Sample(3, "a.tar", "key", {"jpg": jpeg(picture(1)), **members})


def rng_for(purpose: str) -> np.random.Generator:
    return sample_rng(0, "classify", 0, purpose)


def fields(train: bool = True, **options) -> LabelProcessor:
    options = {"image": ImageSettings(size=16), "shards": ["x"], "classes": 10, **options}
    return LabelProcessor(LabelDataSettings(**options), train)


def label(members: dict[str, bytes], **options) -> int:
    return fields(**options).sample(sample(**members), rng_for)["label"]


def test_labels_are_read_from_text_and_json():
    assert label({"cls": b"7"}) == 7
    assert label({"cls": b" 0\n"}) == 0
    assert label({"json": b'{"label": 3}'}, label_source="json:label") == 3
    assert label({"json": b'{"a": {"b": 9}}'}, label_source="json:a.b") == 9
    assert fields().extensions == {*MEMBERS, "cls"}


@pytest.mark.parametrize(
    ("source", "members"),
    [
        ("cls", {}),
        ("json:label", {}),
        ("json:label", {"json": b"{}"}),
        ("json:label", {"json": b'{"label": null}'}),
    ],
)
def test_samples_without_a_label(source, members):
    assert label(members, label_source=source) == -1
    with pytest.raises(BadSample) as caught:
        label(members, label_source=source, unlabelled="fault")
    assert (caught.value.shard, caught.value.key, caught.value.row) == ("a.tar", "key", 3)


@pytest.mark.parametrize(
    ("source", "members", "message"),
    [
        ("cls", {"cls": b"10"}, r"label 10 is not in 0\.\.9 \(classes\)"),
        ("cls", {"cls": b"-1"}, r"label -1 is not in 0\.\.9"),
        ("cls", {"cls": b""}, "not a whole number: ''"),
        ("cls", {"cls": b"1_0"}, "not a whole number: '1_0'"),
        ("cls", {"cls": b"9" * 5000}, "not a whole number: '999"),
        ("cls", {"cls": "٣".encode()}, "not a whole number"),
        ("cls", {"cls": b"\xff"}, "cls: line 1: byte 0xff is not UTF-8"),
        ("json:label", {"json": b'{"label": true}'}, "not a whole number: 'True'"),
        ("json:label", {"json": b'{"label": 1.0}'}, r"not a whole number: '1\.0'"),
        ("json:label", {"json": b'{"label": [1]}'}, "not a whole number"),
        ("json:label", {"json": b"{"}, "JSONDecodeError"),
        ("json:label", {"json": b"[1]"}, "TypeError"),
    ],
)
def test_bad_labels_are_bad_samples(source, members, message):
    """Also where samples without a label are welcome."""
    with pytest.raises(BadSample, match=message):
        label(members, label_source=source)


SOFT = {"label_source": "json:p", "label_form": "probabilities", "classes": 4}


def soft(value, **options):
    """The target of a sample with this under p."""
    members = {"json": json.dumps({"p": value}).encode()}
    return fields(**{**SOFT, **options}).sample(sample(**members), rng_for)


@pytest.mark.parametrize(
    ("value", "target", "largest"),
    [
        ([0.1, 0.2, 0.7, 0], [0.1, 0.2, 0.7, 0], 2),
        ({"3": 0.75, "1": 0.25}, [0, 0.25, 0, 0.75], 3),
        ([0.333, 0.333, 0.333, 0], [1 / 3, 1 / 3, 1 / 3, 0], 0),  # rounded numbers
        (2, [0, 0, 1, 0], 2),
    ],
)
def test_probabilities(value, target, largest):
    item = soft(value)
    assert item["target"].dtype == np.float32 and item["target"].tolist() == pytest.approx(target)
    assert item["label"] == largest


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.5, 0.5], "json:p: 2 probabilities for 4 classes"),
        ([0.5, 0.5, 0.5, 0.5], "probabilities add up to 2, not 1"),
        ({"0": 0.5}, r"probabilities add up to 0\.5, not 1"),
        ([1.5, -0.5, 0, 0], r"not a probability: '1\.5'"),
        ([float("nan"), 1, 0, 0], "not a probability: 'nan'"),
        ([True, 0, 0, 0], "not a probability: 'True'"),
        (["1", 0, 0, 0], "not a probability: '1'"),
        ({"4": 1.0}, r"label 4 is not in 0\.\.3"),
        ({"cat": 1.0}, "not a whole number: 'cat'"),
        (0.5, "not a whole number"),
        ([[1]] * 4, r"not a probability: '\[1\]'"),
    ],
)
def test_bad_probabilities_are_bad_samples(value, message):
    with pytest.raises(BadSample, match=message):
        soft(value)


def test_batches_of_probabilities():
    maker = fields(**SOFT)
    one = maker.sample(sample(json=b'{"p": {"1": 0.25, "2": 0.75}}'), rng_for)
    without = maker.sample(sample(json=b'{"p": null}'), rng_for)
    batch = maker.collate([one, None, without], [True, False, True])
    assert batch["labels"].tolist() == [2, -1, -1]
    assert batch["targets"].tolist() == [[0, 0.25, 0.75, 0], [0] * 4, [0] * 4]
    assert batch["targets"].dtype == torch.float32
    with pytest.raises(BadSample, match="json:p is null"):
        soft(None, unlabelled="fault")
    assert "targets" not in fields().collate([None], [False])
    with pytest.raises(ValidationError, match="label_form=probabilities needs label_source json"):
        fields(label_form="probabilities")


def test_batch():
    maker = fields()
    items = [maker.sample(sample(cls=b"4"), rng_for), None, maker.sample(sample(), rng_for)]
    batch = maker.collate(items, [True, False, True])
    assert batch["images"].shape == (3, 3, 16, 16) and batch["images"].dtype == torch.uint8
    assert batch["images"].is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(batch["images"][0].permute(1, 2, 0).numpy(), items[0]["images"])
    assert not batch["images"][1].any()
    assert batch["labels"].tolist() == [4, -1, -1] and batch["labels"].dtype == torch.int64
    assert batch["valid"].tolist() == [True, False, True]


def test_images_are_those_of_caption_data():
    """One image side for all data: buffers, draws and faults are the same."""
    from data_pipeline.samples.captions import CaptionDataSettings, CaptionProcessor
    from tests.data_pipeline.photos import tokenizer

    data = sample(cls=b"1", txt=b"a bird")
    image = ImageSettings(size=16, flip_probability=0.5, brightness=0.3)
    captions = CaptionProcessor(CaptionDataSettings(shards=["x"], image=image), tokenizer(), True)
    mine = fields(image=image)
    assert mine.buffers(4) == captions.buffers(4) == {"images": (4, 16, 16, 3)}
    one, other = mine.sample(data, rng_for)["images"], captions.sample(data, rng_for)["images"]
    assert np.array_equal(one, other)
    place = {"images": np.full((16, 16, 3), 9, dtype=np.uint8)}
    mine.sample(data, rng_for, place)
    assert np.array_equal(place["images"], one)
    with pytest.raises(BadSample, match="not a readable image"):
        mine.sample(Sample(0, "a", "k", {"jpg": b"no", "cls": b"1"}), rng_for)
    with pytest.raises(BadSample, match="has no member jpg or jpeg"):
        mine.sample(Sample(0, "a", "k", {"cls": b"1"}), rng_for)
    wide = encoded(picture(1, 20, 40), "PNG")
    mixed = fields(image=ImageSettings(size=16, mode="keep_aspect"))
    items = [
        mixed.sample(Sample(0, "a", "k", {"png": d}), rng_for)
        for d in (wide, encoded(picture(1, 40, 20), "PNG"))
    ]
    with pytest.raises(ValueError, match="set micro_batch to 1"):
        mixed.collate(items, [True, True])


def test_evaluation_draws_nothing():
    def forbidden(purpose: str):
        raise AssertionError(f"drew {purpose}")

    data = sample(json=json.dumps({"label": 2}).encode())
    assert fields(False, label_source="json:label").sample(data, forbidden)["label"] == 2


def test_impossible_settings_are_refused():
    with pytest.raises(ValidationError, match="label_source 'json:': write an extension"):
        LabelDataSettings(shards=["x"], classes=2, label_source="json:")
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        LabelDataSettings(shards=["x"], classes=1)


# ---- smaller views -------------------------------------------------------------------------------


def test_smaller_views_are_augmented_on_their_own():
    image = ImageSettings(size=24, flip_probability=0.5, rand_augment={})
    maker = fields(image=image, smaller_views=(16, 8))
    names = {"images": 24, "images_16": 16, "images_8": 8}
    assert maker.buffers(2) == {name: (2, side, side, 3) for name, side in names.items()}
    # Of a JPEG all views together decide at which scale it is decoded.
    here = Sample(3, "a.tar", "key", {"png": encoded(picture(1), "PNG"), "cls": b"3"})
    item = maker.sample(here, rng_for)
    assert {name: item[name].shape for name in names} == {n: (s, s, 3) for n, s in names.items()}
    # Each is what a data set of that size alone would give, for draws of its own purpose.
    for name, side in names.items():
        purpose = "image" if name == "images" else f"view of {side} pixels"
        alone = fields(image=image.model_copy(update={"size": side}))
        assert np.array_equal(
            item[name], alone.sample(here, lambda _, purpose=purpose: rng_for(purpose))["images"]
        )
    # The largest is what it is without the others.
    assert np.array_equal(item["images"], fields(image=image).sample(here, rng_for)["images"])
    batch = maker.collate([item, None], [True, False])
    for name, side in names.items():
        assert batch[name].shape == (2, 3, side, side) and not batch[name][1].any()
        assert np.array_equal(batch[name][0].permute(1, 2, 0), item[name])
    assert "crops" not in batch
    evaluated = fields(train=False, image=image, smaller_views=(16, 8))
    assert evaluated.buffers(1) == {"images": (1, 24, 24, 3)}
    # The geometry of two views is told, and of no more.
    plain = ImageSettings(size=24)
    two = fields(image=plain, second_view=plain, smaller_views=(16,))
    batch = two.collate([two.sample(here, rng_for)], [True])
    assert batch["images_16"].shape == (1, 3, 16, 16) and batch["crops"].shape == (1, 2, 4)


def test_smaller_views_draw_other_boxes():
    """Over positions the boxes of two views are independent: the middle of one says nothing."""
    image = ImageSettings(size=16, scale=(0.1, 0.3))
    maker = fields(image=image, smaller_views=(15,))
    ramp = np.broadcast_to(np.arange(128, dtype=np.uint8)[:, None], (128, 128))
    data = encoded(np.stack([ramp] * 3, axis=-1), "PNG")
    means = []
    for position in range(80):
        item = maker.sample(
            Sample(0, "a.tar", "key", {"png": data, "cls": b"0"}),
            lambda purpose, position=position: sample_rng(0, "classify", position, purpose),
        )
        means.append([item[name].mean() for name in ("images", "images_15")])
    means = np.array(means)
    assert means.std(axis=0).min() > 10
    assert abs(np.corrcoef(means.T)[0, 1]) < 0.35


@pytest.mark.parametrize(
    "options, message",
    [
        ({"smaller_views": (8, 12)}, "must descend"),
        ({"smaller_views": (8, 0)}, "must descend"),
        ({"smaller_views": (16,)}, r"16 is not below image\.size=16"),
        (
            {"image": ImageSettings(size=16, sizes=[12, 16]), "smaller_views": (12,)},
            r"12 is not below image\.sizes=12",
        ),
        (
            {"image": ImageSettings(size=16, mode="keep_aspect"), "smaller_views": (8,)},
            "keep_aspect",
        ),
    ],
)
def test_views_that_are_no_smaller_ones(options, message):
    with pytest.raises(ValidationError, match=message):
        fields(**options)

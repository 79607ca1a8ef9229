"""Images with a second view, a text and a class, of which the last two may be missing."""

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from data_pipeline.images.formats import MEMBERS
from data_pipeline.images.transforms import ImageSettings
from data_pipeline.loader.evaluation import EvaluationLoader
from data_pipeline.loader.loader import LoaderSettings, StepLoader
from data_pipeline.loader.stream import TaskStream
from data_pipeline.order.order import Order
from data_pipeline.reading.reader import BadSample, Sample, SampleReader
from data_pipeline.rng import sample_rng
from data_pipeline.samples.captions import CaptionDataSettings, CaptionProcessor
from data_pipeline.samples.tokenizer import train_byte_level_bpe
from data_pipeline.samples.views_texts_labels import M3IDataSettings, M3IProcessor
from tests.data_pipeline.photos import encoded, pack, photograph

PHOTO = encoded(photograph(1, 90, 120), "PNG")
VIEW = ImageSettings(size=32, flip_probability=0.5)


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_level_bpe(["a red digit", "a blue seven"], 280)


def settings(**options) -> M3IDataSettings:
    return M3IDataSettings(
        **{
            "shards": ["x"],
            "image": VIEW,
            "second_view": VIEW,
            "text_length": 12,
            "label_source": "cls",
            "classes": 10,
            **options,
        }
    )


def load(fields, position: int = 0, **members: bytes) -> dict:
    sample = Sample(3, "a.tar", "key", {"png": PHOTO, **members})
    return fields.sample(sample, lambda purpose: sample_rng(0, "m3i", position, purpose))


def test_a_text_and_a_class_may_be_missing(tokenizer):
    fields = M3IProcessor(settings(), tokenizer, train=True)
    assert fields.extensions == {*MEMBERS, "txt", "cls"}
    items = [
        load(fields, 0, txt=b"a red digit", cls=b"7"),
        load(fields, 1, txt=b"a blue seven"),
        load(fields, 2, cls=b"0"),
        load(fields, 3),
        None,
    ]
    batch = fields.collate(items, [True] * 4 + [False])
    assert batch["labels"].tolist() == [7, -1, 0, -1, -1]
    assert batch["loss_mask"].any(2)[:, 0].tolist() == [True, True, False, False, False]
    assert batch["tokens"][0, 0, 0] == tokenizer.bos_id
    length = batch["tokens"].shape[2]
    empty = [tokenizer.bos_id, tokenizer.eos_id] + [tokenizer.pad_id] * (length - 2)
    assert batch["tokens"][2, 0].tolist() == batch["tokens"][4, 0].tolist() == empty
    assert batch["images"].shape == batch["second_images"].shape == (5, 3, 32, 32)
    assert batch["crops"].shape == (5, 2, 4) and batch["flips"].dtype == torch.bool
    assert not torch.equal(batch["crops"][0, 0], batch["crops"][0, 1])
    assert batch["valid"].tolist() == [True] * 4 + [False]


def test_texts_are_those_of_caption_data(tokenizer):
    source = {"caption_source": "json:captions", "text_length": 12}
    member = json.dumps({"captions": ["a red digit", "a blue seven", "a a a"]}).encode()
    ours = M3IProcessor(settings(**source), tokenizer, train=True)
    theirs = CaptionProcessor(
        CaptionDataSettings(shards=["x"], image=VIEW, second_view=VIEW, **source), tokenizer, True
    )
    one, other = (
        fields.collate([load(fields, p, json=member) for p in range(6)], [True] * 6)
        for fields in (ours, theirs)
    )
    assert len({tuple(row) for row in one["tokens"][:, 0].tolist()}) > 1
    for name in other:
        assert torch.equal(one[name], other[name]), name


def test_which_texts_were_made_from_class_names(tokenizer):
    """Row by row; the label of an image does not tell."""
    sources = [{"source": "json:label", "class_names": ["red", "blue"]}, {"source": "txt"}]
    fields = M3IProcessor(settings(caption_source=sources), tokenizer, train=True)
    label = [json.dumps({"label": n}).encode() for n in (0, 1)]
    item = [
        load(fields, 0, json=label[0], cls=b"3"),
        load(fields, 1, json=label[1], cls=b"3"),
        load(fields, 2, json=label[1]),
        load(fields, 3, txt=b"blue", cls=b"3"),
        load(fields, 4, cls=b"3"),
        None,
    ]
    red, blue, again, *rest = fields.collate(item, [True] * 5 + [False])["prompt_class"].tolist()
    assert blue == again != red and min(red, blue) >= 0 and rest == [-1, -1, -1]


def test_without_classes(tokenizer):
    fields = M3IProcessor(settings(label_source=None, classes=None), tokenizer, train=True)
    assert "cls" not in fields.extensions
    assert load(fields, 0, cls=b"7")["label"] == -1


@pytest.mark.parametrize("members", [{"cls": b"10"}, {"cls": b"x"}, {"txt": b"\xff\xfe"}])
def test_what_is_there_must_be_right(tokenizer, members):
    fields = M3IProcessor(settings(), tokenizer, train=True)
    with pytest.raises(BadSample):
        load(fields, 0, **members)


def test_evaluation_draws_the_second_view_alone(tokenizer):
    """The first is the centre crop, whatever the position; the second is keyed by position."""
    centre = VIEW.model_copy(update={"mode": "center_crop"})
    fields = M3IProcessor(settings(image=centre), tokenizer, train=False)
    items = [load(fields, position, txt=b"a red digit") for position in (0, 1, 0)]
    assert np.array_equal(items[0]["images"], items[1]["images"])
    assert not np.array_equal(items[0]["second_images"], items[1]["second_images"])
    assert np.array_equal(items[0]["second_images"], items[2]["second_images"])
    assert items[0]["captions"] == ["a red digit"]
    x0, y0, x1, y1 = items[0]["crops"][0].tolist()
    assert (y0, y1) == (0, 90) and abs((x0 + x1) / 2 - 60) < 2 and not items[0]["flips"][0]


class SamePairs(CaptionProcessor):
    """Both views of every row, and the second one drawn in evaluation too."""

    draws_second_view = True


def test_the_view_that_nobody_asks_for_is_not_made(tokenizer, tmp_path):
    """Of partners the first predicts itself, the second its other view. All else, the pixels of
    reduced JPEGs too, is what it is where every row has both."""
    shards = pack(tmp_path, 40)
    # So small that most JPEGs are reduced, and often less for both views than for the first.
    view = VIEW.model_copy(update={"size": 12, "brightness": 0.4})
    options = {"shards": ["x"], "image": view, "text_length": 12}
    pair = {**options, "second_view": view.model_copy(update={"solarize_probability": 0.5})}

    def windows(fields, workers=0):
        order = Order.plan(len(shards), 7, 6)
        task = TaskStream("m3i", SampleReader(shards), order, fields, 7, 6, 4)
        settings = LoaderSettings(workers=workers)
        loader = StepLoader({"m3i": task}, lambda s: ("m3i", s), settings, 0, 1, 2, 8)
        return [batch for window in loader for batch in window.micro_batches]

    def evaluation(fields):
        reader = SampleReader(shards)
        task = TaskStream("m3i", reader, None, fields, 7, 4, 4)
        return list(EvaluationLoader(task, 0, 1, max_samples=7))

    alone = windows(CaptionProcessor(CaptionDataSettings(**options), tokenizer, True))
    reduced_less = False
    for train in (True, False):
        ours = M3IProcessor(M3IDataSettings(**pair), tokenizer, train)
        theirs = SamePairs(CaptionDataSettings(**pair), tokenizer, train)
        found = [windows(ours), windows(ours, workers=1)] if train else [evaluation(ours)]
        wanted = windows(theirs) if train else evaluation(theirs)
        for batches in found:
            assert len(batches) == len(wanted)
            for number, (one, other) in enumerate(zip(batches, wanted, strict=True)):
                for name in ("images", "image_sizes", "tokens", "valid", "position", "row"):
                    assert torch.equal(one[name], other[name]), name
                for name in ("crops", "flips", "colours"):
                    assert torch.equal(one[name][:, 0], other[name][:, 0]), name
                for name in ("second_images", "crops", "flips", "colours"):
                    assert torch.equal(one[name][1::2], other[name][1::2]), name
                assert not one["second_images"][::2].any() and other["second_images"][::2].any()
                if train:
                    even = one["images"][::2], alone[number]["images"][::2]
                    reduced_less |= not torch.equal(*even)
    assert reduced_less


@pytest.mark.parametrize(
    "options, message",
    [
        ({"second_view": None}, "second_view is missing"),
        ({"classes": None}, r"label_source=cls and classes=None go together"),
        ({"label_source": None}, r"label_source=None and classes=10 go together"),
        ({"second_view": ImageSettings(size=48)}, "different size or sizes.*make them equal"),
        ({"label_source": "json:"}, "label_source 'json:'"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ValidationError, match=message):
        settings(**options)

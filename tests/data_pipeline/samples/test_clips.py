"""Clips: which frames stand for a sample, and that all of them are seen in the same way."""

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.images.transforms import ImageSettings, ImageTransform
from data_pipeline.loader.loader import LoaderSettings, StepLoader
from data_pipeline.loader.stream import TaskStream
from data_pipeline.order.order import Order
from data_pipeline.reading.reader import BadSample, Sample, SampleReader
from data_pipeline.rng import sample_rng
from data_pipeline.samples.captions import CaptionDataSettings
from data_pipeline.samples.clips import ClipProcessor, choose_frames
from data_pipeline.shards.packer import ShardWriter
from data_pipeline.shards.shard_set import ShardSet
from tests.data_pipeline.photos import tokenizer

AUGMENTED = ImageSettings(
    size=32,
    scale=(0.3, 1.0),
    flip_probability=0.5,
    brightness=0.4,
    hue=0.1,
    rand_augment={},
    erase={"probability": 0.5},
)


def jpeg(seed: int, height: int = 60, width: int = 80) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def clip(number: int, frames: int = 12) -> dict[str, bytes]:
    members = {f"f{place:03d}.jpg": jpeg(100 * number + place) for place in range(frames)}
    return members | {"json": json.dumps({"captions": [f"a red green {number}"]}).encode()}


def fields(train: bool, frames: int = 4, **changes) -> ClipProcessor:
    image = changes.pop("image", AUGMENTED)
    settings = CaptionDataSettings(
        shards=["unused"], image=image, caption_source="json:captions", frames=frames, **changes
    )
    return ClipProcessor(settings, tokenizer(), train)


def keyed(position: int):
    return lambda purpose: sample_rng(7, "clips", position, purpose)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    folder = tmp_path_factory.mktemp("clips")
    with ShardWriter(folder, max_samples=9) as writer:
        for number in range(20):
            writer.write(f"{number:03d}", clip(number, frames=3 + number % 7))
    return ShardSet.open(folder)


def stream(shards: ShardSet, train: bool = True, **changes) -> TaskStream:
    order = Order.plan(len(shards), 7, 6) if train else None
    return TaskStream("clips", SampleReader(shards), order, fields(train, **changes), 7, 6, 2)


@given(there=st.integers(1, 400), wanted=st.integers(1, 40), seed=st.none() | st.integers(0, 9))
def test_one_frame_of_each_part_in_order(there, wanted, seed):
    rng = None if seed is None else np.random.default_rng(seed)
    places = choose_frames(there, wanted, rng)
    assert places.shape == (wanted,) and (np.diff(places) >= 0).all()
    for part, place in enumerate(places.tolist()):
        assert part * there // wanted <= place < max((part + 1) * there / wanted, 1)
    if there >= wanted:
        assert len(set(places.tolist())) == wanted


def test_in_evaluation_they_are_the_middles():
    assert choose_frames(12, 6, None).tolist() == [1, 3, 5, 7, 9, 11]
    assert choose_frames(7, 3, None).tolist() == [1, 3, 5]
    assert choose_frames(2, 6, None).tolist() == [0, 0, 0, 1, 1, 1]
    members = clip(3)
    found = fields(train=False).sample(Sample(0, "s", "k", members), keyed(0))
    transform = ImageTransform(AUGMENTED.model_copy(update={"mode": "center_crop"}))
    found_by_hand = [transform(members[f"f{n:03d}.jpg"], None) for n in (1, 4, 7, 10)]
    evaluated = fields(train=False, image=AUGMENTED.model_copy(update={"mode": "center_crop"}))
    again = evaluated.sample(Sample(0, "s", "k", members), keyed(0))
    assert (again["images"] == np.stack(found_by_hand)).all()
    assert found["captions"] == ["a red green 3"]


def test_in_training_all_frames_meet_the_same_draws():
    members, drawn = clip(3), set()
    for position in range(20):
        found = fields(train=True).sample(Sample(0, "s", "k", members), keyed(position))["images"]
        places = choose_frames(12, 4, keyed(position)("frames")).tolist()
        drawn.add(tuple(places))
        for frame, place in zip(found, places, strict=True):
            rng = keyed(position)("image")
            assert (frame == ImageTransform(AUGMENTED)(members[f"f{place:03d}.jpg"], rng)).all()
    assert len(drawn) > 10
    # Time is in the names of frames, not in their order in the shard.
    backwards = dict(reversed(members.items()))
    found = fields(train=True).sample(Sample(0, "s", "k", members), keyed(3))["images"]
    again = fields(train=True).sample(Sample(0, "s", "k", backwards), keyed(3))["images"]
    assert (found == again).all()
    # A still clip stays still, whatever is done to it.
    still = {name: members["f000.jpg"] for name in members if name != "json"}
    still["json"] = members["json"]
    found = fields(train=True).sample(Sample(0, "s", "k", still), keyed(5))["images"]
    assert (found == found[:1]).all()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches(shards, workers):
    def windows(start, changes=None):
        loader = StepLoader(
            {"clips": stream(shards, **(changes or {}))},
            lambda step: ("clips", step),
            LoaderSettings(workers=workers),
            0,
            1,
            start,
            5,
        )
        return [batch for window in loader for batch in window.micro_batches]

    batches = windows(0)
    assert len(batches) == 15
    for batch in batches:
        assert batch["images"].shape == (2, 4, 3, 32, 32) and batch["tokens"].shape[0] == 2
        for place, position in enumerate(batch["position"].tolist()):
            row = int(batch["row"][place])
            sample = SampleReader(shards).read(row)
            expected = fields(train=True).sample(sample, keyed(position))["images"]
            found = batch["images"][place].permute(0, 2, 3, 1).numpy()
            assert (found == expected).all()
    for found, expected in zip(windows(3), batches[9:], strict=True):
        assert (found["images"] == expected["images"]).all()
    sizes = {"image": AUGMENTED.model_copy(update={"sizes": [16, 32]})}
    assert {tuple(b["images"].shape[-2:]) for b in windows(0, sizes)} == {(16, 16), (32, 32)}


def test_padding_rows_are_empty(shards):
    from data_pipeline.loader.loader import EvaluationLoader

    ranks = [list(EvaluationLoader(stream(shards, train=False), rank, 3)) for rank in range(3)]
    batches = [batch for of_rank in zip(*ranks, strict=True) for batch in of_rank]
    rows = [row for b in batches for row in b["row"].tolist()]
    assert sorted(rows) == [*[-1] * 4, *range(20)]
    last, _ = batches[-1]["images"][~batches[-1]["valid"]]
    assert last.shape == (4, 3, 32, 32) and not last.any()


def test_bad_clips_are_named():
    def reason(members):
        with pytest.raises(BadSample) as found:
            fields(train=True).sample(Sample(5, "shard", "key", members), keyed(0))
        assert (found.value.shard, found.value.key, found.value.row) == ("shard", "key", 5)
        return found.value.reason

    good = clip(1, frames=2)
    assert "has no frames" in reason({"json": good["json"], "jpg": jpeg(1)})
    assert "frames of different size: [(60, 80), (61, 80)]" in reason(
        good | {"f001.jpg": jpeg(1, height=61)}
    )
    assert "frame f001.jpg: " in reason(good | {"f001.jpg": good["f001.jpg"][:200]})


def test_settings_that_clips_do_not_have():
    keep = ImageSettings(mode="keep_aspect", size=32, max_size=64)
    with pytest.raises(ValueError, match=r"frames=4: clips need one size: image\.mode 'keep_asp"):
        fields(train=True, image=keep)
    with pytest.raises(ValueError, match="frames=4: clips have no second_view"):
        plain = ImageSettings(size=32)
        fields(train=True, image=plain, second_view=plain)

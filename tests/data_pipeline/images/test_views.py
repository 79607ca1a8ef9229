"""Two views of an image with their exact geometry, and image sizes drawn per step."""

import time

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from data_pipeline.images.crops import resize
from data_pipeline.images.decode import decode, read_header
from data_pipeline.images.rand_augment import RandAugmentSettings
from data_pipeline.images.transforms import ImageSettings
from data_pipeline.loader.loader import LoaderSettings, StepLoader
from data_pipeline.loader.stream import TaskStream
from data_pipeline.order.order import Order
from data_pipeline.reading.reader import Sample, SampleReader
from data_pipeline.rng import sample_rng
from data_pipeline.samples.captions import CaptionDataSettings
from data_pipeline.samples.image_fields import ImageProcessor
from data_pipeline.samples.pictures import PictureDataSettings
from tests.data_pipeline.photos import encoded, jpeg, pack, photograph, picture

ONLINE = ImageSettings(size=48, flip_probability=0.5)
TARGET = ImageSettings(size=32, flip_probability=0.5, scale=(0.3, 1.0), solarize_probability=0.3)


def fields(first: ImageSettings = ONLINE, second: ImageSettings | None = TARGET, train=True):
    settings = PictureDataSettings(shards=["x"], image=first, second_view=second)
    return ImageProcessor(settings, train)


def load(maker: ImageProcessor, data: bytes, position: int = 0) -> dict:
    sample = Sample(0, "a.tar", "key", {"jpg": data})
    return maker.sample(sample, lambda purpose: sample_rng(0, "views", position, purpose))


def windows(shards, workers: int = 0, steps=(0, 6), rank: int = 0, world: int = 1, **data):
    settings = PictureDataSettings(shards=["x"], **data)
    order = Order.plan(len(shards), 7, 8)
    maker = ImageProcessor(settings, True)
    stream = TaskStream("views", SampleReader(shards), order, maker, 7, 8, 4)
    options = LoaderSettings(workers=workers)
    return StepLoader({"views": stream}, lambda s: ("views", s), options, rank, world, *steps)


def batches(*arguments, **options) -> list:
    return [b for window in windows(*arguments, **options) for b in window.micro_batches]


@pytest.mark.parametrize("position", range(8))
def test_views_are_rebuilt_from_their_geometry(position):
    pixels = photograph(position, 200, 301)
    plain = TARGET.model_copy(update={"solarize_probability": 0.0})
    item = load(fields(ONLINE, plain), encoded(pixels, "PNG"), position)
    assert item["image_sizes"].tolist() == [200, 301]
    for place, name in enumerate(("images", "second_images")):
        x0, y0, x1, y1 = item["crops"][place]
        assert all(edge == round(edge) for edge in (x0, y0, x1, y1))
        region = pixels[round(y0) : round(y1), round(x0) : round(x1)]
        view = resize(np.ascontiguousarray(region), *item[name].shape[:2])
        if item["flips"][place]:
            view = view[:, ::-1]
        assert np.array_equal(item[name], view)


def test_views_are_rebuilt_where_the_jpeg_was_reduced():
    data = encoded(photograph(9, 589, 805), "JPEG", quality=92)
    header = read_header(data, 10**7)
    pixels = decode(data, header)
    for position in range(6):
        item = load(fields(), data, position)
        if item["colours"][1, 6]:  # solarised
            continue
        for place, name in enumerate(("images", "second_images")):
            x0, y0, x1, y1 = item["crops"][place].astype(int)
            view = resize(pixels[y0:y1, x0:x1], *item[name].shape[:2])
            view = view[:, ::-1] if item["flips"][place] else view
            assert ((view.astype(int) - item[name]) ** 2).mean() < 255**2 / 10**3.6  # 36 dB


def test_positions_between_views_follow_from_the_batch():
    """The relative form of SiameseIM: crops measured in each view's own, perhaps mirrored, image
    tell where a cell of view 2 lies in the grid of view 1."""
    cells = 14
    for position in range(40):
        item = load(fields(), encoded(picture(1), "PNG"), position)
        (a, b), (flip_a, flip_b) = item["crops"], item["flips"]
        full = item["image_sizes"][1]
        j1, j2 = full - a[2] if flip_a else a[0], full - b[2] if flip_b else b[0]
        w1, w2 = a[2] - a[0], b[2] - b[0]
        column = 5
        if flip_a == flip_b:
            theirs = w2 / w1 * (column + 0.5) + (j2 - j1) / w1 * cells - 0.5
        else:
            theirs = -w2 / w1 * (column + 0.5) + (full - j1 - j2) / w1 * cells - 0.5
        share = (column + 0.5) / cells
        x = b[0] + (1 - share if flip_b else share) * w2  # in the upright image
        seen = (x - a[0]) / w1
        ours = (1 - seen if flip_a else seen) * cells - 0.5
        assert abs(theirs - ours) < 1e-9


def test_views_draw_for_themselves():
    items = [load(fields(), jpeg(picture(2)), position) for position in range(60)]
    crops = np.array([item["crops"] for item in items])
    assert (np.abs(crops[:, 0] - crops[:, 1]).max(1) > 0).all()
    flips = np.array([item["flips"] for item in items])
    assert 10 < (flips[:, 0] != flips[:, 1]).sum() < 50
    solarized = np.array([item["colours"][:, 6] for item in items])
    assert not solarized[:, 0].any() and 5 < solarized[:, 1].sum() < 35
    alone = [load(fields(second=None), jpeg(picture(2)), p)["images"] for p in range(5)]
    assert all(np.array_equal(a, item["images"]) for a, item in zip(alone, items, strict=False))


def test_batch():
    maker = fields()
    items = [load(maker, jpeg(picture(3)), 3), None]
    batch = maker.collate(items, [True, False])
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in batch.items()}
    assert shapes == {
        "images": ((2, 3, 48, 48), torch.uint8),
        "second_images": ((2, 3, 32, 32), torch.uint8),
        "crops": ((2, 2, 4), torch.float64),
        "flips": ((2, 2), torch.bool),
        "colours": ((2, 2, 7), torch.float32),
        "image_sizes": ((2, 2), torch.int64),
        "valid": ((2,), torch.bool),
    }
    assert batch["images"].is_contiguous(memory_format=torch.channels_last)
    assert not batch["second_images"][1].any()
    assert batch["crops"][1].tolist() == [[0, 0, 1, 1]] * 2
    assert maker.buffers(2) == {"images": (2, 48, 48, 3), "second_images": (2, 32, 32, 3)}
    assert "crops" not in fields(second=None).collate([None], [False])


def test_evaluation_sees_the_middle_twice():
    item = load(fields(train=False), encoded(picture(4, 40, 60), "PNG"))
    assert item["crops"].tolist() == [[10, 0, 50, 40]] * 2
    assert not item["flips"].any()


def test_workers_fill_both_views_in_place(tmp_path):
    shards = pack(tmp_path, 40)
    here = batches(shards, image=ONLINE, second_view=TARGET)
    there = batches(shards, workers=2, image=ONLINE, second_view=TARGET)
    assert len(here) == 12
    for a, b in zip(here, there, strict=True):
        for name in ("images", "second_images", "crops", "flips", "colours", "image_sizes"):
            assert torch.equal(a[name], b[name])


@pytest.mark.parametrize("kept", ["images", "second_images"])
def test_a_view_may_outlive_the_other(tmp_path, kept):
    """Both lie in one slot of the memory shared with the workers, which fill free slots anew."""
    data = {"image": ONLINE, "second_view": TARGET, "steps": (0, 12)}
    shards = pack(tmp_path, 40)
    held = []
    for window in windows(shards, workers=1, **data):
        held += [batch.pop(kept) for batch in window.micro_batches]
        del window
        time.sleep(0.02)  # the worker goes on meanwhile
    here = batches(shards, **data)
    assert len(here) == len(held) == 24
    assert all(torch.equal(batch[kept], view) for batch, view in zip(here, held, strict=True))


def test_sizes_are_drawn_per_step(tmp_path):
    """The same on all ranks, in workers, and after a restart."""
    shards = pack(tmp_path, 40)
    image = ImageSettings(size=32, sizes=[16, 24, 40])
    data = {"image": image, "second_view": image}
    whole = batches(shards, steps=(0, 30), **data)
    sizes = [batch["images"].shape[-1] for batch in whole]
    assert set(sizes) == {16, 24, 40}
    assert sizes[::2] == sizes[1::2]  # both micro-steps
    assert all(
        b["images"].shape == b["second_images"].shape == (4, 3, s, s)
        for b, s in zip(whole, sizes, strict=True)
    )
    for rank in range(2):
        share = batches(shards, 1, (10, 30), rank, 2, **data)
        assert [batch["images"].shape[-1] for batch in share] == sizes[20::2]
    later = batches(shards, steps=(10, 30), **data)
    assert all(
        torch.equal(a["images"], b["images"]) for a, b in zip(later, whole[20:], strict=True)
    )
    assert fields(image, None).buffers(1) == {"images": (1, 40, 40, 3)}
    assert fields(image, None, train=False).of_step(0, "a", 3).buffers(1) == {
        "images": (1, 32, 32, 3)
    }


def test_rand_augment_without_geometry_leaves_crops_as_they_are():
    augmented = ONLINE.model_copy(
        update={"rand_augment": RandAugmentSettings(probability=1.0, geometry=False)}
    )
    data = encoded(photograph(3, 200, 301), "PNG")
    plain, changed = (load(fields(image), data) for image in (ONLINE, augmented))
    assert np.array_equal(plain["crops"], changed["crops"])
    assert np.array_equal(plain["second_images"], changed["second_images"])
    assert not np.array_equal(plain["images"], changed["images"])


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"mode": "keep_aspect"}, {}, "image.mode keep_aspect gives images of different sizes"),
        ({}, {"mode": "keep_aspect"}, "second_view.mode keep_aspect"),
        ({"rand_augment": RandAugmentSettings()}, {}, "image.rand_augment moves pixels"),
        ({}, {"mean": (0.5, 0.5, 0.5)}, "second_view.mean and .std differ"),
    ],
)
def test_what_cannot_be_two_views_is_refused(first, second, message):
    with pytest.raises(ValidationError, match=message):
        CaptionDataSettings(
            shards=["x"], image=ImageSettings(**first), second_view=ImageSettings(**second)
        )

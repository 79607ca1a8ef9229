"""Pictures, shards and streams for the tests of this folder."""

import functools
import io
import json
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from data_pipeline.images.transforms import ImageSettings
from data_pipeline.loader.stream import TaskStream
from data_pipeline.order.order import Order
from data_pipeline.reading.reader import SampleReader
from data_pipeline.samples.captions import CaptionDataSettings, CaptionProcessor
from data_pipeline.samples.tokenizer import Tokenizer, train_byte_level_bpe
from data_pipeline.shards.packer import ShardWriter
from data_pipeline.shards.shard_set import ShardSet

WORDS = ("red", "green", "small", "large", "bird", "boat", "on", "under", "a", "table", "tree")


def picture(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """Smooth coloured noise, (H, W, 3) uint8: JPEG reproduces it well."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def photograph(seed: int, height: int, width: int) -> np.ndarray:
    """Noise whose amplitude falls as 1 / frequency, as that of photographs; (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height)))
    frequency[0, 0] = 1.0
    spectrum = np.fft.fft2(rng.standard_normal((3, height, width))) / frequency
    planes = np.fft.ifft2(spectrum).real
    planes = planes[0] + 0.3 * planes
    planes = 128 + 50 * (planes - planes.mean()) / planes.std()
    return np.clip(planes, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def jpeg(pixels: np.ndarray, quality: int = 95) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, colorsubsampling="444")


def encoded(pixels: np.ndarray, kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def caption(number: int) -> str:
    rng = np.random.default_rng(number)
    return " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), 3 + number % 9))


@functools.cache
def tokenizer() -> Tokenizer:
    return train_byte_level_bpe([caption(number) for number in range(200)], 300)


def pack(folder: Path, samples: int, per_shard: int = 25) -> ShardSet:
    """Shards of 80 x 60 JPEGs with one caption (txt) and 0 to 3 more (json)."""
    with ShardWriter(folder, "test", max_samples=per_shard) as writer:
        for number in range(samples):
            captions = [caption(number + 1000 * i) for i in range(number % 4)]
            writer.write(
                f"{number:05d}",
                {
                    "jpg": jpeg(picture(number)),
                    "txt": caption(number).encode(),
                    "json": json.dumps({"captions": captions}).encode(),
                },
            )
    return ShardSet.open(str(folder))


def damage(folder: Path, numbers: list[int]) -> None:
    """Make the JPEGs of some samples of `pack` unreadable."""
    for number in numbers:
        damage_key(folder, f"{number:05d}")


def damage_key(folder: Path, key: str) -> None:
    """Overwrite bytes in the JPEG of one sample."""
    name = f"{key}.jpg".encode()
    shard = next(s for s in folder.glob("*.tar") if name in s.read_bytes())
    content = bytearray(shard.read_bytes())
    payload = content.index(name) + 512
    content[payload + 100 : payload + 108] = bytes(8 * [0xAA])
    shard.write_bytes(content)


def stream(
    shards: ShardSet,
    global_batch: int = 12,
    micro_batch: int = 4,
    train: bool = True,
    name: str = "caption",
    seed: int = 7,
    **data,
) -> TaskStream:
    image = data.pop("image", ImageSettings(size=32, flip_probability=0.5, brightness=0.3))
    settings = CaptionDataSettings(shards=["unused"], image=image, **data)
    return TaskStream(
        name,
        SampleReader(shards),
        Order.plan(len(shards), seed, global_batch) if train else None,
        CaptionProcessor(settings, tokenizer(), train),
        seed,
        global_batch,
        micro_batch,
    )

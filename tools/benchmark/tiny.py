"""Images of 32 x 32 pixels, where the loader and not the decoder is what costs.

Stored as a member of the tar each, and in bundles.
"""

import itertools
from pathlib import Path

import numpy as np
import simplejpeg

from data_pipeline.order.order import Order
from data_pipeline.reading.reader import SampleReader
from data_pipeline.shards.packer import ShardWriter
from data_pipeline.shards.shard_set import ShardSet
from tools.make_shards.scenes import make_scene

SIDE = 32
BUNDLE = 64


class TinyBench:
    """Reads and decodes every sample (jpg, cls) once per repetition, in one process."""

    def __init__(self, folder: Path, samples: int) -> None:
        scenes = [make_scene(index, size=SIDE).image for index in range(64)]
        # About 0.9 kB each, like the images of CIFAR-10 as JPEGs.
        jpegs = [simplejpeg.encode_jpeg(image, quality=75) for image in scenes]
        self.shards, self.bundles = (
            _pack(folder / str(bundle), jpegs, samples, bundle) for bundle in (1, BUNDLE)
        )
        self.samples = samples

    def ours(self, bundled: bool = False) -> float:
        """Rows in training order, pixels in a buffer that is used again, as the loader does it."""
        buffer = np.empty(SIDE * SIDE * 3, dtype=np.uint8)
        order = Order.plan(self.samples, 0, 64)
        with SampleReader(self.bundles if bundled else self.shards) as reader:
            for row in order.rows(np.arange(self.samples)).tolist():
                members = reader.read(row).members
                simplejpeg.decode_jpeg(members["jpg"], "RGB", buffer=buffer)
                int(members["cls"])
        return self.samples

    def webdataset_pillow(self) -> float:
        """Samples in storage order, decoded as webdataset does it: Pillow to uint8, text to int."""
        import webdataset

        urls = [shard.path for shard in self.shards.shards]
        samples = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        return sum(1 for _ in samples.decode("rgb8"))


def _pack(folder: Path, jpegs: list[bytes], samples: int, bundle: int) -> ShardSet:
    with ShardWriter(folder, "tiny", max_samples=samples // 4, bundle=bundle) as writer:
        for number, jpeg in zip(range(samples), itertools.cycle(jpegs), strict=False):
            writer.write(f"{number:08d}", {"jpg": jpeg, "cls": b"%d" % (number % 10)})
    return ShardSet.open(str(folder))

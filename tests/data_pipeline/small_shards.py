"""Small shards for the tests of this folder."""

import json
from pathlib import Path

import numpy as np

from data_pipeline.shards.packer import ShardWriter
from data_pipeline.shards.shard_set import ShardSet


def sample(number: int) -> tuple[str, dict[str, bytes]]:
    """Return a key and three members that differ from those of every other number."""
    rng = np.random.default_rng(number)
    record = {"captions": ["a"] * (number % 4), "width": 10 + number, "score": number / 3}
    members = {
        "jpg": rng.bytes(300 + 97 * (number % 13)),
        "json": json.dumps(record).encode(),
        "cls": str(number % 5).encode(),
    }
    return f"{number:06d}", members


def write_shards(
    folder: Path, count: int, per_shard: int, prefix: str = "train", bundle: int = 1
) -> ShardSet:
    """Write samples 0 .. count - 1 and open them."""
    with ShardWriter(folder, prefix, max_samples=per_shard, bundle=bundle) as writer:
        for number in range(count):
            writer.write(*sample(number))
    return ShardSet.open(folder)

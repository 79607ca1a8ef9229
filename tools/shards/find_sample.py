"""Find a sample by what people call it."""

from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.storage.errors import ShardError


def row_of(shards: ShardSet, wanted: str) -> int:
    """Row of the first sample whose key is `wanted`, or of that number if no key is.

    Raises:
        ShardError: there is no such sample.
    """
    first_row = 0
    for number, shard in enumerate(shards.shards):
        keys = shards.index(number).keys()
        if wanted in keys:
            return first_row + keys.index(wanted)
        first_row += shard.samples
    if wanted.isdigit() and int(wanted) < len(shards):
        return int(wanted)
    raise ShardError(f"no sample has the key {wanted!r}, and it is no row below {len(shards)}")

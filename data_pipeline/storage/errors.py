"""What is wrong with shards."""


class ShardError(ValueError):
    """A shard, its index or its manifest cannot be trusted. The message names file and byte."""

    at: int | None = None
    """Byte of the tar where damage was met, if it is that."""
    marker: int | None = None
    """First byte of the end-of-archive marker that it lies behind, if it does."""

"""What the manifests of shards say of classes and rights."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.shards.manifest import FILE_NAME, Manifest


def class_names(shards: Sequence[str]) -> list[str]:
    """Names of classes in the order of their numbers, by the first manifest that has some."""
    return next((list(one.classes) for one in _manifests(shards) if one.classes), [])


def licence(shards: Sequence[str]) -> str:
    """What the first manifest says of rights; perhaps nothing."""
    return next((one.licence for one in _manifests(shards)), "")


def _manifests(shards: Sequence[str]) -> Iterator[Manifest]:
    """Of folders of shards, or of the folders that shards lie in."""
    for one in shards:
        folder = Path(one) if Path(one).is_dir() else Path(one).parent
        if (folder / FILE_NAME).is_file():
            yield Manifest.load(folder)

"""The manifest of a packed folder: everything about its shards in one small JSON file.

With a manifest, opening a data set reads one file however many shards there are.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.files import write_atomically
from data_pipeline.storage.errors import ShardError

FILE_NAME = "manifest.json"
PLAN_NAME = "packing.json"
"""Stands in a folder while shards are packed into it, and gives way to the manifest."""
FORMAT = "omnipretrain.shards"
VERSION = 1


class ShardRecord(NamedTuple):
    """What the manifest knows about one shard."""

    name: str
    """File name inside the folder of the manifest."""
    samples: int
    bytes: int
    sha256: str
    """Of the whole tar file."""
    index_digest: str
    """ShardIndex.digest: of keys, offsets and checksums of all members."""


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json."""

    shards: list[ShardRecord]
    fields: dict[str, int] = field(default_factory=dict)
    """Member extension -> number of samples that have it."""
    columns: list[str] = field(default_factory=list)
    """Names of numeric columns in the indices."""
    licence: str = ""
    """Licence and attribution of the data, as text."""
    command: str = ""
    """The command that makes these bytes again."""
    classes: list[str] | None = None
    """Class names in the order of their integer labels, where the data have labels."""
    details: dict[str, Any] = field(default_factory=dict)
    """What the packing tool wants to remember: seed, number of samples left out, plan digest."""

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of all tar files."""
        return sum(shard.bytes for shard in self.shards)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write manifest.json into `folder`, atomically; equal manifests have equal bytes."""
        head = {"format": FORMAT, "version": VERSION, "samples": self.samples, "bytes": self.bytes}
        rest = {k: v for k, v in vars(self).items() if k != "shards" and v is not None}
        # One shard a line: short to diff, and still plain JSON.
        lines = ",\n".join(
            "  " + json.dumps(shard._asdict(), ensure_ascii=False) for shard in self.shards
        )
        text = json.dumps(head | rest, indent=1, ensure_ascii=False)
        text = text.removesuffix("\n}") + ',\n "shards": [\n' + lines + "\n ]\n}\n"
        write_atomically(Path(folder) / FILE_NAME, [text.encode()])

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Manifest":
        """Read manifest.json from `folder`.

        Errors: FileNotFoundError; ShardError if it is not a manifest of this version.
        """
        path = Path(folder) / FILE_NAME
        return cls.parse(path.read_bytes(), str(path))

    @classmethod
    def parse(cls, text: bytes, place: str) -> "Manifest":
        """Read a manifest's bytes; `place` names it in messages. Errors: ShardError."""
        try:
            content = json.loads(text)
            if content.pop("format") != FORMAT or content.pop("version") != VERSION:
                raise ValueError("another format or version")
            totals = content.pop("samples"), content.pop("bytes")
            content["shards"] = [ShardRecord(**record) for record in content["shards"]]
            manifest = cls(**content)
            _check_types(manifest)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ShardError(f"{place}: damaged or foreign manifest: {error}") from None
        if totals != (manifest.samples, manifest.bytes):
            raise ShardError(f"{place}: damaged: its totals are not the sums over its shards")
        for record in manifest.shards:
            if not _is_file_name(record.name):
                raise ShardError(f"{place}: shard name {record.name!r} is not a file name")
        return manifest


def _is_file_name(name: str) -> bool:
    """Whether `name` stays inside its folder and the file system can hold it."""
    is_storable = "\0" not in name and not any("\ud800" <= letter <= "\udfff" for letter in name)
    return is_storable and os.path.basename(name) == name and name not in ("", ".", "..")


def _check_types(manifest: Manifest) -> None:
    """Raise ValueError for values of other types than a manifest's: JSON promises none."""
    types = {"fields": dict, "columns": list, "licence": str, "command": str, "details": dict}
    for name, kind in types.items():
        if not isinstance(getattr(manifest, name), kind):
            raise ValueError(f"{name} is no {kind.__name__}")
    if not isinstance(manifest.classes, list | None):
        raise ValueError("classes is no list")
    for record in manifest.shards:
        numbers = record.samples, record.bytes
        texts = record.name, record.sha256, record.index_digest
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"samples and bytes of {record.name!r} are no counts")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"name and digests of {record.name!r} are no texts")

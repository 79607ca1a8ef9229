"""Ways to damage a folder of shards, each drawn from a generator; for the damage suite.

The folder was packed by `pack`: three shards of twelve samples, with indices and a manifest, or
without them and as another writer's tars (`foreign`).
"""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.index_file import load_index
from data_pipeline.shards.packer import ShardWriter
from tests.data_pipeline.photos import caption, jpeg, picture

SHARDS, PER_SHARD = 3, 12
SAMPLES = SHARDS * PER_SHARD

Members = dict[str, bytes]
Damage = Callable[[Path, np.random.Generator], set[str] | None]
"""(folder, generator) -> keys that are bad now, or None where that is for the test to find out."""


def key(number: int) -> str:
    return f"{number:05d}"


def members(number: int) -> Members:
    return {
        "jpg": jpeg(picture(number, 20, 24)),
        "json": json.dumps({"captions": [caption(number)]}).encode(),
    }


def pack(folder: Path, bundle: int = 1, changed: dict[int, Members] | None = None) -> None:
    """Our own shards; `changed` replaces the members of some samples."""
    with ShardWriter(folder, "train", max_samples=PER_SHARD, bundle=bundle) as writer:
        for number in range(SAMPLES):
            writer.write(key(number), (changed or {}).get(number) or members(number))


def foreign(folder: Path, names: Callable[[int], str] = key) -> None:
    """Tars of Python's tarfile, without indices and manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"train-{shard:06d}.tar", "w") as tar:
            for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                for extension, payload in members(number).items():
                    info = tarfile.TarInfo(f"{names(number)}.{extension}")
                    info.size = len(payload)
                    tar.addfile(info, io.BytesIO(payload))


# ---- shards: bytes -------------------------------------------------------------------------------


def truncation(folder: Path, rng: np.random.Generator) -> None:
    path = _tar(folder, rng)
    size = int(rng.integers(0, path.stat().st_size))
    path.write_bytes(path.read_bytes()[:size])


def flip_in_header(folder: Path, rng: np.random.Generator) -> set[str]:
    path, index, row, member = _member(folder, rng)
    begin, end = index.header_span(row, member[1])
    _flip(path, int(rng.integers(begin, end)), rng)
    return {index.key(row)}


def flip_in_payload(folder: Path, rng: np.random.Generator) -> set[str]:
    path, index, row, (_, offset, size, *_) = _member(folder, rng)
    _flip(path, offset + int(rng.integers(size)), rng)
    return {index.key(row)}


def flip_in_padding(folder: Path, rng: np.random.Generator) -> set[str]:
    """Between members: no sample has these bytes."""
    path, _, _, (_, offset, size, *_) = _member(folder, rng)
    room = -size % 512
    if room:
        _flip(path, offset + size + int(rng.integers(room)), rng)
    return set()


def zeroed_blocks(folder: Path, rng: np.random.Generator) -> None:
    """A hole, as a file system leaves it after a crash."""
    path = _tar(folder, rng)
    content = bytearray(path.read_bytes())
    first = int(rng.integers(len(content) // 512 - 6)) * 512
    content[first : first + 2048] = bytes(2048)
    path.write_bytes(content)


def missing_block(folder: Path, rng: np.random.Generator) -> None:
    path = _tar(folder, rng)
    content = path.read_bytes()
    at = int(rng.integers(len(content) // 512)) * 512
    path.write_bytes(content[:at] + content[at + 512 :])


def more_bytes(folder: Path, rng: np.random.Generator) -> None:
    path = _tar(folder, rng)
    path.write_bytes(path.read_bytes() + rng.bytes(int(rng.integers(1, 2000))))


# ---- shards: files -------------------------------------------------------------------------------


def swapped_tars(folder: Path, rng: np.random.Generator) -> None:
    _swap(*_two(folder, rng))


def swapped_with_indices(folder: Path, rng: np.random.Generator) -> None:
    one, other = _two(folder, rng)
    _swap(one, other)
    _swap(_idx(one), _idx(other))


def missing_tar(folder: Path, rng: np.random.Generator) -> set[str]:
    path = _tar(folder, rng)
    path.unlink()
    return set(load_index(_idx(path)).keys())


def missing_shard(folder: Path, rng: np.random.Generator) -> set[str]:
    keys = missing_tar(folder, rng)
    for path in folder.glob("*.idx"):
        if not path.with_suffix("").exists():
            path.unlink()
    return keys


def missing_index(folder: Path, rng: np.random.Generator) -> set[str]:
    """Built anew: nothing is lost."""
    _idx(_tar(folder, rng)).unlink()
    return set()


def truncated_without_index(folder: Path, rng: np.random.Generator) -> None:
    path = _tar(folder, rng)
    _idx(path).unlink()
    path.write_bytes(path.read_bytes()[: int(rng.integers(1, path.stat().st_size))])


# ---- indices and manifests -----------------------------------------------------------------------


def damaged_index(folder: Path, rng: np.random.Generator) -> None:
    path = _idx(_tar(folder, rng))
    _flip(path, int(rng.integers(path.stat().st_size)), rng)


def cut_index(folder: Path, rng: np.random.Generator) -> None:
    path = _idx(_tar(folder, rng))
    path.write_bytes(path.read_bytes()[: int(rng.integers(path.stat().st_size))])


def index_of_another_shard(folder: Path, rng: np.random.Generator) -> set[str]:
    one, other = _two(folder, rng)
    keys = set(load_index(_idx(one)).keys())
    _idx(one).write_bytes(_idx(other).read_bytes())
    return keys


def damaged_manifest(folder: Path, rng: np.random.Generator) -> None:
    path = folder / "manifest.json"
    content = bytearray(path.read_bytes())
    # Behind the texts, which mean nothing to a reader.
    at = int(rng.integers(content.index(b'"shards"'), len(content)))
    content[at] = int(rng.integers(32, 127))
    path.write_bytes(content)


# ---- what packers write --------------------------------------------------------------------------


def cut_jpeg(folder: Path, rng: np.random.Generator) -> set[str]:
    """Cut before it was packed: its checksum is right."""

    def change(found: Members) -> Members:
        data = found["jpg"]
        return found | {"jpg": data[: int(rng.integers(1, len(data) - 60))]}

    return _repacked(folder, rng, change)


def no_jpeg(folder: Path, rng: np.random.Generator) -> set[str]:
    return _repacked(folder, rng, lambda found: found | {"jpg": rng.bytes(300)})


def missing_member(folder: Path, rng: np.random.Generator) -> set[str]:
    gone = str(rng.choice(["jpg", "json"]))
    return _repacked(folder, rng, lambda found: {e: data for e, data in found.items() if e != gone})


def damaged_json(folder: Path, rng: np.random.Generator) -> set[str]:
    texts = [b"", b"{", b'{"captions": [1]}', b'{"captions": []}', b"[]", b"\xff\xfe", b"[" * 5000]
    text = texts[int(rng.integers(len(texts)))]
    return _repacked(folder, rng, lambda found: found | {"json": text})


def duplicate_keys(folder: Path, rng: np.random.Generator) -> None:
    """A key whose members lie apart, or that has a member twice: two half samples elsewhere."""
    path = _tar(folder, rng)
    with tarfile.open(path, "a") as tar:
        number = int(path.stem[-6:]) * PER_SHARD + int(rng.integers(PER_SHARD - 1))
        extension = "jpg" if rng.random() < 0.5 else "txt"
        info = tarfile.TarInfo(f"{key(number)}.{extension}")
        payload = members(number)["jpg"]
        info.size = len(payload)
        for _ in range(2 if extension == "jpg" else 1):
            tar.addfile(info, io.BytesIO(payload))


def unsafe_name(folder: Path, rng: np.random.Generator) -> None:
    path = _tar(folder, rng)
    with tarfile.open(path, "a", format=tarfile.GNU_FORMAT) as tar:
        names = ["/etc/x.jpg", "../x.jpg", "a/../../x.jpg", "x/" * 60 + "../x.jpg"]
        tar.addfile(tarfile.TarInfo(str(rng.choice(names))))


PACKED: dict[str, Damage] = {
    function.__name__: function
    for function in (
        truncation,
        flip_in_header,
        flip_in_payload,
        flip_in_padding,
        zeroed_blocks,
        missing_block,
        more_bytes,
        swapped_tars,
        swapped_with_indices,
        missing_tar,
        missing_shard,
        missing_index,
        truncated_without_index,
        damaged_index,
        cut_index,
        index_of_another_shard,
        damaged_manifest,
        cut_jpeg,
        no_jpeg,
        missing_member,
        damaged_json,
    )
}
BUNDLED: dict[str, Damage] = {
    function.__name__: function
    for function in (
        truncation,
        flip_in_header,
        flip_in_payload,
        zeroed_blocks,
        swapped_tars,
        missing_tar,
        damaged_index,
    )
}
FOREIGN: dict[str, Damage] = {
    function.__name__: function
    for function in (truncation, zeroed_blocks, missing_block, duplicate_keys, unsafe_name)
}


def _tar(folder: Path, rng: np.random.Generator) -> Path:
    return sorted(folder.glob("*.tar"))[int(rng.integers(SHARDS))]


def _two(folder: Path, rng: np.random.Generator) -> list[Path]:
    tars = sorted(folder.glob("*.tar"))
    return [tars[i] for i in rng.permutation(SHARDS)[:2]]


def _idx(tar: Path) -> Path:
    return tar.with_name(f"{tar.name}.idx")


def _member(folder: Path, rng: np.random.Generator) -> tuple[Path, ShardIndex, int, tuple]:
    path = _tar(folder, rng)
    index = load_index(_idx(path))
    row = int(rng.integers(len(index)))
    found = index.members(row)
    return path, index, row, found[int(rng.integers(len(found)))]


def _flip(path: Path, at: int, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def _swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def _repacked(
    folder: Path, rng: np.random.Generator, change: Callable[[Members], Members]
) -> set[str]:
    """The folder packed again with two changed samples."""
    numbers = rng.permutation(SAMPLES)[:2].tolist()
    for path in folder.iterdir():
        path.unlink()
    pack(folder, changed={number: change(members(number)) for number in numbers})
    return {key(number) for number in numbers}

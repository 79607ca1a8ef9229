"""What is whole in a damaged tar: joined archives, one without an end, a cut one, bad headers.

Training refuses such tars (`data_pipeline.shards.tar`); `repack --on-damage skip` saves from them.
Nothing is copied: each archive in the tar becomes a link to it, beside an index of its whole
samples. A sample is whole if none of its members can have been lost: one whose members lie beside
damage must have every extension that occurs in the tar. Whatever is not whole is named.
"""

import bisect
import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from data_pipeline.shards.index import ShardIndex, index_path, split_name
from data_pipeline.shards.index_builder import IndexBuilder, read_payload
from data_pipeline.shards.index_file import save_index
from data_pipeline.shards.tar import BLOCK, Header, Member, iter_members, parse_header
from data_pipeline.storage.errors import ShardError

_MAGIC, _MAGIC_AT = b"ustar", 257
_EXTENDED = (b"L", b"K", b"x", b"g")
# A header without extended ones in front of it holds so many bytes of a name at most.
_NAME_BYTES = 100


@dataclass
class Part:
    """One archive of those that a file holds."""

    members: list[Member] = field(default_factory=list)
    damage: list[tuple[int, int, int]] = field(default_factory=list)
    """(members that lie before it, its first byte, the first one behind it) of each place where
    something may be missing."""
    lost: dict[str, str] = field(default_factory=dict)
    """Name of a member that is not whole -> why."""

    @property
    def names(self) -> list[str]:
        """Of all members, whole or not."""
        return [*(member.name for member in self.members), *self.lost]


@dataclass(frozen=True)
class Salvage:
    """What was saved from one file."""

    links: list[str]
    """A path for each archive in the file, to be read in place of the file."""
    samples: int
    lost: list[str]
    """A line for each sample, and each stretch without a name, that is not whole."""


def salvage(path: str, folder: Path) -> Salvage:
    """Index the whole samples of the tar `path`, with links and indices in `folder`.

    Errors: ShardError if it is compressed, or mixes bundles and plain members; OSError.
    """
    folder.mkdir(parents=True)
    total = os.stat(path).st_size
    if not total:
        return Salvage([], 0, [f"{path}: is empty"])
    links, samples, lost = [], 0, []
    stem = os.path.basename(path).removesuffix(".tar")
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        parts = _parts(file, content, path)
        known = {split[1] for part in parts for name in part.names if (split := split_name(name))}
        for number, part in enumerate(parts, 1):
            index = _index(file, path, part, known, lost)
            if not len(index):
                continue
            link = folder / f"{stem}.part{number}.tar"
            link.symlink_to(os.path.realpath(path))
            save_index(index, index_path(link))
            links.append(os.fspath(link))
            samples += len(index)
    return Salvage(links, samples, lost)


# ---- members -------------------------------------------------------------------------------------


def _parts(file: BinaryIO, content: mmap.mmap, shard: str) -> list[Part]:
    """The archives in a file that stand one behind the other, with what is lost of each.

    Errors: ShardError if the file is compressed.
    """
    parts, position, end = [Part()], 0, len(content)
    while position < end:
        try:
            for member in iter_members(file, shard, end, position):
                inner = _header_behind(content, member.offset + 1, member.offset + member.size)
                # A payload that begins with a header is a tar of its own.
                if inner is not None and _header_at(content, member.offset) is None:
                    position = _swallowed(parts, member, inner)
                    break
                parts[-1].members.append(member)
            else:
                break
        except ShardError as error:
            if error.at is None:
                raise  # compressed
            at = min(error.at, end)
            if error.marker is None or _header_at(content, at) is None:
                position = _behind_damage(content, parts, at, error)
                continue
            position = at  # another archive begins
            whole = at - error.marker >= 2 * BLOCK
            if not whole:  # else a header may have been overwritten
                parts[-1].damage.append((len(parts[-1].members), error.marker, error.marker))
            parts.append(Part(damage=[] if whole else [(0, error.marker, error.marker)]))
    return parts


def _swallowed(parts: list[Part], member: Member, inner: int) -> int:
    """A cut member in front of another archive, whose headers lie in its payload."""
    part = parts[-1]
    part.lost[member.name] = f"byte {member.begin}: {member.name!r} is cut: an archive follows"
    part.damage.append((len(part.members), member.begin, member.begin))
    parts.append(Part())
    return inner


def _behind_damage(content: mmap.mmap, parts: list[Part], at: int, error: ShardError) -> int:
    """Note the damage at byte `at`; return where the next header lies, or the end of the file."""
    part, end = parts[-1], len(content)
    last = part.members[-1] if part.members else None
    header = _header_at(content, at)
    if last is not None and last.end == at < end and header is None:
        inner = _header_behind(content, last.offset, last.end)
        if inner is not None:
            part.members.pop()
            return _swallowed(parts, last, inner)
    found = _header_behind(content, at + 1, end)
    extended = header is not None and header.kind in _EXTENDED
    if header is not None and not extended:
        part.lost[header.name] = str(error).partition("; what is whole")[0].partition(": ")[2]
        if found == at + BLOCK and found + header.size > end:
            found = None  # what is cut is a tar of its own: its members are none of this one
    if found is not None:
        following = _header_at(content, found)
        # Its name may have been in a lost extended header.
        long = len(following.name) >= _NAME_BYTES or "?" in following.name
        if following.kind not in _EXTENDED and (extended or long):
            part.lost[following.name] = f"byte {found}: {following.name!r} has lost its long name"
            found = _header_behind(content, found + 1, end)
    part.damage.append((len(part.members), at, at if header else end if found is None else found))
    return end if found is None else found


def _header_behind(content: mmap.mmap, start: int, end: int) -> int | None:
    """First byte of the first header that begins in content[start:end], at whatever byte."""
    last = end + _MAGIC_AT + len(_MAGIC) - 1
    found = content.find(_MAGIC, start + _MAGIC_AT, last)
    while found >= 0:
        at = found - _MAGIC_AT
        if _header_at(content, at) is not None:
            return at
        found = content.find(_MAGIC, found + 1, last)
    return None


def _header_at(content: mmap.mmap, at: int) -> Header | None:
    block = content[at : at + BLOCK]
    if len(block) < BLOCK or not any(block):
        return None
    try:
        return parse_header(block, "", at)
    except ShardError:
        return None


# ---- samples -------------------------------------------------------------------------------------


@dataclass
class _Group:
    """Members of one key beside each other: a sample, if it is whole."""

    key: str
    first: int
    """Place of its first member in the archive."""
    members: list[Member] = field(default_factory=list)
    extensions: set[str] = field(default_factory=set)
    reason: str = ""
    """Why it is not whole."""


def _index(file: BinaryIO, path: str, part: Part, known: set[str], lost: list[str]) -> ShardIndex:
    """Index the whole samples of an archive; append a line to `lost` for whatever is not whole.

    known: all extensions in the file.
    """
    groups = _groups(part.members)
    _judge(groups, part, known)
    named: set[str] = set()
    for group in groups:
        if group.reason:
            lost.append(f"{path}: sample {group.key!r}: {group.reason}")
            named.add(group.key)
    for name, why in part.lost.items():
        split = split_name(name)
        if split is None or split[0] not in named:
            lost.append(f"{path}: {why}")
    for _, begin, end in part.damage:
        if end > begin:
            lost.append(f"{path}: bytes {begin} to {end} hold no whole member with a name")
    builder = IndexBuilder(path)
    for group in groups:
        for member in group.members if not group.reason else ():
            file.seek(member.offset)
            builder.add(member, *read_payload(file, member, path))
    return builder.finish(os.fstat(file.fileno()).st_size)


def _groups(members: list[Member]) -> list[_Group]:
    groups: list[_Group] = []
    for place, member in enumerate(members):
        split = split_name(member.name)
        if split is None:
            continue
        key, extension = split
        if not groups or groups[-1].key != key:
            groups.append(_Group(key, place))
        if extension in groups[-1].extensions:
            groups[-1].reason = f"byte {member.begin}: {member.name!r} appears twice"
        groups[-1].members.append(member)
        groups[-1].extensions.add(extension)
    return groups


def _judge(groups: list[_Group], part: Part, known: set[str]) -> None:
    """Give a reason to each group that is no whole sample."""
    keys = {split[0]: why for name, why in part.lost.items() if (split := split_name(name))}
    seen: dict[str, set[str]] = {}
    for group in groups:
        before = seen.setdefault(group.key, group.extensions)
        if before is not group.extensions and not before & group.extensions:
            keys.setdefault(group.key, "its members are not beside each other")
    starts = [group.first for group in groups]
    for before, begin, _ in part.damage:
        # The groups of the members in front of the damage and behind it, which may be one.
        behind = bisect.bisect_left(starts, before)
        for group in groups[max(behind - 1, 0) : behind + 1]:
            if missing := ", ".join(sorted(known - group.extensions)):
                group.reason = f"may have lost {missing} to the damage at byte {begin}"
    for group in groups:
        group.reason = keys.get(group.key, group.reason)

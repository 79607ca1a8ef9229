"""Values that a sample carries beside its image: a text member, or a key of a JSON member."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from data_pipeline.plain_text import decoded
from data_pipeline.reading.reader import BadSample, Sample


class AbsentValue(BadSample):
    """The sample has no such member, or the member has no such key."""


def no_member(
    sample: Sample, wanted: Sequence[str], error: type[BadSample] = BadSample
) -> BadSample:
    """The error that a sample lacks a member, which says so if dots in names are the reason."""
    text = f"has no member {' or '.join(wanted)}"
    if hint := about_dots(sample.members, wanted):
        text += f", but {len(sample.members)} {hint}"
    return bad(sample, text, error)


def about_dots(members: Iterable[str], wanted: Sequence[str]) -> str:
    """What to do about members like `2023.01.txt`, if dots in names made one of what is wanted;
    else empty."""
    ends = tuple(f".{name}" for name in wanted)
    dotted = sorted(name for name in members if name.endswith(ends))
    if not dotted:
        return ""
    return (
        f"like {dotted[0]!r}: the key of a name ends at its first dot, so that files which belong "
        "to several samples became one. Pack them again under names with no dot but the one of "
        "the suffix"
    )


def check_source(name: str, value: str) -> str:
    """Return a source that `MemberSource` understands; ValueError names the setting `name`."""
    extension, separator, key = value.partition(":")
    if not extension or (separator and not all(key.split("."))):
        raise ValueError(f"{name} {value!r}: write an extension, or json:KEY")
    return value


class MemberSource:
    """Reads one value of a sample.

    Args:
        source: a text member's extension ("txt"), or "json:KEY" for what stands under KEY of the
            json member (dots descend: "json:annotations.captions").
    """

    def __init__(self, source: str) -> None:
        self.source = source
        extension, _, key = source.partition(":")
        self.extension = extension.lower()
        self._keys = key.split(".") if key else []

    def value(self, sample: Sample) -> Any:
        """The member's text, or the parsed value under the key.

        Raises:
            AbsentValue: no such member or key.
            BadSample: not text, or not JSON.
        """
        data = sample.members.get(self.extension)
        if data is None:
            raise no_member(sample, [self.extension], AbsentValue)
        try:
            found: Any = decoded(data)
        except ValueError as error:
            raise bad(sample, f"{self.source}: {error}") from error
        try:
            if self._keys:
                found = json.loads(found)
                for key in self._keys:
                    found = found[key]
        except KeyError as error:
            raise bad(sample, f"{self.source}: KeyError: {error}", AbsentValue) from error
        except (ValueError, TypeError, RecursionError) as error:
            reason = f"{self.source}: {type(error).__name__}: {error}"
            raise bad(sample, reason) from error
        return found


def bad(sample: Sample, reason: str, kind: type[BadSample] = BadSample) -> BadSample:
    """The error that says where the sample is."""
    return kind(reason, sample.shard, sample.key, sample.row)

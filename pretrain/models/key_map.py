"""Names of tensors here and in a format of others: one table of rules, read in both directions.

    RULES = (
        ("<E>.norm_after.{p}", "post_layernorm.{p}"),
        ("<E>.blocks.{b}.attention.qkv.{p}", ("layers.{b}.q.{p}", "layers.{b}.k.{p}", ...)),
    )

A format of weights is one file with such a table, and what cannot be said by names.
tests/pretrain/plugins/toy_format.py is the smallest.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Rules = Sequence[tuple[str, str | tuple[str, ...]]]
"""(our name, theirs) each. `{p}` is weight or bias, any other `{mark}` the number of a layer; a
word in angle brackets is spelled out by `KeyMap`. Of several names the tensors lie one behind the
other, along rows, in our one."""

_MARK = re.compile(r"\{(\w+)\}")
_LETTERS = ("weight", "bias")


class Row(NamedTuple):
    """A rule whose words are spelled out."""

    ours: str
    theirs: tuple[str, ...]


class KeyMap:
    """A table of rules.

    Args:
        rules: see `Rules`.
        words: word in angle brackets -> what it stands for, perhaps with further words in it.
        model: what the tensors are, for errors.
        theirs: what the names of others are called, for errors.
    """

    def __init__(
        self, rules: Rules, words: Mapping[str, str], model: str = "model", theirs: str = "foreign"
    ) -> None:
        self.rows = [
            Row(_spelled(ours, words), tuple(_spelled(name, words) for name in _several(names)))
            for ours, names in rules
        ]
        self.model, self.their_name = model, theirs

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their tensors under our names. Raises ValueError: some are missing, or unknown."""
        table = self._table(state, lambda row: row.theirs)
        self._check(state, {name for names in table.values() for name in names}, self.their_name)
        return {
            ours: torch.cat([state[name] for name in names]) if len(names) > 1 else state[names[0]]
            for ours, names in table.items()
        }

    def to_theirs(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors under their names. Raises ValueError: some are missing, or unknown."""
        table = self._table(state, lambda row: (row.ours,))
        self._check(state, set(table), "omnipretrain")
        found: dict[str, Tensor] = {}
        for ours, names in table.items():
            parts = state[ours].chunk(len(names)) if len(names) > 1 else (state[ours],)
            found.update(zip(names, parts, strict=True))
        return found

    def _table(self, names: Iterable[str], side) -> dict[str, tuple[str, ...]]:
        """Our name -> theirs, for a model of as many layers as the names of one side have."""
        layers = self._layers(list(names), side)
        table: dict[str, tuple[str, ...]] = {}
        for row in self.rows:
            marks = _numbers(row.ours)
            letters = _LETTERS if "{p}" in row.ours else ("",)
            for values, letter in itertools.product(layers[marks], letters):
                known = dict(zip(marks, values, strict=True)) | {"p": letter}
                table[row.ours.format(**known)] = tuple(name.format(**known) for name in row.theirs)
        return table

    def _layers(self, names: list[str], side) -> dict[tuple[str, ...], list[tuple[int, ...]]]:
        """Marks of layers, as rules have them together -> the numbers that there are."""
        seen: dict[tuple[str, ...], set[tuple[int, ...]]] = {}
        for row in self.rows:
            marks = _numbers(row.ours)
            found = seen.setdefault(marks, set())
            for name in side(row) if marks else ():
                pattern = _pattern(name)
                matches = filter(None, map(pattern.fullmatch, names))
                found |= {tuple(int(match[mark]) for mark in marks) for match in matches}
        return {marks: _without_gaps(found, len(marks)) for marks, found in seen.items()}

    def _check(self, state: Mapping[str, Tensor], expected: set[str], kind: str) -> None:
        missing, unknown = sorted(expected - state.keys()), sorted(state.keys() - expected)
        complaints = [
            f"{len(names)} {what} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
            for names, what in ((missing, "tensors are missing"), (unknown, "tensors are unknown"))
            if names
        ]
        if complaints:
            raise ValueError(
                f"not a complete {self.model} in {kind} names: {'; '.join(complaints)}"
            )


def _several(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return names if isinstance(names, tuple) else (names,)


def _spelled(name: str, words: Mapping[str, str]) -> str:
    """A name without words in angle brackets."""
    while "<" in name:
        before = name
        for word, text in words.items():
            name = name.replace(f"<{word}>", text)
        if name == before:
            raise ValueError(f"{name}: nobody says what stands for its words")
    return name


def _numbers(name: str) -> tuple[str, ...]:
    """The marks of a name that count layers."""
    return tuple(dict.fromkeys(mark for mark in _MARK.findall(name) if mark != "p"))


def _pattern(name: str) -> re.Pattern[str]:
    """Names that a rule's name stands for; a mark that comes again has the same value."""
    parts, seen = [], set()
    for number, part in enumerate(_MARK.split(name)):
        if number % 2 == 0:
            parts.append(re.escape(part))
        elif part in seen:
            parts.append(f"(?P={part})")
        else:
            seen.add(part)
            parts.append(f"(?P<{part}>{'|'.join(_LETTERS) if part == 'p' else '[0-9]+'})")
    return re.compile("".join(parts))


def _without_gaps(found: set[tuple[int, ...]], marks: int) -> list[tuple[int, ...]]:
    """All numbers up to the highest one, behind each that stands before it; at least the first."""
    if not marks:
        return [()]
    heads = _without_gaps({numbers[:-1] for numbers in found}, marks - 1)
    return [
        (*head, last)
        for head in heads
        for last in range(max((n[-1] for n in found if n[:-1] == head), default=0) + 1)
    ]

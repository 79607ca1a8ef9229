"""Whether all ranks run the same step on the same global batch: an error on all, not a hang.

Ranks derive the schedule and the data order by themselves. Should one of them differ (another file
on its node, another recipe, a wrong rank number), collectives would hang or quietly mix tasks.
So now and then numbers about the step travel in the all-reduce that the loop does anyway, before
the first forward pass. From their sums every rank draws the same conclusion:

* 48 bits of a digest of what must be equal, as three numbers and their squares: all ranks have the
  same number if and only if N times the sum of squares is the square of the sum.
* a sum of hashes of the positions that each rank has loaded: it is the one of the whole global
  batch only if every position is there once.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch.distributed as dist

from data_pipeline.rng import keyed_u64, mix64
from pretrain.engine.launch.distributed import Ranks

# Sums stay whole numbers in float64: 2**21 ranks for squares, 2**17 for hashes.
_CHUNK_BITS, _CHUNKS = 16, 3
_HASH_BITS = 36

LENGTH = 2 * _CHUNKS + 1
"""Numbers that travel."""


class RanksDisagree(RuntimeError):
    """The ranks would have run different things; the message names them."""


class Agreement:
    """The check on one rank.

    It happens at the first step after a start, and then after every `every_steps` steps of this
    process: counted, not taken from the step number, so that ranks at different steps meet in it.

    Args:
        ranks: this process.
        every_steps: steps between two checks.
        common: name -> value of what else must be equal everywhere (digests of data, ledger).
    """

    def __init__(
        self, ranks: Ranks, every_steps: int, common: Mapping[str, str] | None = None
    ) -> None:
        self.ranks, self.every_steps = ranks, every_steps
        self.common = {"check_every_steps": str(every_steps), **(common or {})}
        self._steps = 0

    def due(self) -> bool:
        """Whether this step is checked; to be asked once per step."""
        self._steps += 1
        return (self._steps - 1) % self.every_steps == 0

    def numbers(self, window) -> list[float]:
        """What this rank adds to the sums, (LENGTH,)."""
        digest = keyed_u64("agreement", *map(str, self._facts(window).items()))
        chunks = [digest >> _CHUNK_BITS * i & (1 << _CHUNK_BITS) - 1 for i in range(_CHUNKS)]
        return [*chunks, *(chunk**2 for chunk in chunks), self._hash(window, _loaded)]

    def check(self, window, sums: list[float]) -> None:
        """Judge the sums of `numbers` over all ranks; a collective only if something is wrong.

        Raises:
            RanksDisagree: on every rank.
        """
        whole = [int(value) for value in sums]
        pairs = zip(whole[:_CHUNKS], whole[_CHUNKS : 2 * _CHUNKS], strict=True)
        if any(self.ranks.world * square != chunk**2 for chunk, square in pairs):
            facts = self._gather(self._facts(window))
            raise RanksDisagree(
                "the ranks disagree on what to run: "
                + "; ".join(_differences(facts))
                + ". They must all see the same recipe, run directory and shards"
            )
        if whole[-1] % (1 << _HASH_BITS) != self._hash(window, _expected):
            loaded = self._gather({t: _loaded(window, t).tolist() for t in window.positions})
            raise RanksDisagree(
                f"step {window.step}: the ranks together have not loaded the global batch: "
                + "; ".join(_misdealt(window, loaded))
            )

    def _facts(self, window) -> dict[str, str]:
        """What must be equal on all ranks, in words."""
        parts = [
            f"{part.task} in {len(part.micro_batches)} micro-steps" + _span(window, part.task)
            for part in window.parts
        ]
        return {"step": str(window.step), "parts": " + ".join(parts), **self.common}

    def _hash(self, window, positions: Callable[[Any, str], np.ndarray]) -> int:
        total = 0
        for task in window.positions:
            key = np.uint64(keyed_u64("agreement", task))
            hashes = mix64(positions(window, task).astype(np.uint64) + key)
            total += int((hashes >> np.uint64(64 - _HASH_BITS)).sum(dtype=np.uint64))
        return total % (1 << _HASH_BITS)

    def _gather(self, mine: Any) -> list[Any]:
        everyone: list[Any] = [None] * self.ranks.world
        dist.all_gather_object(everyone, mine)
        return everyone


def _span(window, task: str) -> str:
    span = window.positions.get(task)
    return "" if span is None else f", positions {span.start} to {span.stop - 1}"


def _expected(window, task: str) -> np.ndarray:
    span = window.positions[task]
    return np.arange(span.start, span.stop)


def _loaded(window, task: str) -> np.ndarray:
    """Positions of this rank's samples of a task; padding rows (-1) are left out."""
    batches = [b for part in window.parts if part.task == task for b in part.micro_batches]
    positions = np.concatenate([batch["position"].numpy() for batch in batches])
    return positions[positions >= 0]


def _differences(facts: list[dict[str, str]]) -> list[str]:
    """One text per fact that differs: which ranks have which value, the commonest first."""
    found = []
    for name in sorted({name for own in facts for name in own}):
        holders: dict[str, list[int]] = {}
        for rank, own in enumerate(facts):
            holders.setdefault(own.get(name, "nothing"), []).append(rank)
        if len(holders) > 1:
            values = sorted(holders.items(), key=lambda item: (-len(item[1]), item[1]))
            texts = [f"{value} on {_ranks(ranks)}" for value, ranks in values]
            found.append(f"{name}: {', but '.join(texts)}")
    return found


def _misdealt(window, loaded: list[dict[str, list[int]]]) -> list[str]:
    """One text per part of which positions are missing, doubled or foreign."""
    found = []
    for task, span in window.positions.items():
        owners: dict[int, list[int]] = {}
        for rank, own in enumerate(loaded):
            for position in own[task]:
                owners.setdefault(position, []).append(rank)
        missing = [p for p in span if p not in owners]
        wrong = {p: ranks for p, ranks in owners.items() if len(ranks) > 1 or p not in span}
        if wrong:
            position, ranks = min(wrong.items())
            found.append(
                f"{task}: {len(wrong)} positions are doubled or of another step, such as "
                f"{position} on {_ranks(ranks)}"
            )
        if missing:
            found.append(f"{task}: {len(missing)} positions are missing, such as {missing[0]}")
    return found


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, sorted(set(ranks))[:16]))
    return f"rank(s) {shown}" + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")

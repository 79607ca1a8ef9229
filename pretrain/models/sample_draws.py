"""Random numbers that belong to samples, drawn on the device where they are needed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.rng import keyed_u64


@dataclass(frozen=True)
class SampleDraws:
    """Draws keyed by (seed, task, position, purpose): the same for a sample on any rank, in any
    micro-batch and after any resume."""

    seed: int
    """The run's seed."""
    task: str
    positions: Tensor
    """(B,) int64: places of the samples in the task's order; -1 for padding rows."""

    def uniform(self, purpose: str, count: int) -> Tensor:
        """(count, B) float32 in [0, 1): `count` independent numbers for each sample."""
        key = _signed(keyed_u64(self.seed, self.task, purpose))
        samples = _mix(_mix(self.positions + key) ^ key)
        # Multiples of an odd constant (2**64 / golden ratio) are all different.
        steps = torch.arange(1, count + 1, device=self.positions.device) * _signed(_GOLDEN)
        bits = _mix(samples + steps[:, None])
        return _shift_right(bits, 40).float() * 2.0**-24

    @property
    def valid(self) -> Tensor:
        """(B,) bool: False for padding rows."""
        return self.positions >= 0


_GOLDEN = 0x9E3779B97F4A7C15


def _mix(z: Tensor) -> Tensor:
    """`data_pipeline.rng.mix64` on the bits of int64 tensors, whose products wrap."""
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift in zeros, where the operator of signed numbers would repeat the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the bits of a uint64."""
    return value - 2**64 if value >= 2**63 else value

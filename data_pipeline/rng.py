"""Random numbers as functions of names: no state, so nothing to save and nothing to restore.

`sample_rng(seed, task, position, purpose)` gives the same draws on any rank, in any worker and
after any resume. `mix64` and `permute` are the vectorised side: a hash and a keyed permutation.
"""

import hashlib
from functools import lru_cache
from math import isqrt

import numpy as np
from numpy.random.bit_generator import ISeedSequence

ROUNDS = 6  # each half of the Feistel network is updated three times
TABLE_SIZE = 1 << 15  # permutations up to this size are kept as tables, of at most 256 KiB


def _digest(parts: tuple[int | str, ...], size: int) -> bytes:
    # The type tag and the length keep ("1", 2), (1, "2") and ("12",) apart.
    text = "".join([f"{type(part).__name__[0]}{len(str(part))}:{part}" for part in parts])
    return hashlib.blake2b(text.encode(), digest_size=size).digest()


def keyed_bytes(size: int, *parts: int | str) -> bytes:
    """Hash integers and strings to `size` bytes (at most 64), the same on every machine."""
    return _digest(parts, size)


def keyed_u64(*parts: int | str) -> int:
    """Hash integers and strings to one integer in [0, 2**64), the same on every machine."""
    return int.from_bytes(_digest(parts, 8), "little")


def sample_rng(seed: int, task: str, position: int, purpose: str) -> np.random.Generator:
    """Counter-based generator (Philox) of one purpose of one sample of one task."""
    key = np.frombuffer(_digest((seed, task, position, purpose), 16), dtype="<u8")
    return np.random.Generator(np.random.Philox(_Key(key.astype(np.uint64))))


class _Key(ISeedSequence):
    """A key as a source of seeds. `Philox(key=...)` gives the same numbers, but first asks the
    system for a random seed that it then throws away, which takes twice the time of all the rest.
    """

    def __init__(self, words: np.ndarray) -> None:
        self.words = words

    def generate_state(self, n_words: int, dtype: type = np.uint32) -> np.ndarray:
        """The (2,) uint64 words that Philox asks for."""
        if n_words != len(self.words) or np.dtype(dtype) != self.words.dtype:
            raise ValueError(f"a key of 2 uint64 words, not of {n_words} {np.dtype(dtype)}")
        return self.words


def substream(rng: np.random.Generator, number: int) -> np.random.Generator:
    """Independent generator that belongs to the state of `rng`, 2**128 draws further on per number.

    What draws from it can draw as often as it likes without moving the draws of anything else.
    """
    return np.random.Generator(rng.bit_generator.jumped(number))


def mix64(values: np.ndarray) -> np.ndarray:
    """Bijective scrambling of 64-bit words (the splitmix64 finaliser). Input and output: uint64."""
    z = values ^ (values >> np.uint64(30))
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def permute(values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Image of `values` under the permutation of [0, size) that belongs to each element's key.

    A Feistel network on pairs (value // b, value % b), a*b >= size, with modular addition; the few
    results outside the range are encrypted again until they fall inside (cycle walking). Because
    a*b exceeds size by less than sqrt(size), that happens for one value in sqrt(size).

    Args:
        values: (n,) integers in [0, size).
        size: number of elements permuted, at least 1.
        keys: (n,) or (1,) uint64.

    Returns:
        (n,) int64.
    """
    if keys.size == 1 and size <= TABLE_SIZE:
        return _table(size, int(keys[0]))[values]
    return _permute(values, size, keys)


@lru_cache(maxsize=16)
def _table(size: int, key: int) -> np.ndarray:
    """All of a small permutation: looked up at a hundredth of the cost of a few of its values."""
    return _permute(np.arange(size), size, np.array([key], dtype=np.uint64))


def _permute(values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    a = isqrt(size - 1) + 1 if size > 1 else 1
    b = -(-size // a)
    out = _network(values.astype(np.uint64), a, b, keys)
    outside = np.flatnonzero(out >= size)
    while outside.size:
        own = keys if keys.size == 1 else keys[outside]
        walked = _network(out[outside], a, b, own)
        out[outside] = walked
        outside = outside[walked >= size]
    return out.astype(np.int64)


def _network(values: np.ndarray, a: int, b: int, keys: np.ndarray) -> np.ndarray:
    width = np.uint64(b)
    high, low = values // width, values % width
    for round_number in range(ROUNDS):
        # uint64 arrays wrap silently; the constant is 2**64 / golden ratio.
        key = keys + np.uint64((round_number + 1) * 0x9E3779B97F4A7C15 % 2**64)
        # One bit is dropped so that the sum cannot wrap: that would not be reversible.
        if round_number % 2 == 0:
            high = (high + (mix64(mix64(low + key) ^ key) >> np.uint64(1))) % np.uint64(a)
        else:
            low = (low + (mix64(mix64(high + key) ^ key) >> np.uint64(1))) % width
    return high * width + low

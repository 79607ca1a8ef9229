"""Keyed hashes, generators and permutations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import rng
from data_pipeline.rng import keyed_bytes, keyed_u64, permute, sample_rng, substream


def test_values_are_pinned():
    """Checkpoints of a run depend on these numbers: they may never change."""
    assert keyed_u64(3, "chunks", 5) == 11396646636820487279
    assert sample_rng(1, "caption", 9, "image").random(2).tolist() == [
        0.05624881996108977,
        0.1259404995296176,
    ]
    keys = np.array([keyed_u64(0)], dtype=np.uint64)
    assert permute(np.arange(10), 10, keys).tolist() == [1, 7, 9, 3, 0, 8, 4, 2, 5, 6]


def test_the_generator_is_philox_with_the_hash_as_its_key():
    key = np.frombuffer(keyed_bytes(16, 1, "caption", 9, "image"), dtype="<u8")
    plain = np.random.Philox(key=key)
    rng = sample_rng(1, "caption", 9, "image")
    jumped = substream(rng, 3).integers(0, 1000, 50)
    assert np.array_equal(jumped, np.random.Generator(plain.jumped(3)).integers(0, 1000, 50))
    assert np.array_equal(rng.random(50), np.random.Generator(plain).random(50))


def test_parts_do_not_run_together():
    keys = {keyed_u64(*parts) for parts in [("1", 2), (1, "2"), ("12",), (12,), ("1", "2"), (1, 2)]}
    assert len(keys) == 6


def test_generators_differ_by_every_part():
    parts = [
        (0, "a", 1, "x"),
        (1, "a", 1, "x"),
        (0, "b", 1, "x"),
        (0, "a", 2, "x"),
        (0, "a", 1, "y"),
    ]
    assert len({sample_rng(*part).random() for part in parts}) == 5


def test_substreams_are_their_own():
    rng = sample_rng(1, "caption", 9, "image")
    one, two = substream(rng, 1).random(50), substream(rng, 2).random(50)
    own = rng.random(50)
    assert len({*one, *two, *own}) == 150
    again = sample_rng(1, "caption", 9, "image")
    assert np.array_equal(substream(again, 2).random(50), two)
    assert np.array_equal(again.random(50), own)  # taking one changes nothing
    assert not np.array_equal(substream(again, 1).random(50), one)  # it belongs to the state


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(size, key):
    image = permute(np.arange(size), size, np.array([key], dtype=np.uint64))
    assert np.array_equal(np.sort(image), np.arange(size))


def test_tables_change_nothing(monkeypatch):
    key, values = np.array([keyed_u64(7)], dtype=np.uint64), np.array([5, 0, 999, 5, 321])
    by_table = permute(values, 1000, key)
    monkeypatch.setattr(rng, "TABLE_SIZE", 999)
    assert permute(values, 1000, key).tolist() == by_table.tolist()


def test_each_element_follows_its_own_key():
    keys = np.arange(100, dtype=np.uint64)
    together = permute(np.full(100, 17), 1000, keys)
    alone = [permute(np.array([17]), 1000, key[None])[0] for key in keys]
    assert together.tolist() == alone
    assert len(set(alone)) > 80


@pytest.mark.parametrize("size", [2, 5, 50, 1000])
def test_permutations_are_uniform(size):
    """Where element 0 goes, over 20,000 keys: chi-square within six standard deviations."""
    draws = 20_000
    images = permute(np.zeros(draws, dtype=np.int64), size, np.arange(draws, dtype=np.uint64))
    counts = np.bincount(images, minlength=size)
    expected = draws / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - (size - 1)) < 6 * np.sqrt(2 * size)

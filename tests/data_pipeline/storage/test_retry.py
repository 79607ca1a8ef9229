"""Waits between attempts, and when they end: by time without a byte, or by refusals in a row."""

import time

import pytest

from data_pipeline.storage.retry import Interrupted, Retrier, RetryPolicy, repeated, resumed
from data_pipeline.storage.storage import TransientReadError


class Clock:
    def __init__(self, monkeypatch):
        self.now, self.waits = 1000.0, []
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds):
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def test_waits_double_up_to_the_longest_with_jitter(clock):
    retries = []
    retrier = Retrier("u", RetryPolicy(1000, 30, 0.5, 8), lambda: retries.append(1))
    for _ in range(7):
        retrier.wait(Interrupted("x"))
    for wait, longest in zip(clock.waits, [0.5, 1, 2, 4, 8, 8, 8], strict=True):
        assert longest / 2 <= wait <= longest
    assert len(set(clock.waits)) == 7 and len(retries) == 7
    retrier.progress()
    retrier.wait(Interrupted("x"))
    assert clock.waits[-1] <= 0.5


def test_the_deadline_counts_from_the_last_byte(clock):
    policy = RetryPolicy(10, 30, 1, 1)
    asked = []

    def fetch(begin, end, timeout_s):
        asked.append((begin, timeout_s))
        yield b"a"
        clock.sleep(6)
        raise Interrupted("cut")

    # Every attempt brings a byte: a hundred seconds pass without an end.
    assert b"".join(resumed(fetch, 0, 15, Retrier("u", policy, int))) == b"a" * 15
    assert [begin for begin, _ in asked] == list(range(15))
    assert all(timeout_s <= 10 for _, timeout_s in asked)

    def dead(timeout_s):
        clock.sleep(min(timeout_s, 4))
        raise Interrupted("away")

    started = clock.now
    with pytest.raises(TransientReadError, match=r"^u: away \(tried \d times in .* deadline 10 s"):
        repeated(dead, Retrier("u", policy, int))
    assert clock.now - started <= 10


def test_a_slow_reader_does_not_use_up_the_deadline(clock):
    faults = [Interrupted("cut")]

    def fetch(begin, end, timeout_s):
        yield b"ab"
        if faults:
            raise faults.pop()

    pieces = resumed(fetch, 0, 4, Retrier("u", RetryPolicy(10, 30, 1, 1), int))
    found = []
    for piece in pieces:
        found.append(piece)
        clock.sleep(3600)
    assert found == [b"ab", b"ab"]


def test_other_errors_are_not_met_with_patience(clock):
    calls = []

    def broken(timeout_s):
        calls.append(timeout_s)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        repeated(broken, Retrier("u", RetryPolicy(), int))
    assert len(calls) == 1 and not clock.waits


def test_refusals_are_counted_in_a_row_and_the_last_reason_is_told(clock):
    refused = Interrupted("403", attempts=2, otherwise=PermissionError("no entry"))
    retrier = Retrier("u", RetryPolicy(1000, 30, 0.5, 8), int)
    for fault in [Interrupted("503")] * 5 + [refused, Interrupted("503"), refused]:
        retrier.wait(fault)
    with pytest.raises(PermissionError, match="no entry"):
        retrier.wait(refused)
    retrier = Retrier("u", RetryPolicy(5, 30, 0.5, 0.5), int)
    retrier.wait(Interrupted("503"))
    clock.sleep(5)
    with pytest.raises(TransientReadError, match=r"^u: no answer in time, before: 503 \(tried 2"):
        retrier.wait(Interrupted("no answer in time"))

"""Waiting for storage that fails: exponential back-off with jitter, and an end to it."""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from data_pipeline import activity
from data_pipeline.storage.locations import without_secrets
from data_pipeline.storage.storage import TransientReadError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long storage may be away."""

    deadline_s: float = 300.0
    """Seconds without a new byte after which reading is given up."""
    timeout_s: float = 30.0
    """Seconds that a server may be silent before an attempt counts as failed."""
    first_wait_s: float = 0.5
    """Seconds before the second attempt; doubled each time."""
    longest_wait_s: float = 30.0
    """Seconds between attempts at most."""


class Interrupted(Exception):
    """One attempt failed in a way that may heal."""

    def __init__(
        self,
        reason: str,
        *,
        retry_after_s: float = 0.0,
        attempts: int | None = None,
        otherwise: Exception | None = None,
    ) -> None:
        """Say what failed, and how it is to be met.

        Args:
            reason: for the message.
            retry_after_s: the server asked not to be asked again before.
            attempts: most attempts that are worth making in a row; None: as the deadline allows.
            otherwise: raised after so many attempts, in place of TransientReadError.
        """
        super().__init__(reason)
        self.retry_after_s, self.attempts, self.otherwise = retry_after_s, attempts, otherwise


class Retrier:
    """The attempts of one read."""

    def __init__(self, url: str, policy: RetryPolicy, on_retry: Callable[[], None]) -> None:
        """`on_retry` is called before each new attempt."""
        self._url, self._policy, self._on_retry = url, policy, on_retry
        self._failures, self._limited, self._reasons = 0, 0, []
        self._since = time.monotonic()

    def progress(self) -> None:
        """Bytes arrived: the deadline starts anew."""
        self._failures, self._limited, self._reasons = 0, 0, []
        self._since = time.monotonic()

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return max(self._policy.deadline_s - (time.monotonic() - self._since), 0.001)

    @property
    def timeout_s(self) -> float:
        """Seconds that the next attempt may wait for the server."""
        return min(self._policy.timeout_s, self.left_s)

    def wait(self, fault: Interrupted) -> None:
        """Sleep before the next attempt.

        Raises:
            TransientReadError, or what the fault names: there is no use in another attempt.
        """
        self._failures += 1
        self._reasons = [*self._reasons[-1:], str(fault)]
        spent = time.monotonic() - self._since
        # In a row: a refusal after a while of 503 is the first one.
        self._limited = self._limited + 1 if fault.attempts is not None else 0
        if fault.attempts is not None and self._limited >= fault.attempts:
            raise fault.otherwise or self._given_up(fault, spent)
        longest = min(
            self._policy.first_wait_s * 2 ** min(self._failures - 1, 30),
            self._policy.longest_wait_s,
        )
        # Jitter, so that a thousand workers do not come back in the same moment.
        wait = max(random.uniform(0.5, 1.0) * longest, fault.retry_after_s)
        if spent + wait >= self._policy.deadline_s:
            raise self._given_up(fault, spent)
        self._on_retry()
        activity.retrying(self._failures, str(fault))
        time.sleep(wait)

    def _given_up(self, fault: Interrupted, spent: float) -> TransientReadError:
        asked = f", which asked for {fault.retry_after_s:.0f} s" if fault.retry_after_s else ""
        # The last attempt may have been cut short by the deadline, and know no reason.
        before = "".join(f", before: {text}" for text in self._reasons[:-1] if text != str(fault))
        return TransientReadError(
            f"{without_secrets(self._url)}: {fault}{asked}{before} (tried {self._failures} times "
            f"in {spent:.1f} s without a new byte; deadline {self._policy.deadline_s:g} s)"
        )


def resumed(
    fetch: Callable[[int, int, float], Iterator[bytes]], begin: int, end: int, retrier: Retrier
) -> Iterator[bytes]:
    """Yield the bytes [begin, end), asking again from the byte where an answer was cut.

    Args:
        fetch: (begin, end, timeout in seconds) -> pieces; raises Interrupted for what may heal. It
            never yields more than was asked for.
    """
    while begin < end:
        try:
            for piece in fetch(begin, end, retrier.timeout_s):
                begin += len(piece)
                yield piece
                retrier.progress()  # afterwards: what the caller took its time for is no fault
            if begin < end:
                raise Interrupted(f"the answer ended at byte {begin} of {end}")
        except Interrupted as fault:
            retrier.wait(fault)


def repeated(attempt: Callable[[float], T], retrier: Retrier) -> T:
    """Return the first result of `attempt` (timeout in seconds -> result) that raises nothing."""
    while True:
        try:
            return attempt(retrier.timeout_s)
        except Interrupted as fault:
            retrier.wait(fault)

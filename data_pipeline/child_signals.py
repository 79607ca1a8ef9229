"""Signals that reach a whole job, as its helper processes see them: not at all.

torchrun's agent, DeepSpeed's launcher, a job scheduler and Ctrl-C send their signal to every
process. The trainer decides what it means, and needs its helpers until it has saved; then it ends
them itself, and they end by themselves if it is gone.
"""

import contextlib
import signal
from collections.abc import Iterator

OF_THE_TRAINER = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """For the trainer, around the start of helpers: what comes meanwhile waits.

    Helpers inherit that, by fork and by spawn, so that none dies before it has come to
    `ignore_signals`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_TRAINER)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals() -> None:
    """For a helper, first of all."""
    for number in OF_THE_TRAINER:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OF_THE_TRAINER)

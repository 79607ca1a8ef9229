"""A process that works for this one in the background, and never outlives it.

It reads requests, a JSON object a line, and answers each with a line. Nothing of torch is in it.
"""

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


class ChildProcess:
    """This process's end.

    Signals that ask a whole group to stop are not heard by it: what it is doing is what the stop
    waits for.

    Args:
        module: run as a program, with the number of this process and `arguments`; calls `serve`.
        descriptors: stay open in it.
    """

    def __init__(
        self, module: str, arguments: Sequence[str] = (), descriptors: Sequence[int] = ()
    ) -> None:
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # which children inherit
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(os.getpid()), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=descriptors,
                bufsize=0,
                env={**os.environ, "PYTHONPATH": path},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.pid = self._process.pid
        self._buffer = b""

    def ask(self, request: dict) -> None:
        """Send a request; `answer` gets what comes back. One that has ended shows there."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")

    def answered(self, timeout_s: float = 0.0) -> bool:
        """Whether an answer is there, or never will be since the process has ended."""
        if b"\n" in self._buffer:
            return True
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(timeout_s):
                    return False
                got = os.read(self._process.stdout.fileno(), 1 << 16)
                if not got:
                    return True
                self._buffer += got
        return True

    def answer(self) -> dict | None:
        """The next answer; None if the process has ended without one. Waits for it."""
        while not self.answered(timeout_s=1.0):
            pass
        if b"\n" not in self._buffer:
            return None
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def end_in_words(self) -> str:
        """How it ended, after `answer` gave None."""
        code = self._process.wait()
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"has ended with exit code {code}"

    def close(self, timeout_s: float = 0.0) -> bool:
        """No more requests: let it end by itself within this time, else end it; whether it did."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout_s)
            return True
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return False
        finally:
            self._process.stdout.close()


def serve(parent: int, handle: Callable[[dict], dict], niceness: int = 10) -> None:
    """The other end: answer requests until there are no more, or the parent is gone.

    Args:
        parent: its process number; when it dies this process is killed.
        niceness: training comes first.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was quicker
        return
    os.nice(niceness)
    for line in sys.stdin.buffer:
        answer = json.dumps(handle(json.loads(line))).encode() + b"\n"
        try:
            os.write(1, answer)
        except BrokenPipeError:
            return

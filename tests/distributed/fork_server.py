"""Starts Python modules in forks of a process that has imported what runs import.

Most of the CPU time of a short run goes into importing torch and DeepSpeed (9 of 11 s a rank). One
server a test session imports them once; a rank is a fork of it that then runs its module as
`python -m` would, with an environment, a session and an output file of its own.

What forks share and processes do not are Python's hash seed and the state of generators at the
start: these are drawn anew, the hash seed cannot be. `OMNIPRETRAIN_TEST_STARTS=processes` starts
whole processes instead; the tests of launchers always do.
"""

import atexit
import contextlib
import faulthandler
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

PRELOADED = (
    "torch",
    "torch._dynamo.convert_frame",
    "deepspeed",
    "pretrain.trainer",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "torch.utils.cpp_extension",
    "multiprocessing.sharedctypes",
)


class ForkedProcess:
    """A rank that the server started; has what tests use of subprocess.Popen."""

    def __init__(self, server: "ForkServer", pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        """The exit code, -N after signal N, or None while it runs."""
        self._server.collect(0)
        self.returncode = self._server.exits.get(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code; raises subprocess.TimeoutExpired."""
        if not self._server.collect(timeout, until=self.pid):
            raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout or 0)
        return self.poll()

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The tests' end of the server: asks for forks, and keeps their exit codes."""

    def __init__(self, root: Path) -> None:
        self.exits: dict[int, int] = {}
        self._socket, theirs = socket.socketpair()
        self._buffer = b""
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.distributed.fork_server", str(theirs.fileno())],
                cwd=root,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        atexit.register(self.close)

    def close(self) -> None:
        """End the server; what it started runs on."""
        self._socket.close()
        self._process.wait()

    def start(self, module: str, argv: list[str], env: dict[str, str], cwd: Path, out: Path):
        """Run `python -m module argv` in a fork, in a session of its own; output goes to `out`."""
        request = {"module": module, "argv": argv, "env": env, "cwd": str(cwd), "out": str(out)}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while (pid := self._read(None).get("started")) is None:
            pass
        return ForkedProcess(self, pid)

    def collect(self, timeout: float | None, until: int | None = None) -> bool:
        """Take in exit codes that have come; with `until`, wait for that of this process."""
        end = None if timeout is None else time.monotonic() + timeout
        while until is None or until not in self.exits:
            left = None if end is None else max(end - time.monotonic(), 0)
            if not self._read(left):
                return False
        return True

    def _read(self, timeout: float | None) -> dict:
        """The next message, {} if none comes in time."""
        while b"\n" not in self._buffer:
            self._socket.settimeout(timeout if timeout is None or timeout > 0 else 1e-6)
            try:
                got = self._socket.recv(65536)
            except TimeoutError:
                return {}
            if not got:
                raise RuntimeError("the fork server of the tests has ended")
            self._buffer += got
        line, self._buffer = self._buffer.split(b"\n", 1)
        message = json.loads(line)
        if "ended" in message:
            self.exits[message["ended"]] = message["code"]
        return message


def serve(channel: socket.socket) -> None:
    """Fork as asked and report exits, until the other end is closed."""
    for name in PRELOADED:
        importlib.import_module(name)
    from pretrain.engine.zero.zero import import_muon_uncompiled

    import_muon_uncompiled()
    selector = selectors.DefaultSelector()
    selector.register(channel, selectors.EVENT_READ)
    buffer = b""
    while True:
        for key, _ in selector.select():
            if key.data is not None:  # a process has ended
                selector.unregister(key.fileobj)
                os.close(key.fileobj)
                code = os.waitstatus_to_exitcode(os.waitpid(key.data, 0)[1])
                _tell(channel, {"ended": key.data, "code": code})
                continue
            got = channel.recv(65536)
            if not got:
                return
            *lines, buffer = (buffer + got).split(b"\n")
            for line in lines:
                pid = _fork(json.loads(line), channel)
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
                _tell(channel, {"started": pid})


def _tell(channel: socket.socket, message: dict) -> None:
    with contextlib.suppress(OSError):  # the tests have ended: so does the next turn
        channel.sendall(json.dumps(message).encode() + b"\n")


def _fork(request: dict, channel: socket.socket) -> int:
    """Fork, and return when the child has a session of its own."""
    ready, readied = os.pipe()
    pid = os.fork()
    if pid:
        os.close(readied)
        os.read(ready, 1)
        os.close(ready)
        return pid
    code = 1
    try:
        os.setsid()
        out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.closerange(3, 256)  # channels of this server and of other tests
        code = _run(request)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _run(request: dict) -> int:
    import numpy

    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    numpy.random.seed()
    faulthandler.enable()
    sys.argv = [request["module"], *request["argv"]]
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))

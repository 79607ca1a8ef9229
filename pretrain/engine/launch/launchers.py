"""The processes that have started this rank: since when they run, and whether they still do."""

import os
from pathlib import Path

from pretrain.engine.launch.processes import process_age

# What starts ranks and was itself started by the person: a request since then is for this run.
_LAUNCHERS = ("torchrun", "deepspeed", "accelerate", "mpirun", "prterun", "orted", "prted")
# What torchrun and deepspeed set for their ranks, and nobody sets by hand.
_MARKS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
_MODULES = ("torch.distributed.", "deepspeed.launcher.", "accelerate.commands.")


def age_of_start() -> float:
    """Seconds since the person's command began: that of this process, or of its launcher.

    torchrun and deepspeed take seconds before they start a rank, and start it anew after a crash.
    """
    ages = (process_age(pid) or 0.0 for pid in [os.getpid(), *launchers()])
    return max(ages)


def launchers() -> list[int]:
    """Process numbers of the launchers above this process, the nearest first."""
    found, pid = [], os.getpid()
    while (pid := _parent(pid)) and _is_launcher(pid):
        found.append(pid)
    return found


class Launchers:
    """The launchers of this rank, as they were when it started.

    One that is killed leaves its ranks behind: they would train on, unknown to whoever started
    them, on GPUs that count as free.
    """

    def __init__(self) -> None:
        self._found = {pid: (_started(pid), _name(pid)) for pid in launchers()}
        self._was_gone = not self._found and _has_lost_its_launcher()

    def gone(self) -> str | None:
        """One that runs no more, in words; None while all do."""
        if self._was_gone:
            return "the launcher that started this process is gone"
        for pid, (started, name) in self._found.items():
            if _started(pid) != started:
                return f"{name} (process {pid}), which started this run, is gone"
        return None


def _has_lost_its_launcher() -> bool:
    """Whether a launcher has started this process, and somebody else has adopted it since.

    What a launcher starts between itself and a rank (a shell, say) has the same variables, and the
    same user; those of init are nobody's to read.
    """
    marks = [f"{name}={os.environ[name]}".encode() for name in _MARKS if name in os.environ]
    try:
        of_parent = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        of_parent = []
    return bool(marks) and Path("/proc/self").exists() and not set(marks) & set(of_parent)


def _started(pid: int) -> str | None:
    """When a process started, in ticks; None if there is none, or only its remains."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in ("Z", "X") else fields[19]


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on; None if it is not there."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    return text.rpartition(b")")[2].decode().split()


def _parent(pid: int) -> int:
    """Process number of the parent, 0 if /proc does not say."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _is_launcher(pid: int) -> bool:
    return any(
        Path(word).name in _LAUNCHERS or word.startswith(_MODULES) or "/deepspeed/launcher/" in word
        for word in _command(pid)[:5]  # what follows are arguments
    )


def _name(pid: int) -> str:
    """The word of its command that says what it is."""
    words = [word for word in _command(pid)[:5] if word and not word.startswith("-")]
    known = [w for w in words if Path(w).name in _LAUNCHERS or w.startswith(_MODULES)]
    return Path((known or words or ["launcher"])[0]).name


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text("utf-8", "replace").split("\0")
    except OSError:
        return []

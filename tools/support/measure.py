"""Measuring: interleaved repetitions, wall and CPU seconds, peak memory, and on what machine."""

import ctypes
import importlib.metadata
import math
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

LEAST_REPEATS = 5
# When the benchmark shall be over, by time.perf_counter(); None: no limit.
_end: float | None = None
_shortened: list[str] = []
LIBRARIES = (
    "torch",
    "numpy",
    "deepspeed",
    "transformers",
    "webdataset",
    "simplejpeg",
    "pillow",
    "opencv-python-headless",
    "tokenizers",
)


@dataclass(frozen=True)
class Measurement:
    """One repetition of one case."""

    items: float
    """What was done: images, samples, steps."""
    wall_seconds: float
    cpu_seconds: float
    """Of this process and of its children that have ended meanwhile."""


def measure(case: Callable[[], float]) -> Measurement:
    """Run `case`, which returns how many items it did."""
    wall, cpu = time.perf_counter(), _cpu_seconds()
    items = case()
    return Measurement(items, time.perf_counter() - wall, _cpu_seconds() - cpu)


def repeated(
    step: Callable[[], Any], items: float, span_seconds: float = 0.02
) -> Callable[[], float]:
    """A case that takes `step`, of `items` items, as often as fits into the span, or once.

    Steps of microseconds cannot be measured one by one.
    """
    step()
    start = time.perf_counter()
    step()
    count = max(1, round(span_seconds / (time.perf_counter() - start)))

    def case() -> float:
        for _ in range(count):
            step()
        return count * items

    return case


def interleaved(
    cases: Mapping[str, Callable[[], float]],
    repeats: int,
    progress: Callable[[str], None] = lambda text: None,
    sharers: int = 1,
) -> dict[str, list[Measurement]]:
    """Run every case `repeats` times, in turns, so that a slow spell of the machine hits them all.

    One unmeasured round comes first (imports, page cache). Repetition i of two cases ran next to
    each other: compare them pairwise (`ratio`).

    Each case is said as it is measured. The unmeasured round tells how long the rest takes: where
    that is longer than what `end_after` left, there are fewer repetitions (see `shortened`), and
    where there is no time for one, that round counts.

    sharers: calls that share the time that is left, this one included.
    """
    if repeats < LEAST_REPEATS:
        raise ValueError(f"repeats {repeats}: medians need at least {LEAST_REPEATS}")
    first: dict[str, list[Measurement]] = {}
    start = time.perf_counter()
    for name, case in cases.items():
        progress(f"warm-up: {name}")
        say(f"warm-up: {_said(name)} ...")
        first[name] = [measure(case)]
        say(f"warm-up: {_said(name)}: {first[name][0].wall_seconds:.1f} s")
    turns = _turns(time.perf_counter() - start, repeats, sharers)
    results: dict[str, list[Measurement]] = {name: [] for name in cases}
    for turn in range(1, turns + 1):
        for name, case in cases.items():
            progress(f"{turn}/{turns}: {name}")
            measured = measure(case)
            results[name].append(measured)
            rate = measured.items / max(measured.wall_seconds, 1e-9)
            say(f"{turn}/{turns}: {_said(name)}: {rate:,.4g} a second")
    return results if turns else first


def end_after(seconds: float | None) -> None:
    """Let what is measured from now on in this process end after about this time; None: whenever
    it is done."""
    global _end
    _end = None if seconds is None else time.perf_counter() + seconds
    _shortened.clear()


def seconds_left() -> float:
    """Until the time that `end_after` set; infinite without one."""
    return math.inf if _end is None else max(_end - time.perf_counter(), 0.0)


def shorten(what: str) -> None:
    """Note that there was no time for all that was asked for; `what` says how much there was."""
    text = f"shortened to end in time: {what}; --long takes all"
    if text not in _shortened:
        _shortened.append(text)
        say(text)


def shortened() -> list[str]:
    """What was noted since `end_after`, for the result that is printed."""
    return list(_shortened)


def say(text: str) -> None:
    """A line of progress, on standard error: the result goes to standard output."""
    print(text, file=sys.stderr, flush=True)


def _turns(round_seconds: float, repeats: int, sharers: int) -> int:
    """How many repetitions there are time for, said."""
    turns = math.floor(min(repeats, seconds_left() / sharers / max(round_seconds, 1e-9)))
    if not turns:
        shorten(f"one repetition of {repeats}, the first one, which else only warms up")
    elif turns < repeats:
        shorten(f"{turns} of {repeats} repetitions")
    say(f"{turns} repetitions, about {turns * round_seconds:.0f} s")
    return turns


def _said(case: Any) -> str:
    return case if isinstance(case, str) else ", ".join(map(str, case))


def median_rate(measurements: list[Measurement], clock: str = "wall_seconds") -> float:
    """Median items per second of `clock` (wall_seconds or cpu_seconds)."""
    return median(m.items / getattr(m, clock) for m in measurements)


def ratio(ours: list[Measurement], theirs: list[Measurement], clock: str = "wall_seconds") -> float:
    """Median over the repetitions of our rate / their rate."""
    pairs = zip(ours, theirs, strict=True)
    return median((a.items / getattr(a, clock)) / (b.items / getattr(b, clock)) for a, b in pairs)


def peak_rise_mib(action: Callable[[], Any]) -> float | None:
    """How far `action` lifts this process's memory above what it held before, in MiB.

    None where the system does not tell. Best measured `in_fresh_process`, after one unmeasured
    action.
    """
    marks = Path("/proc/self/clear_refs")
    if not marks.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for reuse would hide the rise
    marks.write_text("5", encoding="utf-8")  # the high-water mark starts anew
    before = _status_bytes("VmRSS")
    action()
    return (_status_bytes("VmHWM") - before) / 2**20


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """What `function` (of a module's top level) returns in a new interpreter.

    A fork would begin with this process's own memory. Raises RuntimeError if the process dies.
    """
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(function, arguments, its))
    child.start()
    its.close()
    try:
        return mine.recv()
    except EOFError:
        raise RuntimeError(f"the process of {function.__name__}{arguments} has died") from None
    finally:
        child.join()


def _answer(function: Callable, arguments: tuple, answer) -> None:
    answer.send(function(*arguments))


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def machine(command: str) -> dict[str, Any]:
    """What was measured where, for a reader who was not there."""
    return {
        "command": command,
        "time": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "cpu": _cpu_name(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "accelerators": _accelerators(),
        "commit": _commit(),
        "libraries": {name: _version(name) for name in LIBRARIES},
    }


def _cpu_seconds() -> float:
    usages = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _accelerators() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

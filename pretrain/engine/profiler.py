"""A look inside a run: some steps of some ranks, and their loader workers, in one trace.

    touch RUN/control/profile                              the next 3 steps of rank 0
    echo "ranks=0,9 steps=5" > RUN/control/profile         of ranks 0 and 9, 5 steps

Writes `RUN/profile/step_N.json.gz` (N: steps taken before), which https://ui.perfetto.dev and
chrome://tracing open; on GPUs also `step_N_memory_rank_R.html`, a timeline of what was allocated
where. Between requests nothing of this runs.
"""

import gzip
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.distributed as dist

from data_pipeline.activity import Span
from data_pipeline.files import write_atomically
from pretrain.engine.control.control import PROFILE_FILE, ControlFolder
from pretrain.engine.launch.distributed import Ranks
from pretrain.engine.memory_pictures import MemoryHistory

log = logging.getLogger("omnipretrain.profiler")

FOLDER = "profile"
_MOST_STEPS = 100


class Request(NamedTuple):
    """What a trace is to show."""

    ranks: tuple[int, ...] = (0,)
    steps: int = 3

    @classmethod
    def read(cls, text: str, world: int) -> Self:
        """From the words of the request; raises ValueError with what is wrong and what is right."""
        found = cls()
        for word in text.split():
            name, _, value = word.partition("=")
            try:
                numbers = tuple(int(part) for part in value.split(","))
            except ValueError:
                numbers = ()
            if name == "ranks" and numbers and all(0 <= rank < world for rank in numbers):
                found = found._replace(ranks=tuple(sorted(set(numbers))))
            elif name == "steps" and len(numbers) == 1 and 1 <= numbers[0] <= _MOST_STEPS:
                found = found._replace(steps=numbers[0])
            else:
                raise ValueError(
                    f"control/{PROFILE_FILE} says {word!r}; it may say ranks=0,1 (of 0 to "
                    f"{world - 1}) and steps=3 (1 to {_MOST_STEPS}), or nothing"
                )
        return found


class Profiler:
    """Traces steps when it is asked to; the same calls on every rank, at step boundaries.

    Args:
        run_dir: of the run.
        ranks: this process.
        control: the request is read there on rank 0, and deleted when the trace is written.
        spans: what the loader workers of this rank have done of late.
    """

    def __init__(
        self, run_dir: Path, ranks: Ranks, control: ControlFolder, spans: Callable[[], list[Span]]
    ) -> None:
        self._folder, self._ranks, self._control = run_dir / FOLDER, ranks, control
        self._spans = spans
        self._request: Request | None = None
        self._first = 0
        self._marks: list[int] = []
        self._profile: torch.profiler.profile | None = None
        self._memory = MemoryHistory(ranks.device)

    def begin(self, step: int) -> None:
        """A trace is asked for, as all ranks have agreed. A collective, unless one is running."""
        if self._request is not None:
            return
        said: list = [None]
        if self._ranks.leads:
            said = [self._read()]
        dist.broadcast_object_list(said, src=0)
        if said[0] is None:
            return
        self._request, self._first = Request(*said[0]), step
        if self._ranks.rank in self._request.ranks:
            self._start()
        self._marks = [time.time_ns()]

    def after_step(self, step: int) -> None:
        """A step has been taken. A collective after the last one of a trace."""
        if self._request is None:
            return
        self._marks.append(time.time_ns())
        if step >= self._first + self._request.steps:
            self.close()

    def close(self) -> None:
        """End the trace that is running, if there is one, and write it. A collective then."""
        if self._request is None:
            return
        request, self._request = self._request, None
        if self._profile is not None:
            try:
                self._write_own()
            except Exception as error:  # a look inside ends no run
                log.warning("rank %d: no trace: %s", self._ranks.rank, error)
            self._profile = None
        dist.barrier()
        if self._ranks.leads:
            try:
                self._merge(request)
            except Exception as error:
                log.warning("no trace: %s", error)
            self._control.profile_done()

    # ---- one trace -----------------------------------------------------------------------------

    def _read(self) -> Request | None:
        try:
            text = (self._control.path / PROFILE_FILE).read_text(encoding="utf-8", errors="replace")
            return Request.read(text, self._ranks.world)
        except (OSError, ValueError) as error:
            log.warning("no trace is taken: %s", error)
            self._control.profile_done()
            return None

    def _start(self) -> None:
        profile = torch.profiler.profile()  # with the GPU's kernels where there is one
        try:
            self._memory.start()
            profile.start()
            self._profile = profile
        except Exception as error:
            log.warning("rank %d: no trace: %s", self._ranks.rank, error)

    def _write_own(self) -> None:
        self._profile.stop()
        memory = self._memory.stop()
        if not self._control.ownership.holds():
            return
        self._folder.mkdir(exist_ok=True)
        path = self._part(self._ranks.rank)
        self._profile.export_chrome_trace(str(path))
        trace = json.loads(path.read_bytes())
        trace["traceEvents"] += self._own_events(trace.get("baseTimeNanoseconds", 0))
        path.write_text(json.dumps(trace), encoding="utf-8")
        if memory:
            name = f"step_{self._first}_memory_rank_{self._ranks.rank}.html"
            write_atomically(self._folder / name, [memory.encode()])

    def _own_events(self, base_ns: int) -> list[dict]:
        """Steps, and what the loader workers did meanwhile, as events of Chrome's format."""
        steps = zip(self._marks, self._marks[1:], strict=False)
        events = [
            _event(f"step {self._first + number + 1}", "steps", 0, begin, end, base_ns)
            for number, (begin, end) in enumerate(steps)
        ]
        wall_ns = time.time_ns() - time.monotonic_ns()
        for span in self._spans():
            begin, end = (int(1e9 * moment) + wall_ns for moment in (span.begin, span.end))
            if end < self._marks[0] or begin > self._marks[-1]:
                continue
            events.append(
                _event(
                    span.stage,
                    f"loader worker {span.process}",
                    span.process,
                    begin,
                    end,
                    base_ns,
                    step=span.step + 1,
                    position=span.position,
                )
            )
        return events

    def _merge(self, request: Request) -> None:
        if not self._control.ownership.holds():
            return
        parts = {rank: self._part(rank) for rank in request.ranks if self._part(rank).exists()}
        if not parts:
            return
        path = self._folder / f"step_{self._first}.json.gz"
        whole = merged({rank: json.loads(part.read_bytes()) for rank, part in parts.items()})
        write_atomically(path, [gzip.compress(json.dumps(whole).encode(), 5)])
        for part in parts.values():
            part.unlink()
        log.info(
            "trace of %d step(s) after step %d on rank(s) %s: %s; open it at "
            "https://ui.perfetto.dev or in chrome://tracing",
            len(self._marks) - 1,
            self._first,
            ", ".join(map(str, parts)),
            path,
        )

    def _part(self, rank: int) -> Path:
        return self._folder / f".step_{self._first}_rank_{rank}.json"


def _event(
    name: str, process: str, thread: int, begin_ns: int, end_ns: int, base_ns: int, **args
) -> dict:
    return {
        "ph": "X",
        "name": name,
        "cat": process,
        "pid": process,
        "tid": thread,
        "ts": (begin_ns - base_ns) / 1e3,
        "dur": (end_ns - begin_ns) / 1e3,
        "args": args,
    }


def merged(traces: dict[int, dict]) -> dict:
    """One trace of those of several ranks, whose numbers of processes and flows may be the same.

    traces: rank -> trace in Chrome's format, whose times count from its `baseTimeNanoseconds`.
    """
    base = min(trace.get("baseTimeNanoseconds", 0) for trace in traces.values())
    events, numbers = [], {}
    for rank, trace in sorted(traces.items()):
        shift = (trace.get("baseTimeNanoseconds", 0) - base) / 1e3
        titles = {
            event["pid"]: event["args"]["name"]
            for event in trace["traceEvents"]
            if event.get("name") == "process_name" and event["ph"] == "M"
        }
        for event in trace["traceEvents"]:
            if event.get("name") in ("process_name", "process_sort_index"):
                continue
            event = {**event, "ts": event.get("ts", 0) + shift}
            source = (rank, event.get("pid", ""))
            event["pid"] = numbers.setdefault(source, len(numbers) + 1)
            if "id" in event:
                event["id"] = f"{rank}:{event['id']}"
            events.append(event)
        for (of, pid), number in numbers.items():
            if of == rank:
                title = f"rank {rank}: {titles.get(pid, pid)}"
                events += [
                    {"ph": "M", "name": "process_name", "pid": number, "args": {"name": title}},
                    {
                        "ph": "M",
                        "name": "process_sort_index",
                        "pid": number,
                        "args": {"sort_index": number},
                    },
                ]
    return {"displayTimeUnit": "ms", "baseTimeNanoseconds": base, "traceEvents": events}

"""A look inside a run: requests, one trace of several ranks, pictures of a GPU's memory."""

import gzip
import json
import logging
from types import SimpleNamespace

import pytest
import torch

from data_pipeline.activity import Span
from pretrain.engine import memory_pictures
from pretrain.engine.control.control import ControlFolder
from pretrain.engine.control.ownership import claim
from pretrain.engine.launch.distributed import Ranks
from pretrain.engine.memory_pictures import MemoryHistory, leave_picture, watch_for_out_of_memory
from pretrain.engine.profiler import Profiler, Request, merged

CPU = torch.device("cpu")
SNAPSHOT = {"segments": [], "device_traces": [[]], "allocator_settings": {}}


@pytest.mark.parametrize(
    "text, found",
    [
        ("", ((0,), 3)),
        ("ranks=9,0,9", ((0, 9), 3)),
        ("steps=5\nranks=1\n", ((1,), 5)),
        ("ranks=10", None),
        ("ranks=-1", None),
        ("steps=0", None),
        ("steps=1,2", None),
        ("all", None),
        ("ranks=", None),
    ],
)
def test_requests(text, found):
    if found is None:
        with pytest.raises(ValueError, match=r"of 0 to 9\) and steps=3"):
            Request.read(text, world=10)
    else:
        assert Request.read(text, world=10) == found


@pytest.fixture
def control(tmp_path, group_of_one):
    return ControlFolder(tmp_path, claim(tmp_path, {}))


def test_a_trace_of_two_steps_and_what_goes_wrong(control, tmp_path, caplog):
    """Steps outside of it cost and leave nothing, whatever goes wrong ends no run."""
    caplog.set_level(logging.INFO, "omnipretrain")
    profiler = Profiler(tmp_path, Ranks(0, 1, 0, 1, CPU), control, lambda: [])
    request = control.path / "profile"
    for step in range(1, 8):
        torch.ones(3).cumsum(0)
        profiler.after_step(step)
        if step in (2, 3):
            request.write_text("steps=2")
            assert control.profile_requested()
            profiler.begin(step)
    assert not request.exists() and [p.name for p in (tmp_path / "profile").iterdir()] == [
        "step_2.json.gz"
    ]
    events = json.loads(gzip.decompress((tmp_path / "profile/step_2.json.gz").read_bytes()))
    names = [event["name"] for event in events["traceEvents"] if event["ph"] == "X"]
    assert names.count("aten::cumsum") == 2 and {"step 3", "step 4"} <= set(names)
    assert str(tmp_path / "profile/step_2.json.gz") in caplog.text
    request.write_text("ranks=1")
    profiler.begin(8)
    assert not request.exists() and "says 'ranks=1'" in caplog.text
    (tmp_path / "profile/step_2.json.gz").unlink()
    (tmp_path / "profile").rmdir()
    (tmp_path / "profile").write_text("in the way")
    request.touch()
    profiler.begin(9)
    profiler.close()  # the run ends within the trace
    assert not request.exists() and "no trace: " in caplog.text


def test_spans_of_workers_stand_at_their_time(control, tmp_path, monkeypatch):
    """In the clock of the trace; those from before are left out."""
    monkeypatch.setattr(
        "pretrain.engine.profiler.time",
        SimpleNamespace(
            time_ns=lambda: 5_000_000_000,
            monotonic_ns=lambda: 2_000_000_000,
        ),
    )
    spans = [Span(7, 1.0, 1.5, "read", 4, 11), Span(7, 2.0, 2.25, "decode", 4, 12)]
    profiler = Profiler(tmp_path, Ranks(0, 1, 0, 1, CPU), control, lambda: spans)
    profiler._first, profiler._marks = 3, [4_900_000_000, 5_100_000_000]
    step, decode = profiler._own_events(base_ns=4_000_000_000)
    assert (step["name"], step["ts"], step["dur"]) == ("step 4", 900_000.0, 200_000.0)
    assert (decode["name"], decode["ts"], decode["dur"]) == ("decode", 1_000_000.0, 250_000.0)
    assert decode["args"] == {"step": 5, "position": 12} and decode["pid"] == "loader worker 7"


def test_ranks_with_the_same_process_numbers_stay_apart():
    """So do their flows; times count from the earliest."""

    def trace(base: int) -> dict:
        named = {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}}
        return {
            "baseTimeNanoseconds": base,
            "traceEvents": [
                named,
                {"ph": "X", "name": "op", "pid": 1, "tid": 1, "ts": 10.0, "dur": 1.0},
                {"ph": "s", "name": "flow", "pid": 1, "tid": 1, "ts": 10.0, "id": 5},
            ],
        }

    found = merged({0: trace(1_000_000), 3: trace(3_000_000)})
    assert found["baseTimeNanoseconds"] == 1_000_000
    events = [e for e in found["traceEvents"] if e["name"] == "op"]
    assert [event["ts"] for event in events] == [10.0, 2010.0]
    titles = {
        e["pid"]: e["args"]["name"] for e in found["traceEvents"] if e["name"] == "process_name"
    }
    assert [titles[e["pid"]] for e in events] == ["rank 0: python", "rank 3: python"]
    assert [e["id"] for e in found["traceEvents"] if e["name"] == "flow"] == ["0:5", "3:5"]


def test_pictures_of_memory(tmp_path, monkeypatch, caplog):
    """The calls to CUDA are stood in for; the pages are torch's."""
    seen = []
    memory = SimpleNamespace(
        _record_memory_history=lambda **how: seen.append(how), _snapshot=lambda: SNAPSHOT
    )
    monkeypatch.setattr(memory_pictures.torch.cuda, "memory", memory)
    history = MemoryHistory(CPU)
    history.start()
    assert history.stop() is None and not seen
    history = MemoryHistory(torch.device("cuda"))
    history.start()
    assert "Active Memory Timeline" in history.stop()
    assert seen[0]["max_entries"] > 0 and seen[-1] == {"enabled": None}
    watch_for_out_of_memory(tmp_path, 3, CPU)  # nothing to watch
    leave_picture(tmp_path / "profile", 3, SNAPSHOT, "the table", asked=2**30, free=5)
    text = (tmp_path / "profile/out_of_memory_rank_00003.txt").read_text()
    assert "1,073,741,824 bytes were asked for" in text and "the table" in text
    page = (tmp_path / "profile/out_of_memory_rank_00003.html").read_text()
    assert "Allocator State History" in page
    leave_picture(tmp_path / "profile/out_of_memory_rank_00003.txt/x", 3, SNAPSHOT, "", 1, 1)
    assert "no picture of it" in caplog.text

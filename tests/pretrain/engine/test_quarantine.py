"""From bad rows to entries of the ledger, on one rank; runs are in tests/distributed."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_pipeline.loader.stream import Fault
from data_pipeline.order.mixed_order import MixedOrder
from data_pipeline.order.order import Order
from data_pipeline.order.repeats import RepeatedOrder
from pretrain.engine.launch.distributed import Ranks
from pretrain.engine.loop import TrainerState
from pretrain.engine.quarantine import Quarantine
from pretrain.engine.quarantine_files import Edit, append_edits, read_list
from pretrain.engine.run_record import RunDirError

RANKS = Ranks(0, 1, 0, 1, torch.device("cpu"))
pytestmark = pytest.mark.usefixtures("group_of_one")


def streams() -> dict:
    """A plain task, and one of two sources of which b is read three times as often."""
    mixed = MixedOrder({"a": Order(30, seed=1), "b": Order(12, seed=2)}, [1, 3], seed=5)
    orders = {"plain": Order(20, seed=3), "mixed": mixed}
    return {name: SimpleNamespace(order=order) for name, order in orders.items()}


def fault(task: str, row: int) -> Fault:
    return Fault(task, 0, 0, row, "x.tar", f"k{row}", "torn")


def start(tmp_path, state: TrainerState) -> Quarantine:
    return Quarantine(tmp_path, RANKS, state, streams())


def test_every_data_set_gets_an_entry_of_its_own(tmp_path):
    state = TrainerState(step=4)
    quarantine = start(tmp_path, state)
    quarantine.gather([fault("plain", 7), *(fault("mixed", row) for row in (3, 30, 41))])
    quarantine.gather([fault("plain", 8), fault("plain", 7)])
    assert state.bad_rows == {"plain": [[7, 9]], "mixed": [[3, 4], [30, 31], [41, 42]]}
    taken = quarantine.streams["mixed"].order.taken(40)
    assert quarantine.revise({"plain": 40, "mixed": 40}) and not state.bad_rows
    common = {"kind": "quarantine", "step": 4, "released": []}
    assert [e for e in state.ledger if e["task"] == "plain"] == [
        common | {"task": "plain", "source": "", "from_position": 40, "excluded": [[7, 9]]}
    ]
    a, b = (e for e in state.ledger if e["task"] == "mixed")
    assert (a["source"], a["excluded"], a["from_position"]) == ("a", [[3, 4]], 30)
    assert (b["source"], b["excluded"]) == ("b", [[0, 1], [11, 12]])
    assert b["from_position"] == -(-taken["b"] // 12) * 12
    assert [quarantine.metrics(t)["quarantined_samples"] for t in ("plain", "mixed")] == [2, 3]
    rows = quarantine.streams["mixed"].order.rows(np.arange(40, 2000))
    assert {3, 30, 41}.isdisjoint(rows[400:].tolist())
    quarantine.write_list()
    assert [(e.task, e.row, e.key, e.reason) for e in read_list(tmp_path)] == [
        (task, row, f"k{row}", "torn")
        for task, row in (("mixed", 3), ("mixed", 30), ("mixed", 41), ("plain", 7), ("plain", 8))
    ]


def test_positions_of_the_ledger_count_images_however_often_they_are_repeated(tmp_path):
    """40 views of three for each image: those of the order behind them are a third as many."""
    state, repeated = TrainerState(step=4), streams()
    for name, order in [(name, task.order) for name, task in repeated.items()]:
        repeated[name].order = RepeatedOrder(order, 12, 3)
    quarantine = Quarantine(tmp_path, RANKS, state, repeated)
    quarantine.gather([fault("plain", 7), *(fault("mixed", row) for row in (3, 41))])
    assert quarantine.revise({"plain": 84, "mixed": 84})
    wanted = Quarantine(tmp_path / "other", RANKS, TrainerState(step=4), streams())
    wanted.gather([fault("plain", 7), *(fault("mixed", row) for row in (3, 41))])
    wanted.revise({"plain": 28, "mixed": 28})
    assert state.ledger == wanted.state.ledger
    (plain,) = [entry for entry in state.ledger if entry["task"] == "plain"]
    assert plain["from_position"] == 40
    rows = repeated["plain"].order.rows(np.arange(3 * 40, 3000))
    assert 7 not in rows and len(set(rows.tolist())) == 19
    assert [quarantine.metrics(t)["quarantined_samples"] for t in ("plain", "mixed")] == [1, 2]
    quarantine.write_list()
    assert [(e.task, e.row) for e in read_list(tmp_path)] == [
        ("mixed", 3),
        ("mixed", 41),
        ("plain", 7),
    ]
    again = streams()
    again["plain"].order = RepeatedOrder(again["plain"].order, 12, 3)
    Quarantine(tmp_path, RANKS, TrainerState(ledger=list(state.ledger)), again)
    assert np.array_equal(again["plain"].order.rows(np.arange(120, 3000)), rows)


def test_without_news_nothing_changes(tmp_path):
    state = TrainerState()
    quarantine = start(tmp_path, state)
    quarantine.gather([fault("a stream without rows", -1)])
    assert not state.bad_rows and not quarantine.revise({"plain": 0, "mixed": 0})
    quarantine.write_list()
    assert not state.ledger and not list(tmp_path.iterdir())
    quarantine.gather([fault("plain", 7)])
    quarantine.revise({"plain": 0})
    # A row that is bad again before it leaves, or while its epoch ends, is known already.
    quarantine.gather([fault("plain", 7)])
    assert not quarantine.revise({"plain": 8}) and len(state.ledger) == 1


def test_the_ledger_alone_gives_the_same_orders(tmp_path):
    state = TrainerState(step=4)
    quarantine = start(tmp_path, state)
    for step, row in ((4, 3), (8, 30), (12, 5)):
        state.step = step
        quarantine.gather([fault("mixed", row), fault("plain", row % 20)])
        quarantine.revise({"mixed": 40 * step, "plain": 13 * step})
    again = start(tmp_path, TrainerState(step=12, ledger=state.ledger))
    positions = np.arange(3000)
    for task in ("plain", "mixed"):
        rows = [q.streams[task].order.rows(positions) for q in (quarantine, again)]
        assert np.array_equal(*rows)
    assert set(again.streams["mixed"].order.by_source()) == {"a", "b"}


def test_a_data_set_without_a_good_sample_is_left_as_it_is(tmp_path, caplog):
    state = TrainerState()
    quarantine = start(tmp_path, state)
    quarantine.gather([fault("plain", row) for row in range(20)])
    with caplog.at_level(logging.WARNING, "omnipretrain.quarantine"):
        assert not quarantine.revise({"plain": 20})
    assert "all 20 samples are bad; none of them is left out" in caplog.text
    assert quarantine.streams["plain"].order.rows(np.arange(20)).size == 20


def test_edits_are_taken_in_once(tmp_path):
    state = TrainerState()
    quarantine = start(tmp_path, state)
    append_edits(tmp_path, [Edit("plain", "x.tar", "k2", 2, True)])
    assert quarantine.revise({"plain": 5}) and state.quarantine_edits == 1
    assert not quarantine.revise({"plain": 5})
    append_edits(tmp_path, [Edit("plain", "x.tar", "k2", 2, False)])
    assert quarantine.revise({"plain": 25})
    assert [e["excluded"] for e in state.ledger] == [[[2, 3]], []]
    assert state.ledger[1]["released"] == [[2, 3]] and state.ledger[1]["from_position"] == 39
    quarantine.write_list()
    assert read_list(tmp_path) == []


def test_the_last_edit_of_a_sample_holds(tmp_path):
    state = TrainerState()
    quarantine = start(tmp_path, state)
    quarantine.gather([fault("plain", 4), fault("plain", 5)])
    changes = ((2, True), (2, False), (3, False), (3, True), (4, False), (5, False), (5, True))
    append_edits(tmp_path, [Edit("plain", "x.tar", f"k{row}", row, out) for row, out in changes])
    assert quarantine.revise({"plain": 5})
    (entry,) = state.ledger
    assert (entry["excluded"], entry["released"]) == ([[3, 4], [5, 6]], [])


def test_a_line_that_is_being_written_waits_for_the_next_time(tmp_path):
    state = TrainerState()
    quarantine = start(tmp_path, state)
    append_edits(tmp_path, [Edit("plain", "x.tar", f"k{row}", row, True) for row in (2, 3)])
    file = tmp_path / "quarantine_edits.jsonl"
    lines = file.read_text()
    file.write_text(lines[:-10])
    assert quarantine.revise({"plain": 5}) and state.quarantine_edits == 1
    file.write_text(lines)
    assert quarantine.revise({"plain": 5}) and state.quarantine_edits == 2
    assert [entry["excluded"] for entry in state.ledger] == [[[2, 3]], [[3, 4]]]
    file.write_text(lines[:-10] + "\n")  # nobody is
    with pytest.raises(RunDirError, match=r"quarantine_edits\.jsonl:2: not an entry"):
        start(tmp_path, TrainerState()).revise({"plain": 5})


@pytest.mark.parametrize(
    ("ledger", "edit", "text"),
    [
        ([("gone", "", 20)], "", "leaves out rows of gone: no such task"),
        ([("plain", "c", 20)], "", r"task plain: the ledger .* does not fit its data: .*\['c'\]"),
        ([("plain", "", 21)], "", "from position 21 on, which is no border"),
        ([], "nonsense\n", r"quarantine_edits\.jsonl:1: not an entry"),
    ],
)
def test_what_does_not_fit_the_run_is_an_error(tmp_path, ledger, edit, text):
    entries = [
        {
            "kind": "quarantine",
            "step": 1,
            "task": task,
            "source": source,
            "from_position": start,
            "excluded": [[1, 2]],
            "released": [],
        }
        for task, source, start in ledger
    ]
    (tmp_path / "quarantine_edits.jsonl").write_text(edit)
    with pytest.raises(RunDirError, match=text):
        start(tmp_path, TrainerState(ledger=entries)).revise({})

"""The check that users run on their own DeepSpeed, and the refusal that asks for it."""

import deepspeed
import pytest

from pretrain.engine.zero.stale_gradients import (
    UnverifiedDeepSpeed,
    passed_here,
    record_path,
    require_verified,
)
from tools.selfcheck import __main__ as selfcheck
from tools.selfcheck import parity_cells
from tools.selfcheck.parity_cells import Cell

RIGHT = Cell(3, False, 1, "all", "sgd")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return tmp_path


def test_a_pass_is_noted_and_opens_the_way(cache, monkeypatch, capsys):
    monkeypatch.setattr(parity_cells, "all_cells", lambda: [RIGHT])
    monkeypatch.setattr(deepspeed, "__version__", "0.99.0")
    with pytest.raises(UnverifiedDeepSpeed, match=r"tools\.selfcheck"):
        require_verified(2, stage=3, offloaded=False)
    assert selfcheck.main(["--world", "1"]) == 0
    assert passed_here() and record_path().is_relative_to(cache)
    require_verified(2, stage=3, offloaded=False)
    assert "all 1 modes equal plain PyTorch" in capsys.readouterr().out


def test_a_difference_is_shown_and_not_noted(cache, monkeypatch, capsys):
    monkeypatch.setattr(parity_cells, "all_cells", lambda: [RIGHT])
    monkeypatch.setattr(selfcheck, "launch", lambda cells, world, out: "")
    monkeypatch.setattr(selfcheck, "compare", lambda cell, out: ["step 3: loss 1, plain 2"])
    assert selfcheck.main([]) == 1
    assert not passed_here()
    text = capsys.readouterr().out
    assert "wrong" in text and "step 3: loss 1, plain 2" in text


def test_a_process_that_dies_ends_the_check(cache, monkeypatch, capsys):
    monkeypatch.setattr(parity_cells, "all_cells", lambda: [Cell(9, False, 1, "all", "sgd")])
    monkeypatch.setattr(selfcheck, "is_affected", lambda cell: True)
    assert selfcheck.main(["--world", "2"]) == 1
    assert "the processes failed" in capsys.readouterr().out


def test_traces_are_shown_as_they_are(cache, monkeypatch, capsys):
    trace = "[rank0]: ValueError: [/dev/null] is empty"
    monkeypatch.setattr(selfcheck, "launch", lambda cells, world, out: trace)
    assert selfcheck.main([]) == 1
    assert trace in capsys.readouterr().out


def test_only_affected_modes_of_several_tasks_ask_for_it(cache, monkeypatch):
    monkeypatch.setattr(deepspeed, "__version__", "0.99.0")
    require_verified(1, stage=3, offloaded=True)
    require_verified(2, stage=2, offloaded=False)
    for stage, offloaded in ((1, True), (2, True), (3, False), (3, True)):
        with pytest.raises(UnverifiedDeepSpeed):
            require_verified(2, stage, offloaded)


def test_a_damaged_record_is_no_pass(cache):
    record_path().parent.mkdir(parents=True, exist_ok=True)
    for text in ("", "[]", '{"passed": "yes"}', '{"passed": false}'):
        record_path().write_text(text)
        assert not passed_here()

"""What a run was trained on is in its ledger, and stays."""

import json

import pytest

from pretrain.engine.data_record import data_entries
from pretrain.engine.run_dir import RunDirError


def never(task):
    raise AssertionError("what is the same needs no second look")


def test_data_are_recorded_once_and_compared_ever_after():
    weak = {"caption": "aa before", "classify": "bb before"}
    found = {"caption": "aa", "classify": "bb"}
    entries = data_entries(found, [{"kind": "weights", "step": 0}], 0, never)
    assert entries == [{"kind": "data", "step": 0, "tasks": found}]
    ledger = json.loads(json.dumps([{"kind": "weights", "step": 0}, *entries]))
    assert data_entries(found, ledger, 500, weak.get) == []
    with pytest.raises(RunDirError, match=r"tasks\.classify: the training data are not those"):
        data_entries(found | {"classify": "cc"}, ledger, 500, weak.get)


def test_a_run_goes_on_where_shards_got_better_indices():
    before, found = {"a": "weak", "b": "same"}, {"a": "full", "b": "same"}
    ledger = data_entries(before, [], 0, never)
    entries = data_entries(found, ledger, 500, {"a": "weak"}.get)
    assert entries == [{"kind": "data", "step": 500, "tasks": found}]
    assert data_entries(found, ledger + entries, 600, never) == []
    with pytest.raises(RunDirError, match=r"tasks\.a: the training data"):
        data_entries(found, ledger, 500, {"a": "others"}.get)
    with pytest.raises(RunDirError, match=r"tasks\.a, b: the training data"):
        data_entries({"a": "full", "b": "other"}, ledger, 500, {"a": "weak", "b": "weak"}.get)

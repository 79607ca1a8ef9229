"""What a run was trained on is in its ledger, and stays."""

import json

import pytest

from pretrain.engine.data_record import data_entries
from pretrain.engine.run_dir import RunDirError


def test_data_are_recorded_once_and_compared_ever_after():
    found = {"caption": "aa", "classify": "bb"}
    entries = data_entries(found, [{"kind": "weights", "step": 0}], 0)
    assert entries == [{"kind": "data", "step": 0, "tasks": found}]
    ledger = json.loads(json.dumps([{"kind": "weights", "step": 0}, *entries]))
    assert data_entries(found, ledger, 500) == []
    with pytest.raises(RunDirError, match=r"tasks\.classify: the training data are not those"):
        data_entries(found | {"classify": "cc"}, ledger, 500)

"""What a run was trained on is in its ledger, and stays."""

import json

import pytest

from pretrain.engine.data_record import data_entries
from pretrain.engine.run_record import RunDirError


def never(task, numbers):
    raise AssertionError("what is the same needs no second look")


def test_data_are_recorded_once_and_compared_ever_after():
    weak = {"caption": "aa before", "classify": "bb before"}
    found, full = {"caption": "aa", "classify": "bb"}, {"caption": [], "classify": []}

    def before(task, numbers):
        assert numbers is None
        return weak[task]

    entries = data_entries(found, full, [{"kind": "weights", "step": 0}], 0, never)
    assert entries == [{"kind": "data", "step": 0, "tasks": found}]
    ledger = json.loads(json.dumps([{"kind": "weights", "step": 0}, *entries]))
    assert data_entries(found, full, ledger, 500, never) == []
    with pytest.raises(RunDirError, match=r"tasks\.classify: the training data are not those"):
        data_entries(found | {"classify": "cc"}, full, ledger, 500, before)


@pytest.mark.parametrize("says_which", [True, False])
def test_a_run_goes_on_where_shards_got_better_indices(says_which):
    """Those that it says had weak ones, or, in ledgers that do not say it, all."""
    weak, full = {"a": [2, 0, 1, 4], "b": []}, {"a": [], "b": []}
    before, found = {"a": "weak", "b": "same"}, {"a": "full", "b": "same"}
    entries = data_entries(before, weak, [], 0, never)
    assert entries == [
        {"kind": "data", "step": 0, "tasks": before, "by_headers": {"a": [[0, 3], [4, 5]]}}
    ]
    ledger = json.loads(json.dumps(entries))
    if not says_which:
        del ledger[0]["by_headers"]

    def then(**known):
        return lambda task, numbers: (
            known[task] if numbers == ({0, 1, 2, 4} if says_which and task == "a" else None) else ""
        )

    entries = data_entries(found, full, ledger, 500, then(a="weak"))
    assert entries == [{"kind": "data", "step": 500, "tasks": found}]
    assert data_entries(found, full, ledger + entries, 600, never) == []
    with pytest.raises(RunDirError, match=r"tasks\.a: the training data"):
        data_entries(found, full, ledger, 500, then(a="others"))
    with pytest.raises(RunDirError, match=r"tasks\.a, b: the training data"):
        data_entries({"a": "full", "b": "other"}, full, ledger, 500, then(a="weak", b="weak"))


def test_a_run_that_began_with_better_indices_says_so():
    ledger = data_entries({"a": "full", "b": "b"}, {"a": [], "b": []}, [], 0, never)
    found, weak = {"a": "weaker", "b": "b"}, {"a": [3, 4], "b": []}
    with pytest.raises(RunDirError, match=r"`where`, or the indices \(\.idx\) of 2 shards cannot"):
        data_entries(found, weak, ledger, 500, lambda task, numbers: "weaker")
    with pytest.raises(RunDirError, match=r"`where`\. Put them back"):
        data_entries({"a": "full", "b": "c"}, weak, ledger, 500, lambda task, numbers: "c")

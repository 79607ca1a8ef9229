"""Which checkpoints stay; on empty folders, since only names count."""

import os

import pytest

from pretrain.engine.checkpoint.files import CheckpointError, checkpoint_name, list_checkpoints
from pretrain.engine.checkpoint.retention import (
    cut_off_return,
    find_checkpoint,
    last_before,
    retire,
    set_aside,
    step_of,
    step_to_go_back_to,
    went_back_from,
)


@pytest.fixture
def root(tmp_path):
    for step in range(1, 9):
        (tmp_path / checkpoint_name(step)).mkdir()
    (tmp_path / "latest").write_text(checkpoint_name(8))
    return tmp_path


def steps(root) -> list[int]:
    return sorted(step_of(folder) for folder in list_checkpoints(root))


@pytest.mark.parametrize(
    ("keep", "every", "sound", "kept"),
    [
        (2, None, 8, [7, 8]),
        (1, 3, 8, [3, 6, 8]),
        (2, None, 5, [4, 5, 7, 8]),  # steps 5, 6 and 7 were skipped
        (2, 4, 0, [4, 7, 8]),  # all steps were
        (3, None, 7, [6, 7, 8]),
        (1, None, 7, [6, 7, 8]),
    ],
)
def test_the_last_ones_before_steps_were_skipped_stay(root, keep, every, sound, kept):
    retire(root, keep, every, sound)
    assert steps(root) == kept


def test_a_streak_does_not_push_out_what_was_before_it(root):
    """As a run does it: one more checkpoint each time, all of them of skipped steps."""
    for step in range(9, 30):
        (root / checkpoint_name(step)).mkdir()
        retire(root, keep_last=2, keep_every_steps=None, sound=8)
    assert steps(root) == [7, 8, 28, 29]
    assert last_before(root, 9) == 8 and last_before(root, 8) == 7 and last_before(root, 7) is None


def test_what_a_run_goes_back_behind_is_kept_aside(root, tmp_path):
    record = tmp_path / "metrics.jsonl"
    record.write_text("old\n")
    first = set_aside(root, 5, [record, tmp_path / "faults"])
    assert first.newest == 8 and steps(root) == [1, 2, 3, 4, 5]
    assert sorted(path.name for path in first.folder.iterdir()) == [
        "metrics.jsonl",
        *(checkpoint_name(step) for step in (6, 7, 8)),
    ]
    assert (root / "latest").read_text().strip() == checkpoint_name(5)
    second = set_aside(root, 5, [])
    assert second.newest is None and second.folder != first.folder
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 .*there are 1, 2, 3, 4, 5"):
        find_checkpoint(root, 7)


@pytest.mark.parametrize("moved", range(4))
def test_a_crash_in_the_middle_of_going_back(root, tmp_path, monkeypatch, moved):
    """The launcher's next start, or the same command again, ends it: nothing after step 5 is gone
    on from, and the ledger hears of the newest step that was there."""
    record = tmp_path / "metrics.jsonl"
    record.write_text("old\n")
    rename, done = os.rename, []

    def crash(*names):
        if len(done) == moved:
            raise KeyboardInterrupt
        done.append(rename(*names))

    monkeypatch.setattr(os, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        set_aside(root, 5, [record])
    monkeypatch.setattr(os, "rename", rename)
    assert cut_off_return(root) == 5
    if moved == 3:  # or the person thinks better of it
        return check_going_back_further(root)
    assert step_to_go_back_to(root, 5, {"TORCHELASTIC_RESTART_COUNT": "1"}) == 5
    aside = set_aside(root, 5, [record])
    assert aside.newest == 8 and steps(root) == [1, 2, 3, 4, 5]
    assert steps(aside.folder) == [6, 7, 8] and (aside.folder / "metrics.jsonl").exists()
    assert cut_off_return(root) is None and [path.name for path in root.glob("*_*_*")] == [
        aside.folder.name
    ]
    assert set_aside(root, 5, []).newest is None  # a start that came no further, and another one
    assert went_back_from(root, 5) == 8 and went_back_from(root, 4) is None
    (root / checkpoint_name(6)).mkdir()
    assert set_aside(root, 5, []).newest == 6


def check_going_back_further(root):
    assert set_aside(root, 3, []).newest == 8 and steps(root) == [1, 2, 3]
    assert cut_off_return(root) is None


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_repeated_command_goes_back_once(root, name):
    assert step_to_go_back_to(root, 5, {name: "1"}) == 5  # the first start had not got that far
    set_aside(root, 5, [])
    assert step_to_go_back_to(root, 5, {name: "1"}) is None
    assert step_to_go_back_to(root, 3, {name: "1"}) == 3
    assert step_to_go_back_to(root, 5, {name: "0"}) == step_to_go_back_to(root, 5, {}) == 5

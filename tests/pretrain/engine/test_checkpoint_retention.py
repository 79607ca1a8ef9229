"""Which checkpoints stay; on empty folders, since only names count."""

import pytest

from pretrain.engine.checkpoint_files import CheckpointError, checkpoint_name, list_checkpoints
from pretrain.engine.checkpoint_retention import (
    find_checkpoint,
    last_before,
    retire,
    set_aside,
    step_of,
    step_to_go_back_to,
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
        "metrics.jsonl", *(checkpoint_name(step) for step in (6, 7, 8))
    ]  # fmt: skip
    assert (root / "latest").read_text().strip() == checkpoint_name(5)
    second = set_aside(root, 5, [])
    assert second.newest is None and second.folder != first.folder
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 .*there are 1, 2, 3, 4, 5"):
        find_checkpoint(root, 7)


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_repeated_command_goes_back_once(root, name):
    assert step_to_go_back_to(root, 5, {name: "1"}) == 5  # the first start had not got that far
    set_aside(root, 5, [])
    assert step_to_go_back_to(root, 5, {name: "1"}) is None
    assert step_to_go_back_to(root, 3, {name: "1"}) == 3
    assert step_to_go_back_to(root, 5, {name: "0"}) == step_to_go_back_to(root, 5, {}) == 5

"""People can list, release and exclude samples of a run, and take that back."""

from pathlib import Path

import pytest

from pretrain.engine.quarantine_files import Edit, Listed, read_edits, write_list
from pretrain.recipe.load import load_recipe
from tests.tiny_run import pack_scenes, three_tasks, tiny_recipe, write_recipe
from tools.shards.__main__ import main


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    pack_scenes(folder, 30, 2)
    return folder


@pytest.fixture
def run_dir(data, tmp_path) -> Path:
    """A run directory as a run leaves it."""
    folder = tmp_path / "run"
    folder.mkdir()
    recipe = load_recipe(str(write_recipe(tmp_path / "r.yaml", tiny_recipe(data, folder))))
    recipe.dump(folder / "recipe.yaml")
    shard = str(data / "train/train-000000.tar")
    write_list(
        folder,
        [
            Listed("caption", shard, "000003", 3, "torn", 60),
            Listed("caption", shard, "000007", 7, "not an image", None),
            Listed("other", shard, "000007", 7, "not an image", None),
        ],
    )
    return folder


def quarantine(run_dir: Path, *arguments: str) -> int:
    return main(["quarantine", str(run_dir), *arguments])


def test_the_list(run_dir, capsys):
    assert quarantine(run_dir) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("caption, from sample 60: ") and lines[0].endswith(
        "train-000000.tar, key '000003', row 3: torn"
    )
    assert lines[1].startswith("caption, not yet: ")
    assert lines[-1] == "3 samples; 0 changes by hand since the run began"
    assert quarantine(run_dir, "--task", "other") == 0
    assert "1 samples;" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wanted", "rows"), [("000003", [3]), ("7", [7]), ("train-000000.tar", [3, 7])]
)
def test_samples_are_released_by_key_row_or_shard(run_dir, capsys, wanted, rows):
    assert quarantine(run_dir, "--task", "caption", "--release", wanted) == 0
    assert f"{len(rows)} changes noted" in capsys.readouterr().out
    edits = read_edits(run_dir)
    assert [(edit.task, edit.row, edit.exclude) for edit in edits] == [
        ("caption", row, False) for row in rows
    ]


def test_samples_are_excluded_by_key_or_row(run_dir, data):
    assert quarantine(run_dir, "--exclude", "000028", "4") == 0
    folder = data / "train"
    assert read_edits(run_dir) == [
        Edit("caption", str(folder / "train-000001.tar"), "000028", 28, True),
        Edit("caption", str(folder / "train-000000.tar"), "000004", 4, True),
    ]


def test_what_the_run_has_not_taken_in_can_be_taken_back(run_dir, capsys):
    assert quarantine(run_dir, "--exclude", "000028", "3") == 0
    capsys.readouterr()
    assert quarantine(run_dir) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("caption, not yet: ") and lines[-2].endswith(
        "train-000001.tar, key '000028', row 28: excluded by hand"
    )
    assert lines[-1] == "4 samples; 2 changes by hand since the run began"
    assert quarantine(run_dir, "--release", "000028") == 0
    last = read_edits(run_dir)[-1]
    assert (last.task, last.row, last.exclude) == ("caption", 28, False)
    assert quarantine(run_dir, "--release", "000028") == 1


def test_mistakes_are_named(run_dir, data, tmp_path, capsys):
    for arguments, text in (
        (["--release", "nothing"], "'nothing' is no key, row or shard"),
        (["--exclude", "nothing"], "no sample has the key 'nothing'"),
        (["--exclude", "1", "--task", "x"], "the run has no task 'x', only caption"),
    ):
        assert quarantine(run_dir, *arguments) == 1
        assert text in capsys.readouterr().err
    assert quarantine(tmp_path) == 1
    assert "has no recipe.yaml" in capsys.readouterr().err
    several = load_recipe(str(write_recipe(tmp_path / "s.yaml", three_tasks(data, run_dir))))
    several.dump(run_dir / "recipe.yaml")
    assert quarantine(run_dir, "--exclude", "1") == 1
    assert "--task is needed: one of caption, classify, contrast" in capsys.readouterr().err
    assert not read_edits(run_dir)
    (run_dir / "quarantine_edits.jsonl").write_text('{"task": "caption"}\n')
    assert quarantine(run_dir) == 1
    assert "quarantine_edits.jsonl:1: not an entry of this file" in capsys.readouterr().err

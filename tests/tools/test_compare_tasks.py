"""The comparison of ways to train tasks: what it runs, and what it makes of the results."""

from pathlib import Path

from pretrain.recipe.load import load_recipe
from tests.tools.finished_run import write_run
from tools import compare_tasks
from tools.compare_tasks import TASKS, table
from tools.support.experiment import Run


def options(tmp_path: Path, *more: str):
    """Parsed as `main` does, without running anything."""
    (tmp_path / "data" / "tokenizer").mkdir(parents=True)
    caught = []
    original = compare_tasks.plan
    compare_tasks.plan = lambda parsed: caught.append(parsed) or {}
    try:
        (tmp_path / "out").mkdir()
        folders = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
        compare_tasks.main([*folders, *more])
    finally:
        compare_tasks.plan = original
    return caught[0]


def test_every_run_is_a_valid_recipe_with_the_same_steps_of_each_task(tmp_path):
    runs = compare_tasks.plan(options(tmp_path, "--seeds", "0", "7", "--steps", "60"))
    ways = {}
    for folder, run in runs.items():
        recipe = load_recipe(run.recipe, run.overrides)
        assert Path(recipe.run_dir) == folder and recipe.seed in (0, 7)
        each_step = len(recipe.tasks) if recipe.sampling.mode == "mixed" else 1
        assert recipe.steps * each_step == 60 * len(recipe.tasks)
        ways.setdefault(run.way, []).append(sorted(recipe.tasks))
    assert {way: len(found) for way, found in ways.items()} == {
        "unmixed, MT-AdamW": 2,
        "unmixed, AdamW": 2,
        "mixed, AdamW": 2,
        "one task alone, AdamW": 6,
    }
    assert sorted(map(tuple, ways["one task alone, AdamW"])) == sorted((t,) for t in TASKS * 2)


def test_rates_are_tried_one_by_one(tmp_path):
    runs = compare_tasks.plan(options(tmp_path, "--seeds", "0", "--lr", "0.001", "0.002"))
    assert sum(run.way == "mixed, AdamW, lr 0.002" for run in runs.values()) == 1
    assert len({str(folder) for folder in runs}) == len(runs) == 12


def test_the_table_takes_last_evaluations_of_finished_runs(tmp_path):
    write_run(tmp_path / "a", "finished", 0.5)
    write_run(tmp_path / "b", "finished", 0.7)
    write_run(tmp_path / "c", "stopped", 0.9)
    text = table({tmp_path / name: Run("way", "digits_multitask", []) for name in "abc"})
    assert text.splitlines()[0].startswith("| | digit accuracy | CIDEr-D")
    assert text.splitlines()[2].startswith("| way | 0.600 ± 0.141 |  |")


def test_without_data_it_says_what_to_do(tmp_path, capsys):
    assert compare_tasks.main(["--data", str(tmp_path)]) == 2
    assert "make demo" in capsys.readouterr().out

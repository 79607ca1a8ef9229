"""A run whose checkpoints are gone is no new run, whichever record tells of it."""

import json

import pytest

from pretrain.engine.run_record import RunDirError, check_new, check_resumable, holds_run
from pretrain.train import main
from tests.tiny_run import tiny_recipe, write_recipe

RECIPE = "checkpoint:\n  every_steps: 4\n"
RECORDS = {
    "control/status.json": json.dumps({"state": "failed", "step": 8, "reason": ""}),
    "starts.jsonl": '{"from_step": 0}\n{"from_step": 8}\n{"from',
    "metrics.jsonl": '{"step": 4}\n{"step": 8}\n',
    "checkpoints/latest": "step_000000008\n",
}
NEVER_SAVED = {
    "control/status.json": json.dumps({"state": "running", "step": 0, "reason": ""}),
    "starts.jsonl": '{"from_step": 0}\n',
    "metrics.jsonl": '{"step": 4}\n',
}


def lay_out(run, files: dict[str, str]) -> None:
    for name, text in {"recipe.yaml": RECIPE, **files}.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("beside", [{}, NEVER_SAVED])
@pytest.mark.parametrize("ask", [check_new, check_resumable, holds_run])
def test_a_record_of_steps_without_a_checkpoint_is_refused(tmp_path, record, beside, ask):
    lay_out(tmp_path, beside | {record: RECORDS[record]})
    with pytest.raises(RunDirError) as refused:
        ask(tmp_path)
    for part in (f"{tmp_path / record} (step 8)", f"{tmp_path / 'checkpoints'}/step_*"):
        assert part in str(refused.value)
    (tmp_path / "checkpoints/step_000000008").mkdir(parents=True)  # brought back
    assert holds_run(tmp_path) and check_resumable(tmp_path) == tmp_path / "recipe.yaml"


def test_a_run_that_ended_before_its_first_checkpoint_may_start_again(tmp_path):
    """Its status says that none was written, and it has logged no step that comes after one."""
    lay_out(tmp_path, NEVER_SAVED)
    check_new(tmp_path)
    check_resumable(tmp_path)
    assert holds_run(tmp_path)
    (tmp_path / "control/status.json").unlink()
    with pytest.raises(RunDirError, match=r"metrics.jsonl \(step 4\)"):
        check_resumable(tmp_path)


def test_the_first_asynchronous_checkpoint_may_come_later(tmp_path):
    """A run may end while it is written: until the second is due, which waits for it."""
    lay_out(tmp_path, NEVER_SAVED | {"metrics.jsonl": '{"step": 8}\n'})
    with pytest.raises(RunDirError, match=r"metrics.jsonl \(step 8\)"):
        check_resumable(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE + "  asynchronous: true\n")
    check_resumable(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    with pytest.raises(RunDirError, match=r"metrics.jsonl \(step 9\)"):
        check_resumable(tmp_path)


def test_nothing_is_nothing(tmp_path):
    check_new(tmp_path / "run")
    assert not holds_run(tmp_path / "run")
    with pytest.raises(RunDirError, match=r"it has no recipe\.yaml"):
        check_resumable(tmp_path / "run")
    (tmp_path / "run/checkpoints/step_000000008").mkdir(parents=True)
    with pytest.raises(RunDirError, match=r"it has no recipe\.yaml"):
        holds_run(tmp_path / "run")  # not a new run over somebody's checkpoints


@pytest.mark.parametrize("how", ["--resume", "--start-or-resume", "anew"])
def test_the_command_changes_nothing_then(tmp_path, how, capsys):
    run = tmp_path / "run"
    path = write_recipe(tmp_path / "r.yaml", tiny_recipe(tmp_path, run))
    lay_out(run, RECORDS | {"recipe.yaml": path.read_text()})
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    arguments = {
        "--resume": ["--resume", str(run)],
        "anew": [str(path)],
        "--start-or-resume": [str(path), "--start-or-resume", "steps=12"],
    }
    assert main(arguments[how]) == 2
    assert "no checkpoint is there" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_start_or_resume_goes_on_under_the_same_recipe_only(tmp_path, capsys):
    run = tmp_path / "run"
    path = write_recipe(tmp_path / "r.yaml", tiny_recipe(tmp_path, run))
    lay_out(run, {"recipe.yaml": path.read_text(), "checkpoints/step_000000004/manifest.json": ""})
    assert main([str(path), "--start-or-resume", "seed=5", "loader.workers=0"]) == 2
    said = capsys.readouterr().err
    assert "seed" in said and "loader.workers" not in said
    assert main(["--resume", str(run), "--start-or-resume"]) == 2
    assert "--start-or-resume wants a recipe" in capsys.readouterr().err

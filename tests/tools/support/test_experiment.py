"""Runs of an experiment: which count as finished, what happens to failed ones, the table."""

import json

import pytest
from rich.console import Console

from tests.tools.finished_run import write_run
from tools.support.experiment import Run, describe, evaluations, markdown, metrics, train, train_one


def test_only_finished_runs_have_results(tmp_path):
    write_run(tmp_path / "a", "finished", 0.5)
    write_run(tmp_path / "b", "stopped", 0.9)
    assert evaluations(tmp_path / "a")["classify"]["top1"] == 0.5
    assert evaluations(tmp_path / "b") == evaluations(tmp_path / "none") == {}
    assert [row["top1"] for row in metrics(tmp_path / "b")] == [0.0, 0.1, 0.9]


def test_a_failed_run_is_named_and_its_output_kept(tmp_path):
    broken = Run("way", "digits_multitask", ["steps=none"])
    assert train_one(tmp_path / "broken", broken) == 2
    text = (tmp_path / "broken.log").read_text(encoding="utf-8")
    assert "steps: input should be a valid integer" in text


def test_finished_runs_are_not_repeated(tmp_path):
    write_run(tmp_path / "done", "finished", 0.5)
    before = (tmp_path / "done" / "metrics.jsonl").read_text(encoding="utf-8")
    broken = Run("way", "digits_multitask", ["steps=none"])
    runs = {tmp_path / "done": broken, tmp_path / "open": broken}
    assert train(runs, 1, Console(quiet=True)) == ["open"]
    assert (tmp_path / "done" / "metrics.jsonl").read_text(encoding="utf-8") == before
    assert not (tmp_path / "done.log").exists()


def test_a_cut_line_is_no_result(tmp_path):
    write_run(tmp_path / "a", "finished", 0.5)
    with open(tmp_path / "a" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "evaluation"})[:9])
    assert metrics(tmp_path / "a") == []


@pytest.mark.parametrize(
    ("values", "text"), [([], ""), ([0.5], "0.500"), ([0.5, 0.7], "0.600 ± 0.141")]
)
def test_means_and_spreads(values, text):
    assert describe(values) == text


def test_tables_are_markdown():
    assert markdown(["a", "b"], [["row", "1", "2"]]) == (
        "| | a | b |\n|---|---|---|\n| row | 1 | 2 |\n"
    )

"""What a node says of itself before a start."""

import json
import os
import shutil
from collections import namedtuple

import pytest

from slurm import health


@pytest.fixture
def run(tmp_path):
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / health.TOKEN_FILE).write_text("t")
    return tmp_path


def said(run, capsys, *words: str) -> list[str]:
    assert health.main([str(run), "--token", "t", *words]) == 0
    return json.loads(capsys.readouterr().out)["faults"]


def test_a_fit_node(run, capsys):
    assert said(run, capsys) == []
    assert not list((run / "control").glob(".health*"))


@pytest.mark.parametrize(
    ("shown", "fault"),
    [
        ("80000, 81000\n80000, 81000\n", None),
        ("80000, 81000\n", "1 GPUs instead of 2"),
        ("80000, 81000\n20000, 81000\n", "GPU 1: 20000 of 81000 MB free"),
        ("No devices were found\n", "nvidia-smi: could not convert"),
    ],
)
def test_gpus(run, capsys, tmp_path, monkeypatch, shown, fault):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{shown}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    faults = said(run, capsys, "--gpus", "2")
    assert (not faults) if fault is None else faults[0].startswith(fault)


def test_folders_and_clocks(run, capsys, monkeypatch):
    (run / "control" / health.TOKEN_FILE).write_text("another")
    assert "is another folder here" in said(run, capsys)[0]
    (run / "control" / health.TOKEN_FILE).unlink()
    assert "is not the supervisor's" in said(run, capsys)[0]
    (run / "control" / health.TOKEN_FILE).write_text("t")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**12, 10**12, 2**20))
    assert f"{run} has 1 MB left" in said(run, capsys)
    now = health.time.time()
    monkeypatch.setattr(health.time, "time", lambda: now + 60)
    assert "the clock is +60 s off that of the run directory's file system" in said(run, capsys)


def test_a_node_without_an_answer_is_unfit(tmp_path):
    (tmp_path / "h-0.log").write_text('slurmstepd: warning\n{"node": "a", "faults": []}\n')
    assert health.reports(tmp_path / "h-*.log", ["a", "b"]) == {"a": [], "b": ["it gave no answer"]}

"""What ranks find out before a run starts: their product, who is missing, their sum."""

import json
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist

from pretrain import node_check
from slurm import health

CPU = torch.device("cpu")


def lines_of(capfd) -> list[dict]:
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


def test_a_product_is_compared(monkeypatch):
    assert node_check.compute(CPU) == []
    right = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: right(a, b) + a.is_floating_point()
    )
    assert node_check.compute(CPU) == ["a matrix product on cpu is wrong"]


def test_a_process_alone(monkeypatch, capfd):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setattr(node_check.os, "environ", dict(node_check.os.environ))
    before = set(threading.enumerate())
    assert node_check.main([]) == 0
    assert lines_of(capfd) == [{"rank": 0, "node": "n1", "faults": []}]
    # What would have ended this process after a while has been called off.
    assert not [one for one in set(threading.enumerate()) - before if not one.finished.is_set()]


def test_ranks_that_are_missing_or_unfit_are_named(capfd):
    """Rank 1 is fit, rank 2 computes wrongly, rank 3 hangs in its product, rank 4 never comes."""
    store, answers = dist.HashStore(), {}
    store.set("here/3", "")
    faults = {0: [], 1: [], 2: ["a matrix product on cuda:2 is wrong"]}
    threads = [
        threading.Thread(
            target=lambda r=r: answers.update({r: node_check.meet(store, r, 5, faults[r], 1.0)})
        )
        for r in faults
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert set(answers.values()) == {"not all ranks are fit: [2, 3, 4]"}
    assert lines_of(capfd) == [
        {
            "rank": 3,
            "node": None,
            "faults": ["rank 3 did not finish its matrix product within 1 s"],
        },
        {"rank": 4, "node": None, "faults": ["rank 4 did not come within 1 s"]},
    ]


def test_all_fit_go_on():
    store = dist.HashStore()
    store.set("computed/1", "well")
    assert node_check.meet(store, 0, 2, [], 5.0) == ""
    assert node_check.meet(store, 1, 2, [], 5.0) == ""


def test_a_silent_rank_0_is_noticed(monkeypatch):
    monkeypatch.setattr(node_check, "_MARGIN_S", 0.0)
    faults = []
    assert node_check.meet(dist.HashStore(), 1, 2, faults, 0.2) == faults[0]


def test_lines_become_faults_of_nodes(tmp_path):
    """Several ranks speak for a node; rank 0 speaks for those that say nothing."""
    (tmp_path / "c-0.log").write_text(
        '{"rank": 0, "node": "a", "faults": []}\n{"rank": 1, "node": "a", "faults": ["x"]}\n'
        'noise\n[1]\n{"rank": 5, "node": null, "faults": ["rank 5 did not come"]}\n'
    )
    (tmp_path / "c-1.log").write_text('{"rank": 2, "node": "b", "faults": []}\n')
    found = health.reports(tmp_path / "c-*.log", ["a", "b", "c", "d"], per_node=2)
    assert found == {"a": ["x"], "b": [], "c": ["rank 5 did not come"], "d": ["it gave no answer"]}


@pytest.mark.slow
@pytest.mark.parametrize("missing", [False, True])
def test_processes(tmp_path, missing):
    """Three real processes add up; without the last one, rank 0 names it within the limit."""
    import os

    from pretrain.engine.launch.launch_environment import free_port

    base = os.environ | {
        "WORLD_SIZE": "3",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "DS_ACCELERATOR": "cpu",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "pretrain.node_check", "--limit-s", "30" if missing else "120"],
            env=base | {"RANK": str(n), "LOCAL_RANK": "0", "SLURMD_NODENAME": f"n{n}"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(2 if missing else 3)
    ]
    said = [
        json.loads(line)
        for process in ranks
        for line in process.communicate(timeout=240)[0].splitlines()
    ]
    assert all(process.returncode == 0 for process in ranks)
    faults = {line["rank"]: line["faults"] for line in said}
    assert faults == {0: [], 1: [], 2: ["rank 2 did not come within 30 s"] if missing else []}

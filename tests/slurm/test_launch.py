"""Names, ports and commands of launchers on the nodes of a job."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm.launch import LAUNCHERS, command, end_of_ranks, hosts, job_id, port_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node1", ["node1"]),
        ("gpu[07-09,12],login1", ["gpu07", "gpu08", "gpu09", "gpu12", "login1"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("a[098-101]-ib", ["a098-ib", "a099-ib", "a100-ib", "a101-ib"]),
        ("", []),
    ],
)
def test_hosts(text, names):
    assert hosts(text) == names


@given(st.integers(1, 10**7), st.integers(1, 50))
def test_ports_are_below_those_of_systems_and_differ_from_try_to_try(job, attempt):
    assert 15_000 <= port_of(job, attempt) < 30_000
    assert port_of(job, attempt) != port_of(job, attempt + 1)


def test_an_element_of_an_array_has_its_own_name():
    assert job_id({"SLURM_JOB_ID": "7"}) == "7"
    element = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert job_id(element) == "7_3"
    assert job_id({}) == ""


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_commands(launcher, tmp_path):
    """One task a rank, or one launcher a node; the arguments of the trainer stay as they are."""
    train = ["pretrain.train", "a b.yaml", "name='x y'"]
    words = command(launcher, train, tmp_path, ["n1", "n2"], 8, 15001, "launch-%j-2-%t.log", "/py")
    tasks = 16 if launcher == "srun" else 2
    assert words[:2] == ["srun", "--nodes=2"] and f"--ntasks={tasks}" in words
    assert "--kill-on-bad-exit=1" in words and words[-3:] == train
    if launcher != "srun":
        inner = words[words.index("sh") + 2]
        subprocess.run(["sh", "-n", "-c", inner], check=True)
        assert "trap '' USR1 USR2" in inner and "$SLURM_NODEID" in inner and "15001" in inner
    if launcher == "deepspeed":
        hostfile = (tmp_path / "control/hostfile").read_text()
        assert hostfile == "n1 slots=8\nn2 slots=8\n"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_refusal_is_heard_through_a_launcher(tmp_path, launcher):
    """The reason is the rank's, not the launcher's report of it; torchrun itself ends with 1."""
    rank = tmp_path / "rank.py"
    rank.write_text("import sys; print('no such key', flush=True); sys.exit(2)")
    words = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node=1", "--master-port=0"],
        "deepspeed": ["deepspeed.launcher.launch", "--world_info=eyJsb2NhbGhvc3QiOiBbMF19"],
    }
    done = subprocess.run(
        [sys.executable, "-m", *words[launcher], str(rank)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    code = {"torchrun": (1, 2), "deepspeed": (2, None)}[launcher]
    assert (done.returncode, end_of_ranks(done.stdout)) == (code[0], ("no such key", code[1]))


def test_words_of_ranks():
    """As the launchers of torch 2.13 and DeepSpeed 0.19 report them."""
    torchrun = "E1201 11:52:05.7 26 /x/api.py:1002] failed (exitcode: 2) local_rank: 0 (pid: 7) of"
    deepspeed = "[2026-12-01 11:50:41,233] [INFO] [launch.py:253:sigkill_handler] Killing 7"
    for report, code in ((torchrun, 2), (deepspeed, None)):
        assert end_of_ranks(f"a\nno such key\n{report}\nTraceback\n") == ("no such key", code)
    assert end_of_ranks("") == ("", None)
    assert end_of_ranks("a\nsrun: error: x\n") == ("srun: error: x", None)


def test_the_room_stands_alone():
    """It imports no torch and nothing of the run; nothing of the run imports it; and what a job
    starts with needs no package."""
    for path in (ROOT / "slurm").glob("*.py"):
        names = imported(path)
        assert not names & {"torch", "deepspeed", "pretrain", "data_pipeline", "tools"}, path
    for room in ("pretrain", "data_pipeline"):
        for path in (ROOT / room).rglob("*.py"):
            assert "slurm" not in imported(path), path
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import slurm.supervise, sys; print('yaml' in sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found

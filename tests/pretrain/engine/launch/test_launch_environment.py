"""Ranks out of what launchers say, in words that SLURM 22.05 and Open MPI 4.1 were seen to use."""

import re
import socket

import pytest
import torch.distributed as dist

from pretrain.engine.launch.launch_environment import (
    LaunchError,
    naming_taken_port,
    read_ranks,
    require_world,
)

SRUN = {
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "3407675393",
}


def test_tasks_of_srun():
    environment = dict(SRUN)
    assert read_ranks(environment) == (2, 3, 0, 1)
    assert environment["MASTER_ADDR"] == "node1"
    others = SRUN | {"SLURM_PROCID": "1", "SLURM_NODEID": "0", "SLURM_LOCALID": "1"}
    assert read_ranks(others) == (1, 3, 1, 2)
    meeting = ("MASTER_ADDR", "MASTER_PORT")
    assert [others[name] for name in meeting] == [environment[name] for name in meeting]
    assert 10_000 <= int(others["MASTER_PORT"]) < 30_000
    # Another step of the job, at the same time on the same nodes.
    second = SRUN | {"SLURM_STEP_ID": "1"}
    read_ranks(second)
    assert second["MASTER_PORT"] != environment["MASTER_PORT"]


def test_many_nodes_of_srun():
    environment = SRUN | {
        "SLURM_STEP_NUM_TASKS": "508",
        "SLURM_STEP_TASKS_PER_NODE": "8(x63),4",
        "SLURM_STEP_NODELIST": "gpu-a[007-060,070-079],gpu-b3",
        "SLURM_PROCID": "506",
        "SLURM_NODEID": "63",
        "SLURM_LOCALID": "2",
    }
    assert read_ranks(environment) == (506, 508, 2, 4)
    assert environment["MASTER_ADDR"] == "gpu-a007"


@pytest.mark.parametrize(
    "nodes, first",
    [("node1", "node1"), ("r[2,4]n[10-12]", "r2n10"), ("a1,b[2-3]", "a1"), ("x[09]-ib", "x09-ib")],
)
def test_the_first_node_of_a_list(nodes, first):
    environment = SRUN | {"SLURM_STEP_NODELIST": nodes}
    read_ranks(environment)
    assert environment["MASTER_ADDR"] == first


def test_where_ranks_meet_is_the_users_choice():
    environment = SRUN | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4000"}
    read_ranks(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.7", "4000")


def test_tasks_that_are_dealt_out_in_turns():
    second = SRUN | {"SLURM_PROCID": "1"}  # of srun --distribution=plane=1, on the second node
    with pytest.raises(LaunchError, match=r"rank 1 is task 0 of node 1: .*--distribution=block"):
        read_ranks(second)
    turns = {"SLURM_DISTRIBUTION": "cyclic"}
    with pytest.raises(LaunchError, match="rank 0 is task 0 of node 0"):
        read_ranks(SRUN | turns | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"})
    # With one task a node there are no turns; of sockets there may be.
    assert read_ranks(
        SRUN
        | turns
        | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1"}
    ) == (1, 2, 0, 1)
    assert read_ranks(SRUN | {"SLURM_DISTRIBUTION": "block:cyclic"}) == (2, 3, 0, 1)


@pytest.mark.parametrize(
    "given",
    [
        {},
        # A batch script, a shell of `srun --pty`, one process of mpirun.
        {k: v for k, v in SRUN.items() if "STEP" not in k} | {"SLURM_PROCID": "0"},
        SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        MPIRUN | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
)
def test_alone(given):
    environment = dict(given)
    assert read_ranks(environment) == (0, 1, 0, 1)
    assert environment["MASTER_ADDR"] == "127.0.0.1"


def test_one_process_never_meets_a_port_that_is_taken():
    """As `deepspeed --num_gpus 1` starts it; torchrun's agent, though, is where it listens."""
    own = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment = own | {"MASTER_PORT": port}
        read_ranks(environment)
        assert environment["MASTER_PORT"] != port
    environment = own | {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    read_ranks(environment)
    assert environment["MASTER_PORT"] == port


@pytest.mark.parametrize(
    "launcher, way",
    [
        ({"LOCAL_SIZE": "2"}, "--master_port "),
        ({"TORCHELASTIC_RUN_ID": "x"}, "--master_port "),
        (SRUN, "MASTER_PORT="),
        (MPIRUN, "MASTER_PORT="),
    ],
)
def test_a_port_that_is_taken_is_named_with_the_way_out(launcher, way):
    """By what torch itself says of it; the port of the advice is free."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = launcher | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with (
            pytest.raises(LaunchError, match=f"port {port} of 127.0.0.1.* is taken") as error,
            naming_taken_port(environment),
        ):
            dist.TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)
        (advised,) = re.findall(rf"{way}(\d+)", str(error.value))
        with naming_taken_port(environment):
            dist.TCPStore("127.0.0.1", int(advised), 2, is_master=True, wait_for_workers=False)
    with pytest.raises(RuntimeError, match="another matter"), naming_taken_port(environment):
        raise RuntimeError("another matter")


def test_torchrun_behind_srun():
    environment = SRUN | {
        "RANK": "5",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "29500",
    }
    assert read_ranks(environment) == (5, 6, 1, 2)
    # The deepspeed launcher calls the processes of a node otherwise.
    environment["LOCAL_SIZE"] = environment.pop("LOCAL_WORLD_SIZE")
    assert read_ranks(environment) == (5, 6, 1, 2)


def test_processes_of_mpirun():
    environment, peer = dict(MPIRUN), MPIRUN | {"OMPI_COMM_WORLD_RANK": "0"}
    assert read_ranks(environment) == (1, 2, 1, 2)
    read_ranks(peer)
    assert environment["MASTER_ADDR"] == "127.0.0.1"
    assert environment["MASTER_PORT"] == peer["MASTER_PORT"]
    apart = MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    with pytest.raises(LaunchError, match=r"rank 1: .*-x MASTER_ADDR="):
        read_ranks(dict(apart))
    assert read_ranks(apart | {"MASTER_ADDR": "head"}) == (1, 2, 0, 1)


def test_a_launcher_that_says_half():
    with pytest.raises(LaunchError, match="not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        read_ranks({"RANK": "0", "WORLD_SIZE": "2"})
    whole = {
        "RANK": "2",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }
    with pytest.raises(LaunchError, match="impossible ranks"):
        read_ranks(whole)


def test_one_process_where_several_were_meant():
    """`accelerate launch --cpu` sets an address and starts one; a host file that is not there makes
    `deepspeed` start one."""
    with pytest.raises(LaunchError, match=r"unset MASTER_ADDR.*accelerate launch --multi_gpu"):
        read_ranks({"MASTER_ADDR": "127.0.0.1"})
    alone_in_a_step = {"MASTER_ADDR": "n1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert read_ranks(alone_in_a_step)[:2] == (0, 1)
    require_world({}, None)
    require_world({"WORLD_SIZE": "8"}, 8)
    for environment in ({}, {"WORLD_SIZE": "7"}):
        with pytest.raises(LaunchError, match="--expect-world 8, but the launcher has started"):
            require_world(environment, 8)

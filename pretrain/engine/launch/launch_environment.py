"""What a launcher has made of this process, in torch's words: RANK, WORLD_SIZE and the like.

`torchrun`, `deepspeed` and `accelerate launch` set these themselves. What `srun` and Open MPI's
`mpirun` say in words of their own is translated. Without any of them a process is rank 0 of 1.
"""

import contextlib
import re
import socket
import zlib
from collections.abc import Iterator, Mapping, MutableMapping

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Ports where ranks meet if nobody has chosen one: below those that systems hand out by themselves.
_FIRST_PORT, _PORTS = 10_000, 20_000


class LaunchError(RuntimeError):
    """The launcher's variables contradict each other, or do not suffice; the message says how."""


def translate(environment: MutableMapping[str, str]) -> None:
    """Say in torch's variables what srun or mpirun says in its own, if either started this.

    Raises:
        LaunchError: they contradict each other, or do not suffice.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return
    # A batch script has SLURM_PROCID and SLURM_NTASKS too, but is one process.
    if int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        _translate_srun(environment)
    elif int(environment.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        _translate_mpirun(environment)
    elif "MASTER_ADDR" in environment and "SLURM_STEP_ID" not in environment:
        # accelerate's simple launcher, for one: N processes were asked for, and this is all.
        raise LaunchError(
            f"MASTER_ADDR={environment['MASTER_ADDR']} is set, but neither RANK nor WORLD_SIZE: a "
            "launcher has started one process where several were meant, or the variable is left "
            "over (for one process: unset MASTER_ADDR). With accelerate, start `accelerate launch "
            "--multi_gpu --num_machines 1 --num_processes N --mixed_precision no "
            "--dynamo_backend no -m pretrain.train ...`, on CPUs too"
        )


def require_world(environment: Mapping[str, str], expected: int | None) -> None:
    """Refuse to train on another number of processes than whoever started them has meant.

    Raises:
        LaunchError: both numbers.
    """
    world = int(environment.get("WORLD_SIZE") or 1)
    if expected is not None and world != expected:
        raise LaunchError(
            f"--expect-world {expected}, but the launcher has started {world} process(es): a host "
            "file that is not there, or fewer nodes or GPUs than asked for"
        )


def read_ranks(environment: MutableMapping[str, str]) -> tuple[int, int, int, int]:
    """Rank, world, local rank and local world; sets what is missing for a process alone.

    A process alone meets nobody, so that it takes a free port whatever its launcher says: that of
    `deepspeed` is 29500 unless told otherwise.

    Raises:
        LaunchError: what the launcher says contradicts itself, or does not suffice.
    """
    translate(environment)
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        _set(environment, 0, 1, 0, 1)
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment["MASTER_PORT"] = str(free_port())
    missing = [name for name in _NAMES if name not in environment]
    if missing:
        raise LaunchError(
            f"the launcher set RANK or WORLD_SIZE but not {', '.join(missing)}; start with "
            "`deepspeed`, `torchrun`, `srun`, or plain `python` for one process"
        )
    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    local_rank = int(environment["LOCAL_RANK"])
    if world == 1 and not _agent_listens(environment):
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    # torchrun says LOCAL_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE.
    local_world = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or world)
    if not (0 <= rank < world and 0 <= local_rank < local_world):
        raise LaunchError(
            f"impossible ranks from the launcher: RANK={rank} of WORLD_SIZE={world}, "
            f"LOCAL_RANK={local_rank} of {local_world} on this node"
        )
    return rank, world, local_rank, local_world


@contextlib.contextmanager
def naming_taken_port(environment: Mapping[str, str]) -> Iterator[None]:
    """Within, the ranks meet. Raises LaunchError, with the way out, if their port is taken."""
    try:
        yield
    except RuntimeError as error:  # torch's DistNetworkError is one
        if not re.search("EADDRINUSE|address already in use", str(error), re.IGNORECASE):
            raise
        port = free_port()
        slurm_or_mpi = {"SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"} & environment.keys()
        by_launcher = "LOCAL_SIZE" in environment or "TORCHELASTIC_RUN_ID" in environment
        way = f"set MASTER_PORT={port} in the environment of all ranks"
        if by_launcher or not slurm_or_mpi:
            way = f"start with `--master_port {port}`, or {way} where no launcher sets it"
        raise LaunchError(
            f"port {environment['MASTER_PORT']} of {environment['MASTER_ADDR']}, where the ranks "
            f"are to meet, is taken by another program: {way}"
        ) from error


def _agent_listens(environment: Mapping[str, str]) -> bool:
    """Whether the ranks meet at a port on which torchrun's agent listens already."""
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _translate_srun(environment: MutableMapping[str, str]) -> None:
    rank, local_rank = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
    node = int(environment["SLURM_NODEID"])
    tasks = _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    # The first rank cannot tell by its own numbers, and would wait for the others.
    in_turns = environment.get("SLURM_DISTRIBUTION", "").startswith("cyclic")
    if (in_turns and len(tasks) > 1 < max(tasks)) or rank - local_rank != sum(tasks[:node]):
        raise LaunchError(
            f"rank {rank} is task {local_rank} of node {node}: srun deals tasks out in turns, but "
            "the ranks of a node have to follow each other; start with srun --distribution=block"
        )
    _set(environment, rank, environment["SLURM_STEP_NUM_TASKS"], local_rank, tasks[node])
    environment.setdefault("MASTER_ADDR", _first_host(environment["SLURM_STEP_NODELIST"]))
    step = f"{environment['SLURM_JOB_ID']}.{environment['SLURM_STEP_ID']}"
    environment.setdefault("MASTER_PORT", _port_of(step))


def _translate_mpirun(environment: MutableMapping[str, str]) -> None:
    rank, world, local_rank, local_world = (
        int(environment[f"OMPI_COMM_WORLD_{name}"])
        for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    )
    if local_world < world and "MASTER_ADDR" not in environment:
        raise LaunchError(
            f"rank {rank}: mpirun does not say where rank 0 of {world} is; add `-x MASTER_ADDR=` "
            "and the name of its node, which has to be the first one of the host file"
        )
    _set(environment, rank, world, local_rank, local_world)
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    environment.setdefault("MASTER_PORT", _port_of(environment.get("PMIX_NAMESPACE", "")))


def _set(
    environment: MutableMapping[str, str],
    rank: int,
    world: int | str,
    local_rank: int,
    local_world: int,
) -> None:
    environment.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(local_rank),
        LOCAL_WORLD_SIZE=str(local_world),
    )


def _tasks_per_node(text: str) -> list[int]:
    """`8(x2),4` are 8, 8 and 4."""
    counts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    return [int(count[1]) for count in counts for _ in range(int(count[2] or 1))]


def _first_host(nodes: str) -> str:
    """`gpu[07-12,20],login1` begins with gpu07."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _port_of(job: str) -> str:
    """The same on all nodes, and for another job most likely another one."""
    return str(_FIRST_PORT + zlib.crc32(job.encode()) % _PORTS)


def free_port() -> int:
    """A port of this machine on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

"""Who this process is among its peers, and the process group that joins them.

The ranks come from what the launcher says in the environment (`launch_environment`).
"""

import atexit
import os
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from pretrain.engine.launch.determinism import be_deterministic
from pretrain.engine.launch.gpu_surroundings import claim_gpu, keep_float32, set_gpu_defaults
from pretrain.engine.launch.launch_environment import (
    LaunchError,
    free_port,
    naming_taken_port,
    read_ranks,
)
from pretrain.engine.launch.peers import Place, own_place
from pretrain.engine.launch.rendezvous import store_of_this_start


@dataclass(frozen=True)
class Ranks:
    """The place of this process: `rank` of `world`, `local_rank` of `local_world` on its node."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    places: tuple[Place, ...] = ()
    """Host and process of each rank."""

    @property
    def of_node(self) -> range:
        """The ranks of this node; they follow each other."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_world)

    @property
    def leads(self) -> bool:
        """True on rank 0, the only one that speaks."""
        return self.rank == 0


def init_distributed(
    threads_per_rank: int | None = None,
    deterministic: bool = False,
    trace_dir: Path | None = None,
    timeout: timedelta | None = None,
) -> Ranks:
    """Read the launcher's environment, choose the device and start the process group.

    Args:
        threads_per_rank: threads of a rank's operators on the CPU: all of them without a GPU, the
            optimizer's where it is offloaded. None: `own_cores`. Part of what "bitwise" depends on
            (a reduction's order follows it).
        deterministic: see `be_deterministic`.
        trace_dir: where a collective of GPUs that times out leaves a file for each rank.
        timeout: of collectives in all process groups, DeepSpeed's own too, and of the meeting of
            the ranks; None: torch's and DeepSpeed's defaults.

    Raises:
        RuntimeError: see `read_ranks`, `choose_device`, `claim_gpu` and `be_deterministic`.
    """
    rank, world, local_rank, local_world = read_ranks(os.environ)
    device = choose_device(rank, local_rank)
    on_gpu = device.type == "cuda"
    if deterministic:
        be_deterministic(on_gpu)
    # DeepSpeed would choose by probing what happens to be installed.
    os.environ["DS_ACCELERATOR"] = device.type
    if on_gpu:
        set_gpu_defaults(trace_dir, os.environ)  # before CUDA starts
        keep_float32()
        torch.cuda.set_device(device)  # before NCCL takes the present one
        os.environ["LOCAL_RANK"] = str(device.index)  # which is what DeepSpeed takes it for
    else:
        os.environ["LOCAL_SIZE"] = str(local_world)  # or DeepSpeed counts NUMA nodes

    import deepspeed

    # DeepSpeed's own calls; a user can do nothing about them.
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*deprecated", FutureWarning)
    if not on_gpu:
        # The shared-memory collective is an optimisation that would start a C++ compiler on every
        # rank (minutes, and a lock that outlives a killed build).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    constants = dist.distributed_c10d
    if timeout is not None:  # of the groups that DeepSpeed makes, which names none
        constants.default_pg_timeout = constants.default_pg_nccl_timeout = timeout
    if not dist.is_initialized():
        try:
            _meet(rank, world, device, timeout)
        except LaunchError:
            if world > 1:
                raise
            os.environ["MASTER_PORT"] = str(free_port())  # somebody was faster
            _meet(rank, world, device, timeout)
    # Asked for in any case: a collective, and recipes may differ.
    cores, places = own_cores(world)
    torch.set_num_threads(threads_per_rank or cores)
    return Ranks(rank, world, local_rank, local_world, device, places)


def _meet(rank: int, world: int, device: torch.device, timeout: timedelta | None) -> None:
    """Start the process group.

    Raises:
        LaunchError: the port where ranks meet is taken; see `claim_gpu` for other errors.
    """
    import deepspeed

    on_gpu = device.type == "cuda"
    timeout = timeout or deepspeed.constants.default_pg_timeout
    with naming_taken_port(os.environ):
        backend = "nccl" if on_gpu else "gloo"
        of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if world > 1 and (on_gpu or of_agent):
            # Kept while the process group starts, which serves its own from the same port.
            store, *_ = next(dist.rendezvous("env://", rank, world, timeout=timeout))
            if of_agent:
                store = store_of_this_start(store, rank, world, timeout.total_seconds())
            if on_gpu:
                claim_gpu(store, rank, str(torch.cuda.get_device_properties(device).uuid))
            if of_agent:
                dist.init_process_group(
                    backend, store=store, rank=rank, world_size=world, timeout=timeout
                )
        deepspeed.init_distributed(
            backend, auto_mpi_discovery=False, verbose=False, timeout=timeout
        )


def choose_device(rank: int, local_rank: int) -> torch.device:
    """The GPU of this rank; the CPU where there is none, or where DS_ACCELERATOR=cpu asks for it.

    A process that sees one GPU takes it, whatever its rank: job schedulers may show each task its
    own. That it is no other rank's is seen by `claim_gpu`.

    Raises:
        RuntimeError: more ranks on this node than GPUs, or DS_ACCELERATOR asks for what is not
            here.
    """
    asked = os.environ.get("DS_ACCELERATOR") or None
    if asked not in (None, "cpu", "cuda"):
        raise RuntimeError(f"DS_ACCELERATOR={asked}: this project runs on cpu and cuda")
    if asked == "cpu" or not torch.cuda.is_available():
        if asked == "cuda":
            raise RuntimeError(
                f"rank {rank}: DS_ACCELERATOR=cuda, but torch {torch.__version__} sees no GPU: "
                "look at the driver and at CUDA_VISIBLE_DEVICES, or unset DS_ACCELERATOR"
            )
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible > 1 and local_rank >= visible:
        raise RuntimeError(
            f"rank {rank}: local rank {local_rank} has no GPU, this node shows {visible}; start at "
            "most that many processes per node, or set DS_ACCELERATOR=cpu"
        )
    return torch.device("cuda", 0 if visible == 1 else local_rank)


def own_cores(world: int) -> tuple[int, tuple[Place, ...]]:
    """This rank's part of the cores that it may use, and where all ranks run; a collective.

    Each core is divided among the ranks that may use it: all of the node's, unless the launcher
    has bound them to cores of their own (`srun --cpus-per-task`, `torchrun --numa-binding`).
    """
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    place, mine = own_place(), sorted(affinity(0))
    everyone: list = [None] * world
    dist.all_gather_object(everyone, (tuple(place), mine))
    users = Counter(c for (host, _), cores in everyone if host == place.host for c in cores)
    own = max(1, int(sum(Fraction(1, users[core]) for core in mine)))
    return own, tuple(Place(*where) for where, _ in everyone)


def shutdown() -> None:
    """Leave the process group, so that no peer waits for this process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process with its Python side cleaned up, and without destructors of C++ statics.

    Threads of torch and gloo that outlive the process group now and then make an exit abort there
    ("terminate called without an active exception"), and a finished run look like a failed one to
    its launcher.
    """
    atexit._run_exitfuncs()  # loader workers, log files, writers
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

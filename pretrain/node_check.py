"""Can the nodes of a job compute, and reach each other? Asked just before a run starts there.

    srun --ntasks-per-node 8 python -m pretrain.node_check        or by any other launcher

Each rank multiplies two matrices whose product is known; when all have, they add a tensor up over
all ranks. Each prints a JSON line, {"rank": 3, "node": "gpu07", "faults": [...]}; rank 0 adds one,
without a node, for each rank that was not there in time. Always ends with 0: the lines are what
counts (`slurm.one_try` reads them), and a launcher would end the others.
"""

import argparse
import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from pretrain.engine.launch.distributed import choose_device
from pretrain.engine.launch.launch_environment import LaunchError, read_ranks

_SIZE = 512
_SENT = 2**20
_POLL_S, _MARGIN_S = 0.05, 15.0


def say(rank: int, faults: Sequence[str], node: str | None = None) -> None:
    """One line for whoever has asked; in one write, since ranks may share a file."""
    line = json.dumps({"rank": rank, "node": node, "faults": list(faults)})
    os.write(1, f"{line}\n".encode())


def compute(device: torch.device) -> list[str]:
    """Faults of a small matrix product, whose integers any arithmetic holds exactly."""
    try:
        small = torch.arange(_SIZE * _SIZE, device=device).reshape(_SIZE, _SIZE) % 3
        found = (small.float() @ small.float().T).cpu()
    except RuntimeError as error:
        return [f"a matrix product on {device}: {str(error).splitlines()[0]}"]
    small = small.cpu()
    right = (small @ small.T).float()
    return [] if torch.equal(found, right) else [f"a matrix product on {device} is wrong"]


def meet(store: dist.Store, rank: int, world: int, faults: list[str], limit_s: float) -> str:
    """Wait until all ranks have computed; rank 0 names those that have not in time.

    Returns:
        "" if all are fit, else why nothing is added up.
    """
    until = time.monotonic() + limit_s
    store.set(f"computed/{rank}", "; ".join(faults) or "well")
    if rank == 0:
        late = set(range(world))
        while late and time.monotonic() < until:
            late = {r for r in late if not store.check([f"computed/{r}"])}
            time.sleep(_POLL_S)
        for r in sorted(late):
            where = (
                "did not finish its matrix product"
                if store.check([f"here/{r}"])
                else ("did not come")
            )
            say(r, [f"rank {r} {where} within {limit_s:.0f} s"])
        bad = [r for r in range(world) if r not in late and store.get(f"computed/{r}") != b"well"]
        store.set("go", f"not all ranks are fit: {sorted([*late, *bad])}" if late or bad else "go")
    while not store.check(["go"]):
        if time.monotonic() > until + _MARGIN_S / 2:
            faults.append("rank 0 does not answer any more")
            return faults[-1]
        time.sleep(_POLL_S)
    answer = store.get("go").decode()
    return "" if answer == "go" else answer


def add_up(store: dist.Store, rank: int, world: int, device: torch.device, limit_s: float) -> list:
    """Faults of a sum over all ranks."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("sum", store),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=limit_s),
        )
        value = torch.full((_SENT,), float(rank), device=device)
        dist.all_reduce(value)
        right = world * (world - 1) / 2
        return [] if bool((value == right).all()) else ["a sum over all ranks is wrong"]
    except RuntimeError as error:
        return [f"a sum over all ranks failed: {str(error).splitlines()[0]}"]


def open_store(rank: int, world: int, limit_s: float) -> dist.Store:
    """Where the ranks meet: rank 0's, or that of torchrun's agent."""
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world,
        is_master=rank == 0 and not of_agent,
        timeout=timedelta(seconds=limit_s),
        wait_for_workers=False,
    )


def check(rank: int, world: int, local_rank: int, limit_s: float) -> list[str]:
    """Faults of this rank; others' are said by rank 0."""
    try:
        store = open_store(rank, world, limit_s)
    except (RuntimeError, OSError) as error:
        return [f"rank {rank} cannot reach rank 0: {str(error).splitlines()[0]}"]
    store.set(f"here/{rank}", "")
    try:
        device = choose_device(rank, local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        faults = compute(device)
    except RuntimeError as error:
        device, faults = torch.device("cpu"), [str(error).splitlines()[0]]
    if world == 1:
        return faults
    if not meet(store, rank, world, faults, limit_s):
        faults += add_up(store, rank, world, device, limit_s)
    if rank == 0:  # its store goes with it
        time.sleep(1.0)
    return faults


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 0 whatever is found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--limit-s", type=float, default=60.0, help="for each part (default 60)")
    options, _ = parser.parse_known_args(argv)  # deepspeed adds --local_rank
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        rank, world, local_rank, _ = read_ranks(os.environ)
    except LaunchError as error:
        say(int(os.environ.get("SLURM_PROCID", "0")), [str(error)], node)
        return 0

    def end() -> None:
        say(rank, [f"rank {rank} hangs: no end after {3 * options.limit_s:.0f} s"], node)
        os._exit(0)

    timer = threading.Timer(3 * options.limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        say(rank, check(rank, world, local_rank, options.limit_s), node)
    finally:
        timer.cancel()  # who called this goes on
    return 0


if __name__ == "__main__":
    main()
    os._exit(0)  # threads of torch that outlive their group may abort an exit

"""One rank of training steps under torch's switch, with all memory that is not written yet filled
with not-a-numbers, against the same steps without.

Usage: python -m tests.distributed.determinism_worker OUT_DIR CELL...   (under ranks' environment)
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.engine.launch.determinism import be_deterministic
from pretrain.engine.launch.distributed import init_distributed, leave, shutdown
from tests.distributed.elastic_worker import Run, same
from tests.nondeterministic_operators import watched_order

STEPS = 4
CELLS = [(stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16")]
FAST = [(1, "bf16"), (3, "fp32")]


def cell_name(cell: tuple[int, str]) -> str:
    return f"zero{cell[0]}-{cell[1]}"


def trained(ranks, stage: int, precision: str) -> dict[str, torch.Tensor]:
    """Losses, and weights, averages and moments after some steps."""
    run = Run(ranks, stage, precision)
    losses = run.train(0, STEPS)
    tensors = run.tensors() | {"losses": torch.tensor(losses)}
    run.close()
    return tensors


def cell(ranks, stage: int, precision: str) -> dict:
    plain = trained(ranks, stage, precision)
    be_deterministic(on_gpu=False)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    try:
        with watched_order() as found:
            fixed = trained(ranks, stage, precision)
    finally:
        torch.use_deterministic_algorithms(False)
    return {
        "same": same(plain, fixed),
        "found": sorted(found),
        "filled": filled,
        "tensors": len(plain),
        "finite": all(t.isfinite().all().item() for t in plain.values()),
    }


def main() -> None:
    ranks = init_distributed(threads_per_rank=1)
    asked = [one for one in CELLS if cell_name(one) in sys.argv[2:]]
    results = [cell(ranks, *one) for one in asked]
    everyone: list = [None] * ranks.world
    dist.all_gather_object(everyone, results)
    if ranks.leads:
        found = {cell_name(one): [r[i] for r in everyone] for i, one in enumerate(asked)}
        Path(sys.argv[1], "cells.json").write_text(json.dumps(found), encoding="utf-8")
    shutdown()


if __name__ == "__main__":
    main()
    leave(0)

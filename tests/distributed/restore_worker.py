"""One rank of the checkpoint cells: save, restore into a fresh engine, go on; every ZeRO stage.

Usage: python -m tests.distributed.restore_worker write|read DIR
`write` trains 6 steps per stage with a checkpoint after 3, restores that one and repeats the last
3 steps; `read` restores the checkpoints of `write` (maybe of another world) into every stage.
"""

import gc
import json
import os
import resource
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.engine.checkpoint import checkpoint
from pretrain.engine.checkpoint.background_save import BackgroundCheckpoints
from pretrain.engine.checkpoint.checkpoint import CheckpointError, Checkpoints, CheckpointSettings
from pretrain.engine.checkpoint.contents import write_contents
from pretrain.engine.launch.distributed import init_distributed, leave, shutdown
from pretrain.engine.zero.partitions import gathered
from pretrain.engine.zero.zero import accumulate_and_step, set_learning_rate, start_engine
from tests.distributed.engines import ADAMW, SEED, deepspeed_config
from tests.distributed.toy import share_of, toy_batch, toy_model
from tools.selfcheck.parity_cells import gathered_partitions

CELLS = [(stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16")]
HALF, ALL = 3, 6


def fresh_engine(ranks, stage: int, precision: str, seed: int = SEED):
    return start_engine(
        toy_model, ADAMW, deepspeed_config(stage, precision, ADAMW), seed, ranks.device
    )


def train(engine, ranks, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        batch = toy_batch(step)
        set_learning_rate(engine, ADAMW.lr, 1.0 / (1 + step))
        total = {"images": batch["valid"].sum().float()}
        shares = accumulate_and_step(
            engine, "words", share_of(batch, ranks.rank, ranks.world, 1), total
        )
        loss = shares["loss"].double()
        dist.all_reduce(loss)
        losses.append(loss.item())
    return losses


def weights(engine) -> dict[str, list[float]]:
    masters = gathered_partitions(engine, lambda p: p.master)
    return {name: values.tolist() for name, values in masters.items()}


def module_weights(engine) -> dict[str, list[float]]:
    """What the forward pass uses, frozen parameters too."""
    out = {}
    for name, parameter in engine.module.named_parameters():
        with gathered([parameter]):
            out[name] = parameter.detach().float().flatten().tolist()
    return out


def write_cell(ranks, folder: Path, stage: int, precision: str) -> dict:
    store = Checkpoints(folder / f"zero{stage}_{precision}", CheckpointSettings(keep_last=1))
    engine = fresh_engine(ranks, stage, precision)
    before = train(engine, ranks, 0, HALF)
    trainer = {"ledger": [{"note": "kept"}]}
    store.save(engine, HALF, trainer)
    background = BackgroundCheckpoints(
        folder / f"background_zero{stage}_{precision}", store.settings, device=ranks.device
    )
    background.begin(engine, HALF, trainer)
    trainer["ledger"].clear()
    straight = train(engine, ranks, HALF, ALL)
    background.settle()
    same_files = files_of(background.newest()) == files_of(store.newest())
    background.close()
    ended, module = weights(engine), module_weights(engine)
    engine.destroy()
    again = fresh_engine(ranks, stage, precision, seed=SEED + 1)  # so all of it must come back
    restored = store.restore(again, store.newest())
    resumed = train(again, ranks, restored.step, ALL)
    result = {
        "before": before,
        "straight": straight,
        "resumed": resumed,
        "trainer": restored.trainer,
        "same_files": same_files,
        "same_weights": weights(again) == ended,
        "same_module": module_weights(again) == module,
        "weights": ended,
    }
    again.destroy()
    gc.collect()
    return result


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def read_cell(ranks, folder: Path, source: str, stage: int, precision: str) -> dict:
    store = Checkpoints(folder / source, CheckpointSettings())
    engine = fresh_engine(ranks, stage, precision, seed=SEED + 1)
    restored = store.restore(engine, store.newest())
    result = {"resumed": train(engine, ranks, restored.step, ALL), "weights": weights(engine)}
    engine.destroy()
    gc.collect()
    return result


def fault_cell(ranks, folder: Path) -> dict:
    """What happens when a save goes wrong, and when checkpoints are damaged afterwards."""
    root = folder / "faults"
    settings = CheckpointSettings(keep_last=2, keep_every_steps=4)
    store = Checkpoints(root, settings)
    engine = fresh_engine(ranks, 2, "fp32")
    train(engine, ranks, 0, 1)
    for step in range(1, 8):
        store.save(engine, step, {})
    kept = sorted(p.name for p in root.glob("step_*"))

    def broken_write(*arguments):
        """The system's own refusal: no file may be longer than the first bytes of a header."""
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, most))
        try:
            return write_contents(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    result = {"kept": kept, "latest": (root / "latest").read_text().strip()}
    if ranks.rank == 1:
        checkpoint.write_contents = broken_write
    result["full_disk"] = error_of(lambda: store.save(engine, 8, {}))
    checkpoint.write_contents = write_contents
    result |= background_faults(
        ranks, BackgroundCheckpoints(root, settings, device=ranks.device), engine
    )
    owner_gone = Checkpoints(root, settings, may_commit=disowned)
    result["disowned"] = error_of(lambda: owner_gone.save(engine, 9, {}))
    result["left_behind"] = sorted(p.name for p in root.iterdir())

    def damage(name: str) -> None:
        dist.barrier()
        if ranks.leads:
            path = root / name / "rank_00001.safetensors"
            data = bytearray(path.read_bytes())
            data[-5] ^= 64
            path.write_bytes(data)
        dist.barrier()

    store = Checkpoints(root, settings)
    damage("step_000000007")
    result["after_one"] = store.newest().name
    store.save(engine, 7, {})  # the same step again: the damaged folder is replaced
    result["replaced"] = store.newest().name
    for name in ("step_000000004", "step_000000006", "step_000000007"):
        damage(name)
    result["after_all"] = error_of(store.newest)
    result["empty"] = Checkpoints(folder / "nothing", settings).newest()
    gone = folder / "gone"
    if ranks.leads:
        gone.mkdir()
        (gone / "latest").write_text("step_000000007\n")
    result["gone"] = error_of(Checkpoints(gone, settings).newest)
    engine.destroy()
    return result


def background_faults(ranks, store: BackgroundCheckpoints, engine) -> dict[str, str]:
    """The same, and worse, in the process that writes while training goes on."""

    def trouble(step: int, action) -> str:
        store.begin(engine, step, {})
        if ranks.rank == 1:
            action(store._part._writer.pid)
        return error_of(store.settle)

    def no_room(pid: int) -> None:
        """As if it had been so before the writer was told to write."""
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        store._part.result()
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100, most))
        contents = store._contents(engine, {}, None, None)
        store._part.start(contents, store._saving.temporary)

    faults = {"full_disk_behind": trouble(8, no_room)}
    store.close()
    faults["killed_behind"] = trouble(8, lambda pid: os.kill(pid, signal.SIGKILL))
    store._part._limit_s = -1.0
    faults["late_behind"] = trouble(8, lambda pid: os.kill(pid, signal.SIGSTOP))
    store.close()
    return faults


def disowned() -> None:
    raise RuntimeError("another job owns this run")


def error_of(action) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return "no error"


def main() -> None:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    ranks = init_distributed(threads_per_rank=1)
    if mode == "write":
        results = {f"zero{s}_{p}": write_cell(ranks, folder, s, p) for s, p in CELLS}
        results["faults"] = fault_cell(ranks, folder)
    else:
        results = {
            f"zero{a}_fp32 -> zero{b}": read_cell(ranks, folder, f"zero{a}_fp32", b, "fp32")
            for a in (1, 2, 3)
            for b in (1, 2, 3)
        }
    if ranks.leads:
        (folder / f"{mode}_world{ranks.world}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    shutdown()


if __name__ == "__main__":
    main()
    leave(0)

"""The cells of the parity matrix: DeepSpeed in one mode against plain PyTorch on one process.

    python -m tools.selfcheck.parity_cells OUT_DIR CELL... [--no-guard CELL...]     (one rank of
    several)

Runs the named cells one after the other in one process group (starting one is what costs) and
writes OUT_DIR/cells.json and a safetensors file per cell on rank 0. `faults` compares them with the
reference: fp32, one process, the whole batch, a missing gradient counted as zero. Cells behind
--no-guard show what DeepSpeed does by itself; their results are in OUT_DIR/no_guard.

Every cell trains with a module that runs twice in one backward pass under non-reentrant
checkpointing, with parameters that `optimizer.frozen` names, and with one that gets no gradient in
a window's first micro-step; it fails too where weights stay whole after a step, where DeepSpeed
has written into the dicts that it was given, and where a frozen parameter has moved or has a place
in the optimizer. Cells of "reentrant" pass if that way of checkpointing is refused.
"""

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from pretrain.models.init import initialise
from pretrain.optim.groups import OptimizerSettings, parameter_groups
from tools.selfcheck.parity_model import TASKS, parity_batch, parity_model, share_of

STEPS = 20
SEED = 5
FROZEN = ("encoders.still.*", "objectives.*.output.bias")
# Steps of linear size show a wrong gradient at full size; Adam's hide its scale.
OPTIMIZERS = {
    "sgd": OptimizerSettings(kind="sgd", lr=0.5, weight_decay=0.0, clip_norm=None, frozen=FROZEN),
    "adamw": OptimizerSettings(
        kind="adamw",
        lr=1e-2,
        weight_decay=0.05,
        clip_norm=0.5,
        lr_multipliers={"objectives.*": 2.0},
        frozen=FROZEN,
    ),
}
TOLERANCE = 1e-6
# Adam turns the rounding of a small gradient into a step, so its weights agree less closely.
WEIGHT_TOLERANCE = {"sgd": 1e-6, "adamw": 1e-4}


@dataclass(frozen=True)
class Cell:
    """One mode. `tasks`: "one", "all" in turn, "mixed": all in every step, or "reentrant", which
    has to be refused; `micro_steps` of a task in an optimizer step."""

    stage: int
    offload: bool
    micro_steps: int
    tasks: str
    optimizer: str
    precision: str = "fp32"

    @property
    def name(self) -> str:
        offload = "offload" if self.offload else "device"
        return (
            f"zero{self.stage}-{offload}-micro{self.micro_steps}-{self.tasks}-"
            f"{self.optimizer}-{self.precision}"
        )

    @classmethod
    def parse(cls, name: str) -> "Cell":
        stage, offload, micro, *rest = name.split("-")
        return cls(int(stage[-1]), offload == "offload", int(micro[5:]), *rest)

    def parts(self, step: int) -> dict[str, float]:
        """Tasks of a step and the weights of their losses."""
        if self.tasks == "mixed":
            return dict(zip(TASKS, (0.5, 0.2, 0.3), strict=True))
        # An uneven turn, so that heads rest for one step, and for several.
        turn = 0 if self.tasks == "one" else (0, 1, 1, 2, 0, 2, 1)[step % 7]
        return {TASKS[turn]: 1.0}


def all_cells() -> list[Cell]:
    """The fp32 matrix, mixed steps (which offload cannot do), what is refused, and bf16."""
    matrix = [
        Cell(stage, offload, micro, tasks, optimizer)
        for stage in (1, 2, 3)
        for offload in (False, True)
        for micro in (1, 3)
        for tasks in ("one", "all")
        for optimizer in OPTIMIZERS
    ]
    mixed = [Cell(stage, False, 1, "mixed", o) for stage in (1, 2, 3) for o in OPTIMIZERS]
    refused = [Cell(stage, False, 1, "reentrant", "sgd") for stage in (1, 2, 3)]
    return (
        matrix
        + mixed
        + refused
        + [
            Cell(stage, offload, 1, "all", "adamw", "bf16")
            for stage in (1, 2, 3)
            for offload in (False, True)
        ]
    )


def telling_cells() -> list[Cell]:
    """Of `all_cells`, those that imply the others: every mode with several micro-steps and with one
    optimizer each, and one refusal."""
    return [
        cell
        for cell in all_cells()
        if cell.precision == "bf16"
        or cell == Cell(3, False, 1, "reentrant", "sgd")
        or (cell.tasks, cell.optimizer, cell.micro_steps)
        in (("all", "sgd", 3), ("all", "adamw", 1), ("mixed", "sgd", 1))
    ]


def engine_settings(cell: Cell) -> dict:
    """The DeepSpeed configuration of a cell."""
    zero: dict = {"stage": cell.stage, "stage3_param_persistence_threshold": 20}
    if cell.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if cell.stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": cell.micro_steps,
        "gradient_clipping": OPTIMIZERS[cell.optimizer].clip_norm or 0.0,
        "bf16": {"enabled": cell.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


# ---- one rank ------------------------------------------------------------------------------------


def gathered_partitions(engine, pick) -> dict[str, torch.Tensor]:
    """Whole flat tensors by parameter name from every rank's partitions, on every rank.

    pick: Partition -> the flat tensor to take, laid out like its master.
    """
    from pretrain.engine.zero.partitions import list_partitions

    pieces = [
        (f.parameter, f.start, pick(p)[f.offset : f.offset + f.numel].detach().clone())
        for p in list_partitions(engine)
        for f in p.fragments
    ]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, pieces)
    merged: dict[str, list] = {}
    for name, start, values in (piece for rank in everyone for piece in rank):
        merged.setdefault(name, []).append((start, values))
    return {
        name: torch.cat([v for _, v in sorted(parts, key=lambda p: p[0])])
        for name, parts in merged.items()
    }


def note_gradients(engine) -> Callable[[], dict[str, torch.Tensor]]:
    """From now on keep the gradients that the optimizer is given.

    The function that comes back gives those of the last step, as `gathered_partitions` does.
    """
    flat: dict[int, torch.Tensor] = {}

    def note(inner, *_) -> None:
        for group in inner.param_groups:
            for parameter in group["params"]:
                flat[id(parameter)] = parameter.grad.clone()

    engine.optimizer.optimizer.register_step_pre_hook(note)
    return lambda: gathered_partitions(engine, lambda p: flat[id(p.master)])


def whole_parameters(engine) -> list[str]:
    """Names of the parameters that ZeRO-3 keeps whole between steps, without those that stay."""
    return [
        name
        for name, p in engine.module.named_parameters()
        if hasattr(p, "ds_id") and p.ds_status.name == "AVAILABLE" and not p.ds_persist
    ]


def frozen_weights(engine) -> dict[str, torch.Tensor]:
    """What the module holds of the parameters that are not trained, by name, flat float32."""
    from pretrain.engine.zero.partitions import gathered

    found = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            with gathered([parameter]):
                found[name] = parameter.detach().flatten().float().clone()
    return found


def refusal(ranks, cell: Cell) -> dict[str, str]:
    """What a step with reentrant checkpointing is answered; nothing if it is accepted."""
    from pretrain.engine.zero.backward import UnsafeGraph
    from pretrain.engine.zero.zero import accumulate_and_step, start_engine

    settings = OPTIMIZERS[cell.optimizer]
    engine = start_engine(
        partial(parity_model, reentrant=True), settings, engine_settings(cell), SEED, ranks.device
    )
    batch = parity_batch(0)
    micro = share_of(batch, ranks.rank, ranks.world, cell.micro_steps)
    answer = ""
    try:
        accumulate_and_step(engine, TASKS[0], micro, {"images": batch["valid"].sum().float()})
    except UnsafeGraph as error:
        answer = str(error)
    engine.destroy()
    gc.collect()
    return {"refused": answer}


def run_cell(ranks, cell: Cell, out: Path) -> dict[str, list]:
    """Train STEPS steps; losses, gradient norms and what went wrong; all tensors into a file."""
    from pretrain.engine.zero.zero import (
        TaskWindow,
        accumulate_parts,
        set_learning_rate,
        start_engine,
    )

    if cell.tasks == "reentrant":
        return refusal(ranks, cell)
    settings = OPTIMIZERS[cell.optimizer]
    engine = start_engine(parity_model, settings, engine_settings(cell), SEED, ranks.device)
    wrong: list[str] = []
    start = frozen_weights(engine)
    gradients = note_gradients(engine)
    saved: dict[str, torch.Tensor] = {}
    losses, norms = [], []
    for step in range(STEPS):
        batch = parity_batch(step)
        micro = share_of(batch, ranks.rank, ranks.world, cell.micro_steps)
        set_learning_rate(engine, settings.lr, 1.0)
        totals = {"images": batch["valid"].sum().float()}
        parts = cell.parts(step)
        given = [dict(mapping) for mapping in (*micro, totals)]
        shares = accumulate_parts(
            engine, [TaskWindow(task, micro, totals, weight) for task, weight in parts.items()]
        )
        for mapping, before in zip((*micro, totals), given, strict=True):
            wrong += [
                f"step {step}: {name} was replaced in a dict that the model was given"
                for name in before
                if mapping[name] is not before[name]
            ]
        wrong += [f"step {step}: {name} stays whole after it" for name in whole_parameters(engine)]
        loss = sum(shares[task]["loss"].double() * weight for task, weight in parts.items())
        dist.all_reduce(loss)
        losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm()))
        saved |= {f"gradient{step}.{n}": t.float() for n, t in gradients().items()}
    saved |= {f"end.{n}": t for n, t in gathered_partitions(engine, lambda p: p.master).items()}
    for name, weight in frozen_weights(engine).items():
        if f"end.{name}" in saved:
            wrong.append(f"{name} is frozen, but the optimizer has it")
        if not torch.equal(weight, start[name]):
            wrong.append(f"{name} is frozen, but has moved")
        saved[f"still.{name}"] = weight
    if ranks.leads:
        save_file(saved, out / f"{cell.name}.safetensors")
    engine.destroy()
    gc.collect()
    return {"losses": losses, "norms": norms, "wrong": wrong}


def main() -> None:
    """Run the cells named on the command line on this rank."""
    from pretrain.engine.launch.distributed import init_distributed, shutdown
    from pretrain.engine.zero import zero

    out, *names = sys.argv[1:]
    here = names.index("--no-guard") if "--no-guard" in names else len(names)
    ranks = init_distributed(threads_per_rank=1)
    run_cells(ranks, names[:here], Path(out))
    if names[here + 1 :]:
        zero.clear_gradients = lambda engine: None
        run_cells(ranks, names[here + 1 :], Path(out) / "no_guard")
    shutdown()


def run_cells(ranks, names: list[str], out: Path) -> None:
    """Run cells by name, and write their results into a folder."""
    if ranks.leads:
        out.mkdir(exist_ok=True)
    results = {name: run_cell(ranks, Cell.parse(name), out) for name in names}
    if ranks.leads:
        (out / "cells.json").write_text(json.dumps(results), encoding="utf-8")


# ---- the reference -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What plain PyTorch gives."""

    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, torch.Tensor]]
    weights: dict[str, torch.Tensor]
    frozen: dict[str, torch.Tensor]


def plain_run(tasks: str, optimizer: str) -> Reference:
    """Train on one process with the whole batch, without DeepSpeed."""
    from pretrain.engine.zero.zero import make_optimizer

    settings = OPTIMIZERS[optimizer]
    turn = Cell(1, False, 1, tasks, optimizer)
    model = parity_model()
    initialise(model, SEED)
    # What `optimizer.frozen` means, in plain PyTorch.
    model.encoders["still"].requires_grad_(False).eval()
    for head in model.objectives.values():
        head.output.bias.requires_grad_(False)
    settings = settings.model_copy(update={"frozen": ()})
    groups = parameter_groups(model, settings)
    torch_optimizer = make_optimizer(groups, settings)
    names = {id(p): n for n, p in model.named_parameters()}
    trained = [p for group in groups for p in group["params"]]
    losses, norms, gradients = [], [], []
    for step in range(STEPS):
        batch = parity_batch(step)
        totals = {"images": batch["valid"].sum().float()}
        loss = sum(
            model(task, "undivided", batch, totals)["loss"] * weight
            for task, weight in turn.parts(step).items()
        )
        torch_optimizer.zero_grad()
        loss.backward()
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        if settings.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(trained, settings.clip_norm, norm)
        gradients.append({names[id(p)]: p.grad.flatten().clone() for p in trained})
        torch_optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    weights = {n: p.detach().flatten() for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p.detach().flatten() for n, p in model.named_parameters() if not p.requires_grad}
    return Reference(losses, norms, gradients, weights, frozen)


def faults(cell: Cell, out: Path, reference: Reference | None) -> list[str]:
    """Where an fp32 cell differs from the reference; empty if it does not. A "reentrant" cell has
    none."""
    mine = json.loads((out / "cells.json").read_text(encoding="utf-8"))[cell.name]
    if cell.tasks == "reentrant":
        return [] if "use_reentrant=False" in mine["refused"] else ["it was not refused"]
    tensors = load_file(out / f"{cell.name}.safetensors")
    found = list(mine["wrong"])
    kept = {name.removeprefix("still."): t for name, t in tensors.items() if name[:6] == "still."}
    if kept.keys() != reference.frozen.keys():
        found.append(f"frozen are {sorted(kept)}, not {sorted(reference.frozen)}")
    found += [
        f"{name} is frozen, and not what the seed gives"
        for name in kept.keys() & reference.frozen.keys()
        if not torch.equal(kept[name], reference.frozen[name])
    ]
    for what, tolerance in (("losses", TOLERANCE), ("norms", 1e-5)):
        pairs = zip(mine[what], getattr(reference, what), strict=True)
        for step, (ours, theirs) in enumerate(pairs):
            if abs(ours - theirs) > tolerance * max(1.0, abs(theirs)):
                found.append(f"step {step}: {what} {ours:.8g}, plain PyTorch {theirs:.8g}")
    for step, gradients in enumerate(reference.gradients):
        for name, gradient in gradients.items():
            error = float((tensors[f"gradient{step}.{name}"] - gradient).abs().max())
            if error > TOLERANCE:
                found.append(f"step {step}: gradient of {name} is off by {error:.2g}")
    for name, weight in reference.weights.items():
        error = float((tensors[f"end.{name}"] - weight).abs().max())
        if error > WEIGHT_TOLERANCE[cell.optimizer]:
            found.append(f"after {STEPS} steps {name} is off by {error:.2g}")
    return found


if __name__ == "__main__":
    from pretrain.engine.launch.distributed import leave

    main()
    leave(0)

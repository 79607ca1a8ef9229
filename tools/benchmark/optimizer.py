"""One step of MT-AdamW against torch's AdamW, on flat float32 tensors as ZeRO gives them.

Time is per element; temporary memory is what a step takes above weights, gradients and moments, in
a process of its own (on CUDA: by the allocator's own count). What the loop does besides is listed
too: the moving average after each step, and the update RMS on reported ones.
"""

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from pretrain.optim.mt_adamw import MTAdamW
from pretrain.optim.update_size import sum_of_squared_steps
from tools.support.measure import (
    Measurement,
    in_fresh_process,
    interleaved,
    peak_rise_mib,
    ratio,
    say,
)

OURS, FUSED, FOREACH = "MT-AdamW", "torch AdamW, fused", "torch AdamW, foreach"
CLIPPED = "torch AdamW, fused, after clipping"
AVERAGE, SIZE = "moving average", "update RMS (reported steps)"
_BETAS, _TASKS = (0.9, 0.95), (("a", 0.75), ("b", 0.25))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; see `tools.benchmark` for the form of the result."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    names = (OURS, FUSED, CLIPPED, FOREACH, AVERAGE, SIZE)
    times = interleaved({n: _timed(args, _case(args, n)) for n in names}, args.repeats, _quiet)
    say("temporary memory, each case in a process of its own")
    memory = {name: _peak(args, name) for name in names}
    count = args.elements * args.tensors
    return {
        "title": f"One optimizer step on {args.tensors} x {args.elements:,} float32 elements "
        f"({args.device}, threads: {args.threads})",
        "rows": [
            {
                "case": name,
                "ns per element": 1e9 * median(_seconds(times[name])),
                "temporary MiB": memory[name],
                "bytes per element": None if memory[name] is None else memory[name] * 2**20 / count,
            }
            for name in names
        ],
        "bars": _bars(times, memory),
        "notes": [
            "foreach is what torch's AdamW takes by default on a GPU; on a CPU it is a loop",
            "clipping is the product that DeepSpeed takes before each step; MT-AdamW has its "
            "normalisation inside the step instead",
        ],
    }


def _bars(times: dict[str, list[Measurement]], memory: dict[str, float | None]) -> list[dict]:
    bars = [
        {
            "what": f"speed of MT-AdamW, as a multiple of {name}",
            "at_least": True,
            "measured": ratio(times[OURS], times[name]),
            "bar": bar,
        }
        for name, bar in ((CLIPPED, 0.9), (FOREACH, 1.0))
    ]
    if memory[OURS] is not None:
        bars.append(
            {
                "what": "temporary MiB of MT-AdamW above that of torch AdamW, fused",
                "measured": memory[OURS] - memory[FUSED],
                "bar": 1.0,
                "at_least": False,
            }
        )
    return bars


def _quiet(_: str) -> None:
    pass


def _seconds(measurements: list[Measurement]) -> list[float]:
    return [m.wall_seconds / m.items for m in measurements]


def _timed(args: argparse.Namespace, step: Callable[[], None]) -> Callable[[], float]:
    def case() -> float:
        step()
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        return args.elements * args.tensors

    return case


def _case(args: argparse.Namespace, name: str) -> Callable[[], None]:
    """One step of a case; its tensors live as long as the function."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.elements,)
    weights = [torch.randn(shape, generator=generator).to(args.device) for _ in range(args.tensors)]
    if name == AVERAGE:
        averages = [w.clone() for w in weights]
        return lambda: torch._foreach_lerp_(averages, weights, 0.001)
    for weight in weights:
        weight.grad = torch.randn(shape, generator=generator).to(args.device)
    groups = [{"params": [weight], "lr": 1e-4} for weight in weights]
    if name in (OURS, SIZE):
        return _ours(groups, name)
    kind = {"foreach": True} if name == FOREACH else {"fused": True}
    step = torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.05, **kind).step
    return step if name != CLIPPED else lambda: _clip_and(step, weights)


def _clip_and(step: Callable[[], None], weights: list[torch.Tensor]) -> None:
    for weight in weights:
        weight.grad.mul_(1.0)  # any factor takes as long
    step()


def _ours(groups: list[dict], name: str) -> Callable[[], None]:
    optimizer = MTAdamW(groups, betas=_BETAS, weight_decay=0.05)
    steps = 0

    def step() -> None:
        nonlocal steps
        task, share = _TASKS[steps % 2]
        steps += 1
        optimizer.begin_step(task, share)
        # A gradient scale of one: the same gradients serve every repetition.
        optimizer.gradient_norm = 1.0 / share
        optimizer.step()

    def size() -> None:
        for group in optimizer.param_groups:
            float(sum_of_squared_steps(optimizer, group, optimizer.state[group["params"][0]]))

    if name == OURS:
        return step
    step()
    return size


def _peak(args: argparse.Namespace, name: str) -> float | None:
    if not args.device.startswith("cuda"):
        return in_fresh_process(_peak_here, args, name)
    step = _case(args, name)
    step()  # the moments exist from here on
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _peak_here(args: argparse.Namespace, name: str) -> float | None:
    torch.set_num_threads(args.threads)
    step = _case(args, name)
    step()
    return peak_rise_mib(step)

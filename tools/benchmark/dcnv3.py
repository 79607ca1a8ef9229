"""DCNv3 on the CPU against the formulation with `grid_sample` that the official code falls back to.

The peer pads the values, makes a grid of all sampling places and sums over the samples that
`grid_sample` returns. It samples in float32, as autocast makes it do: bfloat16 tensors are cast on
the way. All cases of one number of threads take turns; a bar is that of the slowest of its cases.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.operators import cpu_library
from pretrain.models.operators.dcnv3 import dcnv3
from tools.support.measure import (
    Measurement,
    in_fresh_process,
    interleaved,
    peak_rise_mib,
    ratio,
    repeated,
    say,
)

SHAPES = ((2, 56, 56, 64), (2, 28, 28, 128), (2, 14, 14, 256))
OURS, PEER = "ours", "grid_sample"
FORWARD, BOTH = "forward", "both ways"
_POINTS = 9
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class _Case(NamedTuple):
    shape: tuple[int, int, int, int]
    depth: int
    """Channels of a group."""
    type: str
    what: str
    threads: int

    @property
    def elements(self) -> int:
        n, height, width, channels = self.shape
        return n * height * width * channels


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape[1:]))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; see `tools.benchmark` for the form of the result."""
    obstacle = cpu_library.missing()
    if obstacle is not None:
        raise SystemExit(f"no C++ operators to measure: {obstacle}")
    rows, ratios, difference = [], {}, 0.0
    for done, threads in enumerate(args.threads):
        say(f"threads: {threads}; preparing the cases")
        torch.set_num_threads(threads)
        speed = _machine_speed()
        cases = list(_cases(args, threads))
        difference = max(difference, *(_difference(case) for case in cases if case.what == FORWARD))
        steps = {
            (case, who): repeated(_step(case, who), case.elements)
            for case in cases
            for who in (OURS, PEER)
        }
        times = interleaved(steps, args.repeats, sharers=len(args.threads) - done)
        for case in cases:
            ours, peer = times[case, OURS], times[case, PEER]
            rows.append(_row(case, ours, peer, speed))
            ratios.setdefault((case.threads, case.shape, case.what), []).append(ratio(ours, peer))
    say("peak memory, each case in a process of its own")
    memory = list(_memory(args))
    bars = [
        {
            "what": f"times as fast as {PEER}: {what}, {_text(shape)}, threads: {threads}",
            "measured": min(measured),
            "bar": 4.0,
            "at_least": True,
        }
        for (threads, shape, what), measured in ratios.items()
    ] + [
        {
            "what": f"peak memory in sizes of the results: {case.what}, {case.type}",
            "bar": 1.5,
            "measured": rise,
            "at_least": False,
        }
        for case, who, rise in memory
        if who == OURS
    ]
    peers = ", ".join(
        f"{rise:.1f} ({case.what}, {case.type})" for case, who, rise in memory if who == PEER
    )
    return {
        "title": f"DCNv3 on the CPU, {SHAPES[0][0]} images, 3x3 points, offsets of one pixel",
        "rows": rows,
        "bars": bars,
        "notes": [
            f"peak memory of {PEER}, in sizes of the results: {peers}",
            f"largest difference between the two outputs in float32: {difference:.1e}",
            "ns, peer: nanoseconds for an element of the output; group: channels of one",
            "bytes, flops: floors in the same unit. Each tensor touched once at the speed of a "
            "large copy; multiplications and additions at that of a large float32 product",
        ],
    }


def grid_sample_dcnv3(value: Tensor, offset: Tensor, mask: Tensor, groups: int) -> Tensor:
    """The peer: DCNv3 with 3x3 points, stride 1 and pad 1; tensors as `dcnv3` takes them."""
    n, height, width, channels = value.shape
    device = value.device
    padded = F.pad(value.float(), (0, 0, 1, 1, 1, 1))
    size = torch.tensor([width + 2.0, height + 2.0], device=device)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    center = torch.stack([x, y], dim=-1).to(device).view(1, height * width, 1, 1, 2) + 1.5
    step_x, step_y = torch.meshgrid(torch.arange(-1, 2), torch.arange(-1, 2), indexing="ij")
    steps = torch.stack([step_x, step_y], dim=-1).to(device).view(1, 1, 1, _POINTS, 2)
    places = center + steps + offset.float().view(n, height * width, groups, _POINTS, 2)
    grid = (2 * places / size - 1).transpose(1, 2).flatten(0, 1)
    maps = padded.permute(0, 3, 1, 2).reshape(n * groups, -1, height + 2, width + 2)
    samples = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    weights = mask.float().view(n, height * width, groups, _POINTS).transpose(1, 2)
    total = (samples * weights.reshape(n * groups, 1, height * width, _POINTS)).sum(-1)
    out = total.view(n, channels, height * width).transpose(1, 2)
    return out.reshape(n, height, width, channels).to(value.dtype)


def _cases(args: argparse.Namespace, threads: int) -> Iterator[_Case]:
    for n, height, width, channels in SHAPES:
        shape = (n, round(height * args.scale), round(width * args.scale), channels)
        for depth in args.depths:
            for name in args.types:
                for what in (FORWARD, BOTH):
                    yield _Case(shape, depth, name, what, threads)


def _inputs(case: _Case) -> list[Tensor]:
    n, height, width, channels = case.shape
    generator = torch.Generator().manual_seed(0)
    points = channels // case.depth * _POINTS
    value, offset, mask = (
        torch.randn(n, height, width, size, generator=generator)
        for size in (channels, 2 * points, points)
    )
    mask = mask.view(n, height, width, -1, _POINTS).softmax(-1).flatten(3)
    return [tensor.to(_TYPES[case.type]) for tensor in (value, offset, mask)]


def _call(case: _Case, who: str, inputs: list[Tensor]) -> Tensor:
    groups = case.shape[-1] // case.depth
    if who == OURS:
        return dcnv3(*inputs, groups=groups, backend="cpp")
    return grid_sample_dcnv3(*inputs, groups)


def _difference(case: _Case) -> float:
    inputs = [tensor.float() for tensor in _inputs(case)]
    return float((_call(case, OURS, inputs) - _call(case, PEER, inputs)).abs().max())


def _step(case: _Case, who: str) -> Callable[[], None]:
    inputs = [tensor.requires_grad_(case.what == BOTH) for tensor in _inputs(case)]
    upstream = torch.ones(case.shape, dtype=inputs[0].dtype)

    def step() -> None:
        output = _call(case, who, inputs)
        if case.what == BOTH:
            torch.autograd.grad(output, inputs, upstream)

    return step


def _row(
    case: _Case, ours: list[Measurement], peer: list[Measurement], speed: tuple[float, float]
) -> dict[str, Any]:
    seconds = [median(m.wall_seconds / m.items for m in times) for times in (ours, peer)]
    moved, computed = _work(case)
    return {
        "image": _text(case.shape),
        "group": case.depth,
        "type": case.type,
        "threads": case.threads,
        "pass": case.what,
        "ns": 1e9 * seconds[0],
        "peer": 1e9 * seconds[1],
        "ratio": ratio(ours, peer),
        "bytes": 1e9 * moved / speed[0],
        "flops": 1e9 * computed / speed[1],
    }


def _work(case: _Case) -> tuple[float, float]:
    """Bytes that have to be moved, and flops, for each element of the output."""
    size = _TYPES[case.type].itemsize
    extra = 3 * _POINTS / case.depth  # elements of offset and mask
    moved, computed = size * (2 + extra), 8 * _POINTS + 20 * _POINTS / case.depth
    if case.what == BOTH:
        # Read again, with the gradient of the output; written: as much as there are inputs.
        moved += size * (3 + 2 * extra)
        computed += 16 * _POINTS + 27 * _POINTS / case.depth
    return moved, computed


def _machine_speed() -> tuple[float, float]:
    """Bytes a second of a copy, read and written, and float32 flops a second of a product."""
    source = torch.ones(2**25)
    target = torch.empty_like(source)
    square = torch.ones(1536, 1536)

    def best(action: Callable[[], Any]) -> float:
        action()
        spans = []
        for _ in range(5):
            start = time.perf_counter()
            action()
            spans.append(time.perf_counter() - start)
        return min(spans)

    return (
        2 * source.nbytes / best(lambda: target.copy_(source)),
        2 * len(square) ** 3 / best(lambda: square @ square),
    )


def _memory(args: argparse.Namespace) -> Iterator[tuple[_Case, str, float]]:
    """(case, who, peak memory as a multiple of the results); nothing where it cannot be told."""
    shape = (8, *SHAPES[0][1:])  # several images: what is kept for one should not show
    for name in args.types:
        for what in (FORWARD, BOTH):
            case = _Case(shape, 16, name, what, max(args.threads))
            for who in (OURS, PEER):
                rise = in_fresh_process(_peak_here, case, who)
                if rise is not None:
                    yield case, who, rise


def _peak_here(case: _Case, who: str) -> float | None:
    torch.set_num_threads(case.threads)
    step = _step(case, who)
    step()
    rise = peak_rise_mib(step)
    per_element = 1 + (1 + 3 * _POINTS / case.depth if case.what == BOTH else 0)
    results = per_element * case.elements * _TYPES[case.type].itemsize
    return None if rise is None else rise * 2**20 / results

"""Multi-scale deformable attention on the CPU against the implementation in transformers.

Four maps of an image of 512 pixels with strides 8 to 64, 8 heads of 32 channels, 4 points on each
map: once with a query for every pixel, as an encoder has, once with 300, as a decoder has.
"""

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from pretrain.models.operators import cpu_library
from pretrain.models.operators.ms_deform_attn import ms_deform_attn
from tools.support.measure import in_fresh_process, interleaved, peak_rise_mib, ratio, repeated, say

OURS, PEER = "ours", "transformers"
FORWARD, BOTH = "forward", "both ways"
_SIZES = [(64, 64), (32, 32), (16, 16), (8, 8)]
_PIXELS = sum(height * width for height, width in _SIZES)
_HEADS, _DEPTH, _POINTS = 8, 32, 4
_QUERIES = {"encoder": _PIXELS, "decoder": 300}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; see `tools.benchmark` for the form of the result."""
    obstacle = cpu_library.missing()
    if obstacle is not None:
        raise SystemExit(f"no C++ operators to measure: {obstacle}")
    rows, bars = [], []
    for done, threads in enumerate(args.threads):
        say(f"threads: {threads}; preparing the cases")
        torch.set_num_threads(threads)
        cases = [(name, what) for name in _QUERIES for what in (FORWARD, BOTH)]
        steps = {}
        for name, what in cases:
            items = args.images * _QUERIES[name] * _HEADS * _DEPTH
            for who in (OURS, PEER):
                steps[name, what, who] = repeated(_step(args.images, name, what, who), items)
        times = interleaved(steps, args.repeats, sharers=len(args.threads) - done)
        for name, what in cases:
            ours, peer = times[name, what, OURS], times[name, what, PEER]
            speed = ratio(ours, peer)
            nanoseconds = [1e9 * median(m.wall_seconds / m.items for m in t) for t in (ours, peer)]
            rows.append(
                {
                    "queries": name,
                    "threads": threads,
                    "pass": what,
                    "ns": nanoseconds[0],
                    "peer": nanoseconds[1],
                    "ratio": speed,
                }
            )
            bars.append(
                {
                    "what": f"times as fast as {PEER}: {what}, {name}, threads: {threads}",
                    "measured": speed,
                    "bar": 4.0,
                    "at_least": True,
                }
            )
    notes = [
        f"largest difference between the two outputs: {_difference(args.images):.1e}",
        "ns, peer: nanoseconds for an element of the output",
    ]
    say("peak memory, each side in a process of its own")
    peak, its_peak = (in_fresh_process(_peak_here, args.images, who) for who in (OURS, PEER))
    if peak is not None and its_peak is not None:
        bars.append(
            {
                "what": "peak memory in sizes of the results: encoder, both ways",
                "measured": peak,
                "bar": 1.5,
                "at_least": False,
            }
        )
        notes.append(f"peak memory of {PEER}, in sizes of the results: {its_peak:.1f}")
    return {
        "title": f"Multi-scale deformable attention on the CPU, {args.images} images, float32",
        "rows": rows,
        "bars": bars,
        "notes": notes,
    }


def _inputs(images: int, name: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (images, _QUERIES[name], _HEADS, len(_SIZES), _POINTS)
    value = torch.randn(images, _PIXELS, _HEADS, _DEPTH, generator=generator)
    # A query of the encoder looks around its own pixel, one of the decoder around some place.
    centers = torch.rand(images, shape[1], 1, 1, 1, 2, generator=generator)
    if name == "encoder":
        centers = torch.cat([_centers(*size) for size in _SIZES]).view(1, -1, 1, 1, 1, 2)
    locations = centers + 0.05 * torch.randn(*shape, 2, generator=generator)
    weights = torch.rand(shape, generator=generator).flatten(3).softmax(-1).view(shape)
    return [value, locations, weights]


def _centers(height: int, width: int) -> Tensor:
    """(x, y) of the pixels of a map, row by row, 0 to 1 from edge to edge."""
    y, x = ((torch.arange(size) + 0.5) / size for size in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).view(-1, 2)


def _call(who: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if who == OURS:
        return lambda value, places, weights: ms_deform_attn(
            value, _SIZES, places, weights, backend="cpp"
        )
    from transformers.models.deformable_detr.modeling_deformable_detr import (
        MultiScaleDeformableAttention,
    )

    theirs, sizes = MultiScaleDeformableAttention(), torch.tensor(_SIZES)
    starts = torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])
    return lambda value, places, weights: theirs(value, sizes, _SIZES, starts, places, weights, 64)


def _step(images: int, name: str, what: str, who: str) -> Callable[[], None]:
    call = _call(who)
    inputs = [tensor.requires_grad_(what == BOTH) for tensor in _inputs(images, name)]
    upstream = torch.ones(images, _QUERIES[name], _HEADS * _DEPTH)

    def step() -> None:
        output = call(*inputs)
        if what == BOTH:
            torch.autograd.grad(output, inputs, upstream)

    return step


def _difference(images: int) -> float:
    inputs = _inputs(images, "encoder")
    return float((_call(OURS)(*inputs) - _call(PEER)(*inputs)).abs().max())


def _peak_here(images: int, who: str) -> float | None:
    torch.set_num_threads(1)
    step = _step(images, "encoder", BOTH, who)
    step()
    rise = peak_rise_mib(step)
    inputs = _inputs(images, "encoder")
    results = images * _PIXELS * _HEADS * _DEPTH * 4 + sum(tensor.nbytes for tensor in inputs)
    return None if rise is None else rise * 2**20 / results

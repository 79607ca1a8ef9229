"""`python -m tools.benchmark kernels`: machine code of the Triton kernels, counted without a GPU.

A GPU has two limits that can be told from the code: it issues so many instructions a second, and
moves so many bytes. Each tensor touched once gives the floor in bytes; the instructions of a
kernel give the time that it cannot go below, even with every load at hand. Their ratio is the
share of the floor that the kernel can reach at most. Latency, caches and atomic additions come on
top: `tools.benchmark gpu` measures them. Nothing is run here.
"""

import argparse
import os
from typing import Any, NamedTuple

import torch

from pretrain.models.operators.window import Window
from tools.benchmark.gpu import BACKWARD, FORWARD, floor_bars
from tools.support.measure import say, seconds_left, shorten

MAPS, POINTS = ((28, 28), (14, 14), (7, 7), (4, 4)), 4


class Gpu(NamedTuple):
    """Figures of a data sheet: multiprocessors, highest clock in Hz, memory in bytes a second."""

    capability: int
    multiprocessors: int
    clock: float
    bandwidth: float


GPUS = {
    "H100": Gpu(90, 132, 1.98e9, 3.35e12),
    "A100": Gpu(80, 108, 1.41e9, 2.039e12),
}
# Of the data sheet's bandwidth, what copies reach by common experience; not measured here.
_COPY = 0.9
# Of both: schedulers of a multiprocessor, each of which issues one instruction a cycle; registers,
# which a warp takes in pieces; programs and warps that can reside.
_SCHEDULERS, _REGISTERS, _PIECE, _PROGRAMS, _WARPS = 4, 65536, 256, 32, 64


class Case(NamedTuple):
    """A call of an operator: what its kernels are given.

    corners: reads of a pixel an item; inner: those of one map. touched: bytes an item of all
    tensors that are read or written, forward and backward.
    """

    name: str
    module: Any
    forward: tuple[tuple, dict]
    backward: tuple[tuple, dict]
    channels: int
    corners: int
    inner: int
    touched: dict[str, float]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Count; see `tools.benchmark` for the form of the result."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 is set: kernels are interpreted, not compiled")
    try:
        import triton
    except ImportError as error:
        raise SystemExit(f"{error}: pip install triton brings the compiler") from None
    gpu = GPUS[args.gpu]
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for case in cases(dtype):
            for what in (FORWARD, BACKWARD):
                say(f"{case.name}, {dtype}, {what} ...")
                found = sorted(
                    candidates(case, what, dtype, gpu),
                    key=lambda row: (row["spilled bytes"] > 0, -row["share of the floor at most"]),
                )
                rows += found if args.all else found[:1]
                share = found[0]["share of the floor at most"]
                say(f"  at most {share:.2f} of the floor")
    spilled = max(row["spilled bytes"] for row in rows)
    bars = [
        {"what": "bytes of registers spilled", "measured": spilled, "bar": 0, "at_least": False}
    ]
    dcnv3 = [row for row in rows if row["case"].startswith("DCNv3")]
    bars += floor_bars(dcnv3, "share of the floor at most", "least share that instructions allow")
    return {
        "title": f"Machine code for one {args.gpu} (sm_{gpu.capability}); nothing was run",
        "rows": rows,
        "bars": bars,
        "notes": [
            f"compiled by Triton {triton.__version__}",
            f"floor: each tensor touched once at {_COPY:.0%} of {gpu.bandwidth / 1e12:.2f} TB/s, "
            "about what a copy reaches of the data sheet's figure",
            f"instructions: {gpu.multiprocessors} multiprocessors issue {_SCHEDULERS} a cycle at "
            f"{gpu.clock / 1e9:.2f} GHz at most",
            "best of the candidates that a first call on the GPU times (--all lists them)",
            "added / touched: bytes of atomic additions by those of the floor. They are done in "
            "the second-level cache, whose rate no data sheet gives, and are not in the share",
        ],
    }


def cases(dtype: torch.dtype) -> list[Case]:
    """Calls like those of InternImage and of Uni-Perceiver v2."""
    return [_dcnv3(16, 4, dtype), _dcnv3(32, 10, dtype), _attention(32, 8, dtype)]


def candidates(case: Case, what: str, dtype: torch.dtype, gpu: Gpu) -> list[dict[str, Any]]:
    """A row for each configuration of a kernel."""
    from pretrain.models.operators.sampling_triton import ACCESS
    from tools.benchmark.machine_code import compiled, executed

    forward = what == FORWARD
    kernel = case.module.forward_kernel if forward else case.module.backward_kernel
    arguments, settings = case.forward if forward else case.backward
    if not forward and gpu.capability < 90:
        settings = settings | {"WIDTH": 1, "PAIRS": False}  # it adds one number at a time
    rows = []
    for config in kernel.configs:
        if rows and not seconds_left():
            shorten("not every candidate of each kernel was compiled")
            break
        code = compiled(kernel, arguments, settings, config, gpu.capability)
        items = _items_of_warp(settings, config)
        # Of a corner, by a thread: reads of 16 bytes, or additions.
        accesses = case.channels * items // 32 // settings["WIDTH"]
        instructions = executed(
            code,
            f"LDG.E.{8 * ACCESS}" if forward else "RED",
            case.corners * accesses,
            case.inner * accesses,
        )
        issue = instructions / items / (gpu.multiprocessors * _SCHEDULERS * gpu.clock)
        floor = case.touched[what] / (_COPY * gpu.bandwidth)
        rows.append(
            {
                "case": case.name,
                "type": str(dtype).removeprefix("torch."),
                "pass": what,
                "span, points": f"{config.kwargs['SPAN']}, {config.kwargs['UNROLL']}",
                "registers": code.registers,
                "spilled bytes": code.spilled,
                "warps resident": resident(code.registers, code.warps),
                "instructions an item": instructions / items,
                "share of the floor at most": floor / issue,
                "added / touched": (
                    None if forward else case.corners * case.channels * 4 / case.touched[what]
                ),
            }
        )
    return rows


def resident(registers: int, warps: int) -> int:
    """Warps of programs of so many that a multiprocessor holds at a time.

    Each scheduler has its own registers, a part of the multiprocessor's.
    """
    pieces = -(-registers * 32 // _PIECE) * _PIECE
    held = _REGISTERS // _SCHEDULERS // pieces * _SCHEDULERS
    return min(held // warps, _PROGRAMS, _WARPS // warps) * warps


def _items_of_warp(settings: dict, config: Any) -> int:
    from pretrain.models.operators.sampling_triton import items_of_program

    names = {**settings, **config.kwargs}
    shape = (names[name] for name in ("BLOCK_CHANNELS", "ELEMENT", "WIDTH", "SPAN", "WARPS"))
    return items_of_program(*shape) // config.num_warps


def _dcnv3(channels: int, groups: int, dtype: torch.dtype) -> Case:
    from pretrain.models.operators import dcnv3_triton as module

    window = Window((3, 3), (1, 1), (1, 1), (1, 1), groups, 1.0, False)
    value = torch.zeros(1, 14, 14, groups * channels, dtype=dtype)
    offset = torch.zeros(1, 14, 14, 2 * window.points * groups, dtype=dtype)
    mask = torch.zeros(1, 14, 14, window.points * groups, dtype=dtype)
    out, buffer, scale = value.clone(), value.float(), torch.ones(1, dtype=torch.float64)
    sizes = module.geometry(value, out, window)
    inputs = channels + 3 * window.points
    return Case(
        f"DCNv3, {groups} groups of {channels}",
        module,
        ((value, offset, mask, out, *sizes), module.settings(value, offset, out, window)),
        (
            (out, value, offset, mask, buffer, offset.clone(), mask.clone(), scale, *sizes),
            {"FIXED": False} | module.settings(value, offset, out, window, buffer),
        ),
        channels,
        4 * window.points,
        4 * window.points,
        _touched(inputs, channels, dtype),
    )


def _attention(channels: int, heads: int, dtype: torch.dtype) -> Case:
    from pretrain.models.operators import ms_deform_attn_triton as module

    pixels = sum(height * width for height, width in MAPS)
    value = torch.zeros(1, pixels, heads, channels, dtype=dtype)
    locations = torch.zeros(1, pixels, heads, len(MAPS), POINTS, 2, dtype=dtype)
    weights = locations[..., 0].contiguous()
    out = torch.zeros(1, pixels, heads * channels, dtype=dtype)
    buffer, scale = value.float(), torch.ones(1, dtype=torch.float64)
    heights, widths = zip(*MAPS, strict=True)
    sizes = module.geometry(value, pixels, (heights, widths))
    points = len(MAPS) * POINTS
    return Case(
        f"attention, {heads} heads of {channels}, {len(MAPS)} maps",
        module,
        ((value, locations, weights, out, *sizes), module.settings(value, locations, out)),
        (
            (
                out,
                value,
                locations,
                weights,
                buffer,
                locations.clone(),
                weights.clone(),
                scale,
                *sizes,
            ),
            {"FIXED": False} | module.settings(value, locations, out, buffer),
        ),
        channels,
        4 * points,
        4 * POINTS,
        _touched(channels + 3 * points, channels, dtype),
    )


def _touched(inputs: int, outputs: int, dtype: torch.dtype) -> dict[str, float]:
    """Bytes an item, where there are as many pixels as positions: numbers read, then written."""
    forward = (inputs + outputs) * dtype.itemsize
    return {FORWARD: forward, BACKWARD: forward + inputs * dtype.itemsize}

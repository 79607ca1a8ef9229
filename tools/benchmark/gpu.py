"""`python -m tools.benchmark gpu`: the kernels of DCNv3, and InternImage in training, on one GPU.

Kernels are compared with what the memory of the device allows: each tensor touched once, at the
speed of a large copy measured here. Models run forward, backward and an optimizer step on random
images in bfloat16 with fused AdamW on float32 weights (autocast).
"""

import argparse
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from pretrain.engine.report.device_peak import peak_tflops
from pretrain.models.init import initialise
from pretrain.models.internimage.internimage import InternImageSettings
from pretrain.models.operators.dcnv3 import dcnv3
from tools.benchmark import dcnv4 as bench_dcnv4
from tools.benchmark.dcnv3 import grid_sample_dcnv3
from tools.support.measure import say, seconds_left, shorten

POINTS = 9
# (name, height, width, channels, channels of a group) of the stages that InternImage runs at 224.
STAGES = (
    ("T, stage 1", 56, 56, 64, 16),
    ("T, stage 3", 14, 14, 256, 16),
    ("B, stage 2", 28, 28, 224, 16),
    ("H, stage 1", 56, 56, 320, 32),
    ("H, stage 3", 14, 14, 1280, 32),
)
FORWARD, BACKWARD = "forward", "backward"
BARS = {FORWARD: 0.6, BACKWARD: 0.35}
"""Share of the speed of a copy to aim at."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; see `tools.benchmark` for the form of the result."""
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here; --device cpu shows that it runs, its figures say nothing")
    clock = _Clock(device, args.repeats)
    say("speed of a copy and of a product")
    copy, product = _copy_speed(clock, args.copy_mib), _matmul_speed(clock)
    sheet = peak_tflops(_name(device), "bf16")  # what a run's MFU refers to
    peak = sheet * 1e12 if sheet else product
    rows = [
        row
        for dtype in (torch.bfloat16, torch.float32)
        for stage in STAGES
        for row in _kernel_rows(clock, args.batch, *stage, dtype, copy)
    ]
    models = [_model_row(clock, *spec.split(":"), args.image, peak) for spec in args.models]
    _, said = bench_dcnv4.find()
    columns = dict.fromkeys(name for row in (*rows, *models) for name in row)
    rows = [columns | row for row in (*rows, *models)]
    return {
        "title": f"One {_name(device)}",
        "rows": rows,
        "bars": floor_bars(rows, "share of the floor", "least share of the copy speed"),
        "notes": [
            f"copy: {copy / 1e9:.0f} GB/s read and written; matrix product in bfloat16: "
            f"{product / 1e12:.1f} TFLOP/s; MFU is a share of "
            + (f"{sheet:g}, the dense peak of the data sheet" if sheet else "the matrix product"),
            "share of the floor: time of touching each tensor once at the speed of the copy, by "
            "the time taken; gradients of values count once, in their own type",
            said,
        ],
    }


def floor_bars(rows: list[dict[str, Any]], column: str, what_it_is: str) -> list[dict[str, Any]]:
    """BARS, against the least of a column over the rows of DCNv3 in bfloat16."""
    return [
        {
            "what": f"DCNv3 {what}, bfloat16: {what_it_is}",
            "at_least": True,
            "bar": bar,
            "measured": min(
                row[column] for row in rows if row["pass"] == what and row["type"] == "bfloat16"
            ),
        }
        for what, bar in BARS.items()
    ]


class _Clock:
    """Median seconds of a call on the device."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def seconds(self, action: Callable[[], Any], warm_up: int = 3) -> float:
        """Median over the repetitions, after some that are not counted."""
        for number in range(warm_up):
            if number and not seconds_left():
                break
            action()
        times = [self._once(action)]
        while len(times) < self.repeats and seconds_left():
            times.append(self._once(action))
        if len(times) < self.repeats:
            shorten(f"later cases had fewer than {self.repeats} repetitions, one at least")
        return median(times)

    def _once(self, action: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            action()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The cache of the device is emptied: kernels would otherwise read from it. While that goes
        # on, a third of a millisecond, the host queues the whole call: else the time of a short
        # kernel would be that of Python's launching it.
        torch.empty(2**30, dtype=torch.uint8, device=self.device).zero_()
        begin.record()
        action()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1e3


def _copy_speed(clock: _Clock, mib: int) -> float:
    source = torch.ones(mib * 2**20, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / clock.seconds(lambda: target.copy_(source))


def _matmul_speed(clock: _Clock) -> float:
    side = 8192 if clock.device.type == "cuda" else 512
    square = torch.randn(side, side, device=clock.device, dtype=torch.bfloat16)
    return 2 * side**3 / clock.seconds(lambda: square @ square)


def _kernel_rows(
    clock: _Clock,
    batch: int,
    name: str,
    height: int,
    width: int,
    channels: int,
    depth: int,
    dtype: torch.dtype,
    copy: float,
) -> list[dict[str, Any]]:
    groups = channels // depth
    inputs = _inputs(batch, height, width, channels, groups, dtype, clock.device)
    output = dcnv3(*inputs, groups=groups)
    upstream = torch.randn_like(output)
    size = sum(tensor.nbytes for tensor in (*inputs, output))
    bytes_of = {FORWARD: size, BACKWARD: size + sum(tensor.nbytes for tensor in inputs)}
    function, _ = bench_dcnv4.find()
    rows = []
    for what in (FORWARD, BACKWARD):
        say(f"DCNv3 {name}, {dtype}, {what} ...")
        ours, peer, plain = (
            clock.seconds(_pass(call, inputs, upstream, what))
            for call in (
                lambda *t: dcnv3(*t, groups=groups),
                lambda *t: grid_sample_dcnv3(*t, groups),
                lambda *t: dcnv3(*t, groups=groups, backend="torch"),
            )
        )
        rows.append(
            {
                "case": name,
                "type": str(dtype).removeprefix("torch."),
                "pass": what,
                "ms": 1e3 * ours,
                "share of the floor": bytes_of[what] / copy / ours,
                "grid_sample / ours": peer / ours,
                "plain PyTorch / ours": plain / ours,
            }
        )
        if function is not None:
            rows[-1]["DCNv4 / ours"] = _dcnv4(clock, function, inputs, groups, output, what) / ours
        say(f"  {1e3 * ours:.3g} ms, grid_sample {1e3 * peer:.3g} ms")
    return rows


def _dcnv4(
    clock: _Clock, function: Callable, inputs: list[Tensor], groups: int, output: Tensor, what: str
) -> float:
    """Seconds of the package's kernel; not a number where it refuses the type, fails, or computes
    something else: a peer is no reason to lose what was measured of ours."""
    value, offset, mask = (tensor.detach() for tensor in inputs)
    own = [value.requires_grad_(), bench_dcnv4.join(offset, mask, groups).requires_grad_()]

    def call(*tensors: Tensor) -> Tensor:
        return bench_dcnv4.call(function, *tensors, groups)

    try:
        gap = (call(*own) - output).detach().abs().max() / output.detach().abs().max()
        if not gap < 0.05:
            warnings.warn(
                f"DCNv4 computes something else than DCNv3 (by {gap:.2g}) and is not timed: its "
                "layout is not the one that tools/benchmark/dcnv4.py knows",
                stacklevel=2,
            )
            return float("nan")
        return clock.seconds(_pass(call, own, torch.randn_like(output), what))
    except RuntimeError:  # its backward pass has no bfloat16 in some releases
        return float("nan")


def _inputs(
    batch: int,
    height: int,
    width: int,
    channels: int,
    groups: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor]:
    generator = torch.Generator(device=device).manual_seed(0)
    value, offset, mask = (
        torch.randn(batch, height, width, size, generator=generator, device=device)
        for size in (channels, 2 * POINTS * groups, POINTS * groups)
    )
    mask = mask.view(batch, height, width, groups, POINTS).softmax(-1).flatten(3)
    return [tensor.to(dtype).requires_grad_() for tensor in (value, offset, mask)]


def _pass(
    call: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor, what: str
) -> Callable[[], Any]:
    if what == FORWARD:

        def forward() -> Tensor:
            with torch.no_grad():
                return call(*inputs)

        return forward
    output = call(*inputs)
    return lambda: torch.autograd.grad(output, inputs, upstream, retain_graph=True)


def _model_row(clock: _Clock, size: str, batch: str, pixels: int, peak: float) -> dict[str, Any]:
    device = clock.device
    say(f"InternImage-{size}, {batch} images ...")
    with torch.device(device):
        model = InternImageSettings(size=size).build()
    initialise(model, 0)
    images = torch.randn(int(batch), 3, pixels, pixels, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(images).float().square().mean()
        loss.backward()
        optimizer.step()

    seconds = clock.seconds(step)
    say(f"  {int(batch) / seconds:,.4g} images a second")
    flops = 3 * int(batch) * model.flops(pixels, pixels) / seconds
    used = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {
        "case": f"InternImage-{size}, {pixels} px, {batch} images",
        "type": "bfloat16",
        "pass": "training step",
        "ms": 1e3 * seconds,
        "images/s": int(batch) / seconds,
        "TFLOP/s": flops / 1e12,
        "MFU": flops / peak,
        "peak GiB": used,
    }


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (no measurement)"

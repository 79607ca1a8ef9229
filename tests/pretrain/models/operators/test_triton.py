"""The operators in Triton: interpreted, on a GPU, and compiled for GPUs that are not here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from pretrain.models.operators import sampling_triton  # noqa: E402
from tools.benchmark import kernels as bench_kernels  # noqa: E402
from tools.benchmark.machine_code import Code, compiled  # noqa: E402

CASES = Path(__file__).with_name("triton_cases.py")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted here"
)


def _passes(interpreted: bool, *selected: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *selected, str(CASES)],
        env=environment | ({"TRITON_INTERPRET": "1"} if interpreted else {}),
        capture_output=True,
        text=True,
        timeout=3600,  # for a GPU hundreds of kernels are compiled
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize(
    "selected",
    [
        ("-m", "not slow"),
        pytest.param(("-m", "slow"), marks=pytest.mark.slow),
    ],
    ids=["telling", "others"],
)
def test_in_the_interpreter(selected):
    _passes(True, *selected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    _passes(interpreted=False)


def _code(kernel, call: tuple[tuple, dict], capability: int) -> Code:
    """Of the candidate that takes a sector and a point at a time."""
    config = next(c for c in kernel.configs if (c.kwargs["SPAN"], c.kwargs["UNROLL"]) == (32, 1))
    return compiled(kernel, *call, config, capability)


def _deterministic(call: tuple[tuple, dict]) -> tuple[tuple, dict]:
    """The call of a backward pass with sums in fixed point."""
    arguments, settings = call
    buffer = arguments[4].long()
    found = sampling_triton.constants(arguments[1], 1, 1, 1, buffer)
    changed = {"FIXED": True} | {name: found[name] for name in ("ELEMENT", "WIDTH", "PAIRS")}
    return (*arguments[:4], buffer, *arguments[5:]), settings | changed


@pytest.mark.parametrize("operator", [0, 2], ids=["dcnv3", "ms_deform_attn"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_code_for_gpus_moves_nothing_between_threads_but_sums(
    capability, operator, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = bench_kernels.cases(torch.bfloat16)[operator]
    forward = _code(case.module.forward_kernel, case.forward, capability)
    # 8 channels of a pixel at a time, at four corners.
    assert forward.count("LDG.E.128") == 4 * case.channels // 16
    arguments, settings = case.backward
    if capability < 90:
        settings = settings | {"WIDTH": 1, "PAIRS": False}
    backward = _code(case.module.backward_kernel, (arguments, settings), capability)
    fixed = _code(case.module.backward_kernel, _deterministic(case.backward), capability)
    adds = [name for name, _ in backward.instructions if name.startswith("RED")]
    if capability >= 90:
        assert len(adds) == 4 * case.channels // 8 and all("F32x4" in name for name in adds)
    else:
        assert adds and all("F32" in name for name in adds)
    added = [n for n, _ in fixed.instructions if n.startswith("RED")]
    assert added and all(".64" in name for name in added)
    for code in (forward, backward, fixed):
        # Nothing in slow memory, no barriers, no subroutines (64-bit divisions are).
        for name, target in code.instructions:
            assert not name.startswith(("STL", "LDL", "BAR.")), name
            assert target is None or target.startswith(".L_x_"), target
        assert code.spilled == code.shared == 0
    assert not any(name.startswith("SHFL") for name, _ in forward.instructions)
    # Sums of four corners over the threads of an item, and what is written: three gradients.
    for code, steps in ((backward, 1 if capability >= 90 else 3), (fixed, 2)):
        shuffles = sum(name.startswith("SHFL") for name, _ in code.instructions)
        assert shuffles == 4 * steps + 3


def test_many_channels_of_a_group_do_not_run_out_of_registers(tmp_path, monkeypatch):
    """Most points at a time, of the narrower span: spills took 12 KB of a thread, and a GPU sets
    aside as much for each of 270,000 threads."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    operator = bench_kernels._dcnv3(64, 1, torch.bfloat16)
    kernel = operator.module.forward_kernel
    assert compiled(kernel, *operator.forward, kernel.configs[-1], 90).spilled == 0


def test_pairs_of_bfloat16_are_widened_in_order(tmp_path, monkeypatch):
    """The one piece of assembly: four numbers read at a time are written as they came."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    @triton.jit
    def kernel(source, target, PAIRS: triton.language.constexpr):
        place = triton.language.max_contiguous(triton.language.arange(0, 128), 4)
        read = triton.language.load(source + place)
        wide = sampling_triton.widen(read, triton.language.float32, PAIRS)
        triton.language.store(target + place, wide)

    config = triton.Config({}, num_warps=1)
    arguments = (torch.zeros(128, dtype=torch.bfloat16), torch.zeros(128))
    tuned = triton.autotune([config], key=[])(kernel)
    lines = compiled(tuned, arguments, {"PAIRS": True}, config, 90).ptx.splitlines()
    # Where each register comes from: a register that was read, and which half of it.
    source, stored = {}, []
    for line in lines:
        if found := re.search(r"ld\.global\.v2\.b32 \{ ?(.*?) ?\},", line):
            source |= {r.strip(): (n, "") for n, r in enumerate(found[1].split(","))}
        halves = r"(shl|and)\.b32 (%r\d+), (%r\d+), (?:16|0xffff0000);"
        for kind, to, of in re.findall(halves, line):
            source[to] = (source[of][0], "low" if kind == "shl" else "high")
        if found := re.search(r"st\.global\.v4\.b32 \[.*\], \{ ?(.*?) ?\}", line):
            stored += [source[r.strip()] for r in found[1].split(",")]
    assert stored == [(n, half) for n in range(2) for half in ("low", "high")], "\n".join(lines)

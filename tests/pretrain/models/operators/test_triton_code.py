"""The operators as compiled for GPUs that are not here: their PTX, run on the CPU.

What the interpreter cannot show: loops that are unrolled, with a rest; accesses of several channels
at a time; sums over threads; saturation of indices; what lies outside of all tensors.
"""

import os

import pytest
import torch

triton = pytest.importorskip("triton")

from pretrain.models.operators import (  # noqa: E402
    dcnv3_torch,
    dcnv3_triton,
    ms_deform_attn_torch,
    ms_deform_attn_triton,
    sampling_triton,
)
from pretrain.models.operators.ms_deform_attn import Maps  # noqa: E402
from pretrain.models.operators.window import Window  # noqa: E402
from tests.pretrain.models.operators import ptx  # noqa: E402
from tests.pretrain.models.operators.dcnv3_cases import random_case  # noqa: E402
from tests.pretrain.models.operators.test_ms_deform_attn import attention_case  # noqa: E402
from tools.benchmark.machine_code import compiled  # noqa: E402

BOUNDS = {torch.float64: 1e-11, torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted here"
)


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """Kernels are run as a GPU would: called with its capability, and the number of a candidate."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def use(capability: int, candidate: int) -> None:
        def launch(kernel, items, arguments, settings):
            config = kernel.configs[candidate]
            code = compiled(kernel, arguments, settings, config, capability)
            known = settings | config.kwargs
            names = ("BLOCK_CHANNELS", "ELEMENT", "WIDTH", "SPAN", "WARPS")
            each = sampling_triton.items_of_program(*(known[name] for name in names))
            ptx.run(code.ptx, arguments, -(-items // each), config.num_warps)

        for module in (dcnv3_triton, ms_deform_attn_triton):
            monkeypatch.setattr(module, "launch", launch)
        monkeypatch.setattr(
            sampling_triton,
            "_adds_vectors",
            lambda buffer: capability >= 90 and buffer.dtype == torch.float32,
        )

    return use


def _equal(found, expected, dtype: torch.dtype) -> None:
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, atol=BOUNDS[dtype], rtol=BOUNDS[dtype])


def _dcnv3_equals(case, dtype: torch.dtype) -> None:
    """Tensors begin one element into a buffer, as views do."""
    names = ("kernel_size", "stride", "pad", "dilation")
    pairs = (g if isinstance(g, tuple) else (g, g) for g in map(case.geometry.get, names))
    window = Window(
        *pairs,
        case.geometry["groups"],
        case.geometry.get("offset_scale", 1.0),
        case.geometry.get("remove_center", False),
    )
    *inputs, gradient = (
        torch.nn.functional.pad(t.flatten(), (1, 7))[1:-7].view(t.shape)
        for t in (*case.tensors.values(), case.gradient)
    )
    ours, right = (
        (module.forward(*inputs, window), *module.backward(gradient, *inputs, window))
        for module in (dcnv3_triton, dcnv3_torch)
    )
    _equal(ours, right, dtype)


@pytest.mark.parametrize(
    "capability, candidate, channels, dtype, geometry",
    [
        (90, 0, 18, torch.bfloat16, {"stride": (1, 2), "pad": (0, 2), "offset_scale": 1.3}),
        pytest.param(
            90,
            3,
            24,
            torch.float16,
            {"kernel_size": (2, 3), "dilation": (2, 1)},
            marks=pytest.mark.slow,
        ),
        # 4 points, of which 3 are computed at a time.
        pytest.param(
            90,
            0,
            6,
            torch.float32,
            {"kernel_size": (5, 1), "pad": (2, 0), "remove_center": True},
            marks=pytest.mark.slow,
        ),
        (90, 3, 1, torch.float64, {"kernel_size": 1, "pad": 0, "offset_scale": 1.3}),
        (80, 1, 32, torch.bfloat16, {}),
    ],
)
def test_dcnv3(gpu, capability, candidate, channels, dtype, geometry):
    gpu(capability, candidate)
    case = random_case((2, 4, 3, 2 * channels), spread=2.0, dtype=dtype, groups=2, **geometry)
    _dcnv3_equals(case, dtype)


@pytest.mark.parametrize("limit", [2**31, 0], ids=["int32", "int64"])
def test_coordinates_at_the_edge_far_away_or_not_numbers(gpu, limit, monkeypatch):
    gpu(90, 4)
    monkeypatch.setattr(sampling_triton, "INDEX_LIMIT", limit)
    case = random_case((1, 4, 5, 16), groups=2)
    shifts = torch.tensor(
        [-1e30, -3e9, -2, -1, 0, 1, 3, 4, 5, 3e9, 1e30, torch.inf, -torch.inf, torch.nan]
    )
    offset = case.tensors["offset"]
    chosen = torch.randint(len(shifts), offset.shape, generator=torch.Generator().manual_seed(1))
    offset.copy_(shifts[chosen])
    _dcnv3_equals(case, torch.float32)


def test_deterministic(gpu):
    gpu(90, 1)
    torch.use_deterministic_algorithms(True)
    try:
        _dcnv3_equals(random_case((1, 4, 3, 36), groups=2), torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "sizes",
    [
        [(3, 5), (2, 3)],
        [(1, 32767), (2, 1), (1, 3), (2, 2), (4, 1), (1, 5)],
    ],
)
def test_attention_on_maps_of_several_sizes(gpu, sizes):
    gpu(90, 3)  # of 5 points 2 are computed at a time
    tensors, gradient = attention_case(sizes, depth=16, queries=7, points=5, dtype=torch.bfloat16)
    maps = Maps(*zip(*sizes, strict=True))
    ours, right = (
        (module.forward(*tensors, maps), *module.backward(gradient, *tensors, maps))
        for module in (ms_deform_attn_triton, ms_deform_attn_torch)
    )
    _equal(ours, right, torch.bfloat16)


@pytest.mark.parametrize(
    "line, says",
    [
        ("ld.global.b32 %r2, [ %rd1 + 60 ];", None),
        ("ld.global.b32 %r2, [ %rd1 + 64 ];", "outside of all tensors"),
        ("ld.global.v2.b32 { %r2, %r3 }, [ %rd1 + 4 ];", "is not aligned"),
    ],
)
def test_accesses_are_checked(line, says):
    code = (
        ".entry f(.param .u64 .ptr .global .align 1 a) {\n.reg .b64 %rd<2>;\n"
        f"ld.param.b64 %rd1, [a];\n{line}\nret;\n}}\n// -- End function"
    )
    if says is None:
        ptx.run(code, [torch.zeros(16)], 1, 1)
    else:
        with pytest.raises(IndexError, match=says):
            ptx.run(code, [torch.zeros(16)], 1, 1)

"""The Triton kernels in Triton's interpreter, against goldens and plain PyTorch.

Not collected by itself: TRITON_INTERPRET=1 must be set before anything imports triton, so
test_triton.py runs this file in a process of its own.
"""

import pytest
import torch

from pretrain.models.operators.ms_deform_attn import ms_deform_attn
from tests.pretrain.models.operators.dcnv3_cases import GOLDENS, golden, random_case, results
from tests.pretrain.models.operators.test_ms_deform_attn import SHAPES, attention_case
from tests.pretrain.models.operators.test_ms_deform_attn import results as attention_results


def close(found: dict, expected: dict, bound: float) -> None:
    for name in set(found) & set(expected):
        torch.testing.assert_close(
            found[name], expected[name].to(found[name].dtype), atol=bound, rtol=bound,
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem.removeprefix("dcnv3_op_"))
def test_goldens(path):
    case, expected = golden(path)
    expected.pop("output_official_f32grid")
    found = results(case, "triton", torch.float32)
    assert len(set(found) & set(expected)) >= 3  # one has no gradient of its offsets: kinks
    close(found, expected, 5e-5)


@pytest.mark.parametrize(
    "geometry",
    [
        {"groups": 2, "offset_scale": 1.3},
        {"groups": 3, "kernel_size": (2, 3), "stride": (1, 2), "pad": (0, 2), "dilation": (2, 1)},
        {"groups": 1, "kernel_size": 5, "pad": 2, "remove_center": True},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_equals_plain_pytorch(geometry, dtype):
    """18 channels a group: no power of two. The interpreter rounds to bfloat16 by cutting off."""
    case = random_case((2, 6, 7, 18 * geometry["groups"]), spread=2.0, dtype=dtype, **geometry)
    bound = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 3e-3}.get(dtype, 2e-2)
    close(results(case, "triton"), results(case, "torch"), bound)


def test_the_deterministic_scatter_is_as_exact():
    case = random_case((1, 9, 8, 32), spread=3.0, groups=2)
    exact = results(case, "torch", torch.float64)["grad_value"]
    torch.use_deterministic_algorithms(True)
    try:
        found = results(case, "triton")["grad_value"]
    finally:
        torch.use_deterministic_algorithms(False)
    plain = results(case, "triton")["grad_value"]
    assert (found - exact).abs().max() <= (plain - exact).abs().max() + 1e-7
    assert not torch.equal(found, plain)  # it was another path


def test_gradients_of_zero_and_tiny_size_survive_fixed_point():
    case = random_case((1, 4, 4, 16), groups=1)
    torch.use_deterministic_algorithms(True)
    try:
        for factor in (0.0, 1e-30, 1e30):
            scaled = case._replace(gradient=case.gradient * factor)
            expected = results(scaled, "torch")["grad_value"]
            found = results(scaled, "triton")["grad_value"]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * factor)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_multi_scale_attention_equals_plain_pytorch(shape, dtype):
    tensors, gradient = attention_case(**shape, dtype=dtype)
    by_backend = [
        attention_results(
            lambda v, p, w, b=backend: ms_deform_attn(v, shape["sizes"], p, w, backend=b),
            tensors, gradient,
        )
        for backend in ("triton", "torch")
    ]  # fmt: skip
    bound = 1e-11 if dtype == torch.float64 else 2e-4
    for found, expected in zip(*by_backend, strict=True):
        torch.testing.assert_close(found, expected, atol=bound, rtol=bound)

"""Multi-scale deformable attention, against the implementation in transformers."""

import pytest
import torch
from transformers.models.deformable_detr.modeling_deformable_detr import (
    MultiScaleDeformableAttention,
)

from pretrain.models.operators.ms_deform_attn import ms_deform_attn

SHAPES = [
    {"sizes": [(6, 5), (3, 4), (2, 1), (1, 1)]},
    {"sizes": [(1, 7)], "heads": 1, "depth": 1, "points": 1},
    {"sizes": [(9, 8), (5, 4)], "heads": 3, "depth": 32, "queries": 130},
    {"sizes": [(5, 5)], "heads": 4, "depth": 16, "queries": 41, "points": 4},
    {"sizes": [(4, 6)], "depth": 61},
    {"sizes": [(3, 2), (1, 2), (2, 2), (2, 1), (1, 4), (2, 3)], "points": 2},
]


def attention_case(
    sizes, *, n=2, queries=5, heads=2, depth=4, points=3, dtype=torch.float64, seed=0
):
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(
        n, sum(h * w for h, w in sizes), heads, depth, generator=generator, dtype=torch.float64
    )
    shape = (n, queries, heads, len(sizes), points)
    # Some lie outside: from -0.25 to 1.25.
    locations = 1.5 * torch.rand(*shape, 2, generator=generator, dtype=torch.float64) - 0.25
    weights = torch.randn(shape, generator=generator, dtype=torch.float64)
    gradient = torch.randn(n, queries, heads * depth, generator=generator, dtype=torch.float64)
    return [t.to(dtype) for t in (value, locations, weights)], gradient.to(dtype)


def results(call, tensors, gradient):
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    output = call(*inputs)
    output.backward(gradient)
    return [output.detach(), *(tensor.grad for tensor in inputs)]


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_transformers(shape, backend):
    sizes = shape["sizes"]
    theirs = MultiScaleDeformableAttention()

    def reference(value, locations, weights):
        spatial = torch.tensor(sizes)
        starts = torch.tensor([0, *(h * w for h, w in sizes)]).cumsum(0)[:-1]
        return theirs(value, spatial, sizes, starts, locations, weights, 64)

    for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        tensors, gradient = attention_case(**shape)
        expected = results(reference, tensors, gradient)
        found = results(
            lambda v, p, w: ms_deform_attn(v, sizes, p, w, backend=backend),
            [t.to(dtype) for t in tensors],
            gradient.to(dtype),
        )
        for name, ours, right in zip(
            ("output", "value", "locations", "weights"), found, expected, strict=True
        ):
            scale = max(1.0, float(right.abs().max()))
            torch.testing.assert_close(
                ours,
                right.to(dtype),
                atol=bound * scale,
                rtol=0,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def test_gradients_and_operator_contract(backend):
    sizes = [(3, 2), (1, 3)]
    tensors, gradient = attention_case(sizes, n=1, queries=2, depth=2, points=2, seed=1)
    inputs = [tensor.requires_grad_() for tensor in tensors]
    call = lambda v, p, w: ms_deform_attn(v, sizes, p, w, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs)
    arguments = (*inputs, [3, 1], [2, 3], backend)
    torch.library.opcheck(torch.ops.omnipretrain.ms_deform_attn.default, arguments)
    backward = (gradient, *(tensor.detach() for tensor in inputs), *arguments[3:])
    torch.library.opcheck(torch.ops.omnipretrain.ms_deform_attn_backward.default, backward)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"sizes": [(2, 3), (1, 2)]}, ValueError, "must have together the 7 pixels"),
        ({"sizes": []}, ValueError, "sizes .. must be one or more"),
        ({"value": torch.zeros(2, 7, 4)}, ValueError, "value .2, 7, 4. must be"),
        ({"weights": torch.zeros(2, 5, 2, 3, 3)}, ValueError, "weights .2, 5, 2, 3, 3. must be"),
        (
            {"weights": torch.zeros(2, 5, 2, 2, 0)},
            ValueError,
            "weights .2, 5, 2, 2, 0. have no points",
        ),
        (
            {"locations": torch.zeros(2, 5, 2, 2, 3, 3)},
            ValueError,
            "locations .2, 5, 2, 2, 3, 3. must",
        ),
        ({"weights": torch.zeros(2, 5, 2, 2, 3, dtype=torch.float16)}, TypeError, "weights is"),
    ],
)
def test_mistakes_are_named(change, error, words):
    (value, locations, weights), _ = attention_case([(2, 3), (1, 1)], dtype=torch.float32)
    arguments = {
        "value": value,
        "sizes": [(2, 3), (1, 1)],
        "locations": locations,
        "weights": weights,
    }
    with pytest.raises(error, match=words):
        ms_deform_attn(**{**arguments, **change})


def test_no_queries(backend):
    (value, locations, weights), _ = attention_case([(2, 3)], queries=0, dtype=torch.float32)
    value.requires_grad_()
    output = ms_deform_attn(value, [(2, 3)], locations, weights, backend=backend)
    output.sum().backward()
    assert output.shape == (2, 0, 8) and (value.grad == 0).all()

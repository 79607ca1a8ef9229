"""DCNv3 as an operator: the goldens, its gradients, and what PyTorch does with operators."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pretrain.models.operators.dcnv3 import dcnv3
from pretrain.models.operators.dcnv3_standard import standard_operators
from tests.pretrain.models.operators.dcnv3_cases import GOLDENS, golden, random_case, results


def test_all_goldens_are_here():
    assert len(GOLDENS) == 16


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem.removeprefix("dcnv3_op_"))
def test_goldens(path, backend):
    case, expected = golden(path)
    expected.pop("output_official_f32grid")
    for dtype, bounds in (
        (torch.float64, {"output": 1e-11, "grad_offset": 1e-11, "grad_mask": 1e-11}),
        (torch.float32, {"output": 1e-5, "grad_offset": 5e-5, "grad_mask": 5e-5}),
    ):
        found = results(case, backend, dtype)
        for name, tensor in expected.items():
            bound = bounds.get(name, bounds["output"])
            torch.testing.assert_close(
                found[name], tensor.to(dtype), atol=bound, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


# `torch` differentiates by autograd, slowly, and the others agree with it (test_dcnv3_backends).
@pytest.mark.parametrize(
    "backend", ["cpp", pytest.param("torch", marks=pytest.mark.slow)], indirect=True
)
def test_gradients_are_those_of_the_output(backend):
    for geometry in (
        {"groups": 2, "offset_scale": 1.3, "remove_center": True},
        {"groups": 1, "kernel_size": (2, 3), "stride": (1, 2), "pad": (0, 2), "dilation": (2, 1)},
    ):
        case = random_case((1, 4, 3, 2), spread=0.7, dtype=torch.float64, seed=3, **geometry)
        inputs = [tensor.requires_grad_() for tensor in case.tensors.values()]
        assert torch.autograd.gradcheck(
            lambda *tensors, g=case.geometry: dcnv3(*tensors, **g, backend=backend), inputs
        )


def test_a_point_a_whole_pixel_outside_has_no_gradient(backend):
    """At offset 0 the outer points of a 3x3 kernel on the border lie at exactly -1."""
    case = random_case((1, 3, 3, 2), spread=0.0, groups=1, dtype=torch.float64)
    found = results(case, backend)
    offset = found["grad_offset"].view(3, 3, 9, 2)
    mask = found["grad_mask"].view(3, 3, 9)
    assert offset[0, :, [0, 3, 6]].abs().sum() == 0 and mask[0, :, [0, 3, 6]].abs().sum() == 0
    assert offset[:, 0, :3].abs().sum() == 0 and mask[:, 0, :3].abs().sum() == 0
    assert (mask[1, 1] != 0).all()


def test_operator_contract(backend):
    case = random_case((2, 4, 3, 4), groups=2)
    inputs = [tensor.requires_grad_() for tensor in case.tensors.values()]
    arguments = (*inputs, [3, 3], [1, 1], [1, 1], [1, 1], 2, 1.0, False, backend)
    torch.library.opcheck(torch.ops.omnipretrain.dcnv3.default, arguments)
    gradients = (case.gradient, *(tensor.detach() for tensor in inputs), *arguments[3:])
    torch.library.opcheck(torch.ops.omnipretrain.dcnv3_backward.default, gradients)
    narrow = (inputs[0].bfloat16(), inputs[1], inputs[2].bfloat16(), *arguments[3:])
    with pytest.raises(TypeError, match=r"offset torch\.float32, mask torch\.bfloat16"):
        torch.ops.omnipretrain.dcnv3(*narrow)


def test_second_derivatives_are_refused():
    """They would be zero without a word in PyTorch's own fallback."""
    case = random_case((1, 4, 3, 4), groups=2)
    value = case.tensors["value"].requires_grad_()
    output = dcnv3(**case.tensors, **case.geometry)
    (slope,) = torch.autograd.grad(output.square().sum(), value, create_graph=True)
    with pytest.raises(NotImplementedError, match="dcnv3: its gradients cannot be differentiated"):
        slope.sum().backward()


def test_shapes_on_the_meta_device():
    with torch.device("meta"):
        value = torch.empty(300, 64, 64, 32, dtype=torch.bfloat16, requires_grad=True)
        offset, mask = (torch.empty(300, 31, 32, 4 * 20 * each) for each in (2, 1))
        offset.requires_grad_()
        output = dcnv3(value, offset, mask, groups=4, kernel_size=(5, 4), stride=2)
        output.sum().backward()
    assert output.shape == (300, 31, 32, 32) and output.dtype == torch.bfloat16
    assert value.grad.shape == value.shape and value.grad.dtype == torch.bfloat16
    assert offset.grad.shape == offset.shape and offset.grad.dtype == torch.float32


def _last_pixel(height, width, channels, backend):
    """What a kernel of one point, on the corners of a large image, reads at the last pixel.

    The image takes no memory: nobody writes most of its pages."""
    value = torch.empty(1, height, width, channels, dtype=torch.bfloat16)
    assert value.numel() > 2**31
    value[0, -1, -1] = torch.arange(1, channels + 1)
    offset, mask = torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, 1)
    corners = {"kernel_size": 1, "pad": 0, "stride": (height - 1, width - 1)}
    return dcnv3(value, offset, mask, groups=1, **corners, backend=backend)[0, 1, 1].tolist()


def test_more_elements_than_32_bits_count(backend):
    assert _last_pixel(2**14, 2**13, 17, backend) == list(range(1, 18))


def test_more_pixels_than_32_bits_count(backend):
    """The C++ kernel numbers the pixels of one image by 32 bits, and says so."""
    if backend == "torch":
        assert _last_pixel(2**16, 2**15 + 1, 1, backend) == [1]
        return
    with pytest.raises(RuntimeError, match="dcnv3: an image of 65536 x 32769"):
        _last_pixel(2**16, 2**15 + 1, 1, backend)


def test_checkpointed_and_compiled_give_the_same():
    case = random_case((2, 5, 4, 8), groups=2, seed=1)
    expected = results(case)

    def call(value, offset, mask):
        # Something around it for the compiler to trace.
        return 2 * dcnv3(value.tanh(), offset, mask.exp(), **case.geometry)

    found = {}
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for name, function in (
        ("plain", call),
        ("checkpointed", lambda *t: checkpoint(call, *t, use_reentrant=False)),
        ("compiled", compiled),
    ):
        inputs = [tensor.clone().requires_grad_() for tensor in case.tensors.values()]
        output = function(*inputs)
        output.backward(case.gradient)
        found[name] = [output.detach(), *(tensor.grad for tensor in inputs)]
    assert not torch.equal(found["plain"][0], expected["output"])
    for name in ("checkpointed", "compiled"):
        torch.testing.assert_close(found[name], found["plain"], atol=0, rtol=1e-6)


def test_exported():
    case = random_case((2, 5, 4, 8), groups=2, seed=1)

    class Module(torch.nn.Module):
        def forward(self, value, offset, mask):
            return dcnv3(value, offset, mask, **case.geometry)

    program = torch.export.export(Module(), tuple(case.tensors.values()))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.omnipretrain.dcnv3.default in targets
    found = program.module()(*case.tensors.values())
    assert torch.equal(found, results(case)["output"])


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem.removeprefix("dcnv3_op_"))
def test_in_standard_operators(path):
    """For graphs that leave the project: the same values, and no operator of ours is left."""
    case, expected = golden(path)

    class Module(torch.nn.Module):
        def forward(self, value, offset, mask):
            return dcnv3(value, offset, mask, **case.geometry)

    def batch(count: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.cat([tensor] * count) for tensor in case.tensors.values())

    any_batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(Module(), batch(2), dynamic_shapes=(any_batch,) * 3)
    program = program.run_decompositions(standard_operators())
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "aten.grid_sampler.default" in targets
    assert not any("omnipretrain" in target for target in targets)
    for count in (1, 3):
        found = program.module()(*batch(count))
        assert found.dtype == expected["output"].dtype and found.is_contiguous()
        torch.testing.assert_close(
            found, torch.cat([expected["output"]] * count), atol=1e-11, rtol=1e-11
        )


def test_backward_keeps_only_the_inputs():
    case = random_case((1, 5, 4, 8), groups=2)
    inputs = [tensor.requires_grad_() for tensor in case.tensors.values()]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dcnv3(*inputs, **case.geometry)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in inputs} and len(kept) == 3


@pytest.mark.parametrize(
    "change, error, words",
    [
        (
            {"offset": torch.zeros(2, 4, 3, 35)},
            ValueError,
            "offset .2, 4, 3, 35. must be .2, 4, 3, 36",
        ),
        ({"mask": torch.zeros(2, 4, 4, 18)}, ValueError, "mask .2, 4, 4, 18. must be .2, 4, 3, 18"),
        ({"value": torch.zeros(4, 3, 4)}, ValueError, "value .4, 3, 4. must be .N, H, W, C"),
        ({"groups": 3}, ValueError, "groups .3. must divide the 4 channels"),
        ({"group_channels": 3}, ValueError, "group_channels .3. must be the 4 channels"),
        ({"kernel_size": (0, 3)}, ValueError, "kernel_size .0, 3. must be at least 1"),
        (
            {"kernel_size": (3, 3, 3)},
            ValueError,
            "kernel_size .3, 3, 3. must be a whole number, or",
        ),
        ({"stride": 1.0}, ValueError, "stride 1.0 must be a whole number, or two"),
        ({"kernel_size": 9}, ValueError, "smaller than the kernel"),
        ({"kernel_size": 4, "remove_center": True}, ValueError, "odd kernel_size"),
        ({"offset_scale": float("nan")}, ValueError, "offset_scale nan"),
        ({"value": torch.zeros(2, 4, 3, 4, dtype=torch.int32)}, TypeError, "value is torch.int32"),
        (
            {"mask": torch.zeros(2, 4, 3, 18, dtype=torch.float64)},
            TypeError,
            "mask is torch.float64",
        ),
        ({"mask": torch.zeros(2, 4, 3, 18, device="meta")}, ValueError, "mask is on meta"),
        ({"backend": "cuda"}, ValueError, "backend='cuda': on cpu there are auto, "),
    ],
)
def test_mistakes_are_named(change, error, words):
    case = random_case((2, 4, 3, 4), groups=2)
    with pytest.raises(error, match=words):
        dcnv3(**{**case.tensors, **case.geometry, **change})


def test_backend_by_environment(monkeypatch):
    case = random_case((1, 3, 3, 2), groups=1)
    monkeypatch.setenv("OMNIPRETRAIN_OPERATORS", "fortran")
    with pytest.raises(ValueError, match="OMNIPRETRAIN_OPERATORS='fortran'"):
        results(case)
    results(case, "torch")  # an argument goes before

"""The C++ kernel against plain PyTorch: any geometry, narrow types, threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.models.operators import dcnv3_torch
from pretrain.models.operators.cpu_library import missing
from pretrain.models.operators.dcnv3 import dcnv3
from pretrain.models.operators.window import Window
from tests.pretrain.models.operators.dcnv3_cases import GOLDENS, Case, golden, random_case, results


def _need_cpp() -> None:
    if missing() is not None:
        pytest.skip(missing())


@pytest.fixture
def threads():
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


_pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=60)
@given(
    n=st.integers(0, 3),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    groups=st.integers(1, 5),
    depth=st.sampled_from([1, 2, 3, 4, 7, 8, 12, 16, 17, 31, 32, 45, 64]),
    kernel_size=_pairs,
    stride=_pairs,
    pad=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    scale=st.sampled_from([0.5, 1.0, 2.0]),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    center=st.booleans(),
)
def test_backends_agree(
    n, size, groups, depth, kernel_size, stride, pad, dilation, scale, spread, center
):
    _need_cpp()
    # Images at least as large as the kernel needs.
    spans = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel_size, pad, strict=True)]
    size = [max(s, span) for s, span in zip(size, spans, strict=True)]
    odd = all(k % 2 for k in kernel_size) and kernel_size != (1, 1)
    case = random_case(
        (n, *size, groups * depth),
        spread=spread,
        dtype=torch.float64,
        groups=groups,
        kernel_size=kernel_size,
        stride=stride,
        pad=pad,
        dilation=dilation,
        offset_scale=scale,
        remove_center=odd and not center,
    )
    expected, found = results(case, "torch"), results(case, "cpp")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("dtype, steps", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("wide", [False, True], ids=["places narrow", "places float32"])
@pytest.mark.parametrize("depth", [6, 16, 32])
def test_narrow_types_round_once(dtype, steps, wide, depth, backend):
    """Sums are float32: what differs from float32 on the same numbers is the last rounding."""
    # Offsets that bfloat16 holds exactly, and that keep away from whole pixels.
    case = random_case((2, 6, 5, 2 * depth), groups=2, dtype=torch.float32)
    case.tensors["offset"] = (case.tensors["offset"] * 2).round() / 2 + 0.25
    narrow = {name: tensor.to(dtype) for name, tensor in case.tensors.items()}
    gradient = case.gradient.to(dtype)
    same = Case({name: t.float() for name, t in narrow.items()}, case.geometry, gradient.float())
    if wide:
        narrow |= {name: narrow[name].float() for name in ("offset", "mask")}
    expected = results(same, backend)
    found = results(Case(narrow, case.geometry, gradient), backend)
    for name, tensor in expected.items():
        kind = torch.float32 if wide and name in ("grad_offset", "grad_mask") else dtype
        assert found[name].dtype == kind
        # One rounding of the result, and noise of the sums where these cancel.
        torch.testing.assert_close(found[name].float(), tensor, rtol=1.01 * steps, atol=1e-4)


def test_bits_do_not_depend_on_threads(threads):
    _need_cpp()
    for shape, groups in (((3, 9, 11, 48), 3), ((1, 30, 20, 64), 4), ((4, 7, 7, 10), 5)):
        for dtype in (torch.float32, torch.bfloat16):
            case = random_case(shape, groups=groups, dtype=dtype)
            threads(1)
            expected = results(case, "cpp")
            for count in (1, 2, 3, 4):
                threads(count)
                found = results(case, "cpp")
                assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_inputs_of_any_layout(backend):
    case = random_case((2, 5, 4, 12), groups=3)
    expected = results(case, backend)
    views = {
        name: tensor.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        for name, tensor in case.tensors.items()
    }
    gradient = case.gradient[:1, :1].clone().expand_as(case.gradient)
    found = results(case._replace(tensors=views), backend)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    alike = case._replace(gradient=gradient.contiguous())
    found, expected = results(case._replace(gradient=gradient), backend), results(alike, backend)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_places_that_are_no_numbers_read_nothing(backend):
    case = random_case((1, 4, 4, 16), groups=1, spread=0.3)
    for index, number in enumerate((float("nan"), float("inf"), -float("inf"), 3e38, -1e10)):
        case.tensors["offset"][0, 1, 1, index] = number
    found = results(case, backend)
    assert all(tensor.isfinite().all() for tensor in found.values())
    # Coordinates 0 to 4 belong to points 0, 1 and 2.
    assert (found["grad_mask"][0, 1, 1, :3] == 0).all()
    assert (found["grad_mask"][0, 1, 1, 3:] != 0).all()


def test_memory_is_that_of_the_results():
    """The plain backend works in slices: no tensor of all samples is ever made."""
    case = random_case((4, 24, 24, 32), groups=2, kernel_size=5, pad=2)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    window = Window((5, 5), (1, 1), (2, 2), (1, 1), 2, 1.0, False)
    with Watch():
        dcnv3_torch.backward(case.gradient, *case.tensors.values(), window)
    assert largest <= max(tensor.nbytes for tensor in case.tensors.values())


def test_under_autocast(backend):
    """A softmax widens the masks; offsets, from a linear layer, are narrow."""
    case, expected = golden(GOLDENS[2])
    tensors = {name: tensor.float() for name, tensor in case.tensors.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = dcnv3(
            tensors["value"].bfloat16(),
            tensors["offset"].bfloat16(),
            tensors["mask"],
            **case.geometry,
            backend=backend,
        )
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), expected["output"], atol=0.05, rtol=0)

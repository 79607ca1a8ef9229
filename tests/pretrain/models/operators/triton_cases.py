"""The Triton kernels against goldens and plain PyTorch: in Triton's interpreter, or on a GPU.

Not collected by itself: whether TRITON_INTERPRET=1 is set must be settled before anything imports
triton, so test_triton.py runs this file in a process of its own. The interpreter takes a second for
what a GPU does in a microsecond: cases that others imply are slow.
"""

import pytest
import torch
import triton

from pretrain.models.operators import dcnv3_triton, ms_deform_attn_triton, sampling_triton
from pretrain.models.operators.ms_deform_attn import ms_deform_attn
from tests.pretrain.models.operators.dcnv3_cases import GOLDENS, Case, golden, random_case
from tests.pretrain.models.operators.dcnv3_cases import results as results_on
from tests.pretrain.models.operators.test_ms_deform_attn import SHAPES, attention_case
from tests.pretrain.models.operators.test_ms_deform_attn import results as attention_results

INTERPRETED = sampling_triton.interpreted()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
KERNELS = [
    getattr(module, kernel)
    for module in (dcnv3_triton, ms_deform_attn_triton)
    for kernel in ("forward_kernel", "backward_kernel")
]


TELLING = ("nonsquare_cg6", "rc_k5_d2_s2", "large_offsets")
"""Goldens that the others are special cases of."""


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def results(case: Case, backend: str, dtype: torch.dtype | None = None) -> dict:
    """Triton computes on the device, plain PyTorch on the CPU; results come to the CPU."""
    if backend == "triton":
        tensors = {name: tensor.to(DEVICE) for name, tensor in case.tensors.items()}
        case = case._replace(tensors=tensors, gradient=case.gradient.to(DEVICE))
    return {name: t.cpu() for name, t in results_on(case, backend, dtype).items()}


def close(found: dict, expected: dict, bound: float) -> None:
    for name in set(found) & set(expected):
        torch.testing.assert_close(
            found[name],
            expected[name].to(found[name].dtype),
            atol=bound,
            rtol=bound,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize(
    "path",
    [path if path.stem.endswith(TELLING) else slow(path) for path in GOLDENS],
    ids=lambda path: path.stem.removeprefix("dcnv3_op_"),
)
def test_goldens(path):
    case, expected = golden(path)
    expected.pop("output_official_f32grid")
    found = results(case, "triton", torch.float32)
    assert len(set(found) & set(expected)) >= 3  # one has no gradient of its offsets: kinks
    close(found, expected, 5e-5)


@pytest.mark.parametrize(
    "geometry",
    [
        slow({"groups": 2, "offset_scale": 1.3}),
        {"groups": 3, "kernel_size": (2, 3), "stride": (1, 2), "pad": (0, 2), "dilation": (2, 1)},
        slow({"groups": 1, "kernel_size": 5, "pad": 2, "remove_center": True}),
    ],
)
@pytest.mark.parametrize(
    "dtype", [slow(torch.float64), torch.float32, slow(torch.float16), torch.bfloat16]
)
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


@pytest.mark.parametrize("name", ["gradient", "mask", "product"])
def test_fixed_point_that_cannot_hold_its_terms_is_not_a_number(name):
    """As in floating point: a run must see that its loss has gone astray."""
    case = random_case((1, 4, 4, 16), groups=1)
    if name == "product":
        case.gradient.mul_(1e30)
        case.tensors["mask"].mul_(1e30)
    else:
        (case.gradient if name == "gradient" else case.tensors[name])[0, 0, 0, 0] = torch.nan
    torch.use_deterministic_algorithms(True)
    try:
        assert results(case, "triton")["grad_value"].isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_fixed_point_holds_all_that_can_fall_on_one_pixel():
    """Ones, which all points of all positions add to the first pixel."""
    torch.use_deterministic_algorithms(True)
    try:
        y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        inputs = {
            "value": torch.zeros(1, 4, 4, 8),
            "offset": -torch.stack((x, y), -1)[None],
            "mask": torch.ones(1, 4, 4, 1),
        }
        case = Case(inputs, {"groups": 1, "kernel_size": 1, "pad": 0}, torch.ones(1, 4, 4, 8))
        gradients = [results(case, "triton")["grad_value"][0, 0, 0]]
        tensors, gradient = attention_case([(2, 2)], n=1, queries=8, dtype=torch.float32)
        tensors[1].fill_(0.25), tensors[2].fill_(1.0), gradient.fill_(1.0)
        gradients.append(
            attention_results(
                lambda v, p, w: ms_deform_attn(v, [(2, 2)], p, w, backend="triton"),
                [tensor.to(DEVICE) for tensor in tensors],
                gradient.to(DEVICE),
            )[1][0, 0].cpu()
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert (gradients[0] == 16).all()
    assert (gradients[1] == 8 * 3).all()


def test_candidates_that_are_timed_leave_nothing_in_the_gradients(monkeypatch):
    """Each adds to the gradient of the values."""

    def time(call, quantiles):
        call(), call()
        return [1.0] * len(quantiles)

    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "configs", _configurations(kernel)[:2])
        monkeypatch.setattr(kernel, "cache", {})
        monkeypatch.setitem(vars(kernel), "do_bench", time)
    case = random_case((1, 3, 4, 8), groups=2)
    close(results(case, "triton"), results(case, "torch"), 2e-5)
    assert all(kernel.cache for kernel in KERNELS[:2])
    _attention_equals(SHAPES[1], torch.float32, 2e-4)


@pytest.mark.parametrize("dtype", [slow(torch.float64), torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_multi_scale_attention_equals_plain_pytorch(shape, dtype):
    _attention_equals(shape, dtype, 1e-11 if dtype == torch.float64 else 2e-4)


def _attention_equals(shape: dict, dtype: torch.dtype, bound: float) -> None:
    tensors, gradient = attention_case(**shape, dtype=dtype)
    found, expected = (
        attention_results(
            lambda v, p, w, b=backend: ms_deform_attn(v, shape["sizes"], p, w, backend=b),
            [tensor.to(device) for tensor in tensors],
            gradient.to(device),
        )
        for backend, device in (("triton", DEVICE), ("torch", "cpu"))
    )
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), right, atol=bound, rtol=bound)


@pytest.mark.parametrize("sizes", [[(1, 2)] * 9, [(1, 2), (32768, 1)], [(1, 32768)]])
def test_more_maps_or_longer_ones_than_there_is_room_for(sizes):
    value = torch.zeros(1, sum(h * w for h, w in sizes), 1, 1, device=DEVICE)
    places = torch.zeros(1, 1, 1, len(sizes), 1, 2, device=DEVICE)
    with pytest.raises(ValueError, match=r"has room for 8 maps with sides below 32768"):
        ms_deform_attn(value, sizes, places, places[..., 0], backend="triton")


def _configurations(kernel) -> list[triton.Config]:
    """Those that a GPU chooses from; in the interpreter, which unrolls nothing, small programs."""
    if not INTERPRETED:
        return kernel.configs
    return [
        triton.Config({"SPAN": span, "UNROLL": 1, "WARPS": 1}, num_warps=1) for span in (16, 32)
    ]


@pytest.mark.parametrize("number", [0, *map(slow, range(1, 2 if INTERPRETED else 6))])
@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.bfloat16)])
def test_every_candidate_computes_the_same(number, dtype, monkeypatch):
    """Many programs, the last of them partly empty; groups of one part and of several."""
    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "configs", [_configurations(kernel)[number]])
        monkeypatch.setattr(kernel, "cache", {})
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            for depth in (4, 24, 32):
                case = random_case((1, 3, 4, 3 * depth), groups=3, dtype=dtype)
                bound = 2e-5 if dtype == torch.float32 else 2e-2
                close(results(case, "triton"), results(case, "torch"), bound)
            if dtype == torch.float32:
                _attention_equals(SHAPES[3], dtype, 2e-4)
        finally:
            torch.use_deterministic_algorithms(False)


def test_64_bit_indices_compute_the_same(monkeypatch):
    case = random_case((2, 5, 6, 32), groups=2)
    narrow = results(case, "triton")
    monkeypatch.setattr(sampling_triton, "INDEX_LIMIT", 0)
    close(results(case, "triton"), narrow, 0.0 if INTERPRETED else 1e-5)
    _attention_equals(SHAPES[2], torch.float32, 2e-4)


def test_what_makes_indices_64_bit(monkeypatch):
    """The offsets, the output, or one image of the values; not all images together."""
    value, offset = torch.zeros(3, 4, 4, 16), torch.zeros(3, 2, 2, 18)
    out = torch.zeros(3, 2, 2, 16)
    window = dcnv3_triton.Window((3, 3), (2, 2), (1, 1), (1, 1), 1, 1.0, False)
    for limit, expected in ((256, "int64"), (257, "int32")):  # of an image
        monkeypatch.setattr(sampling_triton, "INDEX_LIMIT", limit)
        found = dcnv3_triton.settings(value, offset, out, window)
        assert str(found["INDEX"]) == expected
        assert str(found["UNSIGNED"]) == f"u{expected}"
    for tensors in ((value[:, :1, :1], offset, out), (value[:, :1, :1], offset[:, :1], out)):
        largest = max(tensors[1].numel(), tensors[2].numel())
        for limit, expected in ((largest, "int64"), (largest + 1, "int32")):
            monkeypatch.setattr(sampling_triton, "INDEX_LIMIT", limit)
            assert str(dcnv3_triton.settings(*tensors, window)["INDEX"]) == expected
    value, out = torch.zeros(1, 4, 2, 8), torch.zeros(1, 9, 16)
    for limit, expected in ((432, "int64"), (433, "int32")):  # of locations: 9 * 2 * 3 * 4 * 2
        monkeypatch.setattr(sampling_triton, "INDEX_LIMIT", limit)
        found = ms_deform_attn_triton.settings(value, torch.zeros(1, 9, 2, 3, 4, 2), out)
        assert str(found["INDEX"]) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_coordinates_at_the_edge_far_away_or_not_numbers(dtype):
    """The range is open: at -1 and at the size exactly nothing is read, and nothing changes it."""
    case = random_case((1, 4, 5, 32), groups=2, dtype=dtype, pad=1)
    shifts = [
        -1e30,
        -3e9,
        -2.0,
        -1.0,
        0.0,
        1.0,
        3.0,
        4.0,
        5.0,
        3e9,
        1e30,
        float("inf"),
        -float("inf"),
        float("nan"),
    ]
    offset = case.tensors["offset"]
    draw = torch.Generator().manual_seed(1)
    chosen = torch.randint(len(shifts), offset.shape, generator=draw)
    case.tensors["offset"] = torch.tensor(shifts).to(dtype)[chosen]
    expected, found = results(case, "torch"), results(case, "triton")
    assert all(torch.isfinite(tensor).all() for tensor in expected.values())
    close(found, expected, 2e-2 if dtype == torch.bfloat16 else 2e-5)


def test_told_to_be_deterministic_nothing_is_timed(monkeypatch):
    """Which candidate is fastest depends on the moment, and candidates differ in the last bits."""

    def refuse(*_, **__):
        raise AssertionError("timed")

    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "run", refuse)
    with pytest.raises(Exception, match="timed"):
        results(random_case((1, 4, 4, 16), groups=1), "triton")
    torch.use_deterministic_algorithms(True)
    try:
        results(random_case((1, 4, 4, 16), groups=1), "triton")
        _attention_equals(SHAPES[0], torch.float32, 2e-4)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_tensors_on_another_gpu_than_the_current_one():
    case = random_case((1, 4, 4, 16), groups=1)
    expected = results_on(case, "torch")
    tensors = {name: tensor.to("cuda:1") for name, tensor in case.tensors.items()}
    found = results_on(Case(tensors, case.geometry, case.gradient.to("cuda:1")), "triton")
    close({name: tensor.cpu() for name, tensor in found.items()}, expected, 2e-5)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter adds in one order")
def test_a_gpu_told_to_be_deterministic_is():
    case = random_case((4, 28, 28, 64), groups=4, spread=3.0, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (results(case, "triton") for _ in range(4))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)

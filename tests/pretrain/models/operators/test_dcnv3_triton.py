"""DCNv3 in Triton: through the interpreter against the goldens, and compiled for GPUs that are not
here."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.pretrain.models.operators.dcnv3_cases import GOLDENS, golden, random_case, results

pytest.importorskip("triton")


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    """The kernels are read when their module is first imported, for the interpreter or for good."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("pretrain.models.operators.dcnv3_triton")
        yield


def close(found: dict, expected: dict, bound: float) -> None:
    for name in found:
        torch.testing.assert_close(
            found[name], expected[name].to(found[name].dtype), atol=bound, rtol=bound,
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem.removeprefix("dcnv3_op_"))
def test_goldens(path):
    case, expected = golden(path)
    expected.pop("output_official_f32grid")
    close(results(case, "triton", torch.float32), expected, 5e-5)


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


COMPILE = """
import json, re, sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pretrain.models.operators import dcnv3_triton
from pretrain.models.operators.window import Window

window = Window((3, 3), (1, 1), (1, 1), (1, 1), 4, 1.0, False)
value = torch.empty(2, 56, 56, 64, dtype=torch.bfloat16, device="meta")
found = []
for kernel, fixed in (("_forward_kernel", None), ("_backward_kernel", False),
                      ("_backward_kernel", True)):
    function = getattr(dcnv3_triton, kernel).fn
    constants = dcnv3_triton._constants(value, window) | {"BLOCK": 64}
    constants |= {} if fixed is None else {"FIXED": fixed}
    pointers = dict.fromkeys(("value", "offset", "mask", "out", "gradient", "offset_gradient",
                              "mask_gradient"), "*bf16")
    pointers |= {"value_gradient": "*i64" if fixed else "*fp32", "scale": "*fp64"}
    names = function.arg_names
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    aligned = [i for i, n in enumerate(names) if n in pointers or n == "channels"]
    source = ASTSource(
        fn=function, signature=signature,
        constexprs={(names.index(name),): constant for name, constant in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    assembly = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32)).asm["ptx"]
    accesses = re.findall(r"(?:ld|red|atom)[.]global[.a-z0-9]*", assembly)
    found.append([kernel, fixed, sorted(set(accesses))])
print(json.dumps(found))
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_gpus_with_wide_accesses(capability, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)], env=environment, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    forward, backward, fixed = json.loads(done.stdout.splitlines()[-1])
    # Channels of a pixel are read in pieces of 16 bytes.
    assert all("ld.global.v4.b32" in kernel[2] for kernel in (forward, backward, fixed))
    scatters = [access for access in backward[2] if access.startswith(("red", "atom"))]
    assert scatters and all("f32" in access for access in scatters), scatters
    if capability >= 90:
        assert any("v4.f32" in access for access in scatters), scatters
    assert any("u64" in access for access in fixed[2] if access.startswith(("red", "atom")))

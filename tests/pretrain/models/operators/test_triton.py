"""The operators in Triton: in its interpreter, and compiled for GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

INTERPRETED = Path(__file__).with_name("interpreted_triton.py")


def test_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(INTERPRETED)], env=environment,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


COMPILE = """
import json, re, sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pretrain.models.operators import dcnv3_triton, ms_deform_attn_triton
from pretrain.models.operators.sampling_triton import constants
from pretrain.models.operators.window import Window

value = torch.empty(2, 56, 56, 64, dtype=torch.bfloat16, device="meta")
window = Window((3, 3), (1, 1), (1, 1), (1, 1), 4, 1.0, False)
module, settings = {
    "dcnv3": (dcnv3_triton, dcnv3_triton._constants(value, window)),
    "ms_deform_attn": (ms_deform_attn_triton, constants(value, 32) | {"MAPS": 4, "POINTS": 4}),
}[sys.argv[2]]
found = []
for kernel, fixed in (("_forward_kernel", None), ("_backward_kernel", False),
                      ("_backward_kernel", True)):
    function = getattr(module, kernel).fn
    fixed_values = settings | {"WIDTH": 4, "WARPS": 4, "UNROLL": 3} | ({} if fixed is None else {"FIXED": fixed})
    pointers = dict.fromkeys((
        "value", "offset", "mask", "locations", "weights", "out", "gradient", "offset_gradient",
        "mask_gradient", "location_gradient", "weight_gradient",
    ), "*bf16")
    pointers |= {"value_gradient": "*i64" if fixed else "*fp32", "scale": "*fp64", "table": "*i64"}
    names = function.arg_names
    signature = {n: "constexpr" if n in fixed_values else pointers.get(n, "i32") for n in names}
    # What Triton finds to be multiples of 16 when it is called.
    aligned = [i for i, n in enumerate(names) if n in pointers or n == "channels"]
    source = ASTSource(
        fn=function, signature=signature,
        constexprs={(names.index(name),): value for name, value in fixed_values.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    assembly = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32)).asm["ptx"]
    accesses = re.findall(r"(?:ld|red|atom)[.]global[.a-z0-9]*", assembly)
    found.append([kernel, fixed, sorted(set(accesses))])
print(json.dumps(found))
"""


@pytest.mark.parametrize("operator", ["dcnv3", "ms_deform_attn"])
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_gpus_with_wide_accesses(capability, operator, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability), operator], env=environment,
        capture_output=True, text=True, timeout=300,
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

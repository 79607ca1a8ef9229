"""The same bits in every run on GPUs: what a recipe's `deterministic: true` switches on.

torch's switch makes its operators choose fixed orders of addition or raise, attention included:
flash attention adds in order, the memory-efficient kernel does not divide keys, cuDNN's is passed
over. It chooses fixed convolutions in cuDNN, and DCNv3 and deformable attention look at it too
(`models.operators`). What torch does not reach, libraries read from the environment.
"""

import os

import torch

# Variable -> values that are deterministic, the one that is set where there is none first.
_ENVIRONMENT = {
    # Without a workspace of its own for each stream, cuBLAS divides sums as memory allows.
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    # NVLink SHARP adds up in the switches, in an order that differs from call to call.
    "NCCL_NVLS_ENABLE": ("0",),
}


def be_deterministic(on_gpu: bool) -> None:
    """Make this process deterministic; before it uses a GPU or makes a process group.

    On a CPU nothing that this project computes changes: its operators have a fixed order anyway.

    Raises:
        RuntimeError: the environment asks for the contrary.
    """
    for name, values in _ENVIRONMENT.items() if on_gpu else ():
        if os.environ.setdefault(name, values[0]) not in values:
            raise RuntimeError(
                f"deterministic=true needs {name}={' or '.join(values)}, but the environment says "
                f"{os.environ[name]!r}: unset it, or set deterministic=false"
            )
    torch.use_deterministic_algorithms(True)
    # It would write not-a-numbers into all new memory, at the cost of a pass. Nothing here reads
    # memory before it has written it (tests/distributed/test_determinism.py).
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False  # which convolution is fastest depends on the moment

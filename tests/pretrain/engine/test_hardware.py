"""What a machine cannot do is refused before DeepSpeed starts."""

import pytest
import torch

from pretrain.engine.hardware import require_hardware
from pretrain.engine.run_record import RunDirError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PLAIN = {"zero_optimization": {"stage": 3}}
NVME = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}


def gpu_of(monkeypatch, capability: int) -> None:
    """As torch answers on such a GPU: it calls emulation support, unless asked not to."""
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or capability >= 8,
    )


def test_bf16_is_not_emulated(monkeypatch):
    gpu_of(monkeypatch, 8)
    require_hardware("bf16", PLAIN, GPU)
    gpu_of(monkeypatch, 7)
    for precision in ("fp16", "fp32"):
        require_hardware(precision, PLAIN, GPU)
    require_hardware("bf16", PLAIN, CPU)
    with pytest.raises(RunDirError, match=r"bf16 needs a GPU.*deepspeed=zero1_fp16"):
        require_hardware("bf16", PLAIN, GPU)


def test_fp16_needs_a_gpu():
    require_hardware("fp16", PLAIN, GPU)
    require_hardware("bf16", PLAIN, CPU)
    with pytest.raises(RunDirError, match="fp16 needs a GPU"):
        require_hardware("fp16", PLAIN, CPU)


def test_nvme_needs_the_operator(monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    gpu_of(monkeypatch, 8)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: True)
    require_hardware("bf16", NVME, GPU)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    require_hardware("bf16", PLAIN, GPU)
    with pytest.raises(RunDirError, match="async_io"):
        require_hardware("bf16", NVME, GPU)

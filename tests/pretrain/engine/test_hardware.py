"""What a machine cannot do is refused before DeepSpeed starts."""

import pytest
import torch

from pretrain.engine.run_dir import RunDirError
from pretrain.engine.trainer import require_hardware

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PLAIN = {"zero_optimization": {"stage": 3}}
NVME = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}


def test_fp16_needs_a_gpu():
    require_hardware("fp16", PLAIN, GPU)
    require_hardware("bf16", PLAIN, CPU)
    with pytest.raises(RunDirError, match="fp16 needs a GPU"):
        require_hardware("fp16", PLAIN, CPU)


def test_nvme_needs_the_operator(monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: True)
    require_hardware("bf16", NVME, GPU)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    require_hardware("bf16", PLAIN, GPU)
    with pytest.raises(RunDirError, match="async_io"):
        require_hardware("bf16", NVME, GPU)

"""What a recipe asks of this machine that it may not have."""

import torch

from pretrain.engine.run_record import RunDirError


def require_hardware(precision: str, config: dict, device: torch.device) -> None:
    """Refuse what this machine cannot do before DeepSpeed fails half-way into it.

    Raises:
        RunDirError: fp16 without a GPU, bf16 on one that would emulate it, or weights on NVMe
            without DeepSpeed's operator for it.
    """
    if precision == "fp16" and device.type == "cpu":
        raise RunDirError("precision=fp16 needs a GPU; on a CPU use bf16 or fp32")
    # DeepSpeed asks torch, which also says yes where bf16 is emulated: slow, and not in Triton.
    if (
        precision == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise RunDirError(
            "precision=bf16 needs a GPU that computes it (A100, RTX 30 and newer): set "
            "precision=fp16 and one of the *_fp16 files (deepspeed=zero1_fp16), or precision=fp32"
        )
    offload = config["zero_optimization"].get("offload_param", {})
    if offload.get("device") == "nvme":
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise RunDirError(
                "offload_param.device=nvme needs DeepSpeed's async_io operator: install libaio's "
                "headers and a C++ compiler (`ds_report` shows what is missing), or offload to cpu"
            )

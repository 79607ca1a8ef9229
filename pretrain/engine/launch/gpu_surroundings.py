"""What a run on GPUs sets around itself before CUDA and NCCL start, and whose GPU is whose.

Variables that the user has set are left alone.
"""

import os
import platform
import socket
from collections.abc import MutableMapping
from pathlib import Path

import torch
import torch.distributed as dist

TRACE_PREFIX = "nccl_trace_rank_"  # of the flight recorder's files, one a rank


def set_gpu_defaults(trace_dir: Path | None, environment: MutableMapping[str, str]) -> None:
    """Set what torch reads when its allocator and process group start.

    Args:
        trace_dir: where a collective that times out leaves what each rank was doing; None: where
            torch puts it.
        environment: the process's.
    """
    # A step's layers, image sizes and captions ask for blocks of many sizes; segments that grow
    # keep what was freed from lying between them unused. Under WSL the first allocation would fail
    # (pytorch issue 192330). torch 2.9 overlooks the newer name (issue 183387), and later versions
    # call the older one deprecated.
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    if not environment.keys() & set(names) and "microsoft" not in platform.release().lower():
        environment[names[torch.__version__ >= (2, 10)]] = "expandable_segments:True"

    # The flight recorder: the last collectives of each rank, on file when one of them times out.
    _set_unless_set(environment, ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), "2000")
    _set_unless_set(environment, ("TORCH_NCCL_DUMP_ON_TIMEOUT",), "1")
    if trace_dir is not None:
        files = str(trace_dir.absolute() / TRACE_PREFIX)
        _set_unless_set(
            environment, ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"), files
        )
    # torchrun says 1, which ends the process too, but aborts NCCL first and may lose the files
    # (pytorch issue 121055); 3 is what torch does by itself.
    handling = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    if "TORCHELASTIC_RUN_ID" in environment and environment.get(handling) == "1":
        environment[handling] = "3"


def _set_unless_set(
    environment: MutableMapping[str, str], names: tuple[str, ...], value: str
) -> None:
    """Set the first of the names of one setting, unless one of them is there."""
    if not environment.keys() & set(names):
        environment[names[0]] = value


def keep_float32() -> None:
    """Let convolutions in float32 do what matrix products do, which torch has apart.

    By itself torch multiplies matrices in float32 and lets cuDNN round to TF32, 10 bits of
    mantissa: not what `precision: fp32` is for. TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 means both.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32


def claim_gpu(store: dist.Store, rank: int, uuid: str) -> None:
    """Say that this rank computes on a GPU; NCCL takes one rank a GPU.

    Args:
        store: common to all ranks.
        uuid: the GPU's.

    Raises:
        RuntimeError: another rank has claimed it.
    """
    claim = f"rank {rank} on {socket.gethostname()}"
    holder = store.compare_set(f"GPU {uuid}", "", claim).decode()
    if holder != claim:
        raise RuntimeError(
            f"{claim}: its GPU ({uuid}) is the GPU of {holder} too: start at most one process per "
            "GPU, and let each see all GPUs of its node or another one (CUDA_VISIBLE_DEVICES, "
            f"here {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}; srun --gpus-per-task=1), "
            "or set DS_ACCELERATOR=cpu"
        )

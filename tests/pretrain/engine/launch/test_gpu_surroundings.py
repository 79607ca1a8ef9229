"""What a run sets before CUDA and NCCL start, and that no two ranks take one GPU.

There is no GPU: torch's answers about it are stood in for, its stores and settings are real.
"""

import os
import platform
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pretrain.engine.launch import gpu_surroundings
from pretrain.engine.launch.gpu_surroundings import claim_gpu, keep_float32, set_gpu_defaults
from tests.distributed.launch import ROOT, free_port

DEFAULTS = {
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_FR_DUMP_TEMP_FILE": "/run/logs/nccl_trace_rank_",
}


def defaults(**environment: str) -> dict[str, str]:
    set_gpu_defaults(Path("/run/logs"), environment)
    return environment


@pytest.fixture(autouse=True)
def native_linux(monkeypatch):
    monkeypatch.setattr(platform, "release", lambda: "6.1.0-18-amd64")
    version = torch.torch_version.TorchVersion
    monkeypatch.setattr(torch, "__version__", version("2.10.0+cu128"))


def test_what_is_set_by_default():
    assert defaults() == DEFAULTS
    environment: dict[str, str] = {}
    set_gpu_defaults(None, environment)
    assert "TORCH_FR_DUMP_TEMP_FILE" not in environment


@pytest.mark.parametrize(
    "name",
    [
        *DEFAULTS,
        "PYTORCH_CUDA_ALLOC_CONF",
        "TORCH_NCCL_TRACE_BUFFER_SIZE",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
    ],
)
def test_the_users_values_win_under_either_name(name):
    environment = defaults(**{name: "theirs"})
    assert environment[name] == "theirs"
    assert len(environment) == len(DEFAULTS)  # nothing beside it says the contrary


def test_no_growing_segments_where_they_fail(monkeypatch):
    monkeypatch.setattr(platform, "release", lambda: "6.6.87.2-microsoft-standard-WSL2")
    assert not any("ALLOC_CONF" in name for name in defaults())


def test_the_allocators_name_that_torch_2_9_reads(monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1+cu128"))
    assert defaults()["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


def test_torchruns_error_handling_does_not_lose_the_files():
    handling = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    assert defaults(TORCHELASTIC_RUN_ID="run", **{handling: "1"})[handling] == "3"
    assert defaults(TORCHELASTIC_RUN_ID="run", **{handling: "0"})[handling] == "0"
    assert defaults(**{handling: "1"})[handling] == "1"


@pytest.fixture
def tf32_settings():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("asked_for", [False, True])
def test_convolutions_round_float32_only_if_matrix_products_do(asked_for, tf32_settings):
    torch.backends.cudnn.allow_tf32 = not asked_for
    torch.backends.cuda.matmul.allow_tf32 = asked_for
    keep_float32()
    assert torch.backends.cudnn.allow_tf32 is asked_for


def test_two_ranks_on_one_gpu(monkeypatch):
    monkeypatch.setattr(gpu_surroundings.socket, "gethostname", lambda: "node7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    store = dist.TCPStore("127.0.0.1", free_port(), 1, True, timedelta(seconds=20))
    store = dist.PrefixStore("attempt", store)
    claim_gpu(store, 0, "GPU-a")
    claim_gpu(store, 1, "GPU-b")
    with pytest.raises(
        RuntimeError,
        match=(
            r"rank 2 on node7: its GPU \(GPU-a\) is the GPU of rank 0 on node7 too:.*here 0.*=cpu"
        ),
    ):
        claim_gpu(store, 2, "GPU-a")


# A rank as a job scheduler starts it that shows each task one GPU. What torch answers is stood in
# for; the process group is gloo's, and after its start the process ends as NCCL's watchdog ends it.
RANK = """
import os, pathlib, sys, types
import torch, deepspeed
from pretrain.engine.control.control import StopSignals
from pretrain.start import train_recipe
from pretrain.recipe.load import load_recipe
from pretrain.train import enter

run_dir, uuid = sys.argv[1:]
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(uuid=uuid)

def allocator_grows():
    if hasattr(torch._C, "_cuda_memorySnapshot"):  # torch for GPUs
        return torch._C._cuda_memorySnapshot(None)["allocator_settings"]["expandable_segments"]
    read = getattr(torch._C, "_accelerator_getAllocatorSettings", None)  # of torch 2.13
    names = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
    said = read() if read else next(os.environ[name] for name in names if name in os.environ)
    return said == "expandable_segments:True"

def start_cuda(device):
    print("device", device, "grows" if allocator_grows() else "does not", flush=True)

def start_nccl(dist_backend, **_):
    torch.distributed.init_process_group("gloo")
    print(dist_backend, os.environ["LOCAL_RANK"], os.environ["TORCH_FR_DUMP_TEMP_FILE"], flush=True)
    try:
        torch.distributed.barrier()  # both are here
    finally:
        os.abort()

torch.cuda.set_device, deepspeed.init_distributed = start_cuda, start_nccl
recipe = load_recipe("digits_demo", ["run_dir=" + run_dir, "threads_per_rank=1"])
owner = enter(pathlib.Path(run_dir), take_over=False)
os._exit(train_recipe(recipe, False, StopSignals(), owner))
"""


@pytest.fixture
def start_ranks(tmp_path):
    """Starts a rank for each GPU; their output is in `rank_N.txt`."""
    ranks: list[subprocess.Popen] = []

    def start(*uuids: str) -> list[subprocess.Popen]:
        port = free_port()
        inherited = {
            name: value
            for name, value in os.environ.items()
            if "ALLOC_CONF" not in name and name not in ("PYTHONFAULTHANDLER", "DS_ACCELERATOR")
        }
        for rank, uuid in enumerate(uuids):
            with (tmp_path / f"rank_{rank}.txt").open("w") as out:
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-c", RANK, str(tmp_path / "run"), uuid],
                        cwd=ROOT,
                        env=inherited
                        | {
                            "RANK": str(rank),
                            "LOCAL_RANK": str(rank),
                            "WORLD_SIZE": str(len(uuids)),
                            "LOCAL_WORLD_SIZE": str(len(uuids)),
                            "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": str(port),
                        },
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )
        return ranks

    yield start
    for rank in ranks:
        rank.kill()
        rank.wait()


@pytest.mark.slow
def test_ranks_that_see_one_gpu_each(start_ranks, tmp_path):
    for number, rank in enumerate(start_ranks("GPU-a", "GPU-b")):
        assert rank.wait(timeout=120) == -signal.SIGABRT
        text = (tmp_path / f"rank_{number}.txt").read_text()
        assert "device cuda:0 grows" in text  # set before CUDA starts
        assert f"nccl 0 {tmp_path}/run/logs/nccl_trace_rank_" in text
        assert "Fatal Python error: Aborted" in text and "in train_recipe" in text


def test_ranks_that_see_the_same_gpu(start_ranks, tmp_path):
    ranks = start_ranks("GPU-a", "GPU-a")
    end = time.monotonic() + 120
    while all(rank.poll() is None for rank in ranks) and time.monotonic() < end:
        time.sleep(0.1)
    texts = [(tmp_path / f"rank_{number}.txt").read_text() for number in (0, 1)]
    refused = [number for number, text in enumerate(texts) if "GPU of rank" in text]
    assert len(refused) == 1 and ranks[refused[0]].wait(timeout=20) == 1
    note = tmp_path / f"run/control/failure_rank_0000{refused[0]}.json"
    assert "its GPU (GPU-a) is the GPU of rank" in note.read_text()

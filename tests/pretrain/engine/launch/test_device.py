"""Which device a rank takes: the machine's GPUs are stood in for, nothing is computed."""

import pytest
import torch

from pretrain.engine.launch.distributed import choose_device


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)


def test_a_gpu_of_its_own_for_each_local_rank(two_gpus):
    assert [choose_device(rank, rank % 2) for rank in (4, 5)] == [
        torch.device("cuda", 0),
        torch.device("cuda", 1),
    ]
    with pytest.raises(RuntimeError, match=r"rank 6: local rank 2 has no GPU.*shows 2;.*=cpu"):
        choose_device(6, 2)


def test_the_only_gpu_that_a_task_sees(two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert [choose_device(rank, rank) for rank in (0, 3)] == [torch.device("cuda", 0)] * 2


def test_the_cpu_where_it_is_asked_for(two_gpus, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert choose_device(6, 2) == torch.device("cpu")
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    with pytest.raises(RuntimeError, match="DS_ACCELERATOR=xpu"):
        choose_device(0, 0)


def test_an_empty_variable_asks_for_nothing(two_gpus, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "")
    assert choose_device(1, 1) == torch.device("cuda", 1)


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert choose_device(3, 3) == torch.device("cpu")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(RuntimeError, match=r"rank 1: DS_ACCELERATOR=cuda, but torch .* no GPU"):
        choose_device(1, 1)

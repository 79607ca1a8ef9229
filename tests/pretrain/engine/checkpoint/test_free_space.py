"""The room for two checkpoints, and evaluations that a stop cuts off."""

from types import SimpleNamespace

import pytest
import torch

from pretrain.engine.checkpoint import free_space
from pretrain.engine.checkpoint.free_space import checkpoint_bytes, space_warning
from pretrain.evaluator import EvaluationStopped, Evaluator


def test_too_little_room_is_said_with_both_numbers(tmp_path, monkeypatch):
    module = torch.nn.Linear(1024, 1024)
    module.bias.requires_grad = False
    wanted = checkpoint_bytes(module, "adamw", averaged=True)
    assert wanted == 2**20 * 4 * 4 + 1024 * 4
    for free, said in ((2 * wanted, False), (2 * wanted - 1, True)):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(free_space.shutil, "disk_usage", lambda _, usage=usage: usage)
        assert bool(space_warning(tmp_path, wanted)) == said
    for part in (str(tmp_path), "32.0 MiB free", "16.0 MiB", "room for two"):
        assert part in space_warning(tmp_path, wanted)


def test_an_evaluation_ends_between_two_batches(group_of_one):
    asked = iter([False, False, True])
    evaluator = Evaluator.__new__(Evaluator)
    evaluator.stop_asked = lambda: next(asked)
    evaluator.ranks = SimpleNamespace(device=torch.device("cpu"))
    batches = evaluator._until_stopped(iter(range(9)))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(EvaluationStopped):
        next(batches)

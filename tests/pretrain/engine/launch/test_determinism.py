"""The deterministic switch: what it asks of the environment, of torch and of the reader."""

import os

import pytest
import torch

from pretrain import check
from pretrain.engine.launch.determinism import be_deterministic
from pretrain.recipe.load import load_recipe

VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_NVLS_ENABLE")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_on_a_gpu():
    be_deterministic(on_gpu=True)
    assert [os.environ[name] for name in VARIABLES] == [":4096:8", "0"]
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize(
    "name, value, other",
    [
        (VARIABLES[0], ":0:0", ":16:8"),
        (VARIABLES[1], "1", "0"),
    ],
)
def test_an_environment_that_asks_for_the_contrary(monkeypatch, name, value, other):
    monkeypatch.setenv(name, other)
    be_deterministic(on_gpu=True)
    assert os.environ[name] == other
    torch.use_deterministic_algorithms(False)
    monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=f"deterministic=true needs {name}=.*{value}.*unset it"):
        be_deterministic(on_gpu=True)
    assert not torch.are_deterministic_algorithms_enabled()
    be_deterministic(on_gpu=False)  # no library there that reads it
    assert torch.are_deterministic_algorithms_enabled()


def test_the_check_says_what_it_does():
    for overrides, lines in ((["deterministic=true"], 1), ([], 0)):
        recipe = load_recipe("git_digits", overrides)
        found = [finding.text for finding in check.report(recipe, 1, 1)]
        assert sum(line.startswith("deterministic: the same bits") for line in found) == lines

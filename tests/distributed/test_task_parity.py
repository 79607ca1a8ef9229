"""Several tasks under every ZeRO stage, with and without offload, against plain PyTorch.

All cells of one world run in one launch, for start-up is what costs. Under AdamW nothing has to be
excluded: the layer that nobody uses has gradient exactly zero everywhere, and decays alike.
"""

import json

import pytest
import torch

from pretrain.models.init import initialise
from tests.distributed.launch import run_ranks, tails
from tools.parity_cells import OPTIMIZERS, SEED, Cell, all_cells, faults, plain_run
from tools.parity_model import parity_model

CELLS = all_cells()
FP32 = [cell for cell in CELLS if cell.precision == "fp32"]


@pytest.fixture(
    scope="module",
    params=[2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)],
    ids=lambda world: f"world{world}",
)
def launched(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(f"tasks_world{request.param}")
    names = [cell.name for cell in CELLS]
    codes = run_ranks("tools.parity_cells", [out, *names], request.param, out, timeout_s=800)
    assert codes == [0] * request.param, tails(out)
    return out


@pytest.fixture(scope="module")
def references():
    torch.set_num_threads(1)
    return {(t, o): plain_run(t, o) for t in ("one", "all", "mixed") for o in OPTIMIZERS}


@pytest.mark.parametrize("cell", FP32, ids=lambda cell: cell.name)
def test_fp32_equals_plain_pytorch(launched, references, cell):
    assert faults(cell, launched, references[cell.tasks, cell.optimizer]) == []


def test_bf16_losses_agree_between_stages(launched):
    results = json.loads((launched / "cells.json").read_text())
    runs = [results[cell.name]["losses"] for cell in CELLS if cell.precision == "bf16"]
    assert len(runs) == 6
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=1e-3, atol=0)


def test_the_comparison_can_fail(launched, references):
    """Another optimizer's reference does not pass for this one, and the weights do move."""
    cell = Cell(3, True, 1, "all", "sgd")
    assert len(faults(cell, launched, references["one", "sgd"])) > 20
    for (_, _), reference in references.items():
        start = parity_model()
        initialise(start, SEED)
        moved = max(float((reference.weights[n] - p.detach().flatten()).abs().max())
                    for n, p in start.named_parameters() if p.requires_grad)
        assert moved > 0.05
        assert min(reference.norms) > 1e-3


def test_without_the_guard_the_matrix_shows_the_defect(tmp_path, references):
    """What the guard is for; once this fails, DeepSpeed has mended it and the guard may go."""
    cells = [Cell(stage, offload, 1, "all", "sgd")
             for stage, offload in ((2, False), (2, True), (3, False), (3, True))]
    arguments = [tmp_path, "--no-guard", *(cell.name for cell in cells)]
    assert run_ranks("tools.parity_cells", arguments, 2, tmp_path) == [0, 0], tails(tmp_path)
    wrong = [bool(faults(cell, tmp_path, references["all", "sgd"])) for cell in cells]
    assert wrong == [False, True, True, True]

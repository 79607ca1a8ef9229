"""Several tasks under every ZeRO stage, with and without offload, against plain PyTorch.

All cells of one world run in one launch, for start-up is what costs: those that imply the others in
`make test`, all of them in `make test-slow`. Under AdamW nothing has to be excluded: the layer that
nobody uses has gradient exactly zero everywhere, and decays alike.
"""

import json

import pytest
import torch

from pretrain.models.init import initialise
from tests.distributed.launch import run_ranks, tails
from tools.selfcheck.parity_cells import (
    OPTIMIZERS,
    SEED,
    Cell,
    all_cells,
    faults,
    plain_run,
    telling_cells,
)
from tools.selfcheck.parity_model import parity_model

BARE = [
    Cell(stage, offload, 3, "all", "sgd")
    for stage, offload in ((2, False), (2, True), (3, False), (3, True))
]
"""Cells that also run without the guard."""


@pytest.fixture(
    scope="module",
    params=[
        (2, telling_cells()),
        *(pytest.param((world, all_cells()), marks=pytest.mark.slow) for world in (1, 2, 4)),
    ],
    ids=["world2", "world1-all", "world2-all", "world4-all"],
)
def launched(request, tmp_path_factory):
    world, cells = request.param
    out = tmp_path_factory.mktemp(f"tasks_world{world}")
    arguments = [out, *(cell.name for cell in cells), "--no-guard", *(cell.name for cell in BARE)]
    codes = run_ranks("tools.selfcheck.parity_cells", arguments, world, out, timeout_s=800)
    assert codes == [0] * world, tails(out)
    return out, cells


@pytest.fixture(scope="module")
def references():
    torch.set_num_threads(1)
    return {(t, o): plain_run(t, o) for t in ("one", "all", "mixed") for o in OPTIMIZERS}


def test_fp32_equals_plain_pytorch(launched, references):
    out, cells = launched
    fp32 = [cell for cell in cells if cell.precision == "fp32"]
    found = {c.name: faults(c, out, references.get((c.tasks, c.optimizer))) for c in fp32}
    assert {name: said for name, said in found.items() if said} == {}
    modes = {(stage, offload) for stage in (1, 2, 3) for offload in (False, True)}
    assert {(cell.stage, cell.offload) for cell in fp32} == modes


def test_bf16_losses_agree_between_stages(launched):
    out, cells = launched
    results = json.loads((out / "cells.json").read_text())
    runs = [results[cell.name] for cell in cells if cell.precision == "bf16"]
    assert len(runs) == 6
    for run in runs:
        assert run["wrong"] == []
        torch.testing.assert_close(run["losses"], runs[0]["losses"], rtol=1e-3, atol=0)


def test_the_comparison_can_fail(launched, references):
    """Another optimizer's reference does not pass for this one, and the weights do move."""
    cell = Cell(3, True, 3, "all", "sgd")
    assert len(faults(cell, launched[0], references["one", "sgd"])) > 20
    for (_, _), reference in references.items():
        start = parity_model()
        initialise(start, SEED)
        moved = max(
            float((reference.weights[n] - p.detach().flatten()).abs().max())
            for n, p in start.named_parameters()
            if n in reference.weights
        )
        assert moved > 0.05
        assert min(reference.norms) > 1e-3


def test_without_the_guard_the_matrix_shows_the_defects(launched, references):
    """What the guard is for; once this fails, DeepSpeed has mended it and the guard may go.

    Under ZeRO-2 with offload one of the defects is of the late layer: sums of the window before.
    """
    out = launched[0] / "no_guard"
    found = [faults(cell, out, references["all", "sgd"]) for cell in BARE]
    assert [bool(said) for said in found] == [False, True, True, True]
    assert any(".late." in line for line in found[1])

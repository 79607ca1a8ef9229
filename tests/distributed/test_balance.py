"""MT-AdamW, per-task clipping and moving averages under ZeRO 1, 2, 3 on two ranks.

The references: the goldens, and the rules written down again for one process and whole tensors.
"""

import copy
import functools
import json

import pytest
import torch
from safetensors.torch import load_file

from pretrain.models.init import initialise
from pretrain.optim.ema import decay_at
from pretrain.optim.groups import parameter_groups
from tests.distributed.balance_worker import (
    EMA,
    OPTIMIZERS,
    SEED,
    STAGES,
    STEPS,
    ZERO_GOLDENS,
    cell_name,
    toy_cells,
)
from tests.distributed.launch import run_ranks, tails
from tests.distributed.toy import toy_batch
from tests.distributed.two_tasks import RATIOS, task_of, two_task_model
from tests.pretrain.optim.test_mt_adamw import read_golden


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    out = tmp_path_factory.mktemp("balance")
    codes = run_ranks("tests.distributed.balance_worker", [out, "toy", "goldens3"], 2, out)
    assert codes == [0, 0], tails(out)
    return out, json.loads((out / "cells.json").read_text())


@pytest.fixture(scope="module")
def launched_goldens(launched, tmp_path_factory):
    """Folder of the goldens under a stage of ZeRO; stages 1 and 2 have a launch of their own."""

    @functools.cache
    def folder(stage: int):
        if stage == 3:
            return launched[0]
        out = tmp_path_factory.mktemp("goldens")
        arguments = [out, f"goldens{stage}"]
        assert run_ranks("tests.distributed.balance_worker", arguments, 2, out) == [0, 0]
        return out

    return folder


@pytest.mark.parametrize("stage", [*(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2)), 3])
@pytest.mark.parametrize("path", ZERO_GOLDENS, ids=lambda path: path.stem)
def test_goldens_under_zero(launched_goldens, path, stage):
    hyper, golden = read_golden(path)
    weights = load_file(launched_goldens(stage) / f"{path.stem}_zero{stage}.safetensors")
    assert set(weights) == set(hyper["groups"])
    for name, values in weights.items():
        expected = (
            golden[f"param.{name}"].flatten(1)
            if name != "logit_scale"
            else golden[f"param.{name}"][:, None]
        )
        torch.testing.assert_close(values, expected.float(), rtol=2e-5, atol=1e-7)


class Reference:
    """The rules as published, on whole tensors in one process."""

    def __init__(self, optimizer: str) -> None:
        self.settings = OPTIMIZERS[optimizer]
        self.model = two_task_model()
        initialise(self.model, SEED)
        self.groups = parameter_groups(self.model, self.settings)
        self.moments = {
            p: (torch.zeros_like(p), torch.zeros_like(p)) for g in self.groups for p in g["params"]
        }
        self.average = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.norms, self.sizes = [], []

    def run(self) -> "Reference":
        for step in range(STEPS):
            self.model.zero_grad()
            batch = toy_batch(step)
            totals = {"images": batch["valid"].sum().float()}
            self.model(task_of(step), "undivided", batch, totals)["loss"].backward()
            self.step(step)
        return self

    @torch.no_grad()
    def heldout_losses(self, averaged: bool) -> list[float]:
        model = copy.deepcopy(self.model)
        if averaged:
            model.load_state_dict(self.average, strict=False)  # a tied weight stands there once
        batch = toy_batch(1000)
        totals = {"images": batch["valid"].sum().float()}
        return [model(task, "undivided", batch, totals)["loss"].item() for task in RATIOS]

    @torch.no_grad()
    def step(self, step: int) -> None:
        settings, task = self.settings, task_of(step)
        grads = {p: torch.zeros_like(p) if p.grad is None else p.grad for p in self.moments}
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        if settings.kind == "mt_adamw":
            factor = settings.omega.get(task, 1.0) / norm
            c = min(1 / RATIOS[task], settings.max_compensation)
        else:
            clip = settings.task_clip_norms.get(task, settings.clip_norm)
            factor, c = min(1.0, clip / (norm + 1e-6)), 1.0
        squares = 0.0
        for group in self.groups:
            lr = settings.lr * group["lr_multiplier"] / (1 + step / 10)
            for p in group["params"]:
                m, v = self.moments[p]
                g, (b1, b2) = grads[p] * factor, settings.betas
                m.mul_(b1).add_(g, alpha=(1 - b1) * c)
                v.mul_(b2).add_(g * g, alpha=(1 - b2) * c)
                root = (v / (1 - b2 ** (step + 1))).sqrt() + settings.eps
                move = m / (1 - b1 ** (step + 1)) / root
                p.mul_(1 - lr * group["weight_decay"]).sub_(lr * move)
                squares += move.double().square().sum().item()
        self.norms.append(norm.item())
        self.sizes.append((squares / sum(p.numel() for p in self.moments)) ** 0.5)
        for name, p in self.model.named_parameters():
            decay = decay_at(step, EMA)
            self.average[name] = decay * self.average[name] + (1 - decay) * p


@pytest.fixture(scope="module")
def references():
    torch.set_num_threads(1)
    return {optimizer: Reference(optimizer).run() for optimizer in OPTIMIZERS}


FP32 = [cell for cell in toy_cells() if cell[2] != "bf16"]


@pytest.mark.parametrize("cell", FP32, ids=lambda cell: cell_name(*cell))
def test_equals_the_rule_in_plain_pytorch(launched, references, cell):
    out, results = launched
    tensors, mine = load_file(out / f"{cell_name(*cell)}.safetensors"), results[cell_name(*cell)]
    reference = references[cell[0]]
    torch.testing.assert_close(mine["norms"], reference.norms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine["sizes"], reference.sizes, rtol=1e-4, atol=0)
    for name, weight in reference.model.named_parameters():
        frozen = not weight.requires_grad
        assert (f"end.{name}" in tensors) != frozen
        if not frozen:
            torch.testing.assert_close(
                tensors[f"end.{name}"], weight.detach().flatten(), rtol=1e-6, atol=1e-6
            )
            torch.testing.assert_close(
                tensors[f"ema.{name}"], reference.average[name].flatten(), rtol=1e-6, atol=1e-6
            )
            assert torch.equal(tensors[f"in_module.{name}"].flatten(), tensors[f"ema.{name}"])
        else:
            assert torch.equal(tensors[f"in_module.{name}"], weight)
    assert mine["back"]
    assert mine["partitions"] > 4 if cell[1] == 3 else mine["partitions"] == 4


@pytest.mark.parametrize("cell", toy_cells(), ids=lambda cell: cell_name(*cell))
def test_evaluation_sees_the_average_and_training_goes_on_with_its_own(launched, references, cell):
    heldout = launched[1][cell_name(*cell)]["heldout"]
    expected = {kind: references[cell[0]].heldout_losses(kind == "averaged") for kind in heldout}
    close = 2e-2 if cell[2] == "bf16" else 1e-5
    for kind, losses in heldout.items():
        assert losses == pytest.approx(expected[kind], rel=close), kind
    assert heldout["before"] == heldout["after"] != heldout["averaged"]
    assert expected["averaged"] != pytest.approx(expected["before"], rel=1e-4)


def test_bf16_evaluates_the_rounded_average_and_returns(launched):
    out, results = launched
    for stage in STAGES:
        name = cell_name("mt_adamw", stage, "bf16", 1)
        tensors = load_file(out / f"{name}.safetensors")
        assert results[name]["back"]
        for key in [k.removeprefix("ema.") for k in tensors if k.startswith("ema.")]:
            assert torch.equal(
                tensors[f"in_module.{key}"].flatten(), tensors[f"ema.{key}"].bfloat16()
            )
        torch.testing.assert_close(
            results[name]["norms"],
            results[cell_name("mt_adamw", 1, "bf16", 1)]["norms"],
            rtol=3e-2,
            atol=0,
        )


def test_the_runs_tell_tasks_apart(references):
    """What is compared above is not trivial: tasks differ, clipping bites for one and not both."""
    balanced, clipped = references["mt_adamw"], references["clipped"]
    loud = [n for s, n in enumerate(balanced.norms) if task_of(s) == "shapes"]
    quiet = [n for s, n in enumerate(balanced.norms) if task_of(s) == "words"]
    assert min(loud) > 20 * max(quiet)
    assert max(clipped.norms) > 40.0 and max(quiet) > 0.7
    assert max(balanced.sizes) > 1.0

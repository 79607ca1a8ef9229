"""Two tasks on two ranks under ZeRO-2 against plain PyTorch, and ranks that disagree.

One launch for all of it, for start-up is what costs.
"""

import json

import pytest
import torch

from pretrain.models.init import initialise
from tests.distributed.engines import SEED, SGD
from tests.distributed.launch import run_ranks, tails
from tests.distributed.sampler_worker import (
    MODES,
    STEPS,
    WEIGHTS,
    global_batch,
    loss_weights,
    schedule_of,
    two_tasks,
)
from tests.distributed.toy import SAMPLES


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("sampler")
    codes = run_ranks("tests.distributed.sampler_worker", [out], 2, out, timeout_s=240)
    assert codes == [0, 0], tails(out)
    return [json.loads((out / f"rank_{rank}.json").read_text()) for rank in range(2)]


def plain_losses(mode: str, rate: float = SGD.lr) -> list[list]:
    """One process, full batches, no DeepSpeed: gradient of sum_k w_k loss_k."""
    torch.set_num_threads(1)
    model, schedule, losses = two_tasks(), schedule_of(mode), []
    initialise(model, SEED)
    for step in range(STEPS):
        total = 0.0
        for task, visit in schedule.parts(step):
            batch = global_batch(task, visit)
            weight = loss_weights(schedule, step)[task]
            loss = model(task, "undivided", batch, {"images": batch["valid"].sum().float()})["loss"]
            total = total + weight * loss
            losses.append([step + 1, task, loss.item(), None if weight == 1.0 else weight])
        model.zero_grad()
        total.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
    return losses


@pytest.mark.parametrize("mode", MODES)
def test_losses_are_those_of_one_process(launched, mode):
    expected = plain_losses(mode)
    assert {task for _, task, _, _ in expected} == set(WEIGHTS)
    for rank in launched:
        for mine, wanted in zip(rank[mode]["losses"], expected, strict=True):
            assert mine[:2] == wanted[:2]
            assert mine[2] == pytest.approx(wanted[2], rel=2e-6, abs=1e-6), wanted
            assert mine[3] == wanted[3]
    untrained = plain_losses(mode, rate=0.0)
    for task in WEIGHTS:
        pairs = [(e[2], u[2]) for e, u in zip(expected, untrained, strict=True) if e[1] == task]
        assert max(abs(a - b) for a, b in pairs) > 0.02, "models that stand still prove nothing"


def test_samples_are_counted_per_task(launched):
    for mode in MODES:
        visits = schedule_of(mode).visits(STEPS)
        for rank in launched:
            assert rank[mode]["samples"] == {t: n * SAMPLES for t, n in visits.items()}


@pytest.mark.parametrize(
    ("case", "texts"),
    [
        (
            "task",
            [
                "disagree",
                "parts: words in 2 micro-steps, positions",
                "on rank(s) 0",
                "but others in 3 micro-steps",
                "on rank(s) 1",
            ],
        ),
        ("mixture", ["on rank(s) 0", "words in 2 micro-steps, positions 0 to 11 on rank(s) 1"]),
        ("step", ["step: 0 on rank(s) 0, but 1 on rank(s) 1"]),
        (
            "deal",
            [
                "have not loaded the global batch",
                "positions are missing",
                "positions are doubled",
                "on rank(s) 0, 1",
            ],
        ),
        ("data", ["data of words: digest0 on rank(s) 0, but digest1 on rank(s) 1"]),
    ],
)
def test_a_disagreement_is_an_error_on_all_ranks_and_names_them(launched, case, texts):
    messages = {rank[case] for rank in launched}
    assert len(messages) == 1, messages
    (message,) = messages
    for text in texts:
        assert text in message, message


def test_ranks_that_agree_go_on(launched):
    assert [rank["still able"] for rank in launched] == [2, 2]

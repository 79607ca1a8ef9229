"""Which rank the others wait for: named when it is slow, never between equals."""

import random
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pretrain.engine.launch.distributed import Ranks
from pretrain.engine.launch.peers import Place
from pretrain.engine.report.own_time import OwnTime
from pretrain.engine.report.slow_rank import REPORTS, SlowRanks
from pretrain.engine.report.step_report import StepReport
from pretrain.engine.report.throughput import Throughput

PLACES = [Place(f"node{rank // 2}", rank) for rank in range(4)]


@pytest.mark.parametrize(
    "world, slow, by, named",
    [
        (2, None, 1.0, False),
        (4, None, 1.0, False),  # equal but for chance
        (2, 1, 1.1, False),
        (2, 1, 1.5, True),
        (4, 2, 1.5, True),
    ],
)
def test_who_is_named(world, slow, by, named):
    draw, watch = random.Random(world), SlowRanks(PLACES)
    for _ in range(REPORTS):
        own = [draw.uniform(1.0, 1.05) * (by if rank == slow else 1.0) for rank in range(world)]
        assert watch.observe(own) == max(range(world), key=own.__getitem__)
    found = watch.named()
    assert (found is not None) == named
    if named:
        assert (found.rank, found.host, found.share) == (slow, f"node{slow // 2}", 1.0)
        assert found.factor == pytest.approx(by, rel=0.05)
        assert f"rank {slow} on node{slow // 2}" in str(found)


def test_a_hiccup_names_nobody_and_a_cured_rank_is_forgotten():
    watch = SlowRanks(PLACES)
    for _ in range(5):
        watch.observe([1.0, 9.0])
    assert watch.named() is None, "too few reports"
    for _ in range(15):
        watch.observe([1.0, 9.0])
    assert watch.named().rank == 1
    for _ in range(20):
        watch.observe([1.0, 1.0])
    assert watch.named() is None


def test_layers_of_one_pass_are_clocked():
    """Not what stands between them, not a second pass; nothing stays behind."""

    class Layer(nn.Module):
        def forward(self, x):
            time.sleep(0.05)
            return x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            time.sleep(0.2)  # a collective, say
            return x

    model = Model()
    clock = OwnTime(model, torch.device("cpu"))
    with clock:
        model(torch.zeros(1))
        model(torch.zeros(1))
    assert 0.1 <= clock.seconds() < 0.2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_report_of_a_step(group_of_one, monkeypatch):
    """Times and memory are the largest of any rank, work is the sum, and the slowest is named."""
    ranks = Ranks(0, 2, 0, 2, torch.device("cpu"), tuple(PLACES[:2]))
    throughput = Throughput(ranks, peak_tflops_per_device=1.0)
    monkeypatch.setattr(
        "pretrain.engine.report.throughput.dist",
        SimpleNamespace(
            all_gather_into_tensor=lambda out, own: out.copy_(
                torch.cat([own, own * torch.tensor([1, 1, 1, 1, 1, 3, 1, 2, 1, 3])])
            )
        ),
    )
    seconds = {"own": 1.0, "step": 2.0, "total": 4.0}
    found = throughput.describe(
        StepReport("caption", {"loss": 2.0, "samples": 8, "flops": 1e12}, seconds)
    )
    assert found["loss"] == 2.0 and "flops" not in found
    assert (found["seconds_own"], found["seconds_total"], found["slowest_rank"]) == (3.0, 8.0, 1)
    assert found["samples_per_second"] == 1.0
    assert found["mfu"] == found["model_tflops_per_device"] == pytest.approx(4 / 8 / 2)

"""What the loop does to a batch before an objective reads it; runs are in tests/distributed."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from data_pipeline.images.transforms import ImageSettings
from data_pipeline.loader.loader import Part, StepWindow
from data_pipeline.samples.boxes import BoxDataSettings, BoxProcessor
from pretrain.engine import loop as loop_module
from pretrain.engine.launch.distributed import Ranks
from pretrain.engine.loop import Loop, TrainerState
from pretrain.objectives.objective import Objective
from pretrain.trainer import Trainer

RANKS = Ranks(0, 1, 0, 1, torch.device("cpu"))
pytestmark = pytest.mark.usefixtures("group_of_one")


class Boxes(Objective):
    """The part of an objective of boxes that says what its loss is averaged over."""

    def counts(self, batch) -> dict[str, int]:
        return {"boxes": int(batch["counts"].sum())}

    def flops(self, batch) -> int:
        return 1

    def losses(self, modules, batch, totals, shared):
        raise NotImplementedError


def box_batch() -> dict:
    """What the data pipeline makes of three images without boxes, and how many it would hold."""
    settings = BoxDataSettings(image=ImageSettings(size=16), shards=["x"], classes=3)
    batch = BoxProcessor(settings, train=True).collate([None] * 3, [True] * 3)
    return batch | {"counts": torch.tensor([2, 0, 3])}


def make_loop(engine, control) -> Loop:
    return Loop(
        engine,
        RANKS,
        0,
        (1e-3, lambda step: 1.0),
        0,
        {"detect": 3},
        control,
        SimpleNamespace(received=None),
    )


def test_fields_of_the_data_reach_the_objective_as_they_are():
    batch = box_batch()
    fields = dict(batch)
    engine = SimpleNamespace(module=SimpleNamespace(objectives={"detect": Boxes()}))
    control = SimpleNamespace(
        stop_requested=lambda: None,
        save_requested=lambda: False,
        profile_requested=lambda: False,
        ownership=SimpleNamespace(lost=False),
    )
    loop = make_loop(engine, control)
    totals, _ = loop._agree(StepWindow(0, [Part("detect", [batch])], {}))
    assert totals["detect"]["boxes"] == 5
    assert batch.keys() == fields.keys()
    assert all(batch[name] is value for name, value in fields.items())


@pytest.mark.parametrize(
    "begin, stop_at, evaluation, reported",
    [
        (0, 3, None, [3]),
        (0, 12, None, [10]),
        (20, 23, None, []),
        (0, 3, 2, [2, 3]),
        (0, 1, None, [1]),
    ],
)
def test_a_run_that_stops_early_reports_a_step(monkeypatch, begin, stop_at, evaluation, reported):
    """Without a line, nobody would see later what it did; every tenth step is due."""
    engine = SimpleNamespace(
        module=SimpleNamespace(objectives={"detect": Boxes()}),
        was_step_applied=lambda: True,
        get_global_grad_norm=lambda: 1.0,
    )
    monkeypatch.setattr(loop_module, "set_learning_rate", lambda *_: None)
    monkeypatch.setattr(loop_module, "mean_square_share", lambda *_: None)
    monkeypatch.setattr(
        loop_module, "accumulate_parts", lambda *_: {"detect": {"loss": torch.tensor(1.0)}}
    )
    state, found = TrainerState(step=begin), []
    control = SimpleNamespace(
        stop_requested=lambda: "enough" if state.step == stop_at - 1 else None,
        beat=lambda: None,
        save_requested=lambda: False,
        profile_requested=lambda: False,
        ownership=SimpleNamespace(lost=False),
    )
    trainer = SimpleNamespace(
        recipe=SimpleNamespace(steps=100, logging=SimpleNamespace(every_steps=10)),
        evaluator=SimpleNamespace(is_due=lambda step: bool(evaluation) and step % evaluation == 0),
        log=SimpleNamespace(due=lambda step, total: step % 10 == 0),
    )
    windows = (StepWindow(n, [Part("detect", [box_batch()])], {}) for n in range(begin, 100))
    reason = make_loop(engine, control).run(
        windows,
        state,
        wants_report=partial(Trainer._wants_report, trainer),
        on_report=lambda state, report: found.append(state.step),
        after_step=lambda *_: False,
    )
    assert (found, state.step) == (reported, stop_at) and reason == "stop requested"

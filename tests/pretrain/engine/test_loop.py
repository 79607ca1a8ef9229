"""What the loop does to a batch before an objective reads it; runs are in tests/distributed."""

from types import SimpleNamespace

import pytest
import torch

from data_pipeline.boxes import BoxDataSettings, BoxFields
from data_pipeline.loader import Part, StepWindow
from data_pipeline.transforms import ImageSettings
from pretrain.engine.distributed import Ranks
from pretrain.engine.loop import Loop

RANKS = Ranks(0, 1, 0, 1, torch.device("cpu"))
pytestmark = pytest.mark.usefixtures("group_of_one")


class Boxes:
    """The part of an objective of boxes that says what its loss is averaged over."""

    def count(self, batch) -> dict[str, int]:
        return {"boxes": int(batch["counts"].sum())}


def box_batch() -> dict:
    """What the data pipeline makes of three images without boxes, and how many it would hold."""
    settings = BoxDataSettings(image=ImageSettings(size=16), shards=["x"], classes=3)
    batch = BoxFields(settings, train=True).collate([None] * 3, [True] * 3)
    return batch | {"counts": torch.tensor([2, 0, 3])}


def test_fields_of_the_data_reach_the_objective_as_they_are():
    batch = box_batch()
    fields = dict(batch)
    engine = SimpleNamespace(module=SimpleNamespace(objectives={"detect": Boxes()}))
    control = SimpleNamespace(stop_requested=lambda: None, save_requested=lambda: False,
                              ownership=SimpleNamespace(lost=False))
    loop = Loop(
        engine, RANKS, 0, (1e-3, lambda step: 1.0), 0, {"detect": 3}, control,
        SimpleNamespace(received=None),
    )  # fmt: skip
    totals, _ = loop._agree(StepWindow(0, [Part("detect", [batch])], {}))
    assert totals["detect"]["boxes"] == 5
    assert all(batch[name] is value for name, value in fields.items())
    assert batch["counted"] == {"boxes": 5}

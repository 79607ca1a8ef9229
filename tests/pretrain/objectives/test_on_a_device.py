"""A step of every objective on the stand-in for a GPU: one device, and no wait of the host."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from pretrain.engine.zero.zero import to_device
from pretrain.models.build_context import BuildContext
from pretrain.models.internimage.internimage import InternImageSettings
from pretrain.models.multitask import MultiTaskModel
from pretrain.objectives.classification import ClassificationSettings
from pretrain.objectives.step_count import StepCount
from tests.device_stand_in import DEVICE, on_stand_in, watched
from tests.pretrain.models.git.git_models import (
    MEAN,
    STD,
    clips_of,
    small_batch,
    small_model_without_values,
)
from tests.pretrain.objectives.m3i.m3i_models import build_m3i, m3i_batch
from tests.pretrain.objectives.pair_models import CLASSES, build_pair_model, pair_batch


def pairs(count: int = 6) -> dict:
    return pair_batch(count) | {"position": torch.arange(count)}


def mixed_pairs() -> dict:
    return pairs() | {"mix_share": torch.rand(6), "mix_box": torch.rand(6, 4)}


def enlarged_pairs() -> dict:
    """Images for which position tables are resized, and maps of InternImage have several
    windows."""
    return pairs() | {"images": torch.randint(0, 256, (6, 3, 48, 40), dtype=torch.uint8)}


def internimage_classifier(mixer: str = "dcnv3") -> MultiTaskModel:
    """With drop path, a batch norm and a second size."""
    encoders = {
        "image": InternImageSettings(
            channels=16,
            depths=[1, 1, 2, 1],
            groups=[1, 2, 4, 8],
            drop_path=0.2,
            head={"type": "conv"},
            mixer={"type": mixer},
        ).build()
    }
    settings = ClassificationSettings(pool="head", smaller_sizes=[8])
    objective = settings.build(BuildContext(encoders, None, MEAN, STD, classes=CLASSES))
    return MultiTaskModel(encoders, {"classify": objective})


CASES: dict[str, tuple[Callable, str, Callable]] = {
    "captioning": (small_model_without_values, "caption", small_batch),
    "recomputed": (
        lambda: small_model_without_values(gradient_checkpointing=True),
        "caption",
        small_batch,
    ),
    "classification": (build_pair_model, "classify", pairs),
    "mixed": (build_pair_model, "classify", mixed_pairs),
    "InternImage": (internimage_classifier, "classify", mixed_pairs),
    **{
        mixer: (partial(internimage_classifier, mixer), "classify", enlarged_pairs)
        for mixer in ("halo", "shifted_window", "reduced_attention", "depthwise_conv")
    },
    "resized": (build_pair_model, "contrast", enlarged_pairs),
    "clips": (
        lambda: small_model_without_values(frames=2),
        "caption",
        lambda: clips_of(small_batch(), 2),
    ),
    "contrast": (build_pair_model, "contrast", pairs),
    "M3I": (lambda: build_m3i(balance={}), "m3i", lambda: m3i_batch(6)),
    "M3I of groups": (lambda: build_m3i(group_attention=True), "m3i", lambda: m3i_batch(6)),
    "M3I of an InternImage": (
        lambda: build_m3i("internimage"),
        "m3i",
        lambda: m3i_batch(4, size=(32, 64)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_host_never_waits(case, monkeypatch):
    # Between two measurements, which do wait: the count that says so is the host's.
    monkeypatch.setattr(StepCount, "of", lambda self, buffer: 1)
    build, task, make_batch = CASES[case]
    model, batch = on_stand_in(build()), make_batch()
    objective = model.objectives[task]
    totals = {name: torch.empty((), device=DEVICE) for name in objective.counts(batch)}
    batch |= objective.prepare(batch)
    with watched() as found:
        shares = model(task, "undivided", to_device(batch, DEVICE), totals)
        shares["loss"].backward()
    assert not found
    assert {value.device for value in shares.values()} == {DEVICE}


def test_the_stand_in_sees_waits_and_two_devices():
    values, on_device = torch.ones(3), torch.empty(3, device=DEVICE)
    with watched() as found:
        values.to(DEVICE, non_blocking=True)
        on_device * torch.tensor(2.0)
    assert not found
    calls = [
        lambda: torch.tensor([1.0], device=DEVICE),
        lambda: values.to(DEVICE),
        lambda: on_device.copy_(values),
        lambda: on_device[values.long()],
    ]
    for number, call in enumerate(calls, 1):
        with watched() as found:
            call()
        assert len(found) == 1, (number, found)
    for call in (on_device.sum().item, on_device.nonzero, lambda: on_device[on_device > 0]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            call()

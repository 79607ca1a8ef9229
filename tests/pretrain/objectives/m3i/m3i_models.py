"""Small M3I models, a momentum update in plain torch, and batches for them."""

import math

import torch

from pretrain.models.build_context import BuildContext
from pretrain.models.init import initialise
from pretrain.models.internimage.internimage import InternImageSettings
from pretrain.models.multitask import MultiTaskModel
from pretrain.models.sample_draws import SampleDraws
from pretrain.models.step_draws import StepDraws
from pretrain.models.text import TextEncoderSettings
from pretrain.models.vit import VitSettings
from pretrain.objectives.m3i.settings import M3ISettings
from tests.pretrain.contexts import text_context
from tests.pretrain.models.git.git_models import MEAN, STD
from tests.pretrain.models.internimage.internimage_models import SMALL_PROJECTOR
from tests.pretrain.objectives.pair_models import BOS, CLASSES, EOS, WORDS, pair_batch, rows_of

DECODER = {"width": 32, "heads": 2, "projector_layers": 1, "predictor_layers": 1}


def build_m3i(kind: str = "vit", texts: bool = True, classes: int | None = CLASSES, **changes):
    """Task `m3i` on a ViT of 16 pixels or an InternImage of 32 x 64; no values yet."""
    if kind == "vit":
        image = VitSettings(
            image_size=16, patch_size=4, width=24, layers=1, heads=2, position_std=0.5
        )
        options = {"cell": 4, "pooled_width": 20}
    else:
        image = InternImageSettings(
            channels=16, depths=[1, 1, 1, 1], groups=[1, 2, 4, 8], head=SMALL_PROJECTOR
        )
        options = {"cell": 32}
    text = TextEncoderSettings(
        width=12, layers=1, heads=2, max_positions=16, position_std=0.3, causal=False, pool="mean"
    )
    encoders = {"image": image.build()}
    if texts:
        encoders["text"] = text.build(text_context(WORDS, EOS))
    settings = M3ISettings(
        **{
            "text_encoder": "text" if texts else None,
            "decoder": DECODER,
            "temperature": 0.2,
            **options,
            **changes,
        }
    )
    objective = settings.build(
        BuildContext(
            encoders, None, MEAN, STD, classes=classes, new_encoder=lambda _: image.build()
        )
    )
    return MultiTaskModel(encoders, {"m3i": objective}, seed=3)


def m3i_model(kind: str = "vit", seed: int = 0, **changes) -> MultiTaskModel:
    """With values; targets are those of the online branch."""
    model = build_m3i(kind, **changes)
    initialise(model, seed)
    if "text" in model.encoders:
        with torch.no_grad():
            model.encoders["text"].embedding.words.weight.mul_(20)
    follow(model, 0.0)
    return model


def features_of(
    model: MultiTaskModel, batch: dict, draws: SampleDraws
) -> tuple[dict, torch.Tensor]:
    """All that the losses read of a batch, and the encoder's output."""
    objective = model.objectives["m3i"]
    features, dense = objective.encode(model.encoders, batch, draws)
    shared = objective.shared(model.encoders, StepDraws(model.seed, "m3i", 0))
    return features | objective.targets_of(batch, draws) | shared, dense


@torch.no_grad()
def follow(model: MultiTaskModel, momentum: float) -> None:
    """target = momentum * target + (1 - momentum) * online, in plain torch; buffers are copied."""
    objective = model.objectives["m3i"]
    for target, online in objective.momentum_targets.pairs.items():
        source = (model if online.startswith("encoders.") else objective).get_submodule(online)
        place = objective.get_submodule(target)
        for one, other in zip(place.parameters(), source.parameters(), strict=True):
            one.lerp_(other, 1 - momentum)
        for one, other in zip(place.buffers(), source.buffers(), strict=True):
            one.copy_(other)


def m3i_batch(count: int, seed: int = 0, size: tuple[int, int] = (16, 16), start: int = 0) -> dict:
    """`count` images of which every fourth has no text and some no label, with two crops each."""
    generator = torch.Generator().manual_seed(seed)
    batch = pair_batch(count, seed)
    for name in ("images", "second_images"):
        batch[name] = torch.randint(
            0, 256, (count, 3, *size), generator=generator, dtype=torch.uint8
        )
    batch["loss_mask"][::4] = False
    corners = torch.rand(count, 2, 2, generator=generator, dtype=torch.float64) * 40
    sides = 20 + torch.rand(count, 2, 2, generator=generator, dtype=torch.float64) * 40
    batch["crops"] = torch.cat([corners, corners + sides], dim=2)
    batch["flips"] = torch.rand(count, 2, generator=generator) < 0.5
    batch["position"] = start + torch.arange(count)
    return batch


def m3i_rows(batch: dict, rows) -> dict:
    """Those rows; -1 makes a padding row as the loader does."""
    part = rows_of(batch, rows)
    padding = torch.as_tensor(rows) < 0
    part["second_images"][padding] = 0
    part["crops"][padding] = torch.tensor([0.0, 0, 1, 1], dtype=torch.float64)
    part["flips"][padding] = False
    part["position"][padding] = -1
    return part


def half_cosine(update: int, updates: int, start: float, end: float) -> float:
    return end - (end - start) * 0.5 * (1 + math.cos(math.pi * update / updates))


__all__ = [
    "BOS",
    "EOS",
    "build_m3i",
    "features_of",
    "follow",
    "half_cosine",
    "m3i_batch",
    "m3i_model",
    "m3i_rows",
]

"""A small contrastive or classifying model with dropout to choose, and batches for it."""

import torch

from pretrain.models.build_context import BuildContext
from pretrain.models.init import initialise
from pretrain.models.multitask import MultiTaskModel
from pretrain.models.text import TextEncoderSettings
from pretrain.models.vit import VitSettings
from pretrain.objectives.classification import ClassificationSettings
from pretrain.objectives.contrastive.contrastive import ContrastiveSettings
from tests.pretrain.contexts import text_context
from tests.pretrain.models.git.git_models import MEAN, STD

WORDS, BOS, EOS, CLASSES = 40, 1, 2, 7


def build_pair_model(dropout: float = 0.0, **changes) -> MultiTaskModel:
    """Tasks `contrast` (`changes` are fields of its settings) and `classify`; no values yet."""
    vit = VitSettings(image_size=16, patch_size=8, width=16, layers=1, heads=2, position_std=0.5)
    text = TextEncoderSettings(
        width=12, layers=1, heads=2, max_positions=16, position_std=0.3, dropout=dropout
    )
    encoders = {"image": vit.build(), "text": text.build(text_context(WORDS, EOS))}
    contrast = ContrastiveSettings(**{"width": 8, "temperature": 0.2, **changes})
    context = BuildContext(encoders, None, MEAN, STD, classes=CLASSES)
    return MultiTaskModel(
        encoders,
        {
            "contrast": contrast.build(context),
            "classify": ClassificationSettings().build(context),
        },
    )


def pair_model(seed: int = 0, dropout: float = 0.0, **changes) -> MultiTaskModel:
    model = build_pair_model(dropout, **changes)
    initialise(model, seed)
    # Words as faint as the usual 0.02 make gradients that a tolerance could swallow.
    with torch.no_grad():
        model.encoders["text"].embedding.words.weight.mul_(20)
    return model


def pair_batch(count: int, seed: int = 0, length: int = 8) -> dict:
    """`count` pairs of which every third repeats the caption before it, and labels with gaps; every
    other text counts as made from the name of its class."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(count, 1, length, dtype=torch.int64)
    mask = torch.zeros(count, 1, length, dtype=torch.bool)
    for i in range(count):
        if i % 3 == 2:
            tokens[i], mask[i] = tokens[i - 1], mask[i - 1]
            continue
        words = int(torch.randint(1, length - 1, (1,), generator=generator))
        tokens[i, 0, 0], tokens[i, 0, 1 + words] = BOS, EOS
        tokens[i, 0, 1 : 1 + words] = torch.randint(3, WORDS, (words,), generator=generator)
        mask[i, 0, 1 : 2 + words] = True
    labels = torch.randint(-1, CLASSES, (count,), generator=generator)
    return {
        "images": torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8),
        "tokens": tokens,
        "loss_mask": mask,
        "labels": labels,
        "prompt_class": torch.where(torch.arange(count) % 2 == 1, labels, -1),
        "valid": torch.ones(count, dtype=torch.bool),
        "row": torch.arange(count),
    }


def rows_of(batch: dict, rows) -> dict:
    """Those rows; -1 makes a padding row as the loader does."""
    rows = torch.as_tensor(rows)
    part = {name: value[rows.clamp(min=0)].clone() for name, value in batch.items()}
    padding = rows < 0
    part["images"][padding] = 0
    part["tokens"][padding] = 0
    part["tokens"][padding, :, 0], part["tokens"][padding, :, 1] = BOS, EOS
    part["loss_mask"][padding] = False
    part["labels"][padding], part["row"][padding], part["valid"][padding] = -1, -1, False
    part["prompt_class"][padding] = -1
    return part


def gradients(model: MultiTaskModel) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

"""What objectives hand to an encoder and take from it: draws of the samples, and pooled vectors."""

import pytest
import torch

from pretrain.models.build_context import BuildContext
from pretrain.models.init import initialise
from pretrain.models.multitask import MultiTaskModel
from pretrain.models.text import TextEncoderSettings
from pretrain.models.vit_settings import VitSettings
from pretrain.objectives.captioning.captioning import CaptioningSettings
from pretrain.objectives.classification import ClassificationSettings
from pretrain.objectives.contrastive.contrastive import ContrastiveSettings
from pretrain.objectives.image_tokens import image_vectors, vector_flops, vector_width
from tests.pretrain.contexts import text_context
from tests.pretrain.models.git.git_models import MEAN, STD, Words
from tests.pretrain.models.internimage.internimage_models import SMALL_PROJECTOR, small_encoder
from tests.pretrain.objectives.pair_models import CLASSES, EOS, WORDS, pair_batch

POSITIONS = torch.arange(20, 24)


def three_tasks(seed: int = 0) -> MultiTaskModel:
    """All objectives on one InternImage that drops half of the branches of its last layer."""
    text = TextEncoderSettings(width=12, layers=1, heads=2, max_positions=16)
    encoders = {"image": small_encoder(drop_path=0.5), "text": text.build(text_context(WORDS, EOS))}
    decoder = {
        "width": 16,
        "layers": 1,
        "heads": 2,
        "mlp_width": 32,
        "max_positions": 16,
        "dropout": 0.0,
    }
    model = MultiTaskModel(
        encoders,
        {
            "caption": CaptioningSettings(decoder=decoder, max_new_tokens=4).build(
                BuildContext(encoders, Words(WORDS), MEAN, STD)
            ),
            "classify": ClassificationSettings().build(
                BuildContext(encoders, None, MEAN, STD, classes=CLASSES)
            ),
            "contrast": ContrastiveSettings(width=8).build(BuildContext(encoders, None, MEAN, STD)),
        },
        seed=seed,
    )
    initialise(model, 0)
    return model.train()


def loss(model: MultiTaskModel, task: str, positions: torch.Tensor) -> float:
    torch.seed()  # whatever torch's own generator would draw
    batch = pair_batch(4) | {"position": positions, "labels": torch.tensor([0, 1, 2, 3])}
    totals = model.objectives[task].counts(batch)
    return float(model(task, "undivided", batch, totals)["loss"].detach())


@pytest.mark.parametrize("task", ["caption", "classify", "contrast"])
def test_branches_are_dropped_by_sample_seed_and_task(task):
    model = three_tasks()
    first = loss(model, task, POSITIONS)
    assert loss(model, task, POSITIONS) == first
    assert loss(model, task, POSITIONS + 100) != first
    assert loss(three_tasks(seed=1), task, POSITIONS) != first
    model.eval()
    assert loss(model, task, POSITIONS) == loss(model, task, POSITIONS + 100)


def test_vectors():
    encoder = small_encoder(head=SMALL_PROJECTOR).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        tokens = encoder(images)
        mean, first, head = (
            image_vectors(encoder, images, pool, None) for pool in ("mean", "class_token", "head")
        )
    assert torch.equal(mean, tokens.mean(1)) and torch.equal(first, tokens[:, 0])
    assert head.shape == (2, 48) and vector_width(encoder, "head") == 48
    assert vector_width(encoder, "mean") == encoder.width == 128
    more = vector_flops(encoder, "head")(64, 96) - vector_flops(encoder, "mean")(64, 96)
    assert more == encoder.flops(64, 96, want="pooled") - encoder.flops(64, 96) > 0


def test_an_encoder_without_head():
    with pytest.raises(ValueError, match="has no head"):
        vector_width(small_encoder(), "head")
    vit = VitSettings(image_size=16, patch_size=8, width=12, layers=1, heads=2).build()
    with pytest.raises(ValueError, match="VisionTransformer has not: use pool=mean"):
        vector_width(vit, "head")

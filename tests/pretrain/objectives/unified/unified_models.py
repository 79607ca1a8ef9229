"""A tiny Uni-Perceiver with its tasks, its batches, and its training in plain PyTorch."""

import torch

from data_pipeline.samples.labels import NO_LABEL
from pretrain.models.bert.settings import BertSettings
from pretrain.models.build_context import BuildContext
from pretrain.models.general.settings import ExpertSettings, GeneralDecoderSettings
from pretrain.models.init import initialise
from pretrain.models.multitask import MultiTaskModel
from pretrain.models.vit_settings import VitSettings
from pretrain.objectives.unified.settings import (
    UnifiedCaptionSettings,
    UnifiedClassificationSettings,
    UnifiedMlmSettings,
    UnifiedRetrievalSettings,
)
from pretrain.optim.groups import OptimizerSettings

WORDS, LENGTH, CLASSES, SAMPLES, SEED = 23, 7, 5, 13, 5
BOS, EOS, PAD = 0, 1, 2
TASKS = ("classify", "retrieve", "caption", "mlm", "classify")
SGD = OptimizerSettings(kind="sgd", lr=0.01, weight_decay=0.0, clip_norm=None)
OBJECTIVES = {
    "classify": UnifiedClassificationSettings(),
    "retrieve": UnifiedRetrievalSettings(),
    "caption": UnifiedCaptionSettings(max_new_tokens=LENGTH - 1),
    "mlm": UnifiedMlmSettings(share=0.4),
}


class Words:
    """A tokenizer of letters."""

    vocab_size, bos_id, eos_id, pad_id = WORDS, BOS, EOS, PAD

    def encode(self, text: str) -> list[int]:
        return [3 + ord(letter) % (WORDS - 3) for letter in text]

    def decode(self, ids) -> str:
        return " ".join(str(int(i)) for i in ids if i not in (BOS, EOS, PAD))


def build() -> MultiTaskModel:
    context = BuildContext(
        vocabulary=Words(),
        image_mean=(0.5,) * 3,
        image_std=(0.3,) * 3,
        classes=CLASSES,
        class_names=["a", "bob", "cc", "dede", "e"],
    )
    encoders = {
        "image": VitSettings(image_size=16, patch_size=8, width=16, layers=1, heads=2).build(),
        "text": BertSettings(width=16, layers=1, heads=2, hidden=32, max_positions=8).build(
            context
        ),
        "general": GeneralDecoderSettings(
            width=16,
            layers=2,
            heads=2,
            hidden=32,
            max_queries=8,
            experts=ExpertSettings(number=3, chosen=2),
            temperature=0.2,
        ).build(),
    }
    context = BuildContext(
        encoders,
        context.vocabulary,
        context.image_mean,
        context.image_std,
        CLASSES,
        context.class_names,
    )
    objectives = {name: settings.build(context) for name, settings in OBJECTIVES.items()}
    return MultiTaskModel(encoders, objectives, seed=SEED)


def ready() -> MultiTaskModel:
    """With values that are not small."""
    model = build()
    initialise(model, SEED)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(number)
            if parameter.dim() > 1:
                parameter.mul_(8.0)
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def whole_batch(step: int) -> dict[str, torch.Tensor]:
    """That of `TASKS[step]`."""
    generator = torch.Generator().manual_seed(100 + step)
    position = torch.arange(SAMPLES) + step * SAMPLES
    common = {"valid": torch.ones(SAMPLES, dtype=torch.bool), "position": position}
    ends = torch.randint(2, LENGTH, (SAMPLES, 1), generator=generator)
    tokens = torch.randint(3, WORDS, (SAMPLES, LENGTH), generator=generator)
    places = torch.arange(LENGTH)
    if TASKS[step] == "mlm":
        mask = places <= ends
        documents = ((places > 2) & (torch.arange(SAMPLES) % 2 == 0)[:, None]).long()
        return common | {
            "tokens": tokens.masked_fill(~mask, PAD),
            "mask": mask,
            "documents": documents.masked_fill(~mask, -1),
        }
    images = torch.randint(0, 256, (SAMPLES, 3, 16, 16), generator=generator).to(torch.uint8)
    if TASKS[step] == "classify":
        labels = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
        labels[3] = NO_LABEL
        return common | {"images": images, "labels": labels}
    tokens = tokens.masked_fill(places > ends, PAD).masked_fill(places == ends, EOS)
    tokens[:, 0] = BOS
    return common | {
        "images": images,
        "tokens": tokens[:, None],
        "loss_mask": ((places > 0) & (places <= ends))[:, None],
        "prompt_class": torch.full((SAMPLES,), NO_LABEL),
    }


def rows_of(batch: dict[str, torch.Tensor], rows) -> dict[str, torch.Tensor]:
    """Those rows; -1 makes padding, as a loader does."""
    rows = torch.as_tensor(rows)
    part = {name: value[rows.clamp(min=0)].clone() for name, value in batch.items()}
    empty = rows < 0
    part["valid"] = ~empty
    part["position"][empty] = -1
    for name in ("labels", "prompt_class", "documents"):
        if name in part:
            part[name][empty] = -1
    for name in ("loss_mask", "mask"):
        if name in part:
            part[name][empty] = False
    return part


def totals_of(step: int) -> dict[str, float]:
    counts = build().objectives[TASKS[step]].counts(whole_batch(step))
    return {name: float(count) for name, count in counts.items()}


def plain_run() -> dict[str, torch.Tensor]:
    """One process, one graph a step: losses, gradients and the weights at the end, by name."""
    torch.set_num_threads(1)
    model = build()
    initialise(model, SEED)
    optimizer = torch.optim.SGD(model.parameters(), SGD.lr)
    found = {}
    for step, task in enumerate(TASKS):
        loss = model(task, "undivided", whole_batch(step), totals_of(step), step=step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        found[f"loss{step}"] = loss.detach()
        for name, p in model.named_parameters():
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            found[f"gradient{step}.{name}"] = gradient.flatten().clone()
        optimizer.step()
    return found | {f"end.{n}": p.detach().flatten() for n, p in model.named_parameters()}

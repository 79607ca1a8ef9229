"""`classify`: transformers' model for the classes of images."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionModel,
)

from data_pipeline.loader.loader import EvaluationLoader, TaskStream
from data_pipeline.samples.labels import NO_LABEL
from pretrain.models.pixels import normalise_pixels
from pretrain.objectives.label_loss import mixed_label_loss
from pretrain.objectives.mixing import mix_pairs
from tools.convert.transformers_git import without_bars
from tools.finetune.settings import FinetuneSettings
from tools.finetune.source import Source

_HEADS = ("classifier.", "head.", "fc.", "score.", "cls_classifier.", "distillation_classifier.")
"""How the linear layer is called in transformers' classes."""


def build_classifier(source: Source, names: list[str], seed: int) -> nn.Module:
    """A model with a new head for these classes.

    Raises ValueError: transformers has no classifier of this kind.
    """
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    kind = source.config["model_type"]
    with without_bars(), torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind in ("clip", "clip_vision_model"):
            return _of_clip(source, labels)
        try:
            if source.scratch:
                config = AutoConfig.from_pretrained(source.folder, local_files_only=True, **labels)
                return AutoModelForImageClassification.from_config(config)
            return AutoModelForImageClassification.from_pretrained(
                source.folder,
                dtype=torch.float32,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                **labels,
            )
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise ValueError(
                f"{source.folder}: model_type is {kind}, and transformers has no classifier of "
                "images for it; give a vision encoder (clip, vit, swin, ...), or the run"
            ) from None


def _of_clip(source: Source, labels: dict[str, Any]) -> nn.Module:
    """Our vision transformer and CLIP's, with or without the text tower."""
    vision = source.config
    if source.config["model_type"] == "clip":
        vision = source.config["vision_config"]
    config = CLIPConfig(vision_config=vision, **labels)
    model = CLIPForImageClassification(config)
    # Its mean of all tokens but the first one is not normalised: a head that begins at zero does
    # not disturb an encoder of any scale.
    nn.init.zeros_(model.classifier.weight)
    if source.scratch:
        return model
    wanted = CLIPVisionModel if source.config["model_type"] == "clip_vision_model" else None
    if source.config.get("architectures") == ["CLIPForImageClassification"]:
        wanted = CLIPForImageClassification
    wanted = wanted or CLIPModel
    theirs = wanted.from_pretrained(source.folder, dtype=torch.float32, local_files_only=True)
    tower = theirs.vision_model if hasattr(theirs, "vision_model") else theirs
    own = model.vision_model
    inner = tower.state_dict()
    if not inner.keys() <= own.state_dict().keys():
        inner = {f"vision_model.{name}": tensor for name, tensor in inner.items()}
    own.load_state_dict(inner)
    return model


def layer_of(model: nn.Module) -> tuple[dict[str, int], int]:
    """Name of each parameter -> number of its layer, and the last number.

    The layers are those of the largest list of modules; 0 is what stands before them, the last
    number what stands behind.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1}
    if not lists:
        return {name: 1 for name, _ in model.named_parameters()}, 1
    name = max(lists, key=lambda n: sum(p.numel() for p in lists[n].parameters()))
    last = len(lists[name]) + 1
    found, seen = {}, False
    for parameter, _ in model.named_parameters():
        inside = re.match(rf"{re.escape(name)}\.(\d+)\.", parameter)
        seen = seen or inside is not None
        found[parameter] = int(inside[1]) + 1 if inside else last if seen else 0
    return found, last


class Classify:
    """A `Task` of the loop."""

    def __init__(
        self,
        model: nn.Module,
        stream: TaskStream,
        test: TaskStream,
        image: Any,
        settings: FinetuneSettings,
        probe: bool,
    ) -> None:
        self.model, self.stream, self.test = model, stream, test
        self.image, self.settings = image, settings
        heads = [n for n, _ in model.named_parameters() if n.startswith(_HEADS)]
        if not heads:
            raise ValueError(f"{type(model).__name__}: none of its parameters is a head: {_HEADS}")
        self.heads = set(heads)
        if probe:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in self.heads)

    def groups(self) -> list[dict[str, Any]]:
        """As of `Task`: the rate falls from layer to layer, and vectors do not decay."""
        layers, last = layer_of(self.model)
        settings, found = self.settings, {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            rate = settings.lr * settings.layer_decay ** (last - layers[name])
            if name in self.heads:
                rate = settings.lr * settings.head_lr
            decay = settings.weight_decay if parameter.dim() > 1 else 0.0
            found.setdefault((rate, decay), []).append(parameter)
        return [
            {"params": p, "lr": r, "weight_decay": d}
            for (r, d), p in sorted(found.items(), key=lambda item: item[0])
        ]

    def probe_batch(self) -> dict[str, Tensor]:
        """As of `Task`."""
        size = self.image.size
        images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
        return {"images": images, "labels": torch.tensor([0, 1])}

    def count(self, batch: Mapping[str, Any]) -> int:
        """As of `Task`: images with a class."""
        return int((batch["labels"] != NO_LABEL).sum())

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """As of `Task`."""
        pixels = self._pixels(batch["images"])
        weights = None
        if "mix_share" in batch:
            pixels, weights = mix_pairs(pixels, batch)
        logits = model(pixel_values=pixels).logits.float()
        labels = {"labels": batch["labels"]}
        return mixed_label_loss(logits, labels, weights, self.settings.label_smoothing)

    def evaluate(self, accelerator: Accelerator) -> dict[str, float]:
        """top1, top5 (of more than 5 classes), cross_entropy and images."""
        sums = torch.zeros(4, dtype=torch.float64)
        loader = EvaluationLoader(
            self.test,
            accelerator.process_index,
            accelerator.num_processes,
            workers=self.settings.workers,
        )
        for batch in loader:
            with accelerator.autocast():
                pixels = self._pixels(batch["images"].to(accelerator.device))
                logits = self.model(pixel_values=pixels).logits.float().cpu()
            known = batch["valid"] & (batch["labels"] != NO_LABEL)
            logits, labels = logits[known], batch["labels"][known]
            best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack(
                [best[:, 0].sum(), best.any(1).sum(), loss, torch.tensor(len(labels))]
            ).double()
        top1, top5, loss, images = reduce(sums.float().to(accelerator.device), "sum").tolist()
        if not images:
            raise ValueError("none of the held-out images could be used")
        metrics = {"top1": top1 / images, "cross_entropy": loss / images, "images": images}
        return metrics | ({"top5": top5 / images} if self.model.config.num_labels > 5 else {})

    def _pixels(self, images: Tensor) -> Tensor:
        return normalise_pixels(images, self.image.mean, self.image.std, torch.float32)

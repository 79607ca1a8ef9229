"""A trained model as what metrics ask of it: vectors, class scores, and vectors of texts."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.images.transforms import ImageSettings
from pretrain.build import evaluation_image
from pretrain.models.pixels import normalise_pixels
from pretrain.objectives.image_tokens import image_vectors
from tools.convert.record import RECORD
from tools.support.model_places import image_size, is_run, json_of, names_in
from tools.support.trained import TrainedRun, open_run
from tools.support.training_images import TrainingShards, training_shards

Compute = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Judged:
    """A model, and what it can do; None: it cannot. Pixels are (B, 3, H, W), normalised."""

    name: str
    image: ImageSettings
    vectors: Compute
    """pixels -> (B, width) float32: frozen features."""
    scores: Compute | None = None
    """pixels -> (B, classes) float32."""
    image_features: Compute | None = None
    """pixels -> (B, D) float32 of unit length, to be compared with those of texts."""
    text_features: Callable[[Sequence[str]], Tensor] | None = None
    """texts -> (N, D) float32 of unit length."""
    trained: list[TrainingShards] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def fits(self) -> list[str]:
        """The metrics that it can be judged by."""
        found = ["knn", "linear"]
        if self.scores is not None:
            found += ["top1", "resolutions", "invariance"]
        if self.text_features is not None:
            found += ["zeroshot", "retrieval"]
        return found


def open_judged(place: Path, options: argparse.Namespace, device: torch.device) -> Judged:
    """A run, a checkpoint, or a folder of transformers.

    Raises ValueError: something else; the text says what was found and what makes the right thing.
    """
    if is_run(place):
        return _of_run(open_run(place, options.weights), options, device)
    config = json_of(place / "config.json")
    if config.get("model_type"):
        return _of_folder(place, config, options, device)
    record = json_of(place / RECORD)
    if record:
        raise ValueError(
            f"{place} is an export for {record.get('to')}; evaluate the run itself, or `python -m "
            "tools.convert export --run RUN --to transformers --out FOLDER`"
        )
    if not place.exists():
        what = "there is no such folder"
    elif not place.is_dir():
        what = "a file; SOURCE is a folder"
    else:
        what = f"it has {names_in(place) or 'nothing'}"
    raise ValueError(
        f"{place}: {what}. SOURCE is a run (`python -m pretrain.train RECIPE`), an export (`python "
        "-m tools.convert export --run RUN --to transformers --out FOLDER`) or a folder of "
        "transformers (config.json with a model_type)"
    )


# ---- runs --------------------------------------------------------------------------------------


def _of_run(run: TrainedRun, options: argparse.Namespace, device: torch.device) -> Judged:
    tasks = run.recipe.tasks
    task = options.task
    if task is not None and task not in tasks:
        raise ValueError(f"--task {task}: the run has {', '.join(tasks)}")
    encoder = options.encoder or (task and getattr(tasks[task].objective, "encoder", None))
    readers = {
        name: getattr(one.objective, field)
        for name, one in tasks.items()
        for field, reads in one.objective.encoder_fields.items()
        if reads == "images"
    }
    names = sorted(set(readers.values()))
    if encoder is None and len(names) == 1:
        encoder = names[0]
    if encoder not in names:
        raise ValueError(
            f"choose an encoder of images with --encoder {' or --encoder '.join(names)}"
        )
    own = {name for name, one in readers.items() if one == encoder}
    model = run.model.to(device)
    classify = _one(run, own, "classification", task)
    contrast = _one(run, own, "contrastive", task)
    leader = task or contrast or classify or min(own)
    image = evaluation_image(tasks[leader])
    settings = tasks[leader].data.image
    image = image.model_copy(update={"mean": settings.mean, "std": settings.std})
    net = model.encoders[encoder]
    parts: dict[str, Any] = {}
    if classify:
        parts["scores"] = lambda pixels: (
            model.objectives[classify].logits(model.encoders, pixels, None).float()
        )
    if contrast:
        parts |= _contrast(run, contrast, net, device)
    return Judged(
        f"{run.recipe.name}, step {run.manifest['step']}, encoder {encoder}",
        image,
        lambda pixels: image_vectors(net, pixels, options.pool, None).float(),
        trained=training_shards(one.data for one in tasks.values()),
        facts={"step": run.manifest["step"], "weights": run.state, "encoder": encoder},
        **parts,
    )


def _one(run: TrainedRun, own: set[str], kind: str, wanted: str | None) -> str | None:
    """The task of a kind that reads the encoder; none if there are several to choose from."""
    found = [name for name in own if run.recipe.tasks[name].objective.type == kind]
    if wanted in found:
        return wanted
    return found[0] if len(found) == 1 else None


def _contrast(run: TrainedRun, task: str, net: Any, device: torch.device) -> dict[str, Any]:
    objective, tokenizer = run.model.objectives[task], run.tokenizer
    longest = run.recipe.tasks[task].data.text_length

    def images(pixels: Tensor) -> Tensor:
        vectors = image_vectors(net, pixels, objective.pool, None)
        return F.normalize(objective.image_projection(vectors).float(), dim=1)

    def texts(words: Sequence[str]) -> Tensor:
        rows = [tokenizer.encode(text)[: longest - 2] for text in words]
        rows = [[tokenizer.bos_id, *row, tokenizer.eos_id] for row in rows]
        width = max(map(len, rows))
        filled = [row + [tokenizer.pad_id] * (width - len(row)) for row in rows]
        return objective.text_features(run.model.encoders, torch.tensor(filled, device=device))

    return {"image_features": images, "text_features": texts}


# ---- folders of transformers -------------------------------------------------------------------


def _of_folder(
    place: Path, config: dict[str, Any], options: argparse.Namespace, device: torch.device
) -> Judged:
    from transformers import AutoModel, AutoModelForImageClassification, AutoTokenizer

    from tools.convert.transformers_git import without_bars

    architecture = (config.get("architectures") or [""])[0]
    classifies = architecture.endswith("ForImageClassification")
    if architecture == "GitForCausalLM":
        raise ValueError(
            f"{place} is a captioner: `--metrics captions` judges it; its encoder is judged in "
            "the run that it came from"
        )
    if options.pool == "head":
        raise ValueError(
            f"--pool head is a module of our own encoders, which {place} has none of: take --pool "
            "mean or class_token, or give the run in its place"
        )
    kind = AutoModelForImageClassification if classifies else AutoModel
    with without_bars():
        net = kind.from_pretrained(place, dtype=torch.float32, local_files_only=True)
    net = net.eval().to(device)
    clip = architecture.startswith("CLIP")
    more = {"interpolate_pos_encoding": True} if clip else {}
    parts: dict[str, Any] = {}
    if classifies:
        parts["scores"] = lambda pixels: net(pixel_values=pixels, **more).logits.float()
    if architecture == "CLIPModel":
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)

        def texts(words: Sequence[str]) -> Tensor:
            made = tokenizer(list(words), padding=True, truncation=True, return_tensors="pt")
            found = net.get_text_features(**made.to(device))
            return F.normalize(getattr(found, "pooler_output", found).float(), dim=1)

        def images(pixels: Tensor) -> Tensor:
            found = net.get_image_features(pixel_values=pixels, **more)
            return F.normalize(getattr(found, "pooler_output", found).float(), dim=1)

        parts |= {"text_features": texts, "image_features": images}
    tower = net.vision_model if clip and hasattr(net, "vision_model") else net

    def vectors(pixels: Tensor) -> Tensor:
        if classifies and not clip:
            hidden = net(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
        else:
            hidden = tower(pixel_values=pixels, **more).last_hidden_state
        hidden = hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden
        return (hidden[:, 0] if options.pool == "class_token" else hidden.mean(1)).float()

    record = json_of(place / RECORD)
    seen = record.get("training_shards")
    return Judged(
        place.name,
        _image(place, config, record),
        vectors,
        trained=None if seen is None else [TrainingShards(**one) for one in seen],
        facts={"architecture": architecture, "classes": config.get("id2label")},
        **parts,
    )


def _image(place: Path, config: dict[str, Any], record: dict[str, Any]) -> ImageSettings:
    """How images are prepared: as the record says, or as the folder's image processor does."""
    if "image" in record:
        return ImageSettings(**record["image"])
    found = json_of(place / "preprocessor_config.json")
    if not found:
        raise ValueError(
            f"{place} has no preprocessor_config.json, which says how images are prepared"
        )
    return ImageSettings(
        size=image_size(found, config),
        mode="center_crop",
        mean=found["image_mean"],
        std=found["image_std"],
    )


def normalised(images: Tensor, image: ImageSettings, device: torch.device) -> Tensor:
    """Pixels of uint8 images, (B, 3, H, W) float32."""
    return normalise_pixels(images.to(device), image.mean, image.std, torch.float32)

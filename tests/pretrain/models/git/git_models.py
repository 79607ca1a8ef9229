"""Small captioning models for tests: from golden files, and from plain numbers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrain.models.build_context import BuildContext
from pretrain.models.git.decoder import GitDecoderSettings
from pretrain.models.git.weights import import_git
from pretrain.models.init import initialise
from pretrain.models.multitask import MultiTaskModel
from pretrain.models.vit import VitSettings
from pretrain.objectives.captioning.captioning import CaptioningSettings

GOLDENS = Path(__file__).parents[3] / "goldens"
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@dataclass
class Words:
    """A vocabulary without text: ids print as numbers."""

    vocab_size: int = 97
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2

    def decode(self, ids) -> str:
        ids = list(ids)
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        return " ".join(f"w{i}" for i in ids if i not in (self.bos_id, self.pad_id))


@dataclass
class Golden:
    info: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, name: str) -> "Golden":
        info = json.loads((GOLDENS / f"{name}.json").read_text())
        return cls(info, load_file(GOLDENS / f"{name}.safetensors"))

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, without it."""
        return {
            key[len(prefix) + 1 :]: tensor
            for key, tensor in self.tensors.items()
            if key.startswith(prefix + ".")
        }

    @property
    def text(self) -> dict[str, Tensor]:
        """Tokens (B, 1, T) and loss mask of the case, in the form that the objective reads."""
        inputs = self.part("in")
        if "labels" in inputs:
            tokens, mask = inputs["input_ids"], inputs["labels"] != -100
        else:
            tokens, mask = inputs["caption_tokens"], inputs["need_predict"] == 1
        return {"tokens": tokens[:, None], "loss_mask": mask[:, None]}

    @property
    def pixels(self) -> Tensor:
        inputs = self.part("in")
        return inputs["pixel_values"] if "pixel_values" in inputs else inputs["image"]

    def encode(self, model: MultiTaskModel) -> Tensor:
        """What the decoder reads of the case's images or clips."""
        pixels, encoder = self.pixels, model.encoders["image"]
        if pixels.dim() == 4:
            return encoder(pixels)
        tokens = encoder(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
        return model.objectives["caption"].decoder.temporal(tokens)

    def model(self, label_smoothing: float) -> MultiTaskModel:
        """Our model with the golden weights."""
        read = _transformers_settings if "vision_config" in self.info["config"] else _original
        vit, decoder, words = read(self.info["config"])
        model = build(vit, decoder, words, label_smoothing)
        parameters = dict(model.named_parameters())
        weights = import_git(self.part("w"))
        assert weights.keys() == parameters.keys()
        with torch.no_grad():
            for name, tensor in weights.items():
                parameters[name].copy_(tensor)
        return model


def _transformers_settings(config: dict) -> tuple[VitSettings, GitDecoderSettings, Words]:
    vision = config["vision_config"]
    vit = VitSettings(
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        width=vision["hidden_size"],
        layers=vision["num_hidden_layers"],
        heads=vision["num_attention_heads"],
        mlp_ratio=vision["intermediate_size"] / vision["hidden_size"],
        activation=vision["hidden_act"],
    )
    decoder = GitDecoderSettings(
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_width=config["intermediate_size"],
        max_positions=config["max_position_embeddings"],
        dropout=0.0,
        frames=config["num_image_with_embedding"] or 0,
        tied_output=config["tie_word_embeddings"],
        embedding_norm_eps=config["layer_norm_eps"],
    )
    special = [config[f"{role}_token_id"] for role in ("pad", "bos", "eos")]
    return vit, decoder, Words(config["vocab_size"], *special)


def _original(config: dict) -> tuple[VitSettings, GitDecoderSettings, Words]:
    vision, text = config["vision"], config["decoder"]
    vit = VitSettings(
        image_size=vision["resolution"],
        patch_size=vision["patch"],
        width=vision["width"],
        layers=vision["layers"],
        heads=vision["heads"],
        mlp_ratio=vision["mlp"] / vision["width"],
    )
    decoder = GitDecoderSettings(
        width=text["hidden"],
        layers=text["layers"],
        heads=text["heads"],
        mlp_width=text["ffn"],
        max_positions=text["max_positions"],
        dropout=0.0,
        frames=config.get("num_image_with_embedding") or 0,
        tied_output=config["tied_output"],
        embedding_norm_eps=text["ln_eps_embedding"],
    )
    return vit, decoder, Words(text["vocab"], config["pad"], config["bos"], config["eos"])


def build(
    vit: VitSettings, decoder: GitDecoderSettings, words: Words, label_smoothing: float = 0.1
) -> MultiTaskModel:
    """Encoder `image` and task `caption`, with torch's own initial values."""
    encoders = {"image": vit.build()}
    settings = CaptioningSettings(
        decoder=decoder, label_smoothing=label_smoothing, max_new_tokens=12
    )
    objective = settings.build(BuildContext(encoders, words, MEAN, STD))
    return MultiTaskModel(encoders, {"caption": objective})


def small_model(seed: int = 0, label_smoothing: float = 0.1, **changes: Any) -> MultiTaskModel:
    """A model of two small towers; `changes` are fields of the decoder's settings."""
    model = small_model_without_values(label_smoothing, **changes)
    initialise(model, seed)
    return model


def small_model_without_values(label_smoothing: float = 0.1, **changes: Any) -> MultiTaskModel:
    checkpointing = changes.get("gradient_checkpointing", False)
    vit = VitSettings(
        image_size=16,
        patch_size=8,
        width=32,
        layers=2,
        heads=4,
        gradient_checkpointing=checkpointing,
    )
    text = {"width": 24, "layers": 3, "heads": 4, "mlp_width": 48, "max_positions": 20}
    decoder = GitDecoderSettings(**text | {"dropout": 0.0} | changes)
    return build(vit, decoder, Words(), label_smoothing)


def small_batch(seed: int = 0, images: int = 3, captions: int = 2, length: int = 8, size: int = 16):
    """Random images with right-padded captions of 1 to `length` - 2 words."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (images, 3, size, size), generator=generator, dtype=torch.uint8)
    tokens = torch.zeros(images, captions, length, dtype=torch.int64)
    mask = torch.zeros(images, captions, length, dtype=torch.bool)
    for caption, supervised in zip(tokens.view(-1, length), mask.view(-1, length), strict=True):
        words = int(torch.randint(1, length - 1, (1,), generator=generator))
        caption[0] = 1
        caption[1 : 1 + words] = torch.randint(3, 97, (words,), generator=generator)
        caption[1 + words] = 2
        supervised[1 : 2 + words] = True
    return {
        "images": pixels,
        "tokens": tokens,
        "loss_mask": mask,
        "valid": torch.ones(images, dtype=torch.bool),
        "position": torch.arange(images),
        "row": torch.arange(images),
        "key": [f"{i:04}" for i in range(images)],
    }


def clips_of(batch: dict, frames: int) -> dict:
    """Clips whose frames are images of the batch, in other orders."""
    images = batch["images"]
    clips = torch.stack([images.roll(frame, 0) for frame in range(frames)], dim=1)
    return batch | {"images": clips}


def loss_and_gradients(model: MultiTaskModel, batch: dict, total: float | None = None):
    """Loss and gradients by parameter name; totals are this batch's own unless given."""
    model.zero_grad()
    objective = model.objectives["caption"]
    totals = {"tokens": objective.counts(batch)["tokens"] if total is None else total}
    out = model("caption", "undivided", batch, totals)
    out["loss"].backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters()}

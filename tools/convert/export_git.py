"""Write a trained captioner as a folder that transformers loads with no code of ours."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from torch import Tensor
from transformers import GenerationConfig

from data_pipeline.images.transforms import ImageSettings
from data_pipeline.samples.tokenizer import CONFIG_FILE, TOKENIZER_FILE, Tokenizer
from pretrain.build import evaluation_image
from pretrain.engine.checkpoint.files import MANIFEST, file_entry
from pretrain.models.vit import VitSettings
from tools.convert.formats.clip import resize_positions
from tools.convert.record import ExportRecord
from tools.convert.transformers_git import SpecialIds, transformers_model, without_bars
from tools.support.trained import TrainedCaptioner
from tools.support.training_images import training_shards
from tools.support.weight_files import writing

_RESIZE_NOTE = (
    "resizing: both use an antialiased bicubic filter, but round differently, and training also "
    "lets large JPEGs shrink while they are decoded; images that already have their final size "
    "come out equal"
)
_BICUBIC = 3  # Pillow's number for it; the only good filter that torchvision has as well


def write_git(captioner: TrainedCaptioner, folder: Path, image_size: int | None) -> ExportRecord:
    """Fill an empty folder: weights, configurations, tokenizer, image processor, record.

    image_size: side of the images; none for that of the recipe's evaluation.

    Raises:
        ValueError: transformers' GIT cannot express this model.
        OSError: the folder cannot be written.
    """
    if not isinstance(captioner.vit, VitSettings):
        raise ValueError(
            f"model.encoders.{captioner.encoder_name} is of type {captioner.vit.type}; "
            "transformers' GIT has a vision transformer (vit) and nothing else"
        )
    if captioner.decoder.frames:
        raise ValueError(
            f"tasks.{captioner.task_name}.objective.decoder.frames={captioner.decoder.frames}: "
            "captioners of clips are not exported as a folder; "
            "`pretrain.models.git.weights.export_git` renames their tensors"
        )
    image, notes = _image_settings(captioner, image_size)
    tokenizer = captioner.tokenizer
    vit, weights = _at_size(captioner.vit, captioner.weights(), captioner.encoder_name, image.size)
    if vit != captioner.vit:
        notes.append(
            f"the position table is resized from {captioner.vit.image_size} to {image.size} pixels "
            "(bicubic, as our encoder does for every image), since transformers wants one size"
        )
    ids = SpecialIds(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    model = transformers_model(
        weights, vit, captioner.decoder, ids, captioner.encoder_name, captioner.task_name
    )
    record = _record(captioner, image, notes)
    model.generation_config = GenerationConfig(
        bos_token_id=ids.bos_id,
        eos_token_id=ids.eos_id,
        pad_token_id=ids.pad_id,
        max_new_tokens=record.max_new_tokens,
    )
    with without_bars(), writing(folder):
        model.save_pretrained(folder)
    write_tokenizer(tokenizer, captioner.decoder.max_positions, folder, tokenizer.eos_id)
    _write_json(folder / "preprocessor_config.json", image_processor(image, "GitProcessor"))
    (folder / "README.md").write_text(_usage(record), encoding="utf-8")
    record.write(folder)
    return record


def _image_settings(
    captioner: TrainedCaptioner, size: int | None
) -> tuple[ImageSettings, list[str]]:
    """Evaluation preprocessing in a form that transformers knows, and what differs from it."""
    task, patch = captioner.task, captioner.vit.patch_size
    image = evaluation_image(task)
    notes = [_RESIZE_NOTE]
    if image.mode == "keep_aspect":
        notes.append(
            "images: the recipe evaluates with the aspect kept, the export cuts the middle square, "
            "since transformers' GIT takes square images only"
        )
    # What the model subtracts and divides by comes from the training data's settings.
    statistics = {"mean": task.data.image.mean, "std": task.data.image.std}
    image = image.model_copy(
        update={"size": size or image.size, "mode": "center_crop", "max_size": None, **statistics}
    )
    if image.size % patch:
        raise ValueError(
            f"images of {image.size} pixels are no multiple of patch_size {patch}, which "
            "transformers' GIT cannot express; choose another size with --image-size "
            f"{image.size // patch * patch or patch}"
        )
    return image, notes


def _at_size(
    vit: VitSettings, weights: Mapping[str, Tensor], encoder: str, size: int
) -> tuple[VitSettings, dict[str, Tensor]]:
    """Settings and weights with the position table made for images of `size` pixels.

    transformers can resize its table on the fly too, but then generation counts the image tokens
    of the configured size and fails.
    """
    weights = dict(weights)
    if size == vit.image_size:
        return vit, weights
    name = f"encoders.{encoder}.embedding.positions"
    weights[name] = resize_positions(weights[name], size // vit.patch_size)
    return vit.model_copy(update={"image_size": size}), weights


def _record(captioner: TrainedCaptioner, image: ImageSettings, notes: list[str]) -> ExportRecord:
    data = captioner.task.data
    return ExportRecord(
        recipe=captioner.recipe.name,
        step=captioner.step,
        weights=captioner.state,
        checkpoint_sha256=file_entry(captioner.checkpoint / MANIFEST)["sha256"],
        task=captioner.task_name,
        encoder=captioner.encoder_name,
        tokenizer_digest=captioner.tokenizer.digest,
        image=image,
        image_extensions=data.image_extensions,
        caption_source=data.caption_source,
        cleaning=data.cleaning,
        captions_per_image=data.captions_per_image,
        text_length=data.text_length,
        max_new_tokens=captioner.task.objective.max_new_tokens,
        notes=notes,
        training_shards=training_shards(task.data for task in captioner.recipe.tasks.values()),
    )


def write_tokenizer(tokenizer: Tokenizer, max_length: int, folder: Path, end: int) -> None:
    """tokenizer.json that puts both ends around a text, and its configuration; end: the number that
    stands for the end there."""
    definition = dict(tokenizer.definition)
    if end != tokenizer.eos_id or not _adds_both_ends(tokenizer):
        definition["post_processor"] = _both_ends(tokenizer, end)
    if _begins_with_a_space(tokenizer):
        definition["decoder"] = _without_first_space(definition["decoder"])
    _write_json(folder / TOKENIZER_FILE, definition)
    config = {f"{role}_token": token for role, token in tokenizer.specials.items()}
    _write_json(
        folder / CONFIG_FILE,
        {
            **config,
            # GIT's examples and fine-tuning scripts call the two ends by these names.
            "cls_token": config["bos_token"],
            "sep_token": config["eos_token"],
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
        },
    )


def _begins_with_a_space(tokenizer: Tokenizer) -> bool:
    """Whether what the tokenizer's own file makes of ids begins with the space that it put there:
    a byte-level vocabulary tells " dog" from "dog", and begins texts with the former."""
    backend = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.definition))
    return backend.decode(backend.encode("dog", add_special_tokens=False).ids).startswith(" ")


def _without_first_space(decoder: dict[str, Any]) -> dict[str, Any]:
    """That decoder, and then one space less at the beginning of the text."""
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {"type": "Sequence", "decoders": [decoder, {"type": "Fuse"}, strip]}


def _adds_both_ends(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's own file already puts BOS and EOS around a text."""
    backend = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.definition))
    backend.no_truncation()
    return backend.encode("").ids == [tokenizer.bos_id, tokenizer.eos_id]


def _both_ends(tokenizer: Tokenizer, end: int) -> dict[str, Any]:
    """A post-processor that does, as captions are in training."""
    bos, eos = tokenizer.specials["bos"], tokenizer.specials["eos"]

    def special(token: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": 0}}

    def text(name: str) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": 0}}

    return {
        "type": "TemplateProcessing",
        "single": [special(bos), text("A"), special(eos)],
        # Question and answer follow each other without a mark between them.
        "pair": [special(bos), text("A"), text("B"), special(eos)],
        "special_tokens": {
            token: {"id": token, "ids": [token_id], "tokens": [token]}
            for token, token_id in ((bos, tokenizer.bos_id), (eos, end))
        },
    }


def image_processor(image: ImageSettings, processor: str | None = None) -> dict[str, Any]:
    """preprocessor_config.json that prepares held-out images as ours are."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        **({"processor_class": processor} if processor else {}),
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image.size},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": image.size, "width": image.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _usage(record: ExportRecord) -> str:
    notes = "\n".join(f"- {note}" for note in record.notes)
    averaged = ", averaged weights" if record.weights == "ema" else ""
    return f"""\
# GIT captioner, {record.recipe}, step {record.step}{averaged}

Exported by omnipretrain; where it came from is in `omnipretrain.json`.

```python
from PIL import Image
from transformers import AutoProcessor, GitForCausalLM

model = GitForCausalLM.from_pretrained(".")
processor = AutoProcessor.from_pretrained(".")
pixels = processor(images=Image.open("picture.jpg"), return_tensors="pt").pixel_values
ids = model.generate(pixel_values=pixels)
print(processor.batch_decode(ids, skip_special_tokens=True)[0])
```

Fine-tune with transformers 5.15 or newer: from 4.48.3 to 5.14.1 its loss shifted the labels twice.

What differs from training:

{notes}
"""

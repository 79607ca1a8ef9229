"""CLIP's towers for transformers and open_clip, with tokenizer and image processor."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from data_pipeline.samples.tokenizer import Tokenizer
from pretrain.models.text import TextEncoderSettings
from tools.convert.export_git import image_processor, write_tokenizer
from tools.convert.formats.clip import Names, task_map, text_map, turned, vision_map
from tools.convert.formats.parts import Export, of, save, write_json
from tools.convert.formats.reading import read_tokens
from tools.convert.transformers_git import without_bars

_LEGACY_END = 2
"""For transformers, this number of the end means the largest id of a text."""


def write_transformers(export: Export, folder: Path) -> str:
    """CLIPVisionModel of an encoder, CLIPModel of a contrastive task."""
    write_json(
        folder / "preprocessor_config.json",
        image_processor(export.image, "CLIPProcessor" if export.choice.task else None),
    )
    if export.choice.task is None:
        return _vision_model(export, folder)
    objective, text = _text_part(export)
    end = _end(export)
    theirs = _towers(export, "transformers", ("vision_model.", "text_model."))
    words = "text_model.embeddings.token_embedding.weight"
    tokenizer = export.run.tokenizer
    if end != tokenizer.eos_id:
        theirs[words] = torch.cat([theirs[words], theirs[words][tokenizer.eos_id][None]])
        export.notes.append(
            f"the end of a text has number {end}, a copy of {tokenizer.eos_id}, "
            "which transformers takes for another meaning"
        )
    config = CLIPConfig(
        vision_config=_vision_config(export),
        text_config={
            **_tower(text),
            "vocab_size": len(theirs[words]),
            "max_position_embeddings": text.max_positions,
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": end,
            "pad_token_id": tokenizer.pad_id,
            "projection_dim": objective.width,
        },
        projection_dim=objective.width,
    )
    model = CLIPModel(config)
    model.load_state_dict(theirs)
    with without_bars():
        model.save_pretrained(folder)
    write_tokenizer(tokenizer, text.max_positions, folder, end)
    twin = CLIPModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    texts = _texts(export, text)
    out = twin(
        pixel_values=export.pixels(), input_ids=texts.masked_fill(texts == tokenizer.eos_id, end)
    )
    _compare(export, out.image_embeds, out.text_embeds, twin.logit_scale.exp(), texts)
    return (
        "from transformers import AutoProcessor, CLIPModel\n"
        'model = CLIPModel.from_pretrained(".")\n'
        'processor = AutoProcessor.from_pretrained(".")\n'
    )


def _vision_model(export: Export, folder: Path) -> str:
    start = f"encoders.{export.choice.encoder}."
    theirs = vision_map("transformers", export.choice.encoder).to_theirs(of(export.tensors, start))
    model = CLIPVisionModel(CLIPVisionConfig(**_vision_config(export)))
    model.load_state_dict(theirs)
    with without_bars():
        model.save_pretrained(folder)
    twin = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    ours = export.run.model.encoders[export.choice.encoder](export.pixels())
    export.compare("class token", twin.eval()(export.pixels()).pooler_output, ours[:, 0])
    return (
        "from transformers import AutoImageProcessor, CLIPVisionModel\n"
        'model = CLIPVisionModel.from_pretrained(".")\n'
        'processor = AutoImageProcessor.from_pretrained(".")\n'
    )


def write_open_clip(export: Export, folder: Path) -> str:
    """A folder of open_clip's, whose text tower is told where a text ends."""
    objective, text = _text_part(export)
    tokenizer, vit = export.run.tokenizer, export.vit
    theirs = {n: turned(n, t) for n, t in _towers(export, "openai", ("visual.", "")).items()}
    quick = vit.activation == "quick_gelu"
    image = export.image
    write_json(
        folder / "open_clip_config.json",
        {
            "model_cfg": {
                "embed_dim": objective.width,
                "quick_gelu": quick,
                "vision_cfg": {
                    "image_size": vit.image_size,
                    "patch_size": vit.patch_size,
                    "layers": vit.layers,
                    "width": vit.width,
                    "mlp_ratio": vit.mlp_ratio,
                    "head_width": vit.width // vit.heads,
                },
                "text_cfg": {
                    "context_length": text.max_positions,
                    "vocab_size": tokenizer.vocab_size,
                    "width": text.width,
                    "heads": text.heads,
                    "layers": text.layers,
                    "mlp_ratio": text.mlp_ratio,
                    "pool_type": "eos",
                    "eos_id": tokenizer.eos_id,
                    "hf_tokenizer_name": "tokenizer.json",
                },
            },
            "preprocess_cfg": {
                "size": image.size,
                "mean": list(image.mean),
                "std": list(image.std),
                "interpolation": "bicubic",
                "resize_mode": "shortest",
            },
        },
    )
    export.notes.append(
        "open_clip joins white space and mends broken characters of a text before "
        "it is split into tokens"
    )
    save(theirs, folder / "open_clip_model.safetensors")
    write_tokenizer(tokenizer, text.max_positions, folder, tokenizer.eos_id)
    back = load_file(folder / "open_clip_model.safetensors")
    tokens = read_tokens(
        back, export.pixels(), names="openai", heads=vit.heads, quick=quick, start="visual."
    )
    image_vectors = torch.nn.functional.normalize(tokens[:, 0] @ back["visual.proj"], dim=1)
    _compare(export, image_vectors, None, back["logit_scale"].exp(), _texts(export, text))
    return (
        "import open_clip\n"
        'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:.")\n'
        'tokenizer = open_clip.get_tokenizer("local-dir:.")\n'
    )


def _text_part(export: Export) -> tuple[Any, TextEncoderSettings]:
    """Settings of the task and of its text encoder. Raises ValueError: where a text ends cannot be
    said."""
    objective = export.run.recipe.tasks[export.choice.task].objective
    tokenizer = export.run.tokenizer
    if tokenizer.bos_id == tokenizer.eos_id:
        raise ValueError(
            f"--to {export.choice.format}: the tokenizer begins and ends texts with "
            "the same token, which would be taken for the end"
        )
    return objective, export.run.recipe.model.encoders[objective.text_encoder]


def _towers(export: Export, names: Names, starts: tuple[str, str]) -> dict[str, Tensor]:
    """Both towers, projections and the logarithm of the scale, which has its bound."""
    choice, run = export.choice, export.run
    text_encoder = run.recipe.tasks[choice.task].objective.text_encoder
    tensors = dict(export.tensors)
    scale = f"objectives.{choice.task}.temperature.log_scale"
    tensors[scale] = run.model.objectives[choice.task].temperature().log()
    vision, text = f"encoders.{choice.encoder}.", f"encoders.{text_encoder}."
    theirs = vision_map(names, choice.encoder, starts[0]).to_theirs(of(tensors, vision))
    theirs |= text_map(names, text_encoder, starts[1]).to_theirs(of(tensors, text))
    task = task_map(names, choice.task).to_theirs(of(tensors, f"objectives.{choice.task}."))
    if names == "transformers":
        task["logit_scale"] = turned("logit_scale", task["logit_scale"])
    return theirs | task


def _vision_config(export: Export) -> dict[str, Any]:
    vit = export.vit
    return {**_tower(vit), "image_size": vit.image_size, "patch_size": vit.patch_size}


def _tower(settings: Any) -> dict[str, Any]:
    return {
        "hidden_size": settings.width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "hidden_act": settings.activation,
        "intermediate_size": round(settings.width * settings.mlp_ratio),
    }


def _end(export: Export) -> int:
    """Number of the end of a text in transformers' vocabulary."""
    tokenizer: Tokenizer = export.run.tokenizer
    return tokenizer.vocab_size if tokenizer.eos_id == _LEGACY_END else tokenizer.eos_id


def _texts(export: Export, text: TextEncoderSettings) -> Tensor:
    """Seeded random texts of several lengths, (8, T) int64, filled with ends."""
    tokenizer = export.run.tokenizer
    generator = torch.Generator().manual_seed(1)
    length = min(text.max_positions, 16)
    words = torch.randint(0, tokenizer.vocab_size, (8, length), generator=generator)
    specials = torch.tensor([tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id])
    words = words.masked_fill(
        torch.isin(words, specials), int(set(range(4)).difference(specials.tolist()).pop())
    )
    words[:, 0] = tokenizer.bos_id
    ends = torch.arange(length) >= torch.randint(2, length, (8, 1), generator=generator)
    return words.masked_fill(ends, tokenizer.eos_id)


def _compare(
    export: Export, image: Tensor, text: Tensor | None, scale: Tensor, texts: Tensor
) -> None:
    """Their vectors against those of the task. text: None: its table was renamed, not computed."""
    objective = export.run.model.objectives[export.choice.task]
    encoders = export.run.model.encoders
    export.compare("image vectors", image, objective.image_features(encoders, export.images()))
    if text is not None:
        export.compare("text vectors", text, objective.text_features(encoders, texts))
    export.compare("scale", scale.reshape(1), objective.temperature())

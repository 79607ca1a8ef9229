"""Our captioner as a model of transformers."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

if not torch.cuda.is_available():
    # transformers imports DeepSpeed if it is installed, which warns of every missing accelerator.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from transformers import GitConfig, GitForCausalLM
from transformers.utils import logging as transformers_logging

from pretrain.models.git.decoder import GitDecoderSettings
from pretrain.models.git.weights import export_git
from pretrain.models.vit import VitSettings


class SpecialIds(NamedTuple):
    """Ids of the tokens that begin, end and fill a caption."""

    bos_id: int
    eos_id: int
    pad_id: int


def transformers_model(
    tensors: Mapping[str, Tensor],
    vit: VitSettings,
    decoder: GitDecoderSettings,
    ids: SpecialIds,
    encoder: str = "image",
    task: str = "caption",
) -> GitForCausalLM:
    """A `GitForCausalLM` in eval mode with a copy of these weights.

    tensors: weights under our names; those of other encoders and tasks are left out.

    The epsilon of the text embedding's LayerNorm is 1e-12 there, as in all layers of the decoder;
    a model trained with 1e-8 gives the same scores to about 1e-6.

    Raises:
        ValueError: the tensors are not those of a GIT model (see `export_git`).
    """
    weights = export_git(tensors, "transformers", encoder, task)
    config = transformers_config(vit, decoder, len(weights["output.bias"]), ids)
    model = GitForCausalLM(config)
    model.load_state_dict(weights)
    return model.eval()


def transformers_config(
    vit: VitSettings, decoder: GitDecoderSettings, vocab_size: int, ids: SpecialIds
) -> GitConfig:
    """The configuration that describes these two towers."""
    return GitConfig(
        vision_config={
            "image_size": vit.image_size,
            "patch_size": vit.patch_size,
            "hidden_size": vit.width,
            "num_hidden_layers": vit.layers,
            "num_attention_heads": vit.heads,
            "intermediate_size": round(vit.width * vit.mlp_ratio),
            "hidden_act": vit.activation,
        },
        vocab_size=vocab_size,
        hidden_size=decoder.width,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.heads,
        intermediate_size=decoder.mlp_width,
        max_position_embeddings=decoder.max_positions,
        hidden_dropout_prob=decoder.dropout,
        attention_probs_dropout_prob=decoder.dropout,
        tie_word_embeddings=decoder.tied_output,
        bos_token_id=ids.bos_id,
        eos_token_id=ids.eos_id,
        pad_token_id=ids.pad_id,
    )


def read_git(folder: str | Path) -> GitForCausalLM:
    """The model that a folder holds, float32, in eval mode; nothing is fetched from anywhere."""
    with without_bars():
        model = GitForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval()


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars into ours."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()

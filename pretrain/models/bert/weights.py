"""Weights of transformers' BertModel and RobertaModel, to our names and back.

Our table of positions has a row for every number that theirs has. The pooler, which they put behind
the first token, is not part of ours.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from pretrain.models.bert.settings import BertSettings, bert_settings
from pretrain.models.key_map import KeyMap

_LAYER = "encoder.layer.{l}."
RULES = (
    ("embedding.words.weight", "embeddings.word_embeddings.weight"),
    ("embedding.positions", "embeddings.position_embeddings.weight"),
    ("embedding.types", "embeddings.token_type_embeddings.weight"),
    ("embedding.norm.{p}", "embeddings.LayerNorm.{p}"),
    (
        "layers.{l}.qkv.{p}",
        tuple(f"{_LAYER}attention.self.{part}.{{p}}" for part in ("query", "key", "value")),
    ),
    ("layers.{l}.output.{p}", _LAYER + "attention.output.dense.{p}"),
    ("layers.{l}.norm_attention.{p}", _LAYER + "attention.output.LayerNorm.{p}"),
    ("layers.{l}.expand.{p}", _LAYER + "intermediate.dense.{p}"),
    ("layers.{l}.reduce.{p}", _LAYER + "output.dense.{p}"),
    ("layers.{l}.norm_mlp.{p}", _LAYER + "output.LayerNorm.{p}"),
)

NAMES = KeyMap(RULES, {}, model="BERT", theirs="transformers")

# What a checkpoint of a model with a head has beside the encoder.
_HEADS = ("pooler.", "lm_head.", "cls.", "classifier.", "qa_outputs.")
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their encoder under our names; heads and the pooler are left out.

    Raises ValueError: tensors are missing, or unknown.
    """
    found = {}
    for name, tensor in state.items():
        short = name.removeprefix("roberta.").removeprefix("bert.")
        if not short.startswith(_HEADS) and short not in _BUFFERS:
            found[short] = tensor
    return NAMES.to_ours(found)


def to_theirs(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our encoder under the names of a BertModel or RobertaModel without its pooler."""
    return NAMES.to_theirs(state)


def load_folder(folder: Path) -> tuple[BertSettings, dict[str, Tensor]]:
    """Settings and tensors, under our names, of a local folder of transformers.

    Raises ValueError: not such a folder, or tensors are missing or unknown.
    """
    settings, _ = bert_settings(folder)
    path = folder / "model.safetensors"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no model.safetensors: save the model there with `save_pretrained` "
            "(safe_serialization=True), for a pickle is not read here"
        )
    return settings, to_ours(load_file(path))

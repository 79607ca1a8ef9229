"""Settings of BERT-like text encoders, which need no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pretrain.models.encoder_settings import EncoderSettings

if TYPE_CHECKING:
    from pretrain.models.bert.bert import Bert
    from pretrain.models.build_context import BuildContext


class BertSettings(EncoderSettings):
    """Shape of a text encoder with norms behind each sum; the defaults are RoBERTa-base's, but for
    the vocabulary, which is the tokenizer's."""

    reads: ClassVar[str] = "text"
    reads_text: ClassVar[bool] = True
    type: Literal["bert"] = "bert"
    """Selects this encoder among the kinds that a recipe may name."""
    layout: Literal["roberta", "bert"] = "roberta"
    """Whose table of positions: RoBERTa's begins at the padding token's number + 1."""
    width: int = Field(768, gt=0)
    """Channels of a token."""
    layers: int = Field(12, ge=0)
    """Number of layers; 0: embeddings alone, as Uni-Perceiver v1 has them."""
    heads: int = Field(12, gt=0)
    """Attention heads; must divide `width`."""
    hidden: int = Field(3072, gt=0)
    """Hidden channels of the MLPs."""
    max_positions: int = Field(512, gt=1)
    """The longest text in tokens."""
    token_types: int = Field(1, gt=0)
    """Rows of the table of types, of which the first is used: BERT has 2, RoBERTa 1."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the variance in norms: BERT has 1e-12."""
    gradient_checkpointing: bool = False
    """Recompute the layers in the backward pass: more time for less memory."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        return self

    @property
    def longest_text(self) -> int:
        """As many tokens as there are positions."""
        return self.max_positions

    def build(self, context: BuildContext) -> Bert:
        """The encoder for the vocabulary of the context."""
        from pretrain.models.bert.bert import Bert

        words = context.vocabulary
        first = words.pad_id + 1 if self.layout == "roberta" else 0
        return Bert(
            words.vocab_size,
            words.eos_id,
            first_position=first,
            **self.model_dump(exclude={"type", "layout"}),
        )


def bert_settings(folder: Path) -> tuple[BertSettings, int]:
    """Settings of the model in a folder of transformers, and the size of its vocabulary.

    Raises ValueError: it is no BERT or RoBERTa, or has something that ours has not.
    """
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not the config of a transformers model: {error}") from error
    layout = config.get("model_type")
    if layout not in ("roberta", "bert"):
        raise ValueError(f"{path}: model_type is {layout!r}, and not roberta or bert")
    for name, known in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if config.get(name, known) != known:
            raise ValueError(f"{path}: {name} is {config[name]!r}; only {known} is known here")
    first = config.get("pad_token_id", 1) + 1 if layout == "roberta" else 0
    settings = BertSettings(
        layout=layout,
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        hidden=config["intermediate_size"],
        max_positions=config["max_position_embeddings"] - first,
        token_types=config["type_vocab_size"],
        norm_eps=config.get("layer_norm_eps", 1e-12),
    )
    return settings, config["vocab_size"]

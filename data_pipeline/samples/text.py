"""Text data: rows of token ids, made by `tools.make_shards text`, to a batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from data_pipeline.plain_text import decoded
from data_pipeline.reading.reader import Sample
from data_pipeline.samples.members import bad
from data_pipeline.samples.sample_processor import DataSettings, Item, RngFor, SampleProcessor
from data_pipeline.samples.tokenizer import ID_TYPES, Tokenizer

if TYPE_CHECKING:
    import torch


class TextDataSettings(DataSettings):
    """Rows of token ids in shards, as `make_shards text` packs them."""

    reads_text: ClassVar[bool] = True
    type: Literal["text"] = "text"
    """Kind of data; follows from the task's objective where it is not given."""
    text_length: int = Field(default=512, ge=1)
    """Tokens per row: those that the shards were packed with (`--tokens`), or more."""

    def processor(self, tokenizer: Tokenizer | None, train: bool) -> TextProcessor:
        """As of `DataSettings`."""
        return TextProcessor(self, tokenizer)


class TextProcessor(SampleProcessor):
    """A row of token ids; nothing is drawn at random.

    Args:
        settings: how long rows are.
        tokenizer: the one that the rows were made with.
    """

    extensions = frozenset([*ID_TYPES, "json"])

    def __init__(self, settings: TextDataSettings, tokenizer: Tokenizer) -> None:
        super().__init__(settings, train=False)
        self.tokenizer = tokenizer
        self._mark, self._vocab_size = tokenizer.mark, tokenizer.vocab_size

    def read(self, sample: Sample, rng_for: RngFor) -> Item:
        """tokens (n,) int64; documents (n,) int64: number of the document within the row.

        Raises:
            BadSample: the row is damaged.
            ValueError: it is longer than `text_length`, or was made with another tokenizer.
        """
        tokens = self._ids(sample)
        try:
            record = json.loads(decoded(sample.members["json"]))
            starts = np.array(record["starts"], dtype=np.int64)
            mark = record["tokenizer"]
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise bad(sample, f"its json is not that of a row: {error!r}") from error
        if mark != self._mark:
            raise ValueError(
                f"the row was made with tokenizer {mark}, and the recipe's is {self._mark}: pack "
                "the documents again, or set tokenizer.path to the one that they were packed with"
            )
        if len(tokens) > self.settings.text_length:
            raise ValueError(
                f"the row has {len(tokens)} tokens and data.text_length is "
                f"{self.settings.text_length}: raise it, or pack with `--tokens "
                f"{self.settings.text_length}`"
            )
        within = starts.ndim == 1 and ((starts >= 0) & (starts < len(tokens))).all()
        if not within or int(tokens.max()) >= self._vocab_size:
            raise bad(sample, "its ids or document borders are out of range")
        begins = np.zeros(len(tokens), dtype=np.int64)
        begins[starts] = 1
        begins[0] = 0  # the first document of the row is number 0, wherever it began
        return {"tokens": tokens, "documents": np.cumsum(begins)}

    def stack(self, items: Sequence[Item | None], images: dict[str, torch.Tensor]) -> Item:
        """tokens (B, T) int64 with T = text_length, filled with the padding token; mask (B, T)
        bool, True where there is a token; documents (B, T) int64, -1 where there is none: what
        must not see each other has different numbers."""
        shape = (len(items), self.settings.text_length)
        tokens = np.full(shape, self.tokenizer.pad_id, dtype=np.int64)
        documents = np.full(shape, -1, dtype=np.int64)
        for row, item in enumerate(items):
            if item is not None:
                tokens[row, : len(item["tokens"])] = item["tokens"]
                documents[row, : len(item["tokens"])] = item["documents"]
        return {"tokens": tokens, "mask": documents >= 0, "documents": documents}

    def _ids(self, sample: Sample) -> np.ndarray:
        for extension, kind in ID_TYPES.items():
            data = sample.members.get(extension)
            if data is not None:
                if not data or len(data) % kind.itemsize:
                    raise bad(sample, f"its member {extension} has {len(data)} bytes")
                return np.frombuffer(data, kind).astype(np.int64)
        raise bad(sample, f"has no member {' or '.join(ID_TYPES)}: no row of `make_shards text`")

"""Read texts of images piece by piece: the image lies in memory once, however many texts it has.

Beams, class names and answers are texts side by side: of each the keys and values of its own words
are kept, of the image those of one pass.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.models.git.decoder import DecoderLayer, GitDecoder, LayerCache

Pair = tuple[Tensor, Tensor]
Agree = Callable[[bool], bool]


def alone(done: bool) -> bool:
    """The agreement of a single process with itself."""
    return done


@dataclass(frozen=True)
class Prompt:
    """What texts begin with, BOS and a question, say: read, never generated."""

    ids: Tensor
    """(B, P) int64, padded on the right."""
    lengths: Tensor
    """(B,) int64, at least 1."""

    @classmethod
    def of_bos(cls, batch: int, bos_id: int, device: torch.device) -> "Prompt":
        """BOS alone."""
        ids = torch.full((batch, 1), bos_id, dtype=torch.int64, device=device)
        return cls(ids, torch.ones(batch, dtype=torch.int64, device=device))

    @classmethod
    def of(cls, texts: list[list[int]], pad_id: int, device: torch.device | str) -> "Prompt":
        """Lists of ids, BOS first."""
        longest = max(map(len, texts))
        ids = [text + [pad_id] * (longest - len(text)) for text in texts]
        return cls(
            torch.tensor(ids, device=device), torch.tensor([len(t) for t in texts], device=device)
        )


class TextReader:
    """What B images and W texts of each have left behind in every layer.

    image_tokens: (B, N, visual_width) from the encoder; the decoder should be in eval mode.
    """

    def __init__(self, decoder: GitDecoder, image_tokens: Tensor) -> None:
        self.decoder = decoder
        image = decoder.projection(image_tokens)
        self.images: list[Pair] = []
        for number, layer in enumerate(decoder.layers):
            cache = LayerCache(image.shape[1])
            last = number == len(decoder.layers) - 1
            image = layer(image, image.shape[1], None, last, cache)
            self.images.append((cache.keys, cache.values))
        self.texts: list[Pair] = []
        # Places that hold a word, (B, W, S) bool, and how many do, (B, W): padding counts nowhere.
        self.held: Tensor | None = None
        self.lengths: Tensor | None = None

    def read(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Read on: ids (B, W, T) int64, of which the first `lengths` (B, W) are words (all by
        default); padding may stand behind them.

        Returns what the last layer makes of each place: (B, W, T, width).
        """
        batch, width, length = ids.shape
        if self.lengths is None or self.held is None:
            self.lengths = ids.new_zeros(batch, width)
            self.held = ids.new_zeros((batch, width, 0), dtype=torch.bool)
        place = torch.arange(length, device=ids.device)
        words = torch.ones_like(ids, dtype=torch.bool)
        if lengths is not None:
            words = place < lengths[..., None]
        past = place[:, None] >= place
        own = words[..., None, :] & past
        mask = torch.cat([self.held[..., None, :].expand(-1, -1, length, -1), own], dim=-1)
        hidden = self.decoder.embedding(ids, start=self.lengths)
        for number, layer in enumerate(self.decoder.layers):
            hidden = self._layer(number, layer, hidden, mask)
        self.held = torch.cat([self.held, words], dim=-1)
        self.lengths = self.lengths + words.sum(dim=-1)
        return hidden

    def scores(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of the next word: (..., width) -> (..., vocab_size) float32."""
        return self.decoder.output(hidden).float().log_softmax(dim=-1)

    def keep(self, texts: Tensor) -> None:
        """Go on with these texts of each image: (B, W') int64, places among the W held now."""
        rows = torch.arange(len(texts), device=texts.device)[:, None]
        self.texts = [(key[rows, texts], value[rows, texts]) for key, value in self.texts]
        self.held, self.lengths = self.held[rows, texts], self.lengths[rows, texts]

    def _layer(self, number: int, layer: DecoderLayer, hidden: Tensor, mask: Tensor) -> Tensor:
        attention = layer.attention

        def split(x: Tensor) -> Tensor:  # (B, W, T, width) -> (B, W, heads, T, width // heads)
            return x.unflatten(-1, (attention.heads, -1)).transpose(2, 3)

        query = split(attention.query(hidden))
        text = split(attention.key(hidden)), split(attention.value(hidden))
        if number < len(self.texts):
            text = tuple(
                torch.cat(pair, dim=3) for pair in zip(self.texts[number], text, strict=True)
            )
            self.texts[number] = text
        else:
            self.texts.append(text)
        mixed = _attend(query, self.images[number], text, mask)
        mixed = attention.output(mixed.transpose(2, 3).flatten(3))
        hidden = layer.norm_attention(hidden + mixed)
        update = layer.reduce(torch.nn.functional.gelu(layer.expand(hidden)))
        return layer.norm_mlp(hidden + update)


def _attend(query: Tensor, image: Pair, text: Pair, mask: Tensor) -> Tensor:
    """Attention over an image's keys, which its texts share, and over each text's own.

    query: (B, W, heads, T, d); image: (B, heads, N, d) each; text: (B, W, heads, S, d) each; mask:
    (B, W, T, S) bool. Returns (B, W, heads, T, d).
    """
    _, width, _, length, size = query.shape
    query = query * size**-0.5
    beside = query.transpose(1, 2).flatten(2, 3)  # the texts of an image in one product
    seen = (beside @ image[0].mT).unflatten(2, (width, length)).transpose(1, 2)
    own = (query @ text[0].mT).masked_fill(~mask[:, :, None], float("-inf"))
    shares = torch.cat([seen, own], dim=-1).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    seen, own = shares.split([seen.shape[-1], own.shape[-1]], dim=-1)
    of_image = seen.transpose(1, 2).flatten(2, 3) @ image[1]
    return of_image.unflatten(2, (width, length)).transpose(1, 2) + own @ text[1]


def after_prompt(reader: TextReader, prompt: Prompt, beams: int = 1) -> Tensor:
    """Read the prompts once, and go on with `beams` texts of each.

    Returns log-probabilities of the first new word: (B, beams, vocab_size).
    """
    hidden = reader.read(prompt.ids[:, None], prompt.lengths[:, None])
    rows = torch.arange(len(hidden), device=hidden.device)
    first = reader.scores(hidden[rows, 0, prompt.lengths - 1])
    if beams > 1:
        reader.keep(torch.zeros(len(hidden), beams, dtype=torch.int64, device=hidden.device))
    return first[:, None].expand(-1, beams, -1)


def check_lengths(decoder: GitDecoder, prompt: Prompt, max_new_tokens: int) -> None:
    """Raises ValueError: prompt and new words do not fit the position table."""
    longest = prompt.ids.shape[1]
    if max_new_tokens < 1 or longest + max_new_tokens - 1 > decoder.max_positions:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens}: together at most "
            f"{decoder.max_positions + 1} (max_positions of the decoder and EOS), and at least one "
            "new token"
        )

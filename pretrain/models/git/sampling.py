"""Texts drawn word by word, from all words or from the likely ones."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline.rng import sample_rng
from pretrain.models.git.decoder import GitDecoder
from pretrain.models.git.reading import (
    Agree,
    Prompt,
    TextReader,
    after_prompt,
    alone,
    check_lengths,
)
from pretrain.models.git.trie import Trie


@dataclass(frozen=True)
class Draws:
    """Numbers of rows: the same for a row in any batch and on any number of ranks."""

    seed: int
    rows: list[int]
    """Numbers of the images in their data set."""

    def uniform(self, places: int) -> Tensor:
        """(B, places) float64 in [0, 1), keyed by (seed, row, place)."""
        found = [sample_rng(self.seed, "", row, "words").random(places) for row in self.rows]
        return torch.from_numpy(np.stack(found))


@torch.no_grad()
def generate_words(
    decoder: GitDecoder,
    image_tokens: Tensor,
    prompt: Prompt,
    *,
    eos_id: int,
    pad_id: int,
    max_new_tokens: int,
    draws: Draws | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repeats: bool = True,
    trie: Trie | None = None,
    agree: Agree = alone,
) -> tuple[Tensor, Tensor]:
    """One text for each image: the likeliest word each time, or with `draws` a drawn one.

    temperature, top_k, top_p: as in `likely_words`, of drawn words.
    repeats: whether a word may follow itself; GIT's own code never lets it.
    trie: the texts that are allowed, behind the prompt.
    agree: as in `generate_greedy`: all ranks run as many passes.

    Returns ids (B, n) int64, n <= max_new_tokens: words and EOS, then padding; and their
    log-probabilities (B,) float32, by the model and without what was left out.
    """
    check_lengths(decoder, prompt, max_new_tokens)
    reader, batch = TextReader(decoder, image_tokens), len(image_tokens)
    device = image_tokens.device
    numbers = draws.uniform(max_new_tokens).to(device) if draws else None
    ids = torch.full((batch, max_new_tokens), pad_id, device=device)
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    total, node = torch.zeros(batch, device=device), torch.zeros_like(prompt.lengths)
    trie = trie.to(device) if trie is not None else None
    scores = after_prompt(reader, prompt)[:, 0]
    for step in range(max_new_tokens):
        allowed = scores if trie is None else scores + trie.mask(node)
        if step and not repeats:
            allowed = allowed.scatter(1, ids[:, step - 1 : step], float("-inf"))
        if numbers is None:
            words = allowed.argmax(dim=-1)
        else:
            words = draw(likely_words(allowed, temperature, top_k, top_p), numbers[:, step])
        total += scores.gather(1, words[:, None])[:, 0].masked_fill(ended, 0.0)
        ids[:, step] = torch.where(ended, pad_id, words)
        node = node if trie is None else trie.follow(node, words)
        ended |= words == eos_id
        if agree(bool(ended.all())) or step + 1 == max_new_tokens:
            break
        scores = reader.scores(reader.read(words[:, None, None])[:, 0, 0])
    return ids[:, : step + 1], total


def likely_words(scores: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities (B, V) of words to draw from.

    scores: (B, V) log-probabilities, divided by `temperature` first.
    top_k: only the k likeliest words; 0 takes all.
    top_p: of these the fewest likeliest that have this share of the probability together.
    """
    scores = scores / temperature
    if 0 < top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1.0:
        ranked, order = scores.sort(dim=-1, descending=True)
        shares = ranked.softmax(dim=-1)
        # A word stays if the likelier ones have not reached the share without it.
        ranked = ranked.masked_fill(shares.cumsum(-1) - shares >= top_p, float("-inf"))
        scores = torch.empty_like(scores).scatter_(1, order, ranked)
    return scores.softmax(dim=-1)


def draw(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Words (B,) int64 of numbers (B,) in [0, 1), by the inverse of the distribution."""
    steps = probabilities.double().cumsum(-1)
    place = torch.searchsorted(steps, (numbers * steps[:, -1])[:, None], right=True)
    last = probabilities.shape[-1] - 1 - (probabilities.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(place[:, 0], last)

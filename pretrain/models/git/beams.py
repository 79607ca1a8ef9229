"""Beam search over a batch, by the rules of transformers or by those of GIT's own code.

Both go on with the best `beams` texts and look at twice as many candidates. They differ in what a
finished text is worth, and in who may finish:

- `transformers`: log-probability / new tokens ** penalty, EOS counted; candidates among the best
  `beams` finish; at the limit a text is given back without EOS.
- `original`: log-probability / ((5 + tokens) / 6) ** penalty, BOS and prompt counted, EOS not;
  those that stand before the last beam that goes on finish; at the limit EOS is put in the place
  of the last word.
"""

from typing import Literal

import torch
from torch import Tensor

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

Normalisation = Literal["transformers", "original"]


@torch.no_grad()
def generate_beams(
    decoder: GitDecoder,
    image_tokens: Tensor,
    prompt: Prompt,
    *,
    eos_id: int,
    pad_id: int,
    max_new_tokens: int,
    beams: int = 4,
    length_penalty: float = 1.0,
    normalisation: Normalisation = "transformers",
    trie: Trie | None = None,
    agree: Agree = alone,
) -> tuple[Tensor, Tensor]:
    """The best text that a search of `beams` finds for each image.

    image_tokens: (B, N, visual_width); the decoder should be in eval mode.
    trie: the texts that are allowed, behind the prompt.
    agree: as in `generate_greedy`: all ranks run as many passes.

    Returns ids (B, n) int64, n <= max_new_tokens: words and EOS, then padding; and their scores
    (B,) float32 by `normalisation`.
    """
    check_lengths(decoder, prompt, max_new_tokens)
    reader = TextReader(decoder, image_tokens)
    search = _Search(prompt, beams, max_new_tokens, length_penalty, normalisation, eos_id, pad_id)
    nodes = torch.zeros_like(search.sums, dtype=torch.int64)
    scores = after_prompt(reader, prompt, beams)
    if trie is not None:
        trie = trie.to(scores.device)
    for step in range(max_new_tokens):
        if trie is not None:
            scores = scores + trie.mask(nodes)
        parents, words = search.advance(scores, step)
        if agree(bool(search.done.all())) or step + 1 == max_new_tokens:
            break
        reader.keep(parents)
        if trie is not None:
            nodes = trie.follow(nodes.gather(1, parents), words)
        scores = reader.scores(reader.read(words[..., None])[:, :, 0])
    return search.best(step + 1)


class _Search:
    """Running and finished texts of a batch of B images."""

    def __init__(
        self,
        prompt: Prompt,
        beams: int,
        limit: int,
        penalty: float,
        normalisation: Normalisation,
        eos_id: int,
        pad_id: int,
    ) -> None:
        batch, device = len(prompt.ids), prompt.ids.device
        self.beams, self.limit, self.penalty = beams, limit, penalty
        self.original = normalisation == "original"
        self.eos_id, self.pad_id = eos_id, pad_id
        self.lengths = prompt.lengths
        self.sums = torch.full((batch, beams), float("-inf"), device=device)
        self.sums[:, 0] = 0.0  # at first all beams are the same text
        self.ids = torch.full((batch, beams, limit), pad_id, device=device)
        # GIT's code keeps the best finished text alone; transformers as many as there are beams.
        kept = 1 if self.original else beams
        self.finished = torch.full((batch, kept, limit), pad_id, device=device)
        self.worth = torch.full((batch, kept), float("-inf"), device=device)
        self.done = torch.zeros(batch, dtype=torch.bool, device=device)

    def advance(self, scores: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Take one word more. scores: (B, beams, V) log-probabilities of it.

        Returns (B, beams) each: which beams go on, and with which word.
        """
        sums, place = (self.sums[..., None] + scores).flatten(1).topk(2 * self.beams)
        parents, words = place // scores.shape[-1], place % scores.shape[-1]
        if self.original:
            self._close(sums[:, 0])
        rank = torch.arange(2 * self.beams, device=sums.device)
        end = words == self.eos_id
        last = step + 1 == self.limit
        if self.original:
            # Everything is an end in the last place; EOS stands there instead of the word.
            going_on = (~end).cumsum(1)
            may = (end & (going_on < self.beams)) | last
            words = words if not last else torch.full_like(words, self.eos_id)
        else:
            may = (end | last) & (rank < self.beams)
        candidates = self.ids.gather(1, parents[..., None].expand(-1, -1, self.limit))
        candidates[:, :, step] = words
        worth = sums / self._norm(step)
        may = may & sums.isfinite() & ~self.done[:, None]
        self._finish(candidates, worth.masked_fill(~may, float("-inf")))
        going = sums.masked_fill(end | last, float("-inf")).topk(self.beams)
        self.sums = going.values
        self.ids = candidates.gather(1, going.indices[..., None].expand(-1, -1, self.limit))
        if not self.original:
            best = self.sums[:, 0] / (step + 1) ** self.penalty
            self.done = self.done | (best <= self.worth.min(1).values)
        self.done = self.done | ~self.sums[:, 0].isfinite()
        return parents.gather(1, going.indices), words.gather(1, going.indices)

    def best(self, steps: int) -> tuple[Tensor, Tensor]:
        """ids (B, n) and scores (B,) of the best finished texts; rows end in padding."""
        found, place = self.worth.max(1)
        rows = torch.arange(len(place), device=place.device)
        return self.finished[rows, place, :steps], found

    def _norm(self, step: int) -> Tensor:
        """What sums of texts that end at this step are divided by: (B, 1)."""
        if self.original:
            return (((5.0 + self.lengths + step) / 6.0) ** self.penalty)[:, None]
        return torch.full_like(self.sums[:, :1], step + 1) ** self.penalty

    def _close(self, best: Tensor) -> None:
        """GIT's code ends when no running text can be worth more at the limit."""
        most = best[:, None] / self._norm(self.limit - 1)
        self.done = self.done | (self.worth >= most)[:, 0] & self.worth[:, 0].isfinite()

    def _finish(self, candidates: Tensor, worth: Tensor) -> None:
        """Keep the best of the finished texts and of those that have just ended."""
        kept = self.worth.shape[1]
        texts, worths = torch.cat([self.finished, candidates], 1), torch.cat([self.worth, worth], 1)
        self.worth, place = worths.topk(kept)
        self.finished = texts.gather(1, place[..., None].expand(-1, -1, self.limit))

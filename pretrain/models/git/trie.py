"""The texts that an answer may be, as a table of which word may follow which."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Trie:
    """Allowed texts. Where a text stands in it is a number, so that beams of a batch can be told to
    go on from others; nothing is remembered here."""

    keys: Tensor
    """(E,) int64, sorted: node * vocab_size + word of each edge."""
    targets: Tensor
    """(E,) int64: the node that an edge leads to."""
    starts: Tensor
    """(nodes + 1,) int64: the edges of node n are starts[n] to starts[n + 1]."""
    vocab_size: int

    @classmethod
    def build(cls, texts: Iterable[Sequence[int]], vocab_size: int, eos_id: int) -> "Trie":
        """A trie of texts, each a list of ids without BOS; EOS is added where it is missing.

        Raises ValueError: no text, an empty one, or an id beyond the vocabulary.
        """
        children: list[dict[int, int]] = [{}]
        for text in texts:
            ids = [*text] if text and text[-1] == eos_id else [*text, eos_id]
            if len(ids) < 2 or not all(0 <= i < vocab_size for i in ids) or eos_id in ids[:-1]:
                raise ValueError(f"{list(text)} is no text of ids 0 to {vocab_size - 1} before EOS")
            node = 0
            for word in ids:
                if word not in children[node]:
                    children[node][word] = len(children)
                    children.append({})
                node = children[node][word]
        if not children[0]:
            raise ValueError("no text is allowed: give at least one")
        edges = sorted(
            (node * vocab_size + word, target)
            for node, below in enumerate(children)
            for word, target in below.items()
        )
        counts = torch.tensor([0] + [len(below) for below in children])
        keys, targets = torch.tensor(edges).T
        return cls(keys.contiguous(), targets.contiguous(), counts.cumsum(0), vocab_size)

    def to(self, device: torch.device) -> "Trie":
        """The same on a device."""
        moved = (t.to(device) for t in (self.keys, self.targets, self.starts))
        return Trie(*moved, self.vocab_size)

    def mask(self, nodes: Tensor) -> Tensor:
        """What is to be added to the scores of next words: nodes (...,) -> (..., vocab_size)
        float32, 0 where a word may follow and -inf elsewhere. After an end anything may follow,
        since nobody reads it."""
        flat = nodes.reshape(-1)
        first, counts = self.starts[flat], self.starts[flat + 1] - self.starts[flat]
        rows = torch.arange(len(flat), device=flat.device).repeat_interleave(counts)
        before = (counts.cumsum(0) - counts).repeat_interleave(counts)
        edges = first.repeat_interleave(counts) + torch.arange(len(rows), device=flat.device)
        mask = torch.full((len(flat), self.vocab_size), float("-inf"), device=flat.device)
        mask[rows, self.keys[edges - before] % self.vocab_size] = 0.0
        mask[counts == 0] = 0.0
        return mask.view(*nodes.shape, self.vocab_size)

    def follow(self, nodes: Tensor, words: Tensor) -> Tensor:
        """Where texts stand after one more word, both (...,); an end stays where it is, and so does
        a word that is not allowed."""
        wanted = nodes * self.vocab_size + words
        edge = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
        return torch.where(self.keys[edge] == wanted, self.targets[edge], nodes)

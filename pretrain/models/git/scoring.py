"""Which of many texts an image, and a prompt, make most likely: classification by text."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.models.git.decoder import GitDecoder
from pretrain.models.git.reading import Prompt, TextReader, after_prompt, check_lengths


@torch.no_grad()
def score_texts(
    decoder: GitDecoder,
    image_tokens: Tensor,
    prompt: Prompt,
    texts: Sequence[Sequence[int]],
    *,
    eos_id: int,
    chunk_tokens: int = 4096,
) -> tuple[Tensor, Tensor]:
    """Log-likelihood of each text behind each prompt.

    The image and the prompt are read once. Texts are read side by side, those of similar length
    together, so many at a time as hold `chunk_tokens` tokens.

    image_tokens: (B, N, visual_width); the decoder should be in eval mode.
    texts: ids without BOS; EOS is added where it is missing.

    Raises ValueError: a prompt and its longest text do not fit the position table.

    Returns sums over the tokens of each text, EOS counted, and their means: (B, texts) float32.
    """
    names = [[*t] if t and t[-1] == eos_id else [*t, eos_id] for t in texts]
    check_lengths(decoder, prompt, max(map(len, names)))
    order = sorted(range(len(names)), key=lambda n: len(names[n]))
    batch, device = len(image_tokens), image_tokens.device
    sums = torch.empty(batch, len(names), device=device)
    reader = TextReader(decoder, image_tokens)
    first = after_prompt(reader, prompt)[:, 0]
    start = reader.texts, reader.held, reader.lengths
    at = 0
    while at < len(order):
        end = at + 1
        while end < len(order) and (end + 1 - at) * batch * len(names[order[end]]) <= chunk_tokens:
            end += 1
        chosen = order[at:end]
        reader.texts, reader.held, reader.lengths = list(start[0]), *start[1:]
        sums[:, chosen] = _read(reader, first, [names[n] for n in chosen])
        at = end
    lengths = torch.tensor([len(name) for name in names], device=device)
    return sums, sums / lengths


def _read(reader: TextReader, first: Tensor, names: list[list[int]]) -> Tensor:
    """Log-likelihoods (B, W) of names behind what was read; `first` scores their first words."""
    batch, device = len(first), first.device
    padded = Prompt.of(names, names[0][-1], device)
    ids, lengths = padded.ids, padded.lengths
    found = first[:, ids[:, 0]]
    if ids.shape[1] == 1:
        return found
    reader.keep(torch.zeros(batch, len(names), dtype=torch.int64, device=device))
    hidden = reader.read(ids[None, :, :-1].expand(batch, -1, -1), (lengths - 1).expand(batch, -1))
    # Only places of words reach the vocabulary.
    place = torch.arange(ids.shape[1] - 1, device=device) < (lengths - 1)[:, None]
    labels = ids[:, 1:][place].expand(batch, -1)
    scores = reader.scores(hidden[:, place]).gather(-1, labels[..., None])[..., 0]
    owner = place.nonzero()[:, 0].expand(batch, -1)
    return found.scatter_add(1, owner, scores)

"""Greedy decoding of many captions at once, with a key/value cache."""

from collections.abc import Callable

import torch
from torch import Tensor

from pretrain.models.git.decoder import GitDecoder, LayerCache


def alone(done: bool) -> bool:
    """The agreement of a single process with itself."""
    return done


@torch.no_grad()
def generate_greedy(
    decoder: GitDecoder,
    image_tokens: Tensor,
    *,
    bos_id: int,
    eos_id: int,
    pad_id: int,
    max_new_tokens: int,
    agree: Callable[[bool], bool] = alone,
) -> Tensor:
    """Extend BOS by the most likely word until every caption of the batch has ended.

    image_tokens: (B, N, visual_width) from the encoder; the decoder should be in eval mode.
    agree: gets "all my captions have ended" after every token and says whether to stop. Where a
        forward pass is a collective operation (ZeRO-3) it must give all ranks the same answer, so
        that they run the same number of passes.

    Returns ids (B, 1 + n) int64, n <= max_new_tokens: BOS, words, EOS, then padding.
    """
    if max_new_tokens < 1 or max_new_tokens > decoder.max_positions:
        raise ValueError(
            f"max_new_tokens must be 1 to {decoder.max_positions} (max_positions of the decoder), "
            f"not {max_new_tokens}"
        )
    image = decoder.projection(image_tokens)
    batch, image_length = image.shape[:2]
    caches = [LayerCache(image_length + max_new_tokens) for _ in decoder.layers]
    ids = torch.full((batch, 1 + max_new_tokens), pad_id, device=image.device)
    ids[:, 0] = bos_id
    ended = torch.zeros(batch, dtype=torch.bool, device=image.device)
    for step in range(max_new_tokens):
        hidden = decoder.embedding(ids[:, step : step + 1], start=step)
        if step == 0:
            # The first pass also fills the caches with the image; later ones carry one token.
            hidden = decoder.run_layers(torch.cat([image, hidden], 1), image_length, None, caches)
        else:
            hidden = decoder.run_layers(hidden, 0, None, caches)
        best = decoder.output(hidden[:, -1]).argmax(dim=-1)
        ids[:, step + 1] = torch.where(ended, pad_id, best)
        ended |= best == eos_id
        if agree(bool(ended.all())):
            break
    return ids[:, : step + 2]

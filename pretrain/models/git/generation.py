"""How captions and answers are written: the likeliest word each time, drawn words, or beams."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.models.git.beams import generate_beams
from pretrain.models.git.decoder import GitDecoder
from pretrain.models.git.reading import Agree, Prompt, alone
from pretrain.models.git.sampling import Draws, generate_words
from pretrain.models.git.settings import GenerationSettings


def write_texts(
    settings: GenerationSettings,
    decoder: GitDecoder,
    image_tokens: Tensor,
    prompt: Prompt,
    *,
    rows: Sequence[int] | None = None,
    **limits: Any,
) -> tuple[Tensor, Tensor]:
    """New words (B, n) int64 behind each prompt, EOS and padding behind them, and scores (B,).

    rows: numbers of the images in their data set, by which words are drawn.
    limits: eos_id, pad_id, max_new_tokens and perhaps trie and agree, as of `generate_words`.
    """
    if settings.kind == "beam":
        return generate_beams(
            decoder,
            image_tokens,
            prompt,
            beams=settings.beams,
            length_penalty=settings.length_penalty,
            normalisation=settings.normalisation,
            **limits,
        )
    if settings.kind == "greedy":
        return generate_words(decoder, image_tokens, prompt, **limits)
    return generate_words(
        decoder,
        image_tokens,
        prompt,
        draws=Draws(settings.seed, list(range(len(image_tokens)) if rows is None else rows)),
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        **limits,
    )


def generate_greedy(
    decoder: GitDecoder,
    image_tokens: Tensor,
    *,
    bos_id: int,
    eos_id: int,
    pad_id: int,
    max_new_tokens: int,
    agree: Agree = alone,
) -> Tensor:
    """Extend BOS by the most likely word until every caption of the batch has ended.

    image_tokens: (B, N, visual_width) from the encoder; the decoder should be in eval mode.
    agree: gets "all my captions have ended" after every token and says whether to stop. Where a
        forward pass is a collective operation (ZeRO-3) it must give all ranks the same answer, so
        that they run the same number of passes.

    Returns ids (B, 1 + n) int64, n <= max_new_tokens: BOS, words, EOS, then padding.
    """
    prompt = Prompt.of_bos(len(image_tokens), bos_id, image_tokens.device)
    ids, _ = generate_words(
        decoder,
        image_tokens,
        prompt,
        eos_id=eos_id,
        pad_id=pad_id,
        max_new_tokens=max_new_tokens,
        agree=agree,
    )
    return torch.cat([prompt.ids, ids], dim=1)

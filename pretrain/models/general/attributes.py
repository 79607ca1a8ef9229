"""What a part of a sequence is, in bits: by them the general decoder chooses its experts.

The first eight bits are those of the released code of Uni-Perceiver-MoE (arXiv 2206.04674), where
the third is never set. Detection is not in that table: ours sets the third bit, for regions.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Attribute = Literal[
    "image", "masked_text", "caption_image", "caption_text", "text", "words", "regions"
]
"""`image`: to be classified or retrieved; `masked_text`: text with masked words, or to be
classified; `caption_image`, `caption_text`: the two sides of captioning; `text`: class names, and
texts to be retrieved; `words`: the vocabulary; `regions`: an image whose objects are sought."""

ATTRIBUTES: tuple[Attribute, ...] = get_args(Attribute)
"""In the order of their numbers."""

BITS = {
    "image": "10011000",
    "masked_text": "01010100",
    "caption_image": "11011000",
    "caption_text": "11010101",
    "text": "10010110",
    "words": "11010110",
    "regions": "10111000",
}

LENGTH = 8


def attribute_table(device: torch.device | None = None) -> Tensor:
    """(attributes, 8) float32 of zeros and ones, in the order of `ATTRIBUTES`."""
    rows = [[float(bit) for bit in BITS[name]] for name in ATTRIBUTES]
    return torch.tensor(rows, device=device)

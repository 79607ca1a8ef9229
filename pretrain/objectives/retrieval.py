"""Retrieval between images and their texts: how often a match is among the best k."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pretrain.objectives.evaluation_mode import Gather

RANKS = (1, 5, 10)
_CHUNK = 256


def retrieval_recalls(image: Tensor, text: Tensor, image_of: Tensor, kind: Tensor) -> dict:
    """Recall at 1, 5 and 10 in both directions, each over all queries.

    image: (N, D), text: (M, D) float32 of unit length; image_of: (M,) int64, each text's image;
    kind: (M,) int64. A text matches its own image, and every image that has a text of its kind.

    Returns image_to_text_r1, text_to_image_r1, .. text_to_image_r10, each in [0, 1]; an empty dict
    without images. A key that is as similar as the best match, but none, stands before it: features
    that have all become the same find nothing.
    """
    if not len(image) or not len(text):
        return {}
    kind = kind.unique(return_inverse=True)[1]
    places = {
        "image_to_text": _image_places(image, text, image_of, kind),
        "text_to_image": _text_places(image, text, image_of, kind),
    }
    ranks_of = {name: torch.cat(list(parts)) for name, parts in places.items()}
    return {
        f"{name}_r{k}": (found < k).double().mean().item()
        for k in RANKS
        for name, found in ranks_of.items()
    }


def gathered_recalls(
    parts: Sequence[dict[str, Tensor]], reduce: Gather, device: torch.device, identical_match: bool
) -> tuple[dict, int, int]:
    """Recalls among the images and texts of all ranks. A collective.

    parts: at least one, each with image (N, D), text (M, D) float32 of unit length; row (N,) int64,
        numbers of the images in the data set; row_of (M,) int64, each text's image; caption_id (M,)
        int64, equal for identical texts.
    identical_match: a text matches every image that has such a text, and not only its own.

    Returns what `retrieval_recalls` does, and the numbers of images and texts.
    """
    shares = reduce({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    found = {name: torch.cat([share[name] for share in shares]) for name in shares[0]}
    rows, order = found["row"].sort()
    # Rows are numbers in the data set; texts must name places among the images at hand.
    image_of = torch.searchsorted(rows, found["row_of"])
    kind = found["caption_id"] if identical_match else torch.arange(len(image_of))
    compared = (found["image"][order], found["text"], image_of, kind)
    recalls = retrieval_recalls(*(value.to(device) for value in compared))
    return recalls, len(rows), len(image_of)


def _image_places(image: Tensor, text: Tensor, image_of: Tensor, kind: Tensor) -> Iterator[Tensor]:
    """Place of the best matching text of each image, chunk by chunk."""
    kinds = int(kind.max()) + 1
    for start in range(0, len(image), _CHUNK):
        queries = image[start : start + _CHUNK]
        own = (image_of >= start) & (image_of < start + len(queries))
        has = torch.zeros(len(queries), kinds, dtype=torch.bool, device=image.device)
        has[image_of[own] - start, kind[own]] = True
        yield _places(queries @ text.T, has[:, kind])


def _text_places(image: Tensor, text: Tensor, image_of: Tensor, kind: Tensor) -> Iterator[Tensor]:
    """Place of the best matching image of each text, chunk by chunk."""
    for start in range(0, len(text), _CHUNK):
        queries = text[start : start + _CHUNK]
        same = kind[start : start + _CHUNK, None] == kind
        count = torch.zeros(len(queries), len(image), device=image.device)
        count.index_add_(1, image_of, same.float())
        yield _places(queries @ image.T, count > 0)


def _places(similarity: Tensor, match: Tensor) -> Tensor:
    """Keys that stand before the best match of each query: (queries,) int64.

    similarity, match: (queries, keys).
    """
    best = similarity.masked_fill(~match, -torch.inf).amax(dim=1, keepdim=True)
    return ((similarity >= best) & ~match).sum(dim=1)

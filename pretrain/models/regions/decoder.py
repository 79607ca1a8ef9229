"""From a memory to regions: the best places become queries, layers refine their boxes and masks.

The transformer decoder of Mask DINO (arXiv 2206.02777), under its names, with one class: an object
or none.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.models.regions.boxes import (
    anchors,
    box_code,
    boxes_of_masks,
    exact,
    inverse_sigmoid,
)
from pretrain.models.regions.encoder import Memory
from pretrain.models.regions.layers import DecoderLayer, Mlp, box_head, xavier

# Objects are rare among queries: the first scores say so, as in RetinaNet and DINO. Ours here.
_FIRST_SCORE = 0.01
# The group of queries that look for objects, beside those of known boxes.
_MATCHED = -2


class KnownBoxes(NamedTuple):
    """Boxes of objects with noise, which the decoder learns to put right (DN-DETR)."""

    boxes: Tensor
    """(B, D, 4) float32, fractions of the canvas; D is one or more."""
    groups: Tensor
    """(B, D) int64: from 0; one group holds each object of its image once. -1: padding."""


class Predictions(NamedTuple):
    """What one layer says of each query."""

    logits: Tensor
    """(B, Q, classes)."""
    boxes: Tensor
    """(B, Q, 4) float32: centre and size, fractions of the canvas."""
    mask_embeds: Tensor
    """(B, Q, width): a mask's logits are products with the mask features."""

    def masks(self, mask_features: Tensor) -> Tensor:
        """(B, Q, h, w) logits; mask_features: (B, h, w, width)."""
        return self.mask_logits(mask_features.flatten(1, 2)).unflatten(-1, mask_features.shape[1:3])

    def mask_logits(self, features: Tensor) -> Tensor:
        """(B, Q, N) logits at places with these features (B, N, width)."""
        return self.mask_embeds @ features.transpose(1, 2)

    def part(self, start: int, stop: int | None) -> "Predictions":
        """Those of some of the queries."""
        return Predictions(*(values[:, start:stop] for values in self))


class Regions(NamedTuple):
    """What the decoder finds."""

    predictions: list[Predictions]
    """Of the selected places, of the queries made of them, and of each layer."""
    denoising: list[Predictions]
    """Of known boxes: as queries, and of each layer; empty without known boxes."""
    contents: Tensor
    """(B, Q, width): the queries behind the last layer."""
    mask_features: Tensor
    """(B, h, w, width)."""


class RegionDecoder(nn.Module):
    """Two-stage selection and deformable layers with iterative boxes."""

    def __init__(
        self,
        levels: int = 4,
        width: int = 256,
        layers: int = 9,
        heads: int = 8,
        points: int = 4,
        hidden: int = 2048,
        queries: int = 300,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.queries = width, queries
        self.gradient_checkpointing = gradient_checkpointing
        self.enc_output = xavier(nn.Linear(width, width))
        self.enc_output_norm = nn.LayerNorm(width)
        self.class_embed = nn.Linear(width, 1)
        first_logit = float(inverse_sigmoid(torch.tensor(_FIRST_SCORE, device="cpu")))
        self.class_embed.initial_value = {"bias": first_logit}
        self.label_enc = nn.Embedding(1, width)
        self.label_enc.initial_std = {"weight": 1.0}
        self.mask_embed = Mlp(width, width, width, 3)
        self.bbox_embed = box_head(width)
        self.decoder_norm = nn.LayerNorm(width)
        self.decoder = nn.ModuleDict(
            {
                "layers": nn.ModuleList(
                    DecoderLayer(width, heads, levels, points, hidden) for _ in range(layers)
                ),
                "ref_point_head": Mlp(2 * width, width, width, 2),
            }
        )

    def forward(self, memory: Memory, known: KnownBoxes | None = None) -> Regions:
        """Find regions, and put known boxes right.

        Known boxes never change what is found: queries that look for objects do not see them.

        Raises ValueError: the maps have fewer places than there are queries.
        """
        selected, contents, boxes = self._select(memory)
        contents = contents.detach()
        if known is not None:
            names = self.label_enc(torch.zeros_like(known.groups))
            contents = torch.cat([names, contents], dim=1)
            boxes = torch.cat([known.boxes.to(boxes.dtype), boxes], dim=1)
        found = [self._predictions(contents, boxes)]
        for normed, refined in self._layers(memory, contents, boxes, _mask(known, self.queries)):
            found.append(self._predictions(normed, refined))
        first = 0 if known is None else known.boxes.shape[1]
        return Regions(
            predictions=[selected, *(each.part(first, None) for each in found)],
            denoising=[] if known is None else [each.part(0, first) for each in found],
            contents=normed[:, first:],
            mask_features=memory.mask_features,
        )

    def _select(self, memory: Memory) -> tuple[Predictions, Tensor, Tensor]:
        """The places that look most like objects: what is predicted there, their contents (B, Q,
        width), and boxes (B, Q, 4) without gradient around what their masks show."""
        tokens = memory.tokens
        if tokens.shape[1] < self.queries:
            raise ValueError(
                f"maps of {list(memory.sizes)} pixels have {tokens.shape[1]} places for "
                f"{self.queries} queries: lower `queries`, or enlarge the images"
            )
        places, usable = anchors(memory.sizes, tokens.device)
        usable = usable[None] if memory.present is None else usable & memory.present
        tokens = tokens.masked_fill(~usable[..., None], 0.0)
        outputs = self.enc_output_norm(self.enc_output(tokens))
        scores = exact(self.class_embed(outputs))[..., 0].detach()
        scores = scores.masked_fill(~usable, -torch.inf)
        best = scores.topk(self.queries, dim=1).indices
        contents = outputs.gather(1, best[..., None].expand(-1, -1, self.width))
        changes = self.bbox_embed(contents)
        boxes = (changes + inverse_sigmoid(places)[best]).sigmoid()
        selected = self._predictions(contents, boxes)
        with torch.no_grad():
            shown, some = boxes_of_masks(selected.masks(memory.mask_features) > 0)
            boxes = torch.where(some[..., None], shown.to(boxes.dtype), boxes)
        return selected, contents, boxes

    def _layers(
        self, memory: Memory, contents: Tensor, boxes: Tensor, mask: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """For each layer the normalised queries (B, Q, width) and their boxes (B, Q, 4)."""
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        reference, undetached = boxes, boxes
        for layer in self.decoder["layers"]:
            code = box_code(reference, self.width // 2).to(contents.dtype)
            positions = self.decoder["ref_point_head"](code)
            arguments = (contents, positions, mask, reference, *memory[:3])
            if recompute:
                contents = checkpoint(
                    layer, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                contents = layer(*arguments)
            normed = self.decoder_norm(contents)
            # Looking forward twice (DINO): a layer's loss also reaches the box it started from.
            refined = (self.bbox_embed(normed) + inverse_sigmoid(undetached)).sigmoid()
            # The next layer starts from the same step of queries that are not normalised.
            undetached = (self.bbox_embed(contents) + inverse_sigmoid(reference)).sigmoid()
            reference = undetached.detach()
            yield normed, refined

    def _predictions(self, contents: Tensor, boxes: Tensor) -> Predictions:
        """Contents of layers come normalised and are so once more: that is how Mask DINO's weights
        were trained."""
        contents = self.decoder_norm(contents)
        return Predictions(self.class_embed(contents), boxes, self.mask_embed(contents))

    def flops(self, places: int, known: int = 0) -> int:
        """Multiplications and additions for one image with so many places and known boxes, without
        the sampling itself."""
        queries = self.queries + known
        once = 2 * self.width**2 + 2 * self.width  # selection: a layer and a score
        total = places * once
        layers = self.decoder["layers"]
        head = sum(2 * layer.weight.numel() for layer in self.mask_embed.layers)
        head += 2 * self.width
        box = sum(2 * layer.weight.numel() for layer in self.bbox_embed.layers)
        total += self.queries * (head + box) + (1 + len(layers)) * queries * head
        code = sum(2 * layer.weight.numel() for layer in self.decoder["ref_point_head"].layers)
        for layer in layers:
            value = layer.cross_attn.value_proj.weight.numel()
            weights = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
            total += 2 * places * value + queries * 2 * (weights - value)
            total += 4 * queries * queries * self.width + queries * (code + 2 * box)
        return total


def _mask(known: KnownBoxes | None, queries: int) -> Tensor | None:
    """(B, D + Q, D + Q) bool, True where a query may look: at its own group, and at all queries
    that look for objects."""
    if known is None:
        return None
    matched = known.groups.new_full((len(known.groups), queries), _MATCHED)
    groups = torch.cat([known.groups, matched], dim=1)
    return (groups[:, :, None] == groups[:, None]) | (groups == _MATCHED)[:, None]

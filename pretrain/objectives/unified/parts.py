"""What the unified objectives share: sequences of inputs, and sets of targets (arXiv 2211.09808).

Every input and every target is `<SPE>` and what an encoder makes of it, through one decoder. What
is compared is the output at `<SPE>`, but for words of a text, which have places of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.models.bert.bert import Bert
from pretrain.models.build_context import BuildContext
from pretrain.models.encoder import Encoder
from pretrain.models.frozen import training_flops
from pretrain.models.general.attributes import Attribute
from pretrain.models.general.decoder import Family, GeneralDecoder, Part
from pretrain.models.pixels import normalise_pixels
from pretrain.models.sample_draws import SampleDraws
from pretrain.models.step_draws import StepDraws
from pretrain.objectives.gather import gather_rows
from pretrain.objectives.image_tokens import find_encoder
from pretrain.objectives.objective import Modules

NOISE = "experts"
"""Purpose of a step's draws for the choice of experts."""
_PIECE = 512
"""Targets that are encoded, and recomputed in the backward pass, at once."""


@dataclass(frozen=True)
class UnifiedParts:
    """Names of the shared modules, and how they read pixels."""

    image: str | None
    text: str
    decoder: str
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    image_flops: Any
    """(height, width) -> FLOPs, forward and backward, of one image's encoder."""
    text_flops: Any
    """tokens -> those of a text's."""
    decoder_flops: Any
    """tokens -> those of a sequence's decoder."""
    image_tokens: Any
    """(height, width) -> number of tokens."""

    @classmethod
    def of(
        cls, context: BuildContext, image: str | None, text: str, decoder: str
    ) -> "UnifiedParts":
        """Raises ValueError: a module is not there, or does not fit the others."""
        shared = find_encoder(context.encoders, decoder)
        reader = find_encoder(context.encoders, text)
        if not isinstance(shared, GeneralDecoder):
            raise ValueError(f"encoder {decoder!r} is no general_decoder: name one that is")
        if not isinstance(reader, Bert):
            raise ValueError(f"encoder {text!r} is not of type bert: name one that is")
        seen = None if image is None else find_encoder(context.encoders, image)
        for name, module in ((image, seen), (text, reader)):
            if module is not None and module.width != shared.width:
                raise ValueError(
                    f"encoder {name!r} has width {module.width} and {decoder!r} has {shared.width}:"
                    " make them equal"
                )
        return cls(
            image,
            text,
            decoder,
            tuple(context.image_mean),
            tuple(context.image_std),
            seen and training_flops(seen, seen.flops),
            training_flops(reader, reader.flops),
            training_flops(shared, shared.flops),
            partial(_tokens, seen),
        )

    def image_part(
        self,
        modules: Modules,
        images: Tensor,
        attribute: Attribute,
        draws: SampleDraws | None = None,
    ) -> Part:
        """[SPE, tokens] of images (B, 3, H, W), uint8 or normalised."""
        encoder = modules[self.image]
        if images.dtype == torch.uint8:
            images = normalise_pixels(images, self.image_mean, self.image_std, encoder.dtype)
        return self._begun(modules, encoder(images, draws), attribute)

    def text_part(
        self,
        modules: Modules,
        tokens: Tensor,
        attribute: Attribute,
        present: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Part:
        """[SPE, text] of texts (B, T) int64; further arguments as of `Bert.sequence`."""
        found, present = modules[self.text].sequence(tokens, present, documents=documents)
        mask = F.pad(present, (1, 0), value=True)[:, None, None]
        return self._begun(modules, found, attribute)._replace(mask=mask)

    def compared(
        self, modules: Modules, part: Part, draws: StepDraws | None, at: int | slice = 0
    ) -> Tensor:
        """What is held against others, of the outputs at `at`: float32 of unit length."""
        decoder = modules[self.decoder]
        return decoder.compared(decoder.run([part], noise_of(draws))[0][:, at])

    def scale(self, modules: Modules, family: Family) -> Tensor:
        """1 / temperature, (1,) float32."""
        return modules[self.decoder].scales[family]()

    def targets(
        self,
        modules: Modules,
        tokens: Tensor,
        present: Tensor,
        attribute: Attribute,
        draws: StepDraws | None,
    ) -> Tensor:
        """All targets of a set, (N, width) float32 of unit length. A collective.

        tokens: (N, T) int64; present: (N, T) bool. Each rank encodes ceil(N / world) of them.
        """
        count = len(tokens)
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        each = -(-count // world)
        device = next(modules[self.text].parameters()).device
        # Rows beyond the last are the last one again, and get no gradient.
        own = torch.arange(rank * each, (rank + 1) * each).clamp(max=count - 1)
        tokens, present = tokens[own].to(device), present[own].to(device)

        def encode(ids: Tensor, there: Tensor) -> Tensor:
            part = self.text_part(modules, ids, attribute, there)
            return self.compared(modules, part, draws)

        found = []
        for start in range(0, each, _PIECE):
            piece = tokens[start : start + _PIECE], present[start : start + _PIECE]
            if each > _PIECE and torch.is_grad_enabled():
                found.append(checkpoint(encode, *piece, use_reentrant=False))
            else:
                found.append(encode(*piece))
        return gather_rows(torch.cat(found))[:count]

    def _begun(self, modules: Modules, tokens: Tensor, attribute: Attribute) -> Part:
        special = modules[self.decoder].special(len(tokens))
        return Part(torch.cat([special.to(tokens.dtype), tokens], dim=1), attribute)

    def all_of(self, modules: Modules) -> list[nn.Module]:
        """The modules that are read."""
        names = (self.image, self.text, self.decoder)
        return [modules[name] for name in names if name is not None]


def _tokens(encoder: Encoder | None, height: int, width: int) -> int:
    """Tokens of an image, for FLOPs: as the encoder says, or the places of its last map."""
    if hasattr(encoder, "tokens"):
        return encoder.tokens(height, width)
    if encoder is None or not encoder.map_grids():
        return 0
    rows, columns = encoder.map_grids()[-1].sides(height, width)
    return rows * columns


def noise_of(draws: StepDraws | None) -> torch.Generator | None:
    """Where the noise on the choice of experts comes from; the same for inputs and targets, on all
    ranks and in every micro-step."""
    return None if draws is None else draws.generator(NOISE)


def text_rows(ids: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Texts of different lengths as tokens (N, T) int64, and where they are there, (N, T) bool."""
    length = max(map(len, ids))
    rows = [[*row, *[pad_id] * (length - len(row))] for row in ids]
    present = [[True] * len(row) + [False] * (length - len(row)) for row in ids]
    return torch.tensor(rows), torch.tensor(present)


def name_rows(vocabulary: Any, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Names of classes as `text_rows`, between BOS and EOS."""
    bos, eos = vocabulary.bos_id, vocabulary.eos_id
    return text_rows([[bos, *vocabulary.encode(n), eos] for n in names], vocabulary.pad_id)


def word_rows(vocab_size: int) -> tuple[Tensor, Tensor]:
    """Every word of the vocabulary by itself, as `text_rows`."""
    return torch.arange(vocab_size)[:, None], torch.ones(vocab_size, 1, dtype=torch.bool)

"""The decoder that all tasks of Uni-Perceiver share, for inputs and for targets (arXiv 2211.09808).

A task is a cosine: g(f(x)) against g(f(y)), where f are encoders and g is this decoder. A sequence
is given in parts. A part sees itself and the parts before it, never those behind it; so three small
boolean masks say all that captioning needs.
"""

import copy
import math
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.models.encoder import Encoded, Encoder, Output
from pretrain.models.general.attributes import ATTRIBUTES, Attribute
from pretrain.models.general.experts import (
    ExpertLinear,
    FoldedRouter,
    Router,
    folded_linear,
)
from pretrain.models.general.layer import GeneralLayer, KeysValues
from pretrain.models.general.settings import ExpertSettings
from pretrain.models.sample_draws import SampleDraws

Family = Literal["classification", "caption", "mlm", "retrieval", "regions"]
"""Tasks of a family share a temperature."""


class Part(NamedTuple):
    """Tokens of one kind."""

    tokens: Tensor
    """(B, N, width)."""
    attribute: Attribute
    """What they are, which chooses experts."""
    mask: Tensor | None = None
    """Bool, broadcast to (B, heads, N, K), True where a token may look: K counts what was cached,
    the parts before this one, and this one. None: everywhere."""


class GeneralDecoder(Encoder):
    """Layers of BERT's shape, the learned token `<SPE>`, temperatures, and what is compared.

    Arguments are the fields of `GeneralDecoderSettings`.
    """

    def __init__(
        self,
        width: int = 768,
        layers: int = 6,
        heads: int = 12,
        hidden: int = 3072,
        norm: Literal["after", "before"] = "after",
        layer_scale: float | None = None,
        experts: ExpertSettings | None = None,
        max_queries: int = 128,
        temperature: float = 0.07,
        max_scale: float = 100.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.hidden, self.experts = width, hidden, experts
        self.gradient_checkpointing = gradient_checkpointing
        self.special = SpecialToken(width, max_queries)
        self.layers = nn.ModuleList(
            GeneralLayer(
                width,
                heads,
                hidden,
                norm,
                layer_scale,
                experts if experts is not None and number % experts.every == 0 else None,
            )
            for number in range(layers)
        )
        self.output = OutputProjection(width)
        self.scales = nn.ModuleDict(
            {name: Scale(temperature, max_scale) for name in get_args(Family)}
        )

    def forward(self, inputs: Tensor, draws: SampleDraws | None = None) -> Tensor:
        """Tokens (B, N, width) that all see each other, as an image that is to be classified."""
        return self.run([Part(inputs, "image")])[0]

    def encode(
        self, inputs: Tensor, want: Collection[Output], draws: SampleDraws | None = None, **_
    ) -> Encoded:
        """As `Encoder.encode`, for tokens of a module above this one."""
        self.unwanted(want, ("tokens",))
        return Encoded(tokens=self(inputs, draws))

    def run(self, parts: Sequence[Part], generator: torch.Generator | None = None) -> list[Tensor]:
        """Outputs (B, N, width) of every part.

        generator: of the step (`StepDraws.generator`), for the noise on the choice of experts; it
            must be the same on all ranks, or ZeRO-3 hangs. None: no noise.
        """
        return self.run_cached(parts, None, generator)[0]

    def run_cached(
        self,
        parts: Sequence[Part],
        seen: Sequence[KeysValues] | None,
        generator: torch.Generator | None = None,
    ) -> tuple[list[Tensor], list[list[KeysValues]]]:
        """As `run`, behind tokens whose keys and values are at hand, one pair for each layer.

        Returns the outputs, and for each part the keys and values of each layer.
        """
        tokens = [part.tokens for part in parts]
        numbers = [ATTRIBUTES.index(part.attribute) for part in parts]
        masks = [part.mask for part in parts]
        noise = self._noise(generator)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        found = []
        for number, layer in enumerate(self.layers):
            arguments = (
                tokens,
                numbers,
                masks,
                None if seen is None else seen[number],
                None if noise is None else noise[number],
            )
            if recompute:
                tokens, keys_values = checkpoint(
                    layer, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                tokens, keys_values = layer(*arguments)
            found.append(keys_values)
        return tokens, [list(of_part) for of_part in zip(*found, strict=True)]

    def compared(self, vectors: Tensor) -> Tensor:
        """What is held against others, float32 of unit length; vectors: (..., width)."""
        return F.normalize(self.output(vectors).float(), dim=-1)

    def _noise(self, generator: torch.Generator | None) -> Tensor | None:
        """(layers, 2, attributes, experts) from N(0, 1), drawn on the CPU at once."""
        if generator is None or self.experts is None or not self.training:
            return None
        shape = (len(self.layers), 2, len(ATTRIBUTES), self.experts.number)
        return torch.randn(shape, generator=generator).to(self.output.linear.weight.device)

    def flops(self, tokens: int, want: Output = "tokens") -> int:
        """As `Encoder.flops`, for a sequence of one part; matrix products with tokens only."""
        linear = 2 * tokens * (4 * self.width**2 + 2 * self.width * self.hidden)
        return len(self.layers) * (linear + 4 * tokens**2 * self.width)

    def layer_names(self) -> list[tuple[str, ...]]:
        """As `Encoder.layer_names`."""
        layers = [(f"layers.{number}",) for number in range(len(self.layers))]
        return [("special",), *layers, ("output", "scales")]


class SpecialToken(nn.Module):
    """The learned vector `<SPE>`: it begins every sequence, and asks for the words of a text."""

    def __init__(self, width: int, max_queries: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros(max_queries, width))
        self.initial_std = {"vector": 0.02, "positions": 0.02}
        self.max_queries = max_queries

    def forward(self, batch: int, queries: int | None = None, start: int = 0) -> Tensor:
        """(batch, 1, width): what begins a sequence. With `queries`, that many instead, which ask
        for the words of a text from place `start` on.

        Raises ValueError: the text is too long.
        """
        if queries is None:
            return self.vector.expand(batch, 1, -1)
        if start + queries > self.max_queries:
            raise ValueError(
                f"a text of {start + queries} tokens cannot be asked for by max_queries "
                f"{self.max_queries}: shorten the texts (text_length), or enlarge max_queries"
            )
        return (self.vector + self.positions[start : start + queries]).expand(batch, -1, -1)


class OutputProjection(nn.Module):
    """Norm and linear layer before the cosine, shared by inputs and targets."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, vectors: Tensor) -> Tensor:
        """vectors: (..., width). Returns the same shape."""
        return self.linear(self.norm(vectors))


class Scale(nn.Module):
    """The learned factor on cosines, kept as a logarithm; at its bound the gradient ends."""

    def __init__(self, temperature: float, max_scale: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.initial_value = {"log_scale": -math.log(temperature)}
        self.largest = math.log(max_scale)

    def forward(self) -> Tensor:
        """1 / temperature, (1,) float32."""
        return self.log_scale.float().clamp(max=self.largest).exp()


def caption_masks(
    length: int, before: int, present: Tensor | None = None, device: torch.device | None = None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Masks of the three parts of captioning: what stands before the text, the text, and one query
    for each of its words.

    All see what stands before. A word sees those up to itself; its query sees the words before it,
    and itself alone of all queries. Nobody before the text sees it.

    length: tokens of the text. before: tokens before it. present: (B, before) bool, those that are
    there; None: all. Returns masks as of `Part`: (B, 1, 1, before) or None, (B or 1, 1, length,
    before + length), (B or 1, 1, length, before + 2 * length).
    """
    if present is not None:
        device = present.device
    places = torch.arange(length, device=device)
    words = places[:, None] >= places
    asking = torch.cat([places[:, None] > places, places[:, None] == places], dim=1)
    if present is None:
        all_of_it = words.new_ones(length, before)
        parts = [torch.cat([all_of_it, mask], dim=1)[None, None] for mask in (words, asking)]
        return None, *parts
    rows = present[:, None, None].expand(-1, 1, length, -1)
    parts = [
        torch.cat([rows, mask.expand(len(present), 1, -1, -1)], dim=3) for mask in (words, asking)
    ]
    return present[:, None, None], *parts


@torch.no_grad()
def folded(decoder: GeneralDecoder, attributes: Sequence[Attribute]) -> GeneralDecoder:
    """The same decoder for these attributes only, without experts: one matrix for each attribute.
    For deployment; it cannot be trained on as before."""
    numbers = sorted(ATTRIBUTES.index(name) for name in attributes)
    result = copy.deepcopy(decoder)
    for layer in result.layers:
        for router, names in (
            ("attention_router", ("qkv", "output")),
            ("mlp_router", ("expand", "reduce")),
        ):
            chooses = getattr(layer, router)
            if not isinstance(chooses, Router):
                continue
            for name in names:
                part = getattr(layer, name)
                assert isinstance(part, ExpertLinear)
                setattr(layer, name, folded_linear(part, chooses, numbers))
            setattr(layer, router, FoldedRouter())
    result.experts = None
    return result

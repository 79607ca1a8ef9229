"""Captioning: predict each word of a caption from the image and the words before it (GIT)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pretrain.models.git.decoder import GitDecoder
from pretrain.models.git.reading import Prompt, alone
from pretrain.models.git.settings import GenerationSettings
from pretrain.models.sample_draws import SampleDraws
from pretrain.objectives.captioning.chunked_head import smoothed_cross_entropy_of
from pretrain.objectives.captioning.evaluation import evaluate_captions
from pretrain.objectives.captioning.settings import (  # noqa: F401
    CaptioningSettings,
)
from pretrain.objectives.evaluation_mode import evaluating
from pretrain.objectives.image_tokens import encode_images
from pretrain.objectives.objective import (
    Batch,
    Evaluation,
    EvaluationContext,
    Modules,
    Objective,
    Shares,
    Totals,
)


class Captioning(Objective):
    """Decoder, loss, generation and evaluation of captioning.

    Args:
        decoder: the text decoder; its parameters are the ones this objective owns.
        encoder: name of the encoder that it reads.
        encoder_cost: (height, width) -> (tokens; FLOPs, forward and backward) for one image.
        visual_width: channels of the encoder's tokens.
        image_mean, image_std: per channel, in units of the full range.
    """

    counted_by: ClassVar[dict[str, tuple[str, ...]]] = {
        name: ("tokens",) for name in ("loss", "cross_entropy", "token_accuracy")
    }

    def __init__(
        self,
        decoder: GitDecoder,
        *,
        encoder: str,
        encoder_cost: Callable[[int, int], tuple[int, int]],
        visual_width: int,
        bos_id: int,
        eos_id: int,
        pad_id: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        label_smoothing: float = 0.1,
        max_new_tokens: int = 40,
        way: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.encoder = encoder
        self.encoder_cost = encoder_cost
        self.visual_width = visual_width
        self.special_ids = {"bos_id": bos_id, "eos_id": eos_id, "pad_id": pad_id}
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        self.label_smoothing = label_smoothing
        self.max_new_tokens = max_new_tokens
        self.way = way or GenerationSettings().build()

    def counts(self, batch: Batch) -> dict[str, int]:
        """Images and supervised tokens of a micro-batch; their global sums are `totals`."""
        return {
            "images": int(batch["valid"].sum()),
            "tokens": int(batch["loss_mask"][..., 1:].sum()),
        }

    def prepare(self, batch: Batch) -> dict[str, Any]:
        """supervised: (n,) int64, places of the supervised tokens in (B, K, T - 1), flat."""
        return {"supervised": _supervised(batch)}

    def losses(
        self, modules: Modules, batch: Batch, totals: Totals, shared: Mapping[str, Tensor]
    ) -> Shares:
        """This micro-batch's share of the global batch's loss and metrics.

        batch: images (B, 3, H, W) uint8, or clips (B, F, 3, H, W); tokens (B, K, T) int64, K
            captions per image, padded on the right; loss_mask (B, K, T) bool, True at tokens to be
            predicted; draws of the images, if the encoder needs some; what `prepare` says of it, or
            the host waits for the device to learn how many tokens are supervised.
        totals: "tokens", the supervised tokens of the global batch.

        Returns 0-dim float32 tensors; summed over all micro-batches and ranks each is the mean over
        the supervised tokens of the global batch. Only "loss" carries a gradient.
        """
        image_tokens = self._encode(modules, batch["images"], batch.get("draws"))
        loss, cross_entropy, correct = self.token_sums(image_tokens, batch)
        tokens = torch.as_tensor(totals["tokens"], dtype=torch.float32, device=loss.device)
        tokens = tokens.clamp(min=1.0)
        return {
            "loss": loss / tokens,
            "cross_entropy": cross_entropy / tokens,
            "token_accuracy": correct / tokens,
        }

    def token_sums(self, image_tokens: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Smoothed loss, cross-entropy and correct guesses, summed over supervised tokens.

        image_tokens: (B, N, D) of the encoder; of `batch` tokens, loss_mask and, if it is there,
            supervised are read.
        Returns three 0-dim float32 tensors; the first carries a gradient.
        """
        tokens = batch["tokens"]
        # The scores after token t are held against token t + 1; after the last there is nothing.
        targets = tokens[..., 1:].reshape(-1)
        positions = batch["supervised"] if "supervised" in batch else _supervised(batch)
        weights = torch.ones(len(positions), device=tokens.device)
        if len(positions) == 0:
            # One position without weight keeps every parameter in the graph with a gradient of
            # zero, which is what the other ranks' collectives wait for.
            positions, weights = positions.new_zeros(1), weights.new_zeros(1)
        hidden = self.decoder.read(image_tokens, tokens[..., :-1], positions)
        targets = targets.index_select(0, positions)

        def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            smoothing = self.label_smoothing
            return smoothed_cross_entropy_of(hidden, weight, bias, targets, weights, smoothing)

        return self.decoder.output(hidden, loss)

    def flops(self, batch: Batch) -> int:
        """Model FLOPs, forward and backward, that this micro-batch asks for.

        Padding rows and recomputation do not count: this is the work that trains the model.
        """
        counts = self.counts(batch)
        images = counts["images"]
        if images == 0:
            return 0
        frames = batch["images"].shape[1] if batch["images"].dim() == 5 else 1
        tokens, encoder_flops = self.encoder_cost(*batch["images"].shape[-2:])
        tokens, encoder_flops = frames * tokens, frames * encoder_flops
        _, captions, length = batch["tokens"].shape
        scored = counts["tokens"] / images
        decoder_flops = self.decoder.flops(tokens, self.visual_width, captions, length - 1, scored)
        return images * (encoder_flops + 3 * decoder_flops)

    def generate(
        self,
        modules: Modules,
        images: Tensor,
        max_new_tokens: int | None = None,
        agree: Callable[[bool], bool] = alone,
        rows: Sequence[int] | None = None,
    ) -> Tensor:
        """Captions of images (B, 3, H, W) uint8, or of clips (B, F, 3, H, W): ids (B, 1 + n)
        int64, from BOS on.

        `agree` is explained at `generate_greedy`; `rows` are numbers of the images in their data
        set, by which words are drawn where the way of writing is to draw them.
        """
        with torch.no_grad(), evaluating(self, modules[self.encoder]):
            return self._generate(self._encode(modules, images), max_new_tokens, agree, rows)

    def evaluate(
        self, modules: Modules, loader: Iterable[Batch], context: EvaluationContext
    ) -> Evaluation:
        """Caption every image of `loader` and compare with its references.

        Results as of `evaluate_captions`; `agree` is asked after every generated token, as in
        `generate_greedy`. The metrics are the caption scores, token_accuracy, loss, cross_entropy
        and images.
        """

        def judge(batch: Batch) -> tuple[dict[str, float], list[list[int]] | None]:
            inputs = {k: batch[k].to(context.device) for k in ("images", "tokens", "loss_mask")}
            image_tokens = self._encode(modules, inputs["images"])
            sums = torch.stack(self.token_sums(image_tokens, inputs)).tolist()
            if context.write_texts:
                ids = self._generate(image_tokens, None, context.agree, batch["row"].tolist())
            loss, cross_entropy, right = sums
            found = {"token_accuracy": right, "loss": loss, "cross_entropy": cross_entropy}
            return found, ids.tolist() if context.write_texts else None

        with torch.no_grad(), evaluating(self, modules[self.encoder]):
            return evaluate_captions(
                judge, loader, context.vocabulary, context.reduce, context.keep_images
            )

    def _encode(self, modules: Modules, images: Tensor, draws: SampleDraws | None = None) -> Tensor:
        encoder, statistics = modules[self.encoder], (self.image_mean, self.image_std)
        if images.dim() == 4:
            return encode_images(encoder, images, *statistics, draws)
        if self.decoder.temporal is None:
            raise ValueError("clips need a decoder of clips: set decoder.frames")
        batch, frames = images.shape[:2]
        if draws is not None:  # the frames of a clip are one sample
            positions = draws.positions.repeat_interleave(frames)
            draws = replace(draws, positions=positions)
        tokens = encode_images(encoder, images.flatten(0, 1), *statistics, draws)
        return self.decoder.temporal(tokens.unflatten(0, (batch, frames)))

    def _generate(
        self,
        image_tokens: Tensor,
        max_new_tokens: int | None,
        agree: Callable[[bool], bool],
        rows: Sequence[int] | None,
    ) -> Tensor:
        bos_id, eos_id, pad_id = (self.special_ids[f"{name}_id"] for name in ("bos", "eos", "pad"))
        prompt = Prompt.of_bos(len(image_tokens), bos_id, image_tokens.device)
        words, _ = self.way(
            self.decoder,
            image_tokens,
            prompt,
            eos_id=eos_id,
            pad_id=pad_id,
            max_new_tokens=self.max_new_tokens if max_new_tokens is None else max_new_tokens,
            rows=rows,
            agree=agree,
        )
        return torch.cat([prompt.ids, words], dim=1)


def _supervised(batch: Batch) -> Tensor:
    """Places of the tokens to be predicted among all that have one before them: (n,) int64."""
    return batch["loss_mask"][..., 1:].reshape(-1).nonzero()[:, 0]

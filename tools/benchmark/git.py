"""GIT training steps against transformers' GitForCausalLM: same weights, images and captions.

Both run forward and backward in float32 without dropout, and must arrive at the same loss. With
several captions per image transformers has to repeat the image; ours reads it once. Peak memory is
the high-water mark of a process of its own, above what weights and gradients take.
"""

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from pretrain.models.build_context import BuildContext
from pretrain.models.git.decoder import GitDecoderSettings
from pretrain.models.init import initialise
from pretrain.models.multitask import MultiTaskModel
from pretrain.models.pixels import normalise_pixels
from pretrain.models.vit import VitSettings
from pretrain.objectives.captioning.captioning import CaptioningSettings
from tools.convert.transformers_git import SpecialIds, transformers_model
from tools.support.measure import (
    Measurement,
    in_fresh_process,
    interleaved,
    peak_rise_mib,
    ratio,
    say,
)

_MEAN, _STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)
_IDS = SpecialIds(bos_id=101, eos_id=102, pad_id=0)
_SIDES = ("ours", "transformers")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; see `tools.benchmark` for the form of the result."""
    rows: list[dict[str, Any]] = []
    bars: list[dict[str, Any]] = []
    for done, captions in enumerate(args.captions):
        say(f"captions an image: {captions}")
        cases, losses = _time(args, captions, len(args.captions) - done)
        say("peak memory, each side in a process of its own")
        peaks = {side: in_fresh_process(_peak_mib, args, captions, side) for side in _SIDES}
        rows.extend(_row(side, captions, cases[side], peaks[side], losses[side]) for side in _SIDES)
        bars.extend(_bars(captions, cases, peaks, losses))
    size = f"{args.images} image{'s' if args.images > 1 else ''} of {args.image_size} pixels"
    return {
        "title": f"One training step of GIT ({args.layers[0]} + {args.layers[1]} layers, float32): "
        f"{size}, captions of {args.text_length} tokens, threads: {args.threads}",
        "rows": rows,
        "bars": bars,
        "notes": [
            "a step is forward and backward, without dropout and optimizer; the output matrix is "
            "tied; weights, images and captions are the same on both sides",
            "peak MiB: the most a process held during a step, above weights and gradients",
        ],
    }


def _time(
    args: argparse.Namespace, captions: int, sharers: int
) -> tuple[dict[str, list[Measurement]], dict[str, float]]:
    """Repetitions of both sides for one number of captions per image, and their losses."""
    losses: dict[str, float] = {}
    steps = {side: _step(args, captions, side) for side in _SIDES}

    def case(side: str) -> Callable[[], float]:
        def repeat() -> float:
            losses[side] = steps[side]()
            return args.images

        return repeat

    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        cases = {side: case(side) for side in _SIDES}
        return interleaved(cases, args.repeats, sharers=sharers), losses
    finally:
        torch.set_num_threads(before)


def _row(
    side: str, captions: int, measured: list[Measurement], peak: float | None, loss: float
) -> dict[str, Any]:
    return {
        "case": side,
        "captions": captions,
        "CPU s": median(m.cpu_seconds for m in measured),
        "wall s": median(m.wall_seconds for m in measured),
        "peak MiB": peak,
        "loss": f"{loss:.6f}",
    }


def _bars(
    captions: int,
    cases: dict[str, list[Measurement]],
    peaks: dict[str, float | None],
    losses: dict[str, float],
) -> list[dict[str, Any]]:
    """What must hold for one number of captions; sharing the image pays from several on."""
    label = f"{captions} caption{'s' if captions > 1 else ''} per image"
    faster = ratio(cases["ours"], cases["transformers"], "cpu_seconds")
    bars = [(f"{label}: times faster (CPU)", faster, 3.0 if captions >= 5 else 1.0, True)]
    if peaks["ours"] and peaks["transformers"]:
        less = peaks["transformers"] / peaks["ours"]
        bars.append((f"{label}: times less peak memory", less, 1.0, True))
    difference = abs(losses["ours"] - losses["transformers"])
    bars.append((f"{label}: difference of the losses", difference, 1e-5, False))
    names = ("what", "measured", "bar", "at_least")
    return [dict(zip(names, bar, strict=True)) for bar in bars]


# ------------------------------------------------------------------------------ the two sides


def _step(args: argparse.Namespace, captions: int, side: str) -> Callable[[], float]:
    """A function that does one forward and backward pass and returns the loss."""
    batch = _batch(args, captions)
    return _our_step(args, batch) if side == "ours" else _transformers_step(args, batch)


def _settings(args: argparse.Namespace) -> tuple[VitSettings, GitDecoderSettings]:
    vit = VitSettings(image_size=args.image_size, layers=args.layers[0])
    decoder = GitDecoderSettings(
        layers=args.layers[1],
        dropout=0.0,
        embedding_norm_eps=1e-12,
        max_positions=max(64, args.text_length),
    )
    return vit, decoder


def _model(args: argparse.Namespace) -> MultiTaskModel:
    vit, decoder = _settings(args)
    encoders = {"image": vit.build()}
    objective = CaptioningSettings(decoder=decoder, label_smoothing=0.0).build(
        BuildContext(encoders, _Vocabulary(args.vocabulary), _MEAN, _STD)
    )
    model = MultiTaskModel(encoders, {"caption": objective})
    initialise(model, seed=0)
    return model


class _Vocabulary:
    bos_id, eos_id, pad_id = _IDS.bos_id, _IDS.eos_id, _IDS.pad_id

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


def _batch(args: argparse.Namespace, captions: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (args.images, 3, args.image_size, args.image_size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    shape = (args.images, captions, args.text_length)
    tokens = torch.randint(103, args.vocabulary, shape, generator=generator)
    tokens[..., 0], tokens[..., -1] = _IDS.bos_id, _IDS.eos_id
    loss_mask = torch.ones_like(tokens, dtype=torch.bool)
    loss_mask[..., 0] = False
    return {"images": images, "tokens": tokens, "loss_mask": loss_mask}


def _our_step(args: argparse.Namespace, batch: dict[str, torch.Tensor]) -> Callable[[], float]:
    model = _model(args)
    totals = {"tokens": float(batch["loss_mask"].sum())}

    def step() -> float:
        model.zero_grad(set_to_none=False)
        loss = model("caption", "undivided", batch, totals)["loss"]
        loss.backward()
        return loss.item()

    return step


def _transformers_step(
    args: argparse.Namespace, batch: dict[str, torch.Tensor]
) -> Callable[[], float]:
    weights = {name: p.detach() for name, p in _model(args).named_parameters()}
    twin = transformers_model(weights, *_settings(args), _IDS).train()
    pixels = normalise_pixels(batch["images"], _MEAN, _STD, torch.float32)
    tokens, loss_mask = batch["tokens"], batch["loss_mask"]
    inputs = {
        "pixel_values": pixels.repeat_interleave(tokens.shape[1], dim=0),
        "input_ids": tokens.flatten(0, 1),
        "attention_mask": torch.ones_like(tokens).flatten(0, 1),
        "labels": tokens.masked_fill(~loss_mask, -100).flatten(0, 1),
    }

    def step() -> float:
        twin.zero_grad(set_to_none=False)
        loss = twin(**inputs, use_cache=False).loss
        loss.backward()
        return loss.item()

    return step


def _peak_mib(args: argparse.Namespace, captions: int, side: str) -> float | None:
    torch.set_num_threads(args.threads)
    step = _step(args, captions, side)
    step()  # gradients exist from here on
    return peak_rise_mib(step)

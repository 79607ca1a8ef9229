"""A small model with everything that ZeRO is known to stumble over, and the same run without it."""

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.models.multitask import MultiTaskModel

WIDTH, CLASSES, SAMPLES = 12, 7, 8


class ToyEncoder(nn.Module):
    """(B, 3, H, W) -> (B, 1, WIDTH); a frozen part, and a layer that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.width = WIDTH
        self.frozen = nn.Linear(3, WIDTH)
        self.frozen.requires_grad_(False)
        self.inner = nn.Linear(WIDTH, 17)
        self.outer = nn.Linear(17, WIDTH)
        self.unused = nn.Linear(WIDTH, 5)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.frozen(images.mean((2, 3)))
        return self.norm(hidden + self.outer(F.gelu(self.inner(hidden))))[:, None]


class ToyObjective(nn.Module):
    """Classification of words with a tied output matrix and a temperature; weighted by `valid`."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(CLASSES, WIDTH)
        self.output = nn.Linear(WIDTH, CLASSES)
        self.output.weight = self.words.weight
        self.temperature = nn.Parameter(torch.ones(1))
        self.initial_std = {"temperature": None}

    def count(self, batch: dict) -> dict[str, int]:
        return {"images": int(batch["valid"].sum())}

    def flops(self, batch: dict) -> int:
        return batch["images"].shape[0]

    def forward(self, encoders, batch: dict, totals: dict) -> dict[str, torch.Tensor]:
        dtype = self.temperature.dtype
        features = encoders["image"](batch["images"].to(dtype))[:, 0] + self.words(batch["hint"])
        logits = (self.output(features) * self.temperature).float()
        losses = F.cross_entropy(logits, batch["label"], reduction="none")
        valid = batch["valid"].float()
        right = (logits.argmax(-1) == batch["label"]).float()
        return {
            "loss": (losses * valid).sum() / totals["images"],
            "accuracy": (right * valid).sum().detach() / totals["images"],
        }


def toy_model() -> MultiTaskModel:
    return MultiTaskModel({"image": ToyEncoder()}, {"words": ToyObjective()})


def toy_batch(step: int, poison: bool = False) -> dict[str, torch.Tensor]:
    """The global batch of a step: SAMPLES samples, one of them padding."""
    generator = torch.Generator().manual_seed(1000 + step)
    batch = {
        "images": torch.randn(SAMPLES, 3, 4, 4, generator=generator),
        "hint": torch.randint(CLASSES, (SAMPLES,), generator=generator),
        "valid": torch.ones(SAMPLES, dtype=torch.bool),
    }
    batch["label"] = (3 * batch["hint"] + 1) % CLASSES  # something to learn
    batch["valid"][step % SAMPLES] = False
    if poison:
        batch["images"][(step + 1) % SAMPLES] = float("nan")
    return batch


def share_of(batch: dict, rank: int, world: int, micro_steps: int) -> list[dict]:
    """This rank's micro-batches of a global batch."""
    mine = {name: value[rank::world] for name, value in batch.items()}
    return [
        {name: value[micro::micro_steps] for name, value in mine.items()}
        for micro in range(micro_steps)
    ]

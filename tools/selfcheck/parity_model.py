"""A small multi-task model with everything that ZeRO is known to stumble over, and its batches.

A trunk that all tasks share, a head per task, temperatures of one element, an output matrix tied to
an embedding, a frozen module, a layer that nobody uses, a block that is recomputed and runs twice
in one backward pass, and a layer that gets no gradient in a window's first micro-step.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from pretrain.models.multitask import MultiTaskModel
from pretrain.objectives.objective import Objective

WIDTH, CLASSES, SAMPLES = 12, 7, 12
TASKS = ("words", "shades", "edges")


class Trunk(nn.Module):
    """(B, 3, H, W) -> (B, WIDTH); with a frozen part, and a layer that nobody uses.

    reentrant: recompute in the way that loses gradients, to see it refused.
    """

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.width = WIDTH
        self.reentrant = reentrant
        self.frozen = nn.Linear(3, WIDTH)
        self.frozen.requires_grad_(False)
        self.inner = nn.Linear(WIDTH, 17)
        self.outer = nn.Linear(17, WIDTH)
        self.unused = nn.Linear(WIDTH, 5)
        self.twice = Block()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.frozen(images.mean((2, 3)))
        hidden = hidden + self.outer(F.gelu(self.inner(hidden)))
        for _ in range(2):
            hidden = checkpoint(self.twice, hidden, use_reentrant=self.reentrant)
        return self.norm(hidden)


class Block(nn.Module):
    """(B, WIDTH) -> (B, WIDTH), a residual that is not linear: each of its runs counts."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.mix.initial_std = {"weight": 0.3}

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + torch.tanh(self.mix(hidden))


class Still(nn.Module):
    """(B, 3, H, W) -> (B, WIDTH): an encoder for `optimizer.frozen`, with dropout, which a frozen
    one leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, WIDTH)
        self.drop = nn.Dropout(0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.drop(self.layer(images.mean((2, 3))))


class Head(Objective):
    """Classification behind the trunk; the share of a micro-batch counts its valid samples.

    late: has a layer whose loss is `late_share` of the batch, often 0.
    """

    def __init__(self, tied: bool, late: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(CLASSES, WIDTH)
        self.output = nn.Linear(WIDTH, CLASSES)
        if tied:
            self.output.weight = self.words.weight
        self.late = nn.Linear(WIDTH, 3) if late else None
        self.temperature = nn.Parameter(torch.ones(1))
        self.initial_std = {"temperature": None}

    def counts(self, batch: dict) -> dict[str, int]:
        return {"images": int(batch["valid"].sum())}

    def flops(self, batch: dict) -> int:
        return batch["images"].shape[0]

    def losses(self, modules, batch: dict, totals: dict, shared) -> dict[str, torch.Tensor]:
        dtype = self.temperature.dtype
        images = batch["images"].to(dtype)
        features = modules["image"](images) + self.words(batch["hint"])
        if "still" in modules:
            features = features + modules["still"](images)
        logits = (self.output(features) * self.temperature).float()
        losses = F.cross_entropy(logits, batch["label"], reduction="none")
        valid = batch["valid"].float()
        right = (logits.argmax(-1) == batch["label"]).float()
        loss = (losses * valid).sum() / totals["images"]
        if self.late is not None and batch["late_share"]:
            # Of the weights alone, so that any division of the batch has the same sum.
            ones = torch.ones(1, WIDTH, dtype=dtype, device=losses.device)
            share = 0.05 * batch["late_share"]
            loss = loss + share * self.late(ones).float().square().sum()
        return {
            "loss": loss,
            "accuracy": (right * valid).sum().detach() / totals["images"],
        }


def parity_model(reentrant: bool = False) -> MultiTaskModel:
    """The trunk with three tasks; the first one's output is tied to its embedding."""
    heads = {task: Head(tied=task == TASKS[0], late=True) for task in TASKS}
    return MultiTaskModel({"still": Still(), "image": Trunk(reentrant)}, heads)


def parity_batch(step: int) -> dict[str, torch.Tensor | float]:
    """The global batch of a step: SAMPLES samples, one of them padding.

    late_share: 1, of the loss that `share_of` leaves out of a window's first micro-step.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    batch = {
        "images": torch.randn(SAMPLES, 3, 4, 4, generator=generator),
        "hint": torch.randint(CLASSES, (SAMPLES,), generator=generator),
        "valid": torch.ones(SAMPLES, dtype=torch.bool),
        "late_share": 1.0,
    }
    batch["label"] = (3 * batch["hint"] + 1) % CLASSES  # something to learn
    batch["valid"][step % SAMPLES] = False
    return batch


def share_of(batch: dict, rank: int, world: int, micro_steps: int) -> list[dict]:
    """This rank's micro-batches of a global batch; empty places are padding that counts nothing."""
    late = batch.get("late_share", 0.0)
    batch = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    shares = []
    for micro in range(micro_steps):
        rows = torch.arange(rank + world * micro, SAMPLES, world * micro_steps)
        part = {name: value[rows] for name, value in batch.items()}
        if not len(rows):
            part = {name: value[:1] for name, value in batch.items()}
            part["valid"] = torch.zeros(1, dtype=torch.bool)
        resting = micro == 0 and micro_steps > 1
        part["late_share"] = 0.0 if resting else late / (world * max(1, micro_steps - 1))
        shares.append(part)
    return shares

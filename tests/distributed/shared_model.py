"""A model whose tasks share features that belong to no sample, and its training in plain PyTorch.

Eleven names pass a text encoder and a decoder that images use too; the losses of all micro-batches
read all of them. Ranks share the names out, so that there is padding, and encode them in pieces
that are recomputed. With a temperature, and a bias of the objective itself.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from pretrain.models.init import initialise
from pretrain.models.multitask import MultiTaskModel
from pretrain.objectives.contrastive.contrastive import Temperature
from pretrain.objectives.gather import gather_rows
from pretrain.objectives.objective import CoupledObjective, Objective
from pretrain.optim.groups import OptimizerSettings

WORDS, LENGTH, PIXELS, WIDTH, NAMES, SAMPLES, SEED = 40, 5, 12, 16, 11, 17, 5
TASKS = ("classify", "contrast", "classify", "plain")
"""The task of each step: changes show what a step leaves behind for the next."""
SGD = OptimizerSettings(kind="sgd", lr=0.005, weight_decay=0.0, clip_norm=None)


def totals_of(step: int) -> dict[str, float]:
    return {"samples": float(SAMPLES)}


class Block(nn.Module):
    """The decoder that images and texts pass, so that it runs twice in one backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        for layer in (self.up, self.down):
            layer.initial_std = {"weight": 0.4}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.words.initial_std = self.mix.initial_std = {"weight": 0.4}

    def forward(self, tokens: torch.Tensor, loud: torch.Tensor | float = 1.0) -> torch.Tensor:
        return torch.tanh(self.mix(self.words(tokens))).mean(1) * loud


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(PIXELS, WIDTH)
        self.first.initial_std = {"weight": 0.4}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.first(images))


class _Common(Objective):
    def counts(self, batch) -> dict[str, int]:
        return {"samples": int(batch["valid"].sum())}

    def flops(self, batch) -> int:
        return 0


class _Named(_Common):
    """What both tasks with names share."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        names = torch.randint(0, WORDS, (NAMES, LENGTH), generator=generator)
        self.register_buffer("names", names, persistent=False)
        self.temperature = Temperature(0.5, 100.0)
        self.bias = nn.Parameter(torch.zeros(1))
        self.initial_value = {"bias": 0.3}

    def shared(self, modules, draws):
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        each = -(-NAMES // world)
        mine = torch.arange(rank * each, (rank + 1) * each).clamp(max=NAMES - 1)

        def encode(index: torch.Tensor) -> torch.Tensor:
            loud = 0.5 + draws.of_shared(index).uniform("loudness", 1)[0]
            return modules["decoder"](modules["text"](self.names[index], loud[:, None]))

        rows = torch.cat([checkpoint(encode, p, use_reentrant=False) for p in mine.chunk(2)])
        names = gather_rows(rows)[:NAMES]
        return {"names": names, "scale": self.temperature(), "bias": self.bias * 1}


class Classify(_Named):
    """A sum over samples, with noise that is that of the step."""

    def losses(self, modules, batch, totals, shared):
        image = modules["decoder"](modules["image"](batch["images"]))
        image = image + (image * shared["bias"]).tanh()
        noise = torch.randn(NAMES, generator=batch["step_draws"].generator("noise"))
        logits = image @ shared["names"].T * shared["scale"] + noise
        loss = F.cross_entropy(logits, batch["labels"], reduction="none")
        return {"loss": (loss * batch["valid"]).sum() / totals["samples"]}


class Contrast(_Named, CoupledObjective):
    """Images find their text among the texts of all samples and the names."""

    def targets(self, modules, batch):
        return {"valid": batch["valid"]}

    def features(self, modules, batch):
        return {
            "image": modules["decoder"](modules["image"](batch["images"])),
            "text": modules["decoder"](modules["text"](batch["tokens"])),
        }

    def loss(self, features, targets, shared, totals):
        text, valid = gather_rows(features["text"]), gather_rows(targets["valid"])
        own = len(features["image"])
        first = (dist.get_rank() if dist.is_initialized() else 0) * own
        image = features["image"] + shared["bias"].tanh()
        logits = image @ torch.cat([text, shared["names"]]).T * shared["scale"]
        known = torch.cat([valid, torch.ones(NAMES, dtype=torch.bool)])
        losses = F.cross_entropy(
            logits.masked_fill(~known, -1e9), torch.arange(first, first + own), reduction="none"
        )
        return {"loss": torch.where(targets["valid"], losses, 0.0).sum() / totals["samples"]}


class Plain(_Common):
    """Nothing shared."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, NAMES)

    def losses(self, modules, batch, totals, shared):
        logits = self.head(modules["decoder"](modules["image"](batch["images"])))
        loss = F.cross_entropy(logits, batch["labels"], reduction="none")
        return {"loss": (loss * batch["valid"]).sum() / totals["samples"]}


def build() -> MultiTaskModel:
    encoders = {"image": Image(), "text": Text(), "decoder": Block()}
    objectives = {"classify": Classify(), "contrast": Contrast(), "plain": Plain()}
    return MultiTaskModel(encoders, objectives, seed=SEED)


def whole_batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {
        "images": torch.randn(SAMPLES, PIXELS, generator=generator),
        "tokens": torch.randint(0, WORDS, (SAMPLES, LENGTH), generator=generator),
        "labels": torch.randint(0, NAMES, (SAMPLES,), generator=generator),
        "valid": torch.ones(SAMPLES, dtype=torch.bool),
    }


def rows_of(batch: dict[str, torch.Tensor], rows) -> dict[str, torch.Tensor]:
    """Those rows; -1 makes padding."""
    rows = torch.as_tensor(rows)
    part = {name: value[rows.clamp(min=0)].clone() for name, value in batch.items()}
    part["valid"] = rows >= 0
    return part


def plain_run() -> dict[str, torch.Tensor]:
    """One process, one graph a step: losses, gradients and the weights at the end, by name."""
    torch.set_num_threads(1)
    model = build()
    initialise(model, SEED)
    optimizer = torch.optim.SGD(model.parameters(), SGD.lr)
    found = {}
    for step, task in enumerate(TASKS):
        loss = model(task, "undivided", whole_batch(step), totals_of(step), step=step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        found[f"loss{step}"] = loss.detach()
        for name, p in model.named_parameters():
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            found[f"gradient{step}.{name}"] = gradient.flatten().clone()
        optimizer.step()
    return found | {f"end.{n}": p.detach().flatten() for n, p in model.named_parameters()}

"""A model with a momentum target, and its training in plain PyTorch.

Cosine regression to a momentum encoder, beside a task that trains the same encoder by labels.
"""

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.engine.zero.zero import make_optimizer
from pretrain.models.init import initialise
from pretrain.models.multitask import MultiTaskModel
from pretrain.objectives.objective import Objective
from pretrain.optim.groups import OptimizerSettings, parameter_groups
from pretrain.optim.momentum import MomentumTargets
from tests.distributed.engines import SEED
from tests.distributed.toy import ToyObjective, toy_batch
from tools.selfcheck.parity_model import WIDTH, Trunk

STEPS, POISONED = 6, 1
"""Steps of a run, and the one whose gradient is not finite."""
TASKS = ("follow", "follow", "words", "follow", "words", "follow")
SGD = OptimizerSettings(
    kind="sgd", lr=0.1, weight_decay=0.0, clip_norm=None, lr_multipliers={"objectives.*": 2.0}
)
TARGETS = MomentumTargets(
    {"target_encoder": "encoders.image", "target_projector": "projector"}, start=0.3, end=0.8
)


class CountingTrunk(Trunk):
    """A trunk that counts its forward passes in training, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.passes += 1
        return super().forward(images)


class Follow(Objective):
    """1 - cosine between a prediction and what the momentum encoder makes of the same image."""

    def __init__(self, targets: MomentumTargets) -> None:
        super().__init__()
        self.projector = nn.Linear(WIDTH, 9)
        self.predictor = nn.Linear(9, 9)
        self.target_encoder = CountingTrunk().requires_grad_(False)
        self.target_projector = nn.Linear(WIDTH, 9).requires_grad_(False)
        self.momentum_targets = targets

    def counts(self, batch: dict) -> dict[str, int]:
        return {"images": int(batch["valid"].sum())}

    def flops(self, batch: dict) -> int:
        return len(batch["images"])

    def losses(self, modules, batch: dict, totals: dict, shared) -> dict[str, torch.Tensor]:
        images = batch["images"].to(self.predictor.weight.dtype)
        predicted = self.predictor(self.projector(modules["image"](images)))
        with torch.no_grad():
            wanted = self.target_projector(self.target_encoder.eval()(images))
        losses = 1.0 - F.cosine_similarity(predicted.float(), wanted.float(), dim=-1)
        return {"loss": (losses * batch["valid"].float()).sum() / totals["images"]}


def following_model(targets: MomentumTargets = TARGETS) -> MultiTaskModel:
    objectives = {"follow": Follow(targets), "words": ToyObjective()}
    return MultiTaskModel({"image": CountingTrunk()}, objectives)


def batch_of(step: int) -> dict[str, torch.Tensor]:
    return toy_batch(step, poison=step == POISONED)


def plain_run() -> tuple[list[float], dict[str, torch.Tensor]]:
    """One process with the whole batch, without DeepSpeed: losses of STEPS steps, and the state."""
    model = following_model()
    initialise(model, SEED)
    follow, encoder = model.objectives["follow"], model.encoders["image"]
    pairs = [(follow.target_encoder, encoder), (follow.target_projector, follow.projector)]
    for target, online in pairs:
        target.load_state_dict(online.state_dict())
    groups = parameter_groups(model, SGD)
    optimizer = make_optimizer(groups, SGD)
    losses, updates = [], 0
    for step, task in enumerate(TASKS):
        batch = batch_of(step)
        loss = model(task, "undivided", batch, {"images": batch["valid"].sum().float()})["loss"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if not torch.isfinite(loss):
            continue
        optimizer.step()
        momentum = TARGETS.momentum_at(updates, STEPS)
        updates += 1
        with torch.no_grad():
            for target, online in pairs:
                for mine, theirs in zip(target.parameters(), online.parameters(), strict=True):
                    mine.copy_(momentum * mine + (1.0 - momentum) * theirs)
                for mine, theirs in zip(target.buffers(), online.buffers(), strict=True):
                    mine.copy_(theirs)
    return losses, {name: value.clone() for name, value in model.state_dict().items()}

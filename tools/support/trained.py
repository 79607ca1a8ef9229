"""Open what a run left behind: its model with the weights of a checkpoint, in one process."""

from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.samples.tokenizer import Tokenizer
from pretrain.build import build_model
from pretrain.engine.checkpoint.files import MANIFEST, newest_whole, read_full_state, read_manifest
from pretrain.engine.zero.momentum_pairs import declared_targets, module_pairs
from pretrain.models.git.decoder import GitDecoderSettings
from pretrain.models.multitask import MultiTaskModel
from pretrain.models.vit import VisionTransformer, VitSettings
from pretrain.objectives.captioning.captioning import Captioning
from pretrain.recipe.load import load_resolved
from pretrain.recipe.recipe import Recipe, TaskSettings


@dataclass(frozen=True)
class TrainedRun:
    """The model of a run, with the weights of one checkpoint (float32, eval mode)."""

    checkpoint: Path
    manifest: dict
    """What the checkpoint says of itself."""
    recipe: Recipe
    tokenizer: Tokenizer | None
    model: MultiTaskModel
    state: str = "master"
    """Which weights it has: as in `open_run`."""


@dataclass(frozen=True)
class TrainedCaptioner(TrainedRun):
    """A captioning task of a run."""

    task_name: str = ""

    @property
    def task(self) -> TaskSettings:
        """The task's part of the recipe."""
        return self.recipe.tasks[self.task_name]

    @property
    def objective(self) -> Captioning:
        """The task's decoder and loss."""
        return self.model.objectives[self.task_name]

    @property
    def encoder_name(self) -> str:
        """Name of the encoder that the task reads."""
        return self.task.objective.encoder

    @property
    def encoder(self) -> VisionTransformer:
        """The encoder that the task reads."""
        return self.model.encoders[self.encoder_name]

    @property
    def vit(self) -> VitSettings:
        """Settings of that encoder."""
        return self.recipe.model.encoders[self.encoder_name]

    @property
    def decoder(self) -> GitDecoderSettings:
        """Settings of the decoder."""
        return self.task.objective.decoder

    @property
    def step(self) -> int:
        """Optimizer steps that the weights have seen."""
        return self.manifest["step"]

    def weights(self) -> dict[str, torch.Tensor]:
        """name -> tensor of the whole model; a tied parameter once."""
        return {name: p.detach() for name, p in self.model.named_parameters()}


def open_captioner(
    path: str | Path, task: str | None = None, weights: str = "master"
) -> TrainedCaptioner:
    """As `open_run`, with one of its captioning tasks.

    task: its name; needed if the run has several.

    Raises ValueError also if the run has no such task.
    """
    run = open_run(path, weights)
    return TrainedCaptioner(**vars(run), task_name=choose_task(run.recipe, "captioning", task))


def open_run(path: str | Path, weights: str = "master") -> TrainedRun:
    """Read a checkpoint folder, or the newest whole checkpoint of a run directory.

    weights: "master" for the trained weights, "ema" for their moving average; "target" puts those
        of momentum targets into the modules that these follow.

    Raises:
        ValueError: `path` is neither, or the run has no momentum target, or two of one module.
        CheckpointError: the checkpoint is not whole, or has no such weights.
    """
    checkpoint = _find(Path(path))
    manifest = read_manifest(checkpoint)
    recipe = load_resolved(checkpoint / "recipe.yaml")
    tokenizer = Tokenizer.load(checkpoint / "tokenizer") if recipe.tokenizer else None
    # Nothing is computed before every parameter has its trained value.
    with torch.device("meta"):
        model = build_model(recipe, tokenizer)
    state = read_full_state(checkpoint, "master" if weights == "target" else weights)
    if weights == "target":
        state |= _targets_in_place(model, state)
    model.load_state_dict(state, assign=True)
    # Assigning parted the tied matrices; a cast (here to what they are) joins them again.
    model = model.float().requires_grad_(False).eval()
    return TrainedRun(checkpoint, manifest, recipe, tokenizer, model, weights)


def _targets_in_place(
    model: MultiTaskModel, state: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Parameters and buffers of momentum targets under the names of those that they follow."""
    found: dict[str, torch.Tensor] = {}
    for task in declared_targets(model):
        for target, online in module_pairs(model, task):
            moved = {
                online + name.removeprefix(target): tensor.clone()
                for name, tensor in state.items()
                if name.startswith(f"{target}.")
            }
            if found.keys() & moved.keys():
                raise ValueError(
                    f"weights target: {online} has momentum targets in several tasks, {task} among "
                    "them, which differ; take the trained weights, or their moving average"
                )
            found |= moved
    if not found:
        raise ValueError("weights target: the run has no task with a momentum target (m3i)")
    return found


def recipe_of(path: str | Path) -> Recipe:
    """The recipe of what `open_run` would read, without reading a weight. Raises as it does."""
    return load_resolved(_find(Path(path)) / "recipe.yaml")


def _find(path: Path) -> Path:
    """The checkpoint folder that is meant."""
    if (path / MANIFEST).is_file():
        return path
    if (path / "checkpoints").is_dir():
        return newest_whole(path / "checkpoints")
    raise ValueError(
        f"{path} is neither a run directory (with checkpoints/) nor a whole checkpoint in one "
        f"(RUN/checkpoints/step_..., with {MANIFEST}); give the run_dir of a run"
    )


def choose_task(recipe: Recipe, kind: str, wanted: str | None) -> str:
    """Name of the task with an objective of type `kind`, if it is clear which.

    Raises:
        ValueError: the run has none, or several to choose from, or not the one that is wanted.
    """
    names = [n for n, task in recipe.tasks.items() if task.objective.type == kind]
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted in names:
        return wanted
    if not names:
        there = ", ".join(f"{n} ({task.objective.type})" for n, task in recipe.tasks.items())
        raise ValueError(f"the run has no {kind} task, which this is for; it has {there}")
    raise ValueError(
        f"choose one of the run's {kind} tasks with --task: {', '.join(names)}"
        + (f"; {wanted!r} is not among them" if wanted else "")
    )

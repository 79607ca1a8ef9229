"""The recipe: one YAML file describes one run.

    base: git_digits                  # another recipe below this one: a path, or a shipped name
    steps: 2000
    tasks:
      caption:
        data: {shards: [data/coco/train]}

Files are laid over each other as described in `pretrain.recipe.overlay`; overrides such as
`tasks.caption.micro_batch=8` come last. `null` sets None, and in a mapping whose names are free
(`model.encoders`, `tasks`, `data.sources`, `optimizer.lr_multipliers`) it removes the entry that a
base made.
`${NAME}` in any string is replaced from the environment; paths may start with `~`, and are made
absolute on loading (relative to the current directory), so that a resume works from anywhere.

Every fault is a line `file:line: key.path: what is wrong`, found before any process group starts.
"""

import os
from pathlib import Path
from typing import Annotated, Literal, Self, Union

from pydantic import Field, model_validator

from data_pipeline.filters.select import Condition
from data_pipeline.images.transforms import HeldOutImageSettings, ImageSettings
from data_pipeline.loader.settings import LoaderSettings
from data_pipeline.order.repeats import repeats_problem
from data_pipeline.samples.tokenizer import TokenizerSettings
from data_pipeline.settings import Settings
from pretrain.engine.checkpoint.settings import CheckpointSettings
from pretrain.engine.report.metrics_log import LoggingSettings
from pretrain.engine.spikes import SpikeSettings
from pretrain.optim.ema import EmaSettings
from pretrain.optim.groups import OptimizerSettings
from pretrain.optim.schedule import ScheduleSettings
from pretrain.recipe.exported import Exported
from pretrain.recipe.kinds import DATA, ENCODERS, OBJECTIVES
from pretrain.recipe.overlay import (
    to_yaml,
)
from pretrain.sampler import SamplingSettings

Encoder = Annotated[Union[ENCODERS], Field(discriminator="type")]  # noqa: UP007
Objective = Annotated[Union[OBJECTIVES], Field(discriminator="type")]  # noqa: UP007
Data = Annotated[Union[DATA], Field(discriminator="type")]  # noqa: UP007

DATA_TYPES = {settings.model_fields["type"].default: settings.data_type for settings in OBJECTIVES}
"""Type of objective -> the type of data that it reads."""


class ModelSettings(Settings):
    encoders: dict[str, Encoder] = Field(min_length=1)
    """Name -> encoder, or module that reads what others make and stands below them. Objectives name
    those that they use; several may share one."""


class EvaluationSettings(Settings):
    shards: list[str] = Field(min_length=1)
    """Held-out shards: folders, tars, globs or brace patterns; every row is used once."""

    where: Condition | None = None
    """Only samples that meet this condition on index columns are used, as in `data`; the condition
    of `data` itself is not applied here. null = all."""

    max_samples: int | None = Field(default=None, ge=1)
    """At most so many samples, spread evenly over the shards; null = all."""

    micro_batch: int | None = Field(default=None, ge=1)
    """Samples per rank and forward pass; null = the task's `micro_batch`."""

    image: HeldOutImageSettings | None = None
    """Preprocessing; null = as in training, with a centre crop for the random one."""


class TaskSettings(Settings):
    objective: Objective
    """The loss, and the heads that it owns."""

    data: Data
    """Where its samples come from and how they are prepared."""

    weight: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """Share of the steps that run this task, relative to the weights of the other tasks (in
    `sampling.mode` mixed: of its loss in that of a step)."""

    loss_weight: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """Factor of this task's loss in the gradient of its steps; logged losses are without it. It
    cancels with `optimizer.kind` mt_adamw, whose measure of importance is `optimizer.omega`."""

    global_batch: int = Field(ge=2)
    """Samples per optimizer step over all ranks; even, since neighbours in the data order are
    partners that stay together."""

    micro_batch: int = Field(ge=1)
    """Most samples per rank and forward pass: 1, or even. Accumulation follows from it, from
    `global_batch` and from the number of ranks."""

    evaluation: EvaluationSettings | None = None
    """Held-out data for this task; null = no evaluation."""

    @model_validator(mode="after")
    def _batches_fit(self) -> Self:
        problems = []
        if self.global_batch % 2:
            problems.append(
                f"global_batch={self.global_batch} must be even: "
                f"use {self.global_batch + 1} or {self.global_batch - 1}"
            )
        if self.micro_batch > 1 and self.micro_batch % 2:
            problems.append(
                f"micro_batch={self.micro_batch} must be 1 or even: use {self.micro_batch - 1}"
            )
        if self.micro_batch > self.global_batch:
            problems.append(
                f"micro_batch={self.micro_batch} is larger than global_batch={self.global_batch}: "
                "lower micro_batch"
            )
        if problem := repeats_problem(self.global_batch, self.data.copies):
            problems.append(problem)
        problems += self.data.batch_problems(self.micro_batch)
        if self.objective.pairs and self.micro_batch == 1:
            problems.append(
                f"objective {self.objective.type} mixes neighbours: micro_batch must be even, not 1"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def images(self, where: str) -> dict[str, ImageSettings]:
        """Settings of all images of the task that an encoder sees, by key path; where: its own."""
        images = {f"{where}.data.{n}": image for n, image in self.data.image_settings().items()}
        if images and self.evaluation is not None and self.evaluation.image is not None:
            images[f"{where}.evaluation.image"] = self.data.held_out_image(self.evaluation.image)
        return images


class FailureSettings(Settings):
    max_skipped_steps: int = Field(default=10, ge=0)
    """So many optimizer steps in a row may be skipped for a non-finite gradient; one more ends the
    run."""

    start_minutes: float = Field(default=30, gt=0)
    """From the start of a process to its first step, and a restore, at most; then the run ends,
    with the stacks of all ranks on file and the silent ones named."""

    step_minutes: float = Field(default=10, gt=0)
    """A step with the wait for its data, or a batch of an evaluation, at most."""

    save_minutes: float = Field(default=30, gt=0)
    """Writing a checkpoint, at most."""

    spike: SpikeSettings | None = SpikeSettings()
    """What is done when a logged loss jumps; null: nothing is looked at."""


class Recipe(Settings):
    """Everything that one run is made from."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run: letters, digits, `.`, `_`, `-`."""

    seed: int = Field(default=0, ge=0)
    """Seeds the initial weights, the data order, augmentation, dropout and the task schedule."""

    steps: int = Field(ge=1)
    """Optimizer steps of the whole run."""

    run_dir: str = Field(
        default_factory=lambda data: os.path.join("runs", data.get("name", "<name>")), min_length=1
    )
    """Folder for checkpoints, metrics and logs."""

    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Type of weights and activations in the forward and backward pass; master weights, losses
    and norms are float32 in any case. fp16, with a dynamic loss scale, is for GPUs without bf16."""

    deepspeed: str = "zero1"
    """Engine settings: the name of a file in `ds_configs/`, or the path of a DeepSpeed JSON."""

    threads_per_rank: int | None = Field(default=None, ge=1)
    """CPU threads of each rank (on GPUs of an offloaded optimizer); null = the cores that it may
    use, each divided by the ranks of the node that may use it."""

    deterministic: bool = False
    """Compute the same bits in every run on the same GPUs and software, or end where an operator
    cannot: fixed orders of addition within GPUs and between them, which cost speed. CPUs do so
    without it."""

    initial_weights: str | None = None
    """A safetensors file with weights in our names, read at the start of the run (not on a
    resume). Every tensor in it must belong to the model; parameters that it lacks are drawn from
    `seed`, as all are with null."""

    tokenizer: TokenizerSettings | None = None
    """Text to token ids; needed if a task or an encoder reads text."""

    model: ModelSettings
    """The encoders."""

    tasks: dict[str, TaskSettings] = Field(min_length=1)
    """Name -> task. Every optimizer step runs one task on all ranks, unless `sampling` mixes."""

    sampling: SamplingSettings = SamplingSettings()
    """Which tasks run at which step."""

    optimizer: OptimizerSettings = OptimizerSettings()
    """How gradients change weights."""

    schedule: ScheduleSettings = ScheduleSettings()
    """Learning rate over steps."""

    ema: EmaSettings | None = None
    """Moving average of the weights beside them: 4 bytes a parameter, shared out over the ranks. In
    every checkpoint; exported with `tools.convert export-git --weights ema`. null = none."""

    loader: LoaderSettings = LoaderSettings()
    """Worker processes that prepare batches."""

    checkpoint: CheckpointSettings = CheckpointSettings()
    """When checkpoints are written and how many stay."""

    evaluation_every_steps: int | None = Field(default=None, ge=1)
    """Evaluate each task that has `evaluation` after every so many steps and at the end; null =
    only at the end."""

    perplexity_every_steps: int | None = Field(default=None, ge=1)
    """Between these, after every so many steps: the losses of tasks that write texts on their
    held-out data, without writing any; null = never."""

    export: tuple[Exported, ...] = ()
    """Formats of `python -m tools.convert export --to` that a finished run writes by itself, to
    RUN/exports/step_N. One that fails is said, and the run is finished all the same."""

    logging: LoggingSettings = LoggingSettings()
    """Metrics and progress."""

    failure: FailureSettings = FailureSettings()
    """When a run gives up."""

    def to_yaml(self) -> str:
        """YAML with every field, which `load_resolved` reads back as an equal recipe."""
        return to_yaml(self.model_dump(mode="json"))

    def dump(self, path: str | Path) -> None:
        """Write `to_yaml()` to a file, in one rename."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(self.to_yaml(), encoding="utf-8")
        os.replace(temporary, path)

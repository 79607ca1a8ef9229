"""From a recipe to objects. The only place that knows both: components take plain arguments."""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

from torch import nn

from data_pipeline.boxes import BoxDataSettings, BoxFields
from data_pipeline.cache import source_of
from data_pipeline.captions import CaptionFields
from data_pipeline.clips import ClipFields
from data_pipeline.faults import FaultFile
from data_pipeline.images import ImageDataSettings
from data_pipeline.kept_order import KeptOrder
from data_pipeline.labels import LabelDataSettings, LabelFields
from data_pipeline.loader import EvaluationLoader, TaskStream
from data_pipeline.m3i import M3IDataSettings, M3IFields
from data_pipeline.mixed_order import MixedOrder
from data_pipeline.order import Order
from data_pipeline.order_plan import plan_order
from data_pipeline.pictures import PictureDataSettings, PictureFields
from data_pipeline.reader import SampleReader
from data_pipeline.remote import RemoteSettings
from data_pipeline.repeats import RepeatedOrder
from data_pipeline.shards import ShardSet
from data_pipeline.sources import ShardedData, Source, concatenated, open_source, open_sources
from data_pipeline.text import TextDataSettings, TextFields
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.transforms import ImageSettings
from data_pipeline.weak_stream import WeakStream
from pretrain import sampler
from pretrain.models.multitask import MultiTaskModel
from pretrain.recipe import Data, Recipe, TaskSettings


def build_tokenizer(recipe: Recipe) -> Tokenizer | None:
    """The tokenizer that the recipe names, if any. Raises TokenizerError."""
    return None if recipe.tokenizer is None else Tokenizer.from_settings(recipe.tokenizer)


def plan_sampling(recipe: Recipe, sizes: Mapping[str, int] | None = None) -> list[sampler.Stage]:
    """The stages that the recipe asks for.

    Args:
        sizes: task -> samples that take part; where `sampling.alpha` needs them and they are not
            given, the shards are opened (raises as `data_pipeline.sources.open_source`).
    """
    weights = {name: task.weight for name, task in recipe.tasks.items()}
    if recipe.sampling.alpha is not None and sizes is None:
        sizes = {
            name: count
            for name, task in recipe.tasks.items()
            if (count := _count(task.data, recipe.loader.remote)) is not None
        }
    return sampler.plan_stages(recipe.sampling, weights, sizes)


def _count(data: ShardedData, remote: RemoteSettings) -> int | None:
    """Samples that take part; None for a stream that does not say how many it has."""
    if data.stream is not None:
        return data.stream.samples
    return sum(source.samples for source in open_sources(data, remote))


def build_schedule(
    recipe: Recipe,
    ledger: Sequence[Mapping[str, Any]] = (),
    sizes: Mapping[str, int] | None = None,
) -> sampler.Schedule:
    """Which tasks run at which step: by the run's ledger if it says so, else by the recipe.

    Args:
        ledger: of the run (TrainerState.ledger); see `pretrain.sampler.stages`.
        sizes: as `plan_sampling`.
    """
    stages = sampler.stages_of(ledger) or plan_sampling(recipe, sizes)
    return sampler.build_schedule(stages, recipe.tasks, recipe.seed)


def loss_weights(recipe: Recipe, schedule: sampler.Schedule, step: int) -> dict[str, float]:
    """Factor of each task's loss in the loss of a step: the schedule's times the recipe's own."""
    factors = schedule.loss_weights(step)
    return {task: factor * recipe.tasks[task].loss_weight for task, factor in factors.items()}


def build_model(recipe: Recipe, tokenizer: Tokenizer | None) -> MultiTaskModel:
    """All encoders, and the objective of every task, on torch's default device.

    Where nothing reads text, no tokenizer is needed. Weights are not drawn yet:
    `pretrain.models.init.initialise` does that by seed and name.
    """
    encoders = {
        name: settings.build(tokenizer.vocab_size, tokenizer.eos_id)
        if settings.type == "text"
        else settings.build()
        for name, settings in recipe.model.encoders.items()
    }

    def new_encoder(name: str) -> nn.Module:
        """One more encoder like that of images called `name`, for a target that is not trained."""
        settings = recipe.model.encoders[name]
        plain = {"drop_path": 0.0, "gradient_checkpointing": False}
        fields = {field: value for field, value in plain.items() if hasattr(settings, field)}
        return settings.model_copy(update=fields).build()

    objectives = {
        name: build_objective(task, encoders, tokenizer, new_encoder)
        for name, task in recipe.tasks.items()
    }
    return MultiTaskModel(encoders, objectives, recipe.seed)


def build_objective(
    task: TaskSettings,
    encoders: dict[str, nn.Module],
    tokenizer: Tokenizer | None,
    new_encoder: Callable[[str], nn.Module],
) -> nn.Module:
    """The objective of a task, told what its data knows.

    new_encoder: makes another encoder of a name, for objectives whose `build` asks for it: those
        with a target of their own.
    """
    known: dict[str, Any] = {}
    if isinstance(task.data, ImageDataSettings):
        known = {"image_mean": task.data.image.mean, "image_std": task.data.image.std}
    if "new_encoder" in signature(task.objective.build).parameters:
        known["new_encoder"] = new_encoder
    if isinstance(task.data, LabelDataSettings | BoxDataSettings | M3IDataSettings):
        known["classes"] = task.data.classes
    if isinstance(task.data, LabelDataSettings):
        known["smaller_views"] = task.data.smaller_views
    return task.objective.build(encoders, tokenizer, **known)


def build_fields(
    data: Data, tokenizer: Tokenizer | None, train: bool
) -> CaptionFields | LabelFields | PictureFields | BoxFields | TextFields | M3IFields:
    """What turns samples into batches of this kind of data."""
    if isinstance(data, LabelDataSettings):
        return LabelFields(data, train)
    if isinstance(data, BoxDataSettings):
        return BoxFields(data, train)
    if isinstance(data, PictureDataSettings):
        return PictureFields(data, train)
    if isinstance(data, TextDataSettings):
        return TextFields(data, tokenizer)
    if isinstance(data, M3IDataSettings):
        return M3IFields(data, tokenizer, train)
    if data.frames is not None:
        return ClipFields(data, tokenizer, train)
    return CaptionFields(data, tokenizer, train)


def build_streams(
    recipe: Recipe, tokenizer: Tokenizer | None
) -> dict[str, TaskStream | WeakStream]:
    """Training data of every task, in its own order; no rank or position is part of it.

    Opens the shards (and indexes foreign ones). Raises FileNotFoundError, ShardError.
    """
    return {name: build_stream(recipe, name, tokenizer) for name in recipe.tasks}


def build_stream(recipe: Recipe, name: str, tokenizer: Tokenizer | None) -> TaskStream | WeakStream:
    """Training data of task `name`, as `build_streams`."""
    task = recipe.tasks[name]
    if task.data.stream is not None:
        return WeakStream(
            name,
            task.data.stream.urls(),
            build_fields(task.data, tokenizer, train=True),
            recipe.seed,
            task.global_batch,
            task.micro_batch,
            samples=task.data.stream.samples,
            shuffle_samples=task.data.stream.shuffle_samples,
            retry=recipe.loader.remote.retry_policy(),
            max_member_bytes=task.data.max_member_bytes,
        )
    sources = open_sources(task.data, recipe.loader.remote)
    return TaskStream(
        name,
        _reader(recipe, concatenated(sources), task.data.max_member_bytes),
        plan_task_order(task, sources, recipe.seed, name),
        build_fields(task.data, tokenizer, train=True),
        recipe.seed,
        task.global_batch,
        task.micro_batch,
    )


def plan_task_order(
    task: TaskSettings, sources: Sequence[Source], seed: int, name: str
) -> Order | KeptOrder | MixedOrder | RepeatedOrder:
    """The order of a task's training data; arguments as `data_pipeline.sources.plan_order`."""
    return plan_order(sources, task.global_batch, seed, name, repeats_of(task.data))


def repeats_of(data: Data) -> int:
    """How often each sample stands in a step."""
    return data.repeats if isinstance(data, ImageDataSettings) else 1


def _reader(recipe: Recipe, shards: ShardSet, max_member_bytes: int) -> SampleReader:
    source = source_of(shards, recipe.loader.cache)
    return SampleReader(shards, source, max_member_bytes=max_member_bytes)


def build_evaluation_loader(
    recipe: Recipe,
    name: str,
    tokenizer: Tokenizer | None,
    rank: int = 0,
    world: int = 1,
    fault_file: FaultFile | None = None,
) -> EvaluationLoader:
    """Held-out data of task `name` for one rank; every rank gets the same number of batches.

    fault_file: where every bad sample is written down.

    Raises ValueError if the task has no `evaluation`, FileNotFoundError, ShardError.
    """
    task = recipe.tasks[name]
    if task.evaluation is None:
        raise ValueError(f"tasks.{name}.evaluation: this task has no held-out data")
    held_out = open_source(
        task.evaluation.shards, task.evaluation.where, remote=recipe.loader.remote
    )
    changes: dict[str, Any] = {
        "shards": task.evaluation.shards, "sources": None, "stream": None
    }
    if isinstance(task.data, ImageDataSettings):
        changes["image"] = evaluation_image(task)
    if task.objective.type in ("contrastive", "m3i"):
        changes["captions_per_image"] = task.objective.evaluation_references
    data = task.data.model_copy(update=changes)
    micro_batch = task.evaluation.micro_batch or task.micro_batch
    stream = TaskStream(
        name,
        _reader(recipe, held_out.shards, task.data.max_member_bytes),
        None,
        build_fields(data, tokenizer, train=False),
        recipe.seed,
        micro_batch * world,
        micro_batch,
        held_out.selection,
    )
    loader = recipe.loader
    return EvaluationLoader(
        stream,
        rank,
        world,
        workers=loader.workers,
        max_samples=task.evaluation.max_samples,
        prefetch_batches=loader.prefetch_batches,
        start_method=loader.start_method,
        limits=loader.fault_limits(),
        fault_file=fault_file,
        stall_seconds=loader.stall_seconds,
    )


def evaluation_image(task: TaskSettings) -> ImageSettings:
    """Preprocessing of held-out images: as the recipe says, else a centre crop of that size."""
    if task.evaluation is not None and task.evaluation.image is not None:
        return task.evaluation.image
    image = task.data.image
    if image.mode != "random_resized_crop":
        return image
    return image.model_copy(update={"mode": "center_crop"})

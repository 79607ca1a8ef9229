"""From a recipe to objects. The only place that knows both: components take plain arguments."""

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.cache.cache import source_of
from data_pipeline.images.transforms import ImageSettings
from data_pipeline.loader.faults import FaultFile
from data_pipeline.loader.loader import EvaluationLoader, TaskStream
from data_pipeline.loader.sequential_stream import SequentialStream
from data_pipeline.order.order import RowOrder
from data_pipeline.order.plan import plan_order
from data_pipeline.order.sources import ShardedData, Source, concatenated, open_source, open_sources
from data_pipeline.reading.reader import SampleReader
from data_pipeline.samples.tokenizer import Tokenizer
from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.storage.remote import RemoteSettings
from pretrain import sampler
from pretrain.models.build_context import BuildContext
from pretrain.models.encoder import Encoder
from pretrain.models.multitask import MultiTaskModel
from pretrain.recipe.recipe import Recipe, TaskSettings


def build_tokenizer(recipe: Recipe) -> Tokenizer | None:
    """The tokenizer that the recipe names, if any. Raises TokenizerError."""
    return None if recipe.tokenizer is None else Tokenizer.from_settings(recipe.tokenizer)


def plan_sampling(recipe: Recipe, sizes: Mapping[str, int] | None = None) -> list[sampler.Stage]:
    """The stages that the recipe asks for.

    Args:
        sizes: task -> samples that take part; where `sampling.alpha` needs them and they are not
            given, the shards are opened (raises as `data_pipeline.order.sources.open_source`).
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
    weights = {name: task.loss_weight for name, task in recipe.tasks.items()}
    return sampler.build_schedule(stages, recipe.tasks, recipe.seed, weights)


def build_model(recipe: Recipe, tokenizer: Tokenizer | None) -> MultiTaskModel:
    """All encoders, and the objective of every task, on torch's default device.

    Where nothing reads text, no tokenizer is needed. Weights are not drawn yet:
    `pretrain.models.init.initialise` does that by seed and name.
    """
    encoders: dict[str, Encoder] = {}
    for name, settings in recipe.model.encoders.items():
        encoders[name] = settings.build(BuildContext(dict(encoders), tokenizer))

    def new_encoder(name: str) -> Encoder:
        """One more encoder like that of images called `name`, for a target that is not trained."""
        settings = recipe.model.encoders[name].as_target()
        return settings.build(BuildContext(encoders, tokenizer))

    objectives = {
        name: task.objective.build(
            BuildContext(encoders, tokenizer, **task.data.facts(), new_encoder=new_encoder)
        )
        for name, task in recipe.tasks.items()
    }
    return MultiTaskModel(encoders, objectives, recipe.seed)


def build_streams(
    recipe: Recipe, tokenizer: Tokenizer | None
) -> dict[str, TaskStream | SequentialStream]:
    """Training data of every task, in its own order; no rank or position is part of it.

    Opens the shards (and indexes foreign ones). Raises FileNotFoundError, ShardError.
    """
    return {name: build_stream(recipe, name, tokenizer) for name in recipe.tasks}


def build_stream(
    recipe: Recipe, name: str, tokenizer: Tokenizer | None
) -> TaskStream | SequentialStream:
    """Training data of task `name`, as `build_streams`."""
    task = recipe.tasks[name]
    if task.data.stream is not None:
        return SequentialStream(
            name,
            task.data.stream.urls(),
            task.data.processor(tokenizer, train=True),
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
        task.data.processor(tokenizer, train=True),
        recipe.seed,
        task.global_batch,
        task.micro_batch,
    )


def plan_task_order(
    task: TaskSettings, sources: Sequence[Source], seed: int, name: str
) -> RowOrder:
    """The order of a task's training data; arguments as `data_pipeline.order.plan.plan_order`."""
    return plan_order(sources, task.global_batch, seed, name, task.data.copies)


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
    data = task.data.held_out(
        task.evaluation.shards, task.evaluation.image, task.objective.held_out_changes()
    )
    micro_batch = task.evaluation.micro_batch or task.micro_batch
    stream = TaskStream(
        name,
        _reader(recipe, held_out.shards, task.data.max_member_bytes),
        None,
        data.processor(tokenizer, train=False),
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
    return task.data.held_out_image(task.evaluation and task.evaluation.image)

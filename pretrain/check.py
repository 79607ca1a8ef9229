"""What can be known of a run before it starts: data, batches, engine settings, size and memory."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from data_pipeline.loader.weak_stream import PROMISES_NOT
from data_pipeline.order.mixed_order import MixedOrder
from data_pipeline.order.sources import Source, concatenated, open_source, open_sources
from data_pipeline.order.step_sampler import MicroBatch, deal
from pretrain.build import (
    build_evaluation_loader,
    build_model,
    build_schedule,
    build_stream,
    build_tokenizer,
    plan_task_order,
)
from pretrain.check_cache import cache_lines
from pretrain.data_start import changed_data, look_at_samples
from pretrain.ds_config import engine_config, find_engine_file
from pretrain.engine.zero.momentum_pairs import moving_targets, require_weights_in_memory
from pretrain.idle_ranks import idle_ranks
from pretrain.models.frozen import freeze, kept_at_random
from pretrain.models.init import classes_hint
from pretrain.optim.groups import parameter_groups
from pretrain.recipe import checks as recipe_checks
from pretrain.recipe.recipe import Recipe, TaskSettings

if TYPE_CHECKING:
    from data_pipeline.samples.tokenizer import Tokenizer
    from pretrain.models.multitask import MultiTaskModel


@dataclass(frozen=True)
class Finding:
    """One line of the report; `ok` is False where a run would fail."""

    ok: bool
    text: str
    warns: bool = False
    """Whether it would run, but most likely not as it was meant."""


class AssumedVocabulary:
    """What a model's size needs to know of a tokenizer that cannot be read: BERT's, as in GIT."""

    vocab_size, bos_id, eos_id, pad_id = 30_522, 101, 102, 0


def report(recipe: Recipe, world: int, ranks_per_node: int) -> list[Finding]:
    """Check everything that needs no process group; later checks go on after a fault.

    Args:
        recipe: a valid recipe.
        world: number of ranks to plan for.
        ranks_per_node: how many of them share a node, and its cache.
    """
    findings = [Finding(True, f"recipe {recipe.name}: {recipe.steps} steps on {world} rank(s)")]

    def attempt(what: str, action: Callable[[], Iterable[str | Finding]]) -> None:
        try:
            found = [Finding(True, line) if isinstance(line, str) else line for line in action()]
            findings.extend(found)
        except Exception as error:  # whatever a run would raise there is a line of this report
            faults = [Finding(False, f"{what}: {line}") for line in _lines_of(error)]
            findings.extend(fault for fault in faults if fault not in findings)

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed probes, and warns
    zero: list[dict] = []
    # None where nothing reads text; empty where the tokenizer cannot be read.
    tokenizers: list[Tokenizer | None] = [] if recipe.tokenizer else [None]
    attempt("engine", lambda: _engine(recipe, world, zero))
    if recipe.tokenizer:
        attempt("tokenizer", lambda: _tokenizer(recipe, tokenizers))
    warnings = [*recipe_checks.warnings(recipe), *idle_ranks(recipe, world)]
    findings += [Finding(True, line, warns=True) for line in warnings]
    if len(recipe.tasks) > 1:
        attempt("schedule", lambda: _schedule(recipe))
    for name, task in recipe.tasks.items():
        attempt(f"tasks.{name}", lambda n=name, t=task: _task(recipe, n, t, world))
    for name in recipe.tasks if tokenizers else ():
        attempt(f"tasks.{name}", lambda n=name: _first_samples(recipe, n, tokenizers[0]))
        attempt(f"tasks.{name}", lambda n=name: _targets(recipe, n, tokenizers[0]))
    if recipe.loader.cache is not None:
        attempt("cache", lambda: cache_lines(recipe, world, ranks_per_node))
    if zero and not tokenizers:
        findings.append(
            Finding(
                True,
                f"model: without the tokenizer, sizes are those with an "
                f"assumed vocabulary of {AssumedVocabulary.vocab_size:,} entries",
            )
        )
    if zero:
        tokenizer = tokenizers[0] if tokenizers else AssumedVocabulary()
        attempt("model", lambda: _model(recipe, tokenizer, zero[0], world))
    return findings


def _lines_of(error: Exception) -> list[str]:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return [f"{error.strerror}: {error.filename}"]
    return str(error).splitlines() or [type(error).__name__]


def _engine(recipe: Recipe, world: int, zero: list[dict]) -> list[str]:
    config = engine_config(recipe, world)
    zero.append(config["zero_optimization"])
    file = find_engine_file(recipe.deepspeed)
    lines = [f"engine: ZeRO stage {zero[0]['stage']}, {recipe.precision} ({file})"]
    if recipe.deterministic:
        lines.append(
            "deterministic: the same bits in every run on the same world, GPUs and software, at "
            "the cost of speed (on CPUs that is so without it)"
        )
    return lines


def _tokenizer(recipe: Recipe, found: list["Tokenizer | None"]) -> list[str]:
    tokenizer = build_tokenizer(recipe)
    found.append(tokenizer)
    return [f"tokenizer: {tokenizer.vocab_size} entries, digest {tokenizer.digest[:12]}"]


def _schedule(recipe: Recipe) -> list[str]:
    """A line per stage: cycle, shares, largest error of a share."""
    lines = build_schedule(recipe).describe().splitlines()
    every = recipe.sampling.check_every_steps
    return [f"schedule: {line}" for line in lines] + [
        f"schedule: ranks compare what they run at the first step and every {every} steps"
    ]


def _task(recipe: Recipe, name: str, task: TaskSettings, world: int) -> Iterator[str]:
    dealt = [len(places) for places in deal(task.global_batch, task.micro_batch, 0, world)]
    padded = world * sum(dealt) - task.global_batch
    yield (
        f"tasks.{name}: global batch {task.global_batch} = {world} rank(s) x {len(dealt)} "
        f"micro-step(s) of up to {max(dealt)}" + (f", less {padded} padding rows" if padded else "")
    )
    visits = build_schedule(recipe).visits(recipe.steps)[name]
    if task.data.stream is None:
        yield from _training_data(recipe, name, task, visits)
    else:
        yield from _streamed_data(name, task, visits)
    if task.evaluation is not None:
        held_out = open_source(
            task.evaluation.shards, task.evaluation.where, remote=recipe.loader.remote
        )
        used = min(held_out.samples, task.evaluation.max_samples or held_out.samples)
        yield f"tasks.{name}: evaluation on {used} of {_kept_of(held_out)}"


def _streamed_data(name: str, task: TaskSettings, visits: int) -> Iterator[str]:
    stream = task.data.stream
    yield f"tasks.{name}: a stream of {len(stream.urls())} shard(s), with {PROMISES_NOT}"
    if stream.samples is not None:
        epochs = visits * task.global_batch / stream.samples
        yield (
            f"tasks.{name}: {visits} steps = about {epochs:.2f} epochs of {stream.samples} samples"
        )


def _training_data(recipe: Recipe, name: str, task: TaskSettings, visits: int) -> Iterator[str]:
    sources = open_sources(task.data, recipe.loader.remote)
    shards = concatenated(sources)
    samples = sum(source.samples for source in sources)
    repeats = task.data.copies
    per_epoch = samples * repeats / task.global_batch
    yield (
        f"tasks.{name}: {_kept(samples, len(shards))} in {len(shards.shards)} shard(s); "
        f"{per_epoch:.1f} steps an epoch, {visits} steps = {visits / per_epoch:.2f} epochs"
        + (f"; every image {repeats} times in a step" if repeats > 1 else "")
    )
    order = plan_task_order(task, sources, recipe.seed, name)
    if isinstance(order.images, MixedOrder):
        yield f"tasks.{name}: sources in a {order.images.describe()}"
        epochs = order.epochs(visits * task.global_batch)
        for source in sources:
            yield (
                f"tasks.{name}: source {source.name}: {_kept_of(source)}, read "
                f"{epochs[source.name]:.2f} times"
            )


def _kept_of(source: Source) -> str:
    return _kept(source.samples, len(source.shards))


def _kept(samples: int, stored: int) -> str:
    """Samples that take part, and how many there are if a condition leaves some out."""
    if samples == stored:
        return f"{samples} samples"
    return f"{samples} samples ({samples / stored:.1%} of {stored}, by `where`)"


def _first_samples(recipe: Recipe, name: str, tokenizer: "Tokenizer | None") -> Iterator[str]:
    """Load the first two samples as training will: members, captions and pixels are there."""
    stream = build_stream(_without_cache(recipe), name, tokenizer)
    batch = stream.load(MicroBatch(0, 0, name, (0, 1), (True, True)))
    shapes = ", ".join(
        f"{key} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        for key, value in batch.items()
        if torch.is_tensor(value) and (value.dim() > 1 or key == "labels")
    )
    yield f"tasks.{name}: first samples {', '.join(batch['key'])}: {shapes}"


def _targets(recipe: Recipe, name: str, tokenizer: "Tokenizer | None") -> Iterator[Finding]:
    """What the start of a run looks at, too: shards that changed, samples that teach nothing."""
    recipe = _without_cache(recipe)
    groups = [{name: build_stream(recipe, name, tokenizer)}, {}]
    if recipe.tasks[name].evaluation is not None:
        groups[1][name] = build_evaluation_loader(recipe, name, tokenizer).stream
    if changed := changed_data(*groups):
        yield Finding(False, f"tasks.{name}: {changed}")
        return
    found = look_at_samples(recipe, *groups)
    yield from (Finding(False, line) for line in found.faults)
    yield from (Finding(True, line, warns=True) for line in found.warnings)


def _without_cache(recipe: Recipe) -> Recipe:
    """The recipe without the cache, which is of nodes and not of this machine."""
    return recipe.model_copy(update={"loader": recipe.loader.model_copy(update={"cache": None})})


def _check_initial_weights(
    model: "MultiTaskModel", path: str, frozen: list[str]
) -> Iterator[str | Finding]:
    """Names and shapes of the file against the model; `models.init.load_weights` does the rest."""
    places = [*model.named_parameters(), *model.named_buffers()]
    shapes = {name: list(tensor.shape) for name, tensor in places}
    with safe_open(path, framework="pt") as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    wrong = [name for name, shape in found.items() if shapes.get(name) != shape]
    if wrong:
        raise ValueError(
            f"initial_weights: {len(wrong)} of {len(found)} tensors have no place in this model, "
            f"among them {wrong[0]} {tuple(found[wrong[0]])}{classes_hint(wrong[0])}"
        )
    yield f"initial_weights: {len(found)} of {len(shapes)} tensors from {path}"
    if random := sorted(set(frozen) - set(found)):
        yield Finding(True, kept_at_random(random), warns=True)


def _model(
    recipe: Recipe, tokenizer: "Tokenizer | None", zero: dict, world: int
) -> Iterator[str | Finding]:
    with torch.device("meta"):
        model = build_model(recipe, tokenizer)
    frozen_names = freeze(model, recipe.optimizer.frozen)
    total, trained = _count(model), _count(model, trained=True)
    yield f"model: {_millions(total)} parameters ({_parts(model)})"
    require_weights_in_memory(model, zero)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    following = sum(sizes[name] for name in moving_targets(model))
    if trained < total:
        targets = f", of them {_millions(following)} in momentum targets" if following else ""
        yield (
            f"model: {_millions(trained)} parameters are trained, {_millions(total - trained)} "
            f"are not{targets}"
        )
    if frozen_names:
        yield (
            f"model: {_millions(sum(sizes[name] for name in frozen_names))} parameters in "
            f"{len(frozen_names)} tensors are frozen by optimizer.frozen"
            + ("" if recipe.initial_weights else ", at their random first values")
        )
    if recipe.initial_weights is not None:
        yield from _check_initial_weights(model, recipe.initial_weights, frozen_names)
    groups = parameter_groups(model, recipe.optimizer)
    yield "optimizer groups: " + "; ".join(
        f"{group['name']}: {_millions(sum(p.numel() for p in group['params']))}" for group in groups
    )
    momenta = _momenta(recipe)
    size = state_bytes(
        trained,
        zero["stage"],
        world,
        recipe.precision,
        momenta,
        zero.get("sub_group_size"),
        frozen=total - trained,
        following=following,
    )
    yield (
        f"memory per rank: about {size / 2**30:.2f} GiB for weights, gradients and optimizer "
        "(ds_configs/README.md); activations, buckets and the framework come on top"
    )


def state_bytes(
    parameters: int,
    stage: int,
    world: int,
    precision: str,
    momenta: int,
    sub_group_size: int | None = None,
    frozen: int = 0,
    following: int = 0,
) -> float:
    """Bytes a rank keeps for weights, gradients and optimizer under ZeRO (ds_configs/README.md).

    Args:
        parameters: trainable parameters of the model.
        stage: ZeRO stage 1, 2 or 3.
        world: ranks.
        precision: bf16, fp16 or fp32.
        momenta: float32 values that are kept beside each master weight: 2 for AdamW, 1 for `ema`.
        sub_group_size: elements of a rank that stage 3 steps at a time; None = all.
        frozen: parameters beside the trainable ones, of which there are only weights.
        following: those of them that are momentum targets, with a float32 value each.
    """
    width = 4 if precision == "fp32" else 2
    weights = width / world if stage == 3 else width
    gradients = width if stage == 1 else width / world
    # The partition of this rank: float32 master weights, momenta, and gradients during the step.
    partition = parameters / world
    stepped = min(partition, sub_group_size) if stage == 3 and sub_group_size else partition
    beside = frozen * weights + 4 * following / world
    return parameters * (weights + gradients) + (4 + 4 * momenta) * partition + 4 * stepped + beside


def _momenta(recipe: Recipe) -> int:
    """float32 values beside a weight: what the optimizer keeps, and the moving average."""
    averages = 1 if recipe.ema else 0
    if recipe.optimizer.kind in ("adamw", "mt_adamw"):
        return 2 + averages
    return averages + (1 if recipe.optimizer.momentum else 0)


def _count(module: torch.nn.Module, trained: bool = False) -> int:
    """Parameters of a module, or those of them that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def _parts(model: "MultiTaskModel") -> str:
    parts = [(f"encoders.{name}", part) for name, part in model.encoders.items()]
    parts += [(f"objectives.{name}", part) for name, part in model.objectives.items()]
    return ", ".join(f"{name} {_millions(_count(part))}" for name, part in parts)


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"

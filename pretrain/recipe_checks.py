"""What no single block of a recipe can know: combinations of blocks that cannot work.

Every function returns lines that name both fields and the way out; `problems` collects them all.
"""

import operator
import re
from typing import TYPE_CHECKING, Any

from data_pipeline.images import ImageDataSettings
from pretrain.engine.trackers import missing_packages
from pretrain.optim.schedule import problems as schedule_problems
from pretrain.pattern_checks import check_patterns
from pretrain.sampler.settings import problems as sampling_problems

if TYPE_CHECKING:
    from pretrain.recipe import Recipe, TaskSettings

_TAKEN = """
T_destination add_module apply bfloat16 buffers call_super_init children clear compile cpu
cuda double dump_patches eval extra_repr float forward get_buffer get_extra_state
get_parameter get_submodule half ipu items keys load_state_dict modules mtia named_buffers
named_children named_modules named_parameters parameters pop register_backward_hook
register_buffer register_forward_hook register_forward_pre_hook register_full_backward_hook
register_full_backward_pre_hook register_load_state_dict_post_hook
register_load_state_dict_pre_hook register_module register_parameter
register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ set_extra_state
set_submodule share_memory state_dict to to_empty train training type update values xpu
zero_grad
"""
TAKEN_NAMES = frozenset(_TAKEN.split())
"""Attributes of torch's `nn.ModuleDict`, which keeps encoders and objectives by their names;
written down, since recipes are checked before torch is imported."""


def problems(recipe: "Recipe") -> list[str]:
    """One line per combination that cannot work; empty if the recipe is sound."""
    return [line for check in _CHECKS for line in check(recipe)]


def _check_names(recipe: "Recipe") -> list[str]:
    """Encoder and task names become parts of parameter names."""
    found = []
    for block, names in (("model.encoders", recipe.model.encoders), ("tasks", recipe.tasks)):
        for name in names:
            if not re.fullmatch(r"[A-Za-z]\w*", name, flags=re.ASCII):
                found.append(f"{block}: the name {name!r} must be letters, digits and _ only")
            elif name in TAKEN_NAMES:
                found.append(f"{block}: the name {name!r} is taken by torch; choose another")
    return found


def _check_sampling(recipe: "Recipe") -> list[str]:
    return sampling_problems(
        recipe.sampling, list(recipe.tasks), recipe.steps, recipe.optimizer.kind
    )


def _check_schedule(recipe: "Recipe") -> list[str]:
    return schedule_problems(recipe.schedule, recipe.steps)


def _check_data(recipe: "Recipe") -> list[str]:
    """Objectives and data of the same kind; what else data must be is then up to `_check_texts`."""
    return [
        f"tasks.{name}.data.type={task.data.type!r} does not fit "
        f"tasks.{name}.objective.type={task.objective.type!r}, which reads "
        f"{task.objective.data_type!r}: change one of them"
        for name, task in recipe.tasks.items()
        if task.data.type != task.objective.data_type
    ]


def _check_encoders(recipe: "Recipe") -> list[str]:
    """Encoders that objectives name are there, read what they should, and all are used."""
    found, used = [], set()
    encoders = recipe.model.encoders
    for name, task in recipe.tasks.items():
        for field, reads in task.objective.encoder_fields.items():
            chosen = getattr(task.objective, field)
            if chosen is None:
                continue
            used.add(chosen)
            where = f"tasks.{name}.objective.{field}={chosen!r}"
            if chosen not in encoders:
                found.append(f"{where} is not among model.encoders: {', '.join(encoders)}")
            elif encoders[chosen].reads != reads:
                found.append(
                    f"{where} must read {reads}, but model.encoders.{chosen}.type="
                    f"{encoders[chosen].type} reads {encoders[chosen].reads}: name another encoder"
                )
            elif reads == "images":
                found += _check_image_sizes(f"tasks.{name}", task, encoders[chosen], chosen)
                found += _check_pool(where, task, encoders[chosen])
    found += _check_heads(recipe)
    for name in encoders:
        if name not in used:
            found.append(
                f"model.encoders.{name}: no task uses this encoder, so it would only decay: "
                "remove it, or name it in a task's objective.encoder"
            )
    return found


def _check_tokenizer(recipe: "Recipe") -> list[str]:
    """Whatever reads text needs one."""
    if recipe.tokenizer is not None:
        return []
    readers = [f"tasks.{name}.data" for name, task in recipe.tasks.items() if task.data.reads_text]
    readers += [
        f"model.encoders.{name}"
        for name, encoder in recipe.model.encoders.items()
        if encoder.type == "text"
    ]
    return [f"tokenizer: give tokenizer.path; {readers[0]} reads text"] if readers else []


def _check_texts(recipe: "Recipe") -> list[str]:
    """Captions fit into what reads or writes them."""
    found = []
    for name, task in recipe.tasks.items():
        if task.data.type != task.objective.data_type:
            continue  # _check_data says so
        if task.objective.type == "captioning":
            found += _captioning_texts(f"tasks.{name}", task)
        elif task.objective.type in ("contrastive", "m3i"):
            found += _contrastive_texts(f"tasks.{name}", task, recipe)
    return found


def _captioning_texts(where: str, task: "TaskSettings") -> list[str]:
    found = []
    objective = task.objective
    positions = objective.decoder.max_positions
    if task.data.text_length > positions:
        found.append(
            f"{where}.data.text_length={task.data.text_length} exceeds "
            f"{where}.objective.decoder.max_positions={positions}: raise max_positions or "
            "lower text_length"
        )
    if objective.max_new_tokens > positions:
        found.append(
            f"{where}.objective.max_new_tokens={objective.max_new_tokens} exceeds "
            f"{where}.objective.decoder.max_positions={positions}: lower max_new_tokens"
        )
    return found + _clips(where, task)


def _clips(where: str, task: "TaskSettings") -> list[str]:
    """Clips meet a decoder that tells their frames apart, and it meets nothing else."""
    frames, most = task.data.frames, task.objective.decoder.frames
    key = f"{where}.objective.decoder.frames"
    if (frames or 0) > most:
        return [f"{where}.data.frames={frames} exceeds {key}={most}: set that to {frames} or more"]
    if most and not frames:
        return [f"{key}={most} is for clips, but {where}.data.frames is not set: set both, or none"]
    image = task.evaluation and task.evaluation.image
    if frames and image and not image.fixed_size:
        return [f"{where}.evaluation.image.mode={image.mode!r}: clips need one size"]
    return []


def _contrastive_texts(where: str, task: "TaskSettings", recipe: "Recipe") -> list[str]:
    found = []
    if task.data.captions_per_image > 1:
        found.append(
            f"{where}.data.captions_per_image={task.data.captions_per_image} must be 1 for a "
            f"{task.objective.type} objective, whose images have one text each in a step"
        )
    if task.data.frames is not None:
        found.append(
            f"{where}.data.frames={task.data.frames}: a contrastive objective reads images: remove "
            "frames"
        )
    if task.data.repeats > 1:
        found.append(
            f"{where}.data.repeats={task.data.repeats} must be 1 for a {task.objective.type} "
            "objective, which would have to tell an image from its own copies"
        )
    encoder = recipe.model.encoders.get(task.objective.text_encoder)
    positions = getattr(encoder, "max_positions", None)
    if positions is not None and task.data.text_length > positions:
        found.append(
            f"{where}.data.text_length={task.data.text_length} exceeds "
            f"model.encoders.{task.objective.text_encoder}.max_positions={positions}: raise "
            "max_positions or lower text_length"
        )
    return found


def _check_m3i(recipe: "Recipe") -> list[str]:
    """Images divide into cells, and cells into what the encoder cannot take apart."""
    found = []
    for name, task in recipe.tasks.items():
        encoder = recipe.model.encoders.get(getattr(task.objective, "encoder", None))
        if task.objective.type != "m3i" or task.data.type != "m3i":
            continue  # _check_data says so
        found += _m3i_losses(f"tasks.{name}.objective", task)
        if encoder is None or encoder.reads != "images":
            continue  # _check_encoders says so
        where, cell = f"tasks.{name}.objective", task.objective.cell
        step = encoder.patch_size if encoder.type == "vit" else 32
        found += _check_multiple(
            f"{where}.cell", cell, step, f"model.encoders.{task.objective.encoder} needs"
        )
        for key, image in _images_of(f"tasks.{name}", task).items():
            for size in {image.size, *(image.sizes or ())}:
                found += _check_multiple(f"{key}.size", size, cell, f"{where}.cell={cell} needs")
        image = task.data.image  # and the second view: of the same sizes
        if cell in {image.size, *(image.sizes or ())}:
            found.append(
                f"{where}.cell={cell} is all of an image, but two share the cells: lower cell, or "
                f"take a larger tasks.{name}.data.image.size"
            )
        if task.evaluation is not None:
            found += _m3i_evaluation(f"tasks.{name}", task)
        if encoder.type == "vit":
            continue
        if "head" not in encoder.pools or encoder.head.type != "projector":
            found.append(
                f"{where} reads dense features of model.encoders.{task.objective.encoder}, which "
                "an internimage has with `head: {type: projector}` alone: give it that"
            )
        for field, free in (("group_attention", False), ("pooled_width", None)):
            if getattr(task.objective, field) != free:
                found.append(
                    f"{where}.{field} is for a vit, not for an internimage: remove it"
                )
    return found


def _m3i_losses(where: str, task: "TaskSettings") -> list[str]:
    """Settings of losses that are not there."""
    objective, absent = task.objective, []
    if objective.text_encoder is None:
        fields = {"weights.text": objective.weights.text, "temperature": objective.temperature,
                  "max_scale": objective.max_scale}
        absent.append((f"{where}.text_encoder", fields))
    if task.data.classes is None:
        fields = {"weights.category": objective.weights.category,
                  "label_smoothing": objective.label_smoothing}
        absent.append((f"{where.removesuffix('objective')}data.classes", fields))
    plain = type(objective)()
    return [
        f"{where}.{field}={value} has no effect with {key}=null: remove it, or set {key}"
        for key, fields in absent
        for field, value in fields.items()
        if value != operator.attrgetter(field)(plain)
    ]


def _m3i_evaluation(where: str, task: "TaskSettings") -> list[str]:
    found, image = [], task.evaluation.image
    if (size := task.evaluation.micro_batch or task.micro_batch) % 2:
        found.append(f"{where}.evaluation.micro_batch={size} must be even: m3i mixes neighbours")
    if image is not None and (image.size, image.fixed_size) != (task.data.image.size, True):
        found.append(
            f"{where}.evaluation.image must give squares of {where}.data.image.size="
            f"{task.data.image.size}, on whose grid the second view is predicted"
        )
    return found


def _images_of(where: str, task: "TaskSettings") -> dict[str, Any]:
    """Settings of all images that an encoder sees, by key path."""
    images = {f"{where}.data.image": task.data.image}
    if task.data.second_view is not None:
        images[f"{where}.data.second_view"] = task.data.second_view
    if task.evaluation is not None and task.evaluation.image is not None:
        images[f"{where}.evaluation.image"] = task.evaluation.image
    return images


def _check_image_sizes(where: str, task: "TaskSettings", encoder: Any, name: str) -> list[str]:
    step = encoder.size_multiple
    if not isinstance(task.data, ImageDataSettings):
        return []  # _check_data says that the objective reads other data
    found = []
    for key, image in _images_of(where, task).items():
        needs = f"model.encoders.{name} ({encoder.type}) needs"
        if image.mode == "keep_aspect":
            if not encoder.any_sides:
                found.append(
                    f"{key}.mode=keep_aspect gives sides that are not multiples of {step}, as "
                    f"{needs}: use another mode"
                )
            continue
        sizes = [("size", image.size), *(("sizes", size) for size in image.sizes or ())]
        for field, size in sizes:
            found += _check_multiple(f"{key}.{field}", size, step, needs)
    trained, least = "size", task.data.image.size
    if task.data.image.sizes:
        trained, least = "sizes", min(task.data.image.sizes)
    needs = f"model.encoders.{name} ({encoder.type}) needs"
    smaller = getattr(task.objective, "smaller_sizes", ())
    views = getattr(task.data, "smaller_views", ())
    for size in smaller:
        key = f"{where}.objective.smaller_sizes"
        if size >= least:
            found.append(f"{key}: {size} is not below {where}.data.image.{trained}={least}")
        found += _check_multiple(key, size, step, needs)
    for size in views:
        found += _check_multiple(f"{where}.data.smaller_views", size, step, needs)
    if smaller and views:
        found.append(
            f"{where}.objective.smaller_sizes and {where}.data.smaller_views are two ways to show "
            "smaller images: remove one"
        )
    return found


def _check_multiple(key: str, size: int, step: int, needs: str) -> list[str]:
    below = size // step * step
    if not size % step:
        return []
    return [
        f"{key}={size} is not a multiple of {step}, as {needs}: use {below or step} or "
        f"{below + step}"
    ]


def _check_pool(where: str, task: "TaskSettings", encoder: Any) -> list[str]:
    """An objective that wants one vector per image asks for one that the encoder has."""
    pool = getattr(task.objective, "pool", None)
    if pool is None or pool in encoder.pools:
        return []
    return [
        f"{where} cannot give pool={pool}: this {encoder.type} has {' and '.join(encoder.pools)}"
        + (", and with a `head` also that" if pool == "head" and encoder.type != "vit" else "")
    ]


def _check_heads(recipe: "Recipe") -> list[str]:
    """An encoder's own head is used by some task."""
    pooled = {
        task.objective.encoder
        for task in recipe.tasks.values()
        if getattr(task.objective, "pool", None) == "head" or task.objective.type == "m3i"
    }
    return [
        f"model.encoders.{name}.head: no task has `pool: head`, so it would only decay: remove it "
        "(head=null), or let an objective use it"
        for name, encoder in recipe.model.encoders.items()
        if "head" in getattr(encoder, "pools", ()) and name not in pooled
    ]


def _check_evaluation(recipe: "Recipe") -> list[str]:
    found = []
    tested = [name for name, task in recipe.tasks.items() if task.evaluation is not None]
    if recipe.evaluation_every_steps is not None and not tested:
        found.append(
            f"evaluation_every_steps={recipe.evaluation_every_steps}, but no task has an "
            "`evaluation` block: add one, or set evaluation_every_steps=null"
        )
    for name in tested:
        task = recipe.tasks[name]
        if not isinstance(task.data, ImageDataSettings):
            if task.evaluation.image is not None:
                found.append(f"tasks.{name}.evaluation.image: data of type text have no images")
            continue
        image = task.evaluation.image or task.data.image
        size = task.evaluation.micro_batch or task.micro_batch
        if image.mode == "keep_aspect" and size > 1:
            found.append(
                f"tasks.{name}.evaluation.micro_batch={size} must be 1 with image mode keep_aspect"
            )
        trained = task.data.image
        if (image.mean, image.std) != (trained.mean, trained.std):
            found.append(
                f"tasks.{name}.evaluation.image.mean and .std differ from those of "
                f"tasks.{name}.data.image, which the model is trained with: remove them"
            )
    return found


def _check_optimizer(recipe: "Recipe") -> list[str]:
    """Per-task settings and layers name what there is, and steps have a task."""
    found = []
    if recipe.sampling.mode == "mixed" and recipe.optimizer.task_clip_norms:
        found.append(
            "optimizer.task_clip_norms clips each task's gradient on its own, but with "
            "sampling.mode=mixed a step has those of all tasks in one: use block or iid, or "
            "clip_norm"
        )
    for field in ("omega", "task_clip_norms"):
        for name in getattr(recipe.optimizer, field):
            if name not in recipe.tasks:
                found.append(
                    f"optimizer.{field}: {name!r} is not among tasks: {', '.join(recipe.tasks)}"
                )
    for path in recipe.optimizer.layer_decay:
        if path.removeprefix("encoders.") not in recipe.model.encoders or "." not in path:
            known = ", ".join(f"encoders.{name}" for name in recipe.model.encoders)
            found.append(f"optimizer.layer_decay: {path!r} is not an encoder; there are: {known}")
    return found


def warnings(recipe: "Recipe") -> list[str]:
    """One line per setting that has no effect, or not the one that is meant, beside another one."""
    random = [
        "optimizer.frozen keeps parameters at their random first values, since there are no "
        "initial_weights: name a file of them"
    ] if recipe.optimizer.frozen and recipe.initial_weights is None else []
    found = random + missing_packages(recipe.logging.trackers)
    if recipe.optimizer.kind != "mt_adamw":
        return found
    return found + [
        f"tasks.{name}.loss_weight={task.loss_weight:g} cancels with optimizer.kind=mt_adamw, "
        f"which divides each gradient by its norm: use optimizer.omega to weight task {name}"
        for name, task in recipe.tasks.items()
        if task.loss_weight != 1.0
    ]


_CHECKS = (
    _check_names,
    _check_sampling,
    _check_schedule,
    _check_data,
    _check_encoders,
    _check_tokenizer,
    _check_texts,
    _check_m3i,
    _check_evaluation,
    _check_optimizer,
    check_patterns,
)

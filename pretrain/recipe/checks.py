"""What no single block of a recipe can know: combinations of blocks that cannot work.

Every function returns lines that name both fields and the way out; `problems` collects them all.
"""

import re
from typing import TYPE_CHECKING, Any

from pretrain.engine.report.trackers import missing_packages
from pretrain.models.encoder_settings import multiple_problem
from pretrain.optim.schedule import problems as schedule_problems
from pretrain.recipe.pattern_checks import check_patterns
from pretrain.sampler.settings import problems as sampling_problems

if TYPE_CHECKING:
    from pretrain.recipe.recipe import Encoder, Recipe, TaskSettings

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
    """Objectives and data of the same kind, and then whatever the objective knows of both."""
    found = []
    for name, task in recipe.tasks.items():
        if task.data.type != task.objective.data_type:
            found.append(
                f"tasks.{name}.data.type={task.data.type!r} does not fit "
                f"tasks.{name}.objective.type={task.objective.type!r}, which reads "
                f"{task.objective.data_type!r}: change one of them"
            )
        else:
            found += task.objective.problems(f"tasks.{name}", task, recipe)
    return found


def _check_encoders(recipe: "Recipe") -> list[str]:
    """Encoders that objectives name are there, read what they should, and all are used."""
    found, used = [], set()
    encoders = recipe.model.encoders
    for name, task in recipe.tasks.items():
        for field, reads in task.objective.encoder_fields.items():
            chosen = getattr(task.objective, field)
            if chosen is None:
                continue
            used |= (read := _read_by(chosen, encoders))
            where = f"tasks.{name}.objective.{field}={chosen!r}"
            if faults := _named(where, chosen, reads, encoders):
                found += faults
                continue
            if reads == "images":
                found += _check_pool(where, task, encoders[chosen])
            for one in (one for one in encoders if one in read and encoders[one].reads == "images"):
                found += _check_image_sizes(f"tasks.{name}", task, encoders[one], one)
    found = list(dict.fromkeys(found + _check_modules(encoders) + _check_heads(recipe)))
    for name in encoders:
        if name not in used:
            found.append(
                f"model.encoders.{name}: no task uses this encoder, so it would only decay: "
                "remove it, or name it in a task's objective.encoder"
            )
    return found


def _named(where: str, chosen: str, reads: str, encoders: "dict[str, Encoder]") -> list[str]:
    """The encoder that a field names is there, and reads what it should."""
    if chosen not in encoders:
        return [f"{where} is not among model.encoders: {', '.join(encoders)}"]
    if encoders[chosen].reads != reads:
        return [
            f"{where} must read {reads}, but model.encoders.{chosen}.type="
            f"{encoders[chosen].type} reads {encoders[chosen].reads}: name another encoder"
        ]
    return []


def _read_by(name: str, encoders: "dict[str, Encoder]") -> set[str]:
    """The name, and those of all modules that are read on the way to what it makes."""
    read, left = set(), [name]
    while left:
        if (one := left.pop()) in read:
            continue
        read.add(one)
        if one in encoders:
            fields = encoders[one].encoder_fields
            left += [named for f in fields if (named := getattr(encoders[one], f)) is not None]
    return read


def _check_modules(encoders: "dict[str, Encoder]") -> list[str]:
    """Modules that read others stand below them."""
    found, names = [], list(encoders)
    for place, (name, module) in enumerate(encoders.items()):
        for field, reads in module.encoder_fields.items():
            chosen = getattr(module, field)
            if chosen is None:
                continue
            where = f"model.encoders.{name}.{field}={chosen!r}"
            if faults := _named(where, chosen, reads, encoders):
                found += faults
            elif chosen not in names[:place]:
                found.append(f"{where} must stand above {name}, which reads it: change their order")
    return found


def _check_tokenizer(recipe: "Recipe") -> list[str]:
    """Whatever reads text needs one."""
    if recipe.tokenizer is not None:
        return []
    readers = [f"tasks.{name}.data" for name, task in recipe.tasks.items() if task.data.reads_text]
    readers += [
        f"model.encoders.{name}"
        for name, encoder in recipe.model.encoders.items()
        if encoder.reads_text
    ]
    return [f"tokenizer: give tokenizer.path; {readers[0]} reads text"] if readers else []


def _check_image_sizes(where: str, task: "TaskSettings", encoder: Any, name: str) -> list[str]:
    step = encoder.size_multiple
    if "image" not in task.data.image_settings():
        return []  # _check_data says that the objective reads other data
    found = []
    for key, image in task.images(where).items():
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
            found += multiple_problem(f"{key}.{field}", size, step, needs)
    trained, least = "size", task.data.image.size
    if task.data.image.sizes:
        trained, least = "sizes", min(task.data.image.sizes)
    needs = f"model.encoders.{name} ({encoder.type}) needs"
    smaller = task.objective.further_sizes
    views = task.data.further_views
    for size in smaller:
        key = f"{where}.objective.smaller_sizes"
        if size >= least:
            found.append(f"{key}: {size} is not below {where}.data.image.{trained}={least}")
        found += multiple_problem(key, size, step, needs)
    for size in views:
        found += multiple_problem(f"{where}.data.smaller_views", size, step, needs)
    if smaller and views:
        found.append(
            f"{where}.objective.smaller_sizes and {where}.data.smaller_views are two ways to show "
            "smaller images: remove one"
        )
    return found


def _check_pool(where: str, task: "TaskSettings", encoder: Any) -> list[str]:
    """An objective that wants one vector per image asks for one that the encoder has."""
    pool = task.objective.wanted_pool
    if pool is None or pool in encoder.pools:
        return []
    return [
        f"{where} cannot give pool={pool}: this {encoder.type} has {' and '.join(encoder.pools)}"
        + (encoder.pool_hint if pool == "head" else "")
    ]


def _check_heads(recipe: "Recipe") -> list[str]:
    """An encoder's own head is used by some task."""
    pooled = {task.objective.encoder for task in recipe.tasks.values() if task.objective.uses_head}
    return [
        f"model.encoders.{name}.head: no task has `pool: head`, so it would only decay: remove it "
        "(head=null), or let an objective use it"
        for name, encoder in recipe.model.encoders.items()
        if "head" in encoder.pools and name not in pooled
    ]


def _check_evaluation(recipe: "Recipe") -> list[str]:
    found = []
    tested = [name for name, task in recipe.tasks.items() if task.evaluation is not None]
    if recipe.evaluation_every_steps is not None and not tested:
        found.append(
            f"evaluation_every_steps={recipe.evaluation_every_steps}, but no task has an "
            "`evaluation` block: add one, or set evaluation_every_steps=null"
        )
    writing = [name for name in tested if recipe.tasks[name].objective.writes_texts]
    if recipe.perplexity_every_steps is not None and not writing:
        found.append(
            f"perplexity_every_steps={recipe.perplexity_every_steps}, but no task with an "
            "`evaluation` block writes texts: use evaluation_every_steps, and set "
            "perplexity_every_steps=null"
        )
    for name in tested:
        task = recipe.tasks[name]
        size = task.evaluation.micro_batch or task.micro_batch
        found += task.data.evaluation_problems(f"tasks.{name}", task.evaluation.image, size)
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
    random = (
        [
            "optimizer.frozen keeps parameters at their random first values, since there are no "
            "initial_weights: name a file of them"
        ]
        if recipe.optimizer.frozen and recipe.initial_weights is None
        else []
    )
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
    _check_encoders,
    _check_tokenizer,
    _check_data,
    _check_evaluation,
    _check_optimizer,
    check_patterns,
)

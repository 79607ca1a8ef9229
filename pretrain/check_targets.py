"""Whether the data of a task hold what its objective is to learn from:
`data_pipeline.loader.targets`."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from data_pipeline.loader.stream import TaskStream
from data_pipeline.loader.targets import Look, look
from data_pipeline.loader.weak_stream import WeakStream
from data_pipeline.samples.target import Target
from pretrain.recipe.recipe import Recipe, TaskSettings

FEW = 0.1
"""A smaller share of samples with a target is worth a warning."""


@dataclass
class Findings:
    """Lines for people: `faults` end a run before it begins, `warnings` do not."""

    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def look_for_targets(
    recipe: Recipe, name: str, stream: TaskStream | WeakStream, held_out: bool = False
) -> Findings:
    """Look at some samples of task `name`.

    stream: its training data, or held-out data (`held_out`).

    Raises TransientReadError if storage fails.
    """
    task, found = recipe.tasks[name], Findings()
    targets = wanted_targets(task, stream)
    if not targets or targets_may_miss(task):
        return found
    looks = look(stream, targets)
    where = f"tasks.{name}.{'evaluation' if held_out else 'data'}"
    _judge_task(where, task, targets, _joined(looks), found)
    if not found.faults:
        for source, seen in looks.items():
            if source:
                _judge_source(f"{where}.sources.{source}", targets, seen, found)
            if seen.bad > recipe.loader.max_bad_fraction * seen.samples:
                found.warnings.append(
                    f"{where}: {seen.bad} of {seen.samples} samples have no usable "
                    f"{' or '.join(dict.fromkeys(t.kind for t in targets))} "
                    f"({'; '.join(seen.reasons.values())}): they are bad samples, and the run ends "
                    f"when more than loader.max_bad_fraction={recipe.loader.max_bad_fraction} are"
                )
    return found


def wanted_targets(task: TaskSettings, stream: TaskStream | WeakStream) -> list[Target]:
    """What samples may teach, as far as the objective reads it."""
    unread = task.objective.unread_targets
    return [target for target in stream.fields.targets() if target.kind not in unread]


def targets_may_miss(task: TaskSettings) -> bool:
    """Whether the recipe says that it is meant if few samples, or none, have a target."""
    return task.data.targets_may_miss


def _joined(looks: Mapping[str, Look]) -> Look:
    """What was found in all data sets of a task."""
    total = Look()
    for seen in looks.values():
        total.samples += seen.samples
        for name in ("with_target", "with_kind", "members", "keys"):
            getattr(total, name).update(getattr(seen, name))
        total.reasons = seen.reasons | total.reasons
    return total


def _judge_task(
    where: str, task: TaskSettings, targets: list[Target], seen: Look, found: Findings
) -> None:
    for target in targets:
        count = seen.with_target[target.name]
        if not seen.samples:
            continue
        if not count:
            found.faults.append(
                f"{where}.{target.setting}: none of {seen.samples} samples has a usable "
                f"{target.kind} at {target.source} ({seen.reasons[target.name]}); "
                f"{seen.holds(target.source)}{_way_out(where, task)}"
            )
        elif count < FEW * seen.samples and seen.with_kind[target.kind] < FEW * seen.samples:
            found.warnings.append(
                f"{where}.{target.setting}: only {count} of {seen.samples} samples "
                f"({count / seen.samples:.1%}) have a usable {target.kind} at {target.source} "
                f"({seen.reasons[target.name]})"
            )


def _way_out(where: str, task: TaskSettings) -> str:
    """What to set where targets may be missing; a caption may not."""
    of_task = where.rsplit(".", 1)[0]
    key = task.data.missing_targets
    return "" if key is None else f"; if that is meant, set {of_task}.data.{key}=expected"


def _judge_source(where: str, targets: list[Target], seen: Look, found: Findings) -> None:
    """One of several data sets: it need not have everything, but has to have something."""
    kinds = dict.fromkeys(target.kind for target in targets)
    missing = [kind for kind in kinds if not seen.with_kind[kind]] if seen.samples else []
    for kind in missing:
        sources = " or ".join(t.source for t in targets if t.kind == kind)
        line = f"{where}: none of {seen.samples} samples has a usable {kind} at {sources}"
        if len(kinds) > 1:
            found.warnings.append(line)
        else:
            found.faults.append(f"{line}; {seen.holds(sources)}")

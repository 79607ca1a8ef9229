"""What may differ between a run and the recipe that it is resumed with.

The rule looks at two states, not at the words of a command: the recipe that lies in the checkpoint,
which is what the run was trained with, and the one that it would go on with. It does not matter
whether an override, an editor or another version of a base changed a field.

    ... --resume RUN optimizer.lr=3e-5                    lower the rate from here on
    ... --resume RUN --from-step 4000 optimizer.lr=3e-5   go back first
    ... --resume RUN steps=20000                          a longer run

Changes of what decides the training stand in the run's ledger, from the step on that they hold:

    {"kind": "settings", "step": 4000, "changed": {"optimizer.lr": [1e-4, 3e-5]}}
    {"kind": "return", "step": 4000, "from_step": 9000}
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.engine.checkpoint.retention import Aside, last_before, step_of, steps_there
from pretrain.optim.schedule import lr_factor
from pretrain.recipe.overlay import RecipeError

if TYPE_CHECKING:
    from pretrain.engine.checkpoint.checkpoint import Checkpoints
    from pretrain.engine.loop import TrainerState
    from pretrain.recipe.recipe import Recipe

RECIPE = "recipe.yaml"
log = logging.getLogger("omnipretrain.train")

# Patterns over dotted paths: `*` is one name, `**` any number of them.
FREE = (
    # Where and how things are computed.
    "loader.**",
    "logging.**",
    "checkpoint.**",
    "failure.**",
    "export",
    "threads_per_rank",
    "deterministic",
    "deepspeed",
    "ema.evaluate",
    "evaluation_every_steps",
    "perplexity_every_steps",
    "tasks.*.evaluation.**",
    "tasks.*.micro_batch",
    # Where data lie; the ledger and the checkpoint know by digests whether they are the same.
    "run_dir",
    "tokenizer.path",
    "tasks.*.data.shards",
    "tasks.*.data.sources.*.shards",
    "tasks.*.data.stream.shards",
    # What ran stays as the ledger has it; these decide what is to come.
    "tasks.*.weight",
    "sampling.**",
)
"""May change without being part of the run's history (sampling keeps a record of its own)."""

RECORDED = (
    "steps",
    "schedule.**",
    "optimizer.lr",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "optimizer.task_clip_norms.**",
)
"""May change on purpose; the ledger says when, and from what to what."""

SAID = ("tasks.*.data.unlabelled", "tasks.*.data.unannotated")
"""May change unless to or from `fault`: other values differ in what is said, not in the data."""

JUMP = 0.1
"""A learning rate that differs by more than this share at the resume is said."""

Changes = Mapping[str, tuple[Any, Any]]
"""Dotted path -> (value before, value now)."""


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether the field at a dotted path is among those that patterns name."""
    names = path.split(".")
    return any(_match(names, pattern.split(".")) for pattern in patterns)


def _match(names: list[str], pattern: list[str]) -> bool:
    if pattern[-1] == "**":  # also the block itself, which may become null
        head = pattern[:-1]
        return len(names) >= len(head) and _match(names[: len(head)], head)
    return len(names) == len(pattern) and all(
        part in ("*", name) for name, part in zip(names, pattern, strict=True)
    )


def differences(before: "Recipe", now: "Recipe") -> Changes:
    """Every field whose value differs. Lists are values; a block that is not there is null."""
    old, new = (_leaves(recipe.model_dump(mode="json")) for recipe in (before, now))
    return {
        path: (old.get(path), new.get(path))
        for path in [*new, *(path for path in old if path not in new)]
        if old.get(path) != new.get(path)
    }


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {
        deeper: leaf
        for name, inner in value.items()
        for deeper, leaf in _leaves(inner, f"{path}.{name}" if path else str(name)).items()
    }


def check_changes(before: "Recipe", now: "Recipe", where: str, step: int | None = None) -> Changes:
    """What a resume changes, if it may.

    Args:
        before: what the run was trained with.
        now: what it would go on with.
        where: the place of `before`, for the message.
        step: steps that the run has taken; None = unknown.

    Returns:
        the differences, all of which are allowed.

    Raises:
        RecipeError: it names every field that may not change, or says that the run is longer than
            `steps`.
    """
    changes = differences(before, now)
    wrong = [
        path
        for path, values in changes.items()
        if not matches(path, FREE + RECORDED) and ("fault" in values or not matches(path, SAID))
    ]
    if wrong:
        lines = [
            f"  {path}: {changes[path][0]} in {where}, {changes[path][1]} now" for path in wrong
        ]
        raise RecipeError(
            "these fields cannot change on a resume: the run would not be the one that its "
            "checkpoints belong to.\n" + "\n".join(lines) + "\nGive them their old values (in "
            f"{now.run_dir}/recipe.yaml, or by leaving out the override), or start a new run from "
            f"this one's weights: python -m tools.convert export-weights --run {now.run_dir} "
            "--out weights.safetensors, then initial_weights=weights.safetensors. Changeable: "
            + ", ".join(RECORDED + FREE).replace("**", "*")
        )
    if step is not None and now.steps < step:
        raise RecipeError(
            f"steps={now.steps}: the run has taken {step} steps already, as {where} says; give "
            f"steps={step} or more, or go back to an earlier checkpoint with --from-step"
        )
    return changes


def recipe_of(checkpoint: Path) -> "Recipe | None":
    """What a run was trained with up to a checkpoint; None if it is too old to say.

    Raises:
        RecipeError: the file is there, but this version cannot read it.
    """
    from pretrain.recipe.load import load_resolved

    path = checkpoint / RECIPE
    return load_resolved(path) if path.exists() else None


class Turn:
    """Where a resumed run takes another turn than it would have: what changes there, and since
    when it goes back."""

    def __init__(self, before: "Recipe", now: "Recipe", changes: Changes) -> None:
        self.before, self.now, self.changes = before, now, changes
        self.step = 0
        self.aside: Aside | None = None

    @classmethod
    def plan(cls, now: "Recipe", checkpoint: Path | None) -> "Turn":
        """What will change at a checkpoint; None = the run starts anew.

        Raises:
            RecipeError: see `check_changes`.
        """
        before = recipe_of(checkpoint) if checkpoint is not None else None
        if before is None:
            return cls(now, now, {})
        where = f"{checkpoint.parent.name}/{checkpoint.name}"
        return cls(before, now, check_changes(before, now, where, step_of(checkpoint)))

    def take(
        self, checkpoints: "Checkpoints", state: "TrainerState", from_step: int | None
    ) -> None:
        """Bring checkpoints and ledger up to the turn, after the restore. A collective."""
        self.step = state.step
        if from_step is not None:
            run_dir = checkpoints.root.parent
            records = [run_dir / name for name in ("metrics.jsonl", "faults", "quarantine.jsonl")]
            self.aside = checkpoints.go_back(self.step, records)
        # Also where an earlier start went back, and ended before a checkpoint could say so.
        newest = checkpoints.went_back_from(self.step)
        entry = {"kind": "return", "step": self.step, "from_step": newest}
        if newest is not None and entry not in state.ledger[-1:]:
            state.ledger.append(entry)
        recorded = {p: list(pair) for p, pair in self.changes.items() if matches(p, RECORDED)}
        if recorded:
            state.ledger.append({"kind": "settings", "step": self.step, "changed": recorded})

    def tell(self) -> None:
        """Log every change, and a learning rate that jumps."""
        if self.aside is not None and self.aside.newest is not None:
            log.info(
                "gone back from step %d to step %d; the checkpoints between, and the records as "
                "they were, are in %s",
                self.aside.newest,
                self.step,
                self.aside.folder,
            )
        for path, (old, new) in self.changes.items():
            if path != "run_dir":
                log.info("changed at step %d: %s was %s and is %s", self.step, path, old, new)
        old, new = (
            recipe.optimizer.lr * lr_factor(self.step, recipe.schedule, recipe.steps)
            for recipe in (self.before, self.now)
        )
        if abs(new - old) > JUMP * old:
            log.warning(
                "the learning rate jumps: step %d would have had %.4g before what has changed (%s) "
                "and has %.4g%s",
                self.step,
                old,
                ", ".join(path for path in self.changes if matches(path, RECORDED)),
                new,
                f", {new / old:.3g} times as much" if old else "",
            )


def way_back(recipe: "Recipe", first_skipped: int) -> str:
    """What to do about a run whose steps since `first_skipped` were all skipped."""
    run_dir, rate = Path(recipe.run_dir), recipe.optimizer.lr
    root = run_dir / "checkpoints"
    # From one before the first of these steps, a step could be taken; one of just there may be why.
    step, doubt = last_before(root, first_skipped), ""
    if step is None and (step := last_before(root, first_skipped + 1)) is not None:
        doubt = "; if steps are skipped from there too, its weights are beyond repair: start again"
    data = "Look also at the data of these steps (faults/, logs/)"
    if step is None:
        return (
            "no checkpoint is from before that: start again in another run_dir, with a lower "
            f"optimizer.lr (it is {rate:g}) or a longer schedule.warmup_steps. {data}"
        )
    return (
        "go back to a checkpoint from before that, with a lower learning rate: "
        f"--resume {run_dir} --from-step {step} optimizer.lr={rate / 10:g}{doubt} "
        f"(checkpoints: {steps_there(root)}). {data}"
    )

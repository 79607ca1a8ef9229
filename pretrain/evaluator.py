"""Evaluation between steps: every task's held-out data, on all ranks, numbers and pictures.

An objective's `evaluate` returns its metrics in the order that matters; so they are said.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.loader.faults import FaultFile
from pretrain import build
from pretrain.engine.launch.distributed import Ranks
from pretrain.engine.report.metrics_log import METRICS_FILE, MetricsLog, evaluated_tasks, shown
from pretrain.engine.zero.ema import Ema
from pretrain.objectives.objective import EvaluationContext, Example
from pretrain.recipe.recipe import Recipe

log = logging.getLogger("omnipretrain.evaluation")


class EvaluationStopped(Exception):
    """A stop was asked for, or the run directory lost, between two batches; on every rank."""


class Evaluator:
    """Evaluates each task that names held-out data.

    `stop_asked` says on each rank whether the evaluation is to end; asked before every batch.
    `phase` gives the context in which all of it runs.
    """

    def __init__(
        self,
        recipe: Recipe,
        ranks: Ranks,
        engine,
        tokenizer,
        metrics: MetricsLog,
        fault_file: FaultFile,
        ema: Ema | None,
        stop_asked: Callable[[], bool],
        phase: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        self.recipe = recipe
        self.ranks = ranks
        self.engine = engine
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.fault_file = fault_file
        self.ema = ema
        self.stop_asked = stop_asked
        self.phase = phase

    def evaluate_if_due(self, step: int) -> bool:
        """Evaluate after `step` steps if the recipe says so; False if a stop that was asked for has
        cut it off, on every rank. A collective."""
        return self._evaluate(step, self._due(step))

    def catch_up(self, step: int) -> bool:
        """Evaluate what an earlier start has not come to after this step, as `evaluate_if_due`.

        Rank 0 looks into the metrics: where a task's line is missing, a stop has cut it off.
        """
        left: list = [[]]
        if self.ranks.leads and step and self.is_due(step):
            done = evaluated_tasks(self.metrics.run_dir / METRICS_FILE, step)
            left = [[task for task in self._due(step) if task not in done]]
        dist.broadcast_object_list(left, src=0)
        return self._evaluate(step, left[0])

    def _due(self, step: int) -> list[str]:
        """Tasks to evaluate after `step` steps: all that have held-out data, or only the losses of
        those that write texts."""
        tested = [name for name, task in self.recipe.tasks.items() if task.evaluation is not None]
        if self._is_whole(step):
            return tested
        every = self.recipe.perplexity_every_steps
        if not every or step % every:
            return []
        return [name for name in tested if self.recipe.tasks[name].objective.writes_texts]

    def is_due(self, step: int) -> bool:
        """Whether tasks are evaluated after `step` steps."""
        return bool(self._due(step))

    def _is_whole(self, step: int) -> bool:
        """Whether texts are written, too, where an evaluation is due."""
        every = self.recipe.evaluation_every_steps
        return bool(every and step % every == 0) or step == self.recipe.steps

    def _evaluate(self, step: int, tasks: list[str]) -> bool:
        if not tasks:
            return True
        averaged = self.ema is not None and self.ema.settings.evaluate
        try:
            with self.phase(), self.ema.in_module() if averaged else contextlib.nullcontext():
                self._evaluate_tasks(step, tasks)
        except EvaluationStopped:
            log.info(
                "the evaluation after step %d ends early, since a stop is asked for; a resume "
                "begins with it",
                step,
            )
            return False
        return True

    def _evaluate_tasks(self, step: int, tasks: list[str]) -> None:
        for name in tasks:
            loader = build.build_evaluation_loader(
                self.recipe,
                name,
                self.tokenizer,
                rank=self.ranks.rank,
                world=self.ranks.world,
                fault_file=self.fault_file,
            )
            model = self.engine.module
            values, examples = model.objectives[name].evaluate(
                model.encoders,
                self._until_stopped(loader),
                EvaluationContext(
                    self.ranks.device,
                    self.tokenizer,
                    self._share,
                    self.recipe.logging.images,
                    self._all_agree,
                    self._is_whole(step),
                ),
            )
            values["read_retries"] = sum(self._share(loader.counters()["retries"]))
            self.metrics.log(step, name, values, kind="evaluation")
            self._show(step, name, examples)
            log.info(
                "step %d, %s on %d held-out samples: %s",
                step,
                name,
                values["images"],
                ", ".join(f"{name} {shown(value)}" for name, value in values.items()),
            )

    def _until_stopped(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches, equally many on all ranks, until any rank is asked to stop."""
        for batch in batches:
            asked = torch.tensor(int(self.stop_asked()), dtype=torch.int32)
            asked = asked.to(self.ranks.device)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
            if asked:
                raise EvaluationStopped
            yield batch

    def _show(self, step: int, task: str, examples: Sequence[Example]) -> None:
        """Pictures for TensorBoard, of the examples that can draw themselves."""
        drawn = [shown for example in examples if (shown := example.drawn()) is not None]
        self.metrics.images(
            step, task, [picture for picture, _ in drawn], [text for _, text in drawn]
        )

    def _share(self, value: Any) -> list[Any]:
        """One value of each rank, on every rank."""
        values: list[Any] = [None] * self.ranks.world
        dist.all_gather_object(values, value)
        return values

    def _all_agree(self, done: bool) -> bool:
        """Whether all ranks say so; asked for every generated token, so one number travels."""
        if self.ranks.world == 1:
            return done
        answer = torch.tensor(int(done), dtype=torch.int32, device=self.ranks.device)
        dist.all_reduce(answer, op=dist.ReduceOp.MIN)
        return bool(answer)

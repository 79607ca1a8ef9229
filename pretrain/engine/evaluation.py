"""Evaluation between steps: every task's held-out data, on all ranks, numbers and pictures."""

import logging
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.faults import FaultFile
from pretrain import build
from pretrain.engine.distributed import Ranks
from pretrain.engine.metrics_log import MetricsLog, shown
from pretrain.objectives.caption_evaluation import CaptionExample
from pretrain.recipe import Recipe

log = logging.getLogger("omnipretrain.evaluation")


class Evaluator:
    """Evaluates each task that names held-out data."""

    def __init__(
        self, recipe: Recipe, ranks: Ranks, engine, tokenizer, metrics: MetricsLog,
        fault_file: FaultFile,
    ) -> None:
        self.recipe = recipe
        self.ranks = ranks
        self.engine = engine
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.fault_file = fault_file

    def evaluate(self, step: int) -> dict[str, dict[str, float | None]]:
        """Evaluate after `step` steps. A collective. Returns task -> metrics, None where nothing
        was counted."""
        results = {}
        for name, task in self.recipe.tasks.items():
            if task.evaluation is None:
                continue
            loader = build.build_evaluation_loader(
                self.recipe, name, self.tokenizer, rank=self.ranks.rank, world=self.ranks.world,
                fault_file=self.fault_file,
            )
            model = self.engine.module
            values, examples = model.objectives[name].evaluate(
                model.encoders, loader, self.tokenizer, self.ranks.device, reduce=self._share,
                keep_images=self.recipe.logging.images, agree=self._all_agree,
            )
            values["read_retries"] = sum(self._share(loader.counters()["retries"]))
            self.metrics.log(step, name, values, kind="evaluation")
            self._show(step, name, [e for e in examples if e.image is not None])
            log.info("step %d, %s on %d held-out samples: %s", step, name, values["images"],
                     ", ".join(f"{k} {shown(v)}" for k, v in sorted(values.items())))
            results[name] = values
        return results

    def _show(self, step: int, task: str, examples: list[CaptionExample]) -> None:
        """Pictures for TensorBoard, from objectives that write captions."""
        self.metrics.images(
            step, task, [e.image.permute(1, 2, 0).numpy() for e in examples],
            [f"{e.caption}\n({e.references[0] if e.references else 'no reference'})"
             for e in examples],
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

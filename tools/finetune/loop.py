"""The loop: accelerate's processes, gradients and trackers; data, order and resume are ours.

What a step sees is a function of its number, so a checkpoint is weights, optimizer, average and
step, in one file that is there whole or not at all.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import reduce
from torch import Tensor, nn
from tqdm.auto import tqdm

from data_pipeline.files import sync_file, temporary_name
from data_pipeline.loader.loader import LoaderSettings, StepLoader
from data_pipeline.rng import keyed_u64
from pretrain.optim.schedule import ScheduleSettings, lr_factor
from tools.finetune.log import Log
from tools.finetune.settings import FinetuneSettings
from tools.finetune.task import Task

CHECKPOINT = "last.pt"


class Loop:
    """Trains one task from its last checkpoint to its last step."""

    def __init__(
        self, task: Task, settings: FinetuneSettings, accelerator: Accelerator, folder: Path
    ) -> None:
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                "tools.finetune keeps the whole model in each process: start it with torchrun, or "
                "without fsdp_config and deepspeed_config. A model that does not fit is fine-tuned "
                "by `python -m pretrain.train` with initial_weights"
            )
        self.task, self.settings, self.accelerator = task, settings, accelerator
        self.folder = folder
        self.per_epoch = -(-task.stream.n_rows // task.stream.global_batch)
        self.steps = self.per_epoch * settings.epochs
        freeze_unreached(task)
        groups = task.groups()
        self.peaks = [group["lr"] for group in groups]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
        task.model.to(accelerator.device)
        self.average = (
            {n: p.detach().clone() for n, p in trained(task.model).items()} if settings.ema else {}
        )
        self.step, self.log = 0, Log(accelerator, folder)
        self._restore(optimizer)
        self.model, self.optimizer = accelerator.prepare(task.model, optimizer)

    # ---- training ------------------------------------------------------------------------------

    def run(self) -> dict[str, float]:
        """All steps that are left; the metrics of the last evaluation."""
        leads = self.accelerator.is_main_process
        metrics = self.log.last_metrics()
        self.task.model.train()
        loader = StepLoader(
            {self.task.stream.name: self.task.stream},
            lambda step: (self.task.stream.name, step),
            LoaderSettings(workers=self.settings.workers),
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.step,
            self.steps,
        )
        bar = tqdm(total=self.steps, initial=self.step, disable=not leads, desc="fine-tuning")
        for found in loader:
            loss, norm = self._step(found.micro_batches)
            self.step += 1
            rate = self.optimizer.param_groups[-1]["lr"]
            line = {"step": self.step, "loss": loss, "gradient_norm": norm, "learning_rate": rate}
            self.log.add("train", line)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            epoch, rest = divmod(self.step, self.per_epoch)
            due = not rest and not epoch % self.settings.evaluate_epochs
            if due or self.step == self.steps:
                metrics = self.evaluate()
                self.log.add("evaluation", {"step": self.step, "epoch": epoch, **metrics})
            if not self.step % self.settings.save_steps or self.step == self.steps:
                self.save()
        bar.close()
        return metrics

    def _step(self, batches: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
        """One optimizer step: loss per answer over all processes, and the gradient norm."""
        accelerator = self.accelerator
        device, world = accelerator.device, accelerator.num_processes
        seed = keyed_u64(self.settings.seed, "finetune step", self.step, accelerator.process_index)
        torch.manual_seed(seed >> 1)
        factor = self._factor(self.step)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        answers = torch.tensor(float(sum(map(self.task.count, batches))), device=device)
        answers = reduce(answers, "sum").clamp(min=1)
        total = torch.zeros((), device=device)
        for number, batch in enumerate(batches):
            moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            last = number == len(batches) - 1
            quiet = contextlib.nullcontext() if last else accelerator.no_sync(self.model)
            with quiet:
                with accelerator.autocast():
                    loss = self.task.loss(self.model, moved)
                # Processes' gradients are averaged, and are to be added.
                accelerator.backward(loss * (world / answers))
            total += loss.detach()
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss = float(reduce(total, "sum") / answers)
        if not torch.isfinite(torch.tensor(loss)):
            raise ValueError(f"the loss of step {self.step + 1} is {loss}: lower lr")
        if self.average:
            now = trained(self.task.model)
            pairs = [list(self.average.values()), [now[name].detach() for name in self.average]]
            torch._foreach_lerp_(*pairs, 1 - self._decay())
        return loss, float(norm)

    def _factor(self, step: int) -> float:
        """Share of the peak learning rate: a line up, then half a cosine down."""
        warm = min(round(self.settings.warmup * self.steps), self.steps - 1)
        return lr_factor(step, ScheduleSettings(warmup_steps=warm), self.steps)

    def _decay(self) -> float:
        """Of the average; smaller at first, so that it forgets where it began."""
        return min(self.settings.ema, (1 + self.step) / (10 + self.step))

    # ---- evaluation ----------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Metrics of the averaged weights, or of the trained ones where there is no average."""
        with self.averaged(), torch.no_grad():
            self.task.model.eval()
            metrics = self.task.evaluate(self.accelerator)
        self.task.model.train()
        return metrics

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the place of the trained ones."""
        now = trained(self.task.model)
        kept = {name: now[name].detach().clone() for name in self.average}
        for source in (self.average, kept):
            with torch.no_grad():
                for name, value in source.items():
                    now[name].copy_(value)
            if source is self.average:
                yield

    # ---- checkpoints and logs ------------------------------------------------------------------

    def save(self) -> None:
        """Replace the checkpoint. A collective; the process that leads writes."""
        if self.accelerator.is_main_process:
            state = {
                "step": self.step,
                "steps": self.steps,
                "model": self.task.model.state_dict(),
                "optimizer": self.optimizer.optimizer.state_dict(),
                "average": self.average,
            }
            place = self.folder / CHECKPOINT
            temporary = temporary_name(place)
            torch.save(state, temporary)
            sync_file(temporary)
            temporary.replace(place)
        self.accelerator.wait_for_everyone()

    def _restore(self, optimizer: torch.optim.Optimizer) -> None:
        place = self.folder / CHECKPOINT
        if place.is_file():
            state = torch.load(place, map_location=self.accelerator.device, weights_only=True)
            self.task.model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            self.average, self.step = state["average"], state["step"]
        self.log.cut_behind(self.step)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter that learns."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def freeze_unreached(task: Task) -> None:
    """Freeze what no loss reaches (towers and norms of a class that it does not use): processes
    wait for the gradient of every parameter that learns."""
    task.model.train()
    with torch.random.fork_rng():
        task.loss(task.model, task.probe_batch()).backward()
    for parameter in task.model.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter.grad is not None)
        parameter.grad = None

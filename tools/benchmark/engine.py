"""What the training loop costs above the DeepSpeed engine that it drives.

Both cases train the same model with the same engine on the same batches, which lie in memory, and
take turns. The bare one is what DeepSpeed's tutorials show: forward, backward, step. Ours adds the
sampler (which task at which step), the guard against stale gradients, the balance of tasks, counts,
agreement of the ranks, schedule, randomness, metrics to JSON lines and TensorBoard, control files
and progress.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pretrain.models.build_context import BuildContext
from tools.support.measure import interleaved, say

VOCABULARY = 1000
CLASSES = 100
WEIGHTS = {"caption": 2.0, "classify": 1.0}
"""Tasks, and their shares of the steps."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; see `tools.benchmark` for the form of the result."""
    from pretrain.engine.launch.distributed import init_distributed, shutdown

    ranks = init_distributed(threads_per_rank=1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _measure(args, ranks, Path(folder))
    finally:
        shutdown()


def _measure(args: argparse.Namespace, ranks, folder: Path) -> dict[str, Any]:
    say("starting the engine")
    engine = _engine(args, ranks)
    batches = {task: _batches(args, task) for task in _weights(args)}
    cases = {
        "bare DeepSpeed engine": lambda: _bare(args, engine, batches),
        "training loop": _ours(args, engine, batches, ranks, folder),
    }
    results = interleaved(cases, args.repeats)
    seconds = {name: [m.cpu_seconds / m.items for m in ms] for name, ms in results.items()}
    wall = {name: [m.wall_seconds / m.items for m in ms] for name, ms in results.items()}
    bare, ours = seconds.values()
    overhead = median(o / b for o, b in zip(ours, bare, strict=True)) - 1
    return {
        "title": f"One optimizer step (ZeRO-{args.zero}, {args.tasks} task(s) in turn, "
        f"{args.micro_steps} micro-steps of {args.batch} images, one process)",
        "rows": [
            {
                "case": name,
                "wall ms": 1e3 * median(wall[name]),
                "CPU ms": 1e3 * median(seconds[name]),
            }
            for name in cases
        ],
        "bars": [
            {
                "what": "CPU time of the loop above the bare engine, share of a step",
                "measured": overhead,
                "bar": 0.02,
                "at_least": False,
            }
        ],
        "notes": [
            f"the difference is {1e3 * (median(ours) - median(bare)):.2f} ms a step; metrics "
            f"are reduced and written every {args.log_every} steps"
        ],
    }


def _weights(args: argparse.Namespace) -> dict[str, float]:
    return dict(list(WEIGHTS.items())[: args.tasks])


def _schedule(args: argparse.Namespace):
    from pretrain.sampler import Stage, build_schedule

    weights = _weights(args)
    return build_schedule([Stage(0, "block", weights)], weights, seed=0)


def _settings(args: argparse.Namespace):
    from pretrain.optim.groups import OptimizerSettings

    if args.tasks == 1:
        return OptimizerSettings(lr=1e-4)
    return OptimizerSettings(kind="mt_adamw", lr=1e-4, clip_norm=None)


def _engine(args: argparse.Namespace, ranks):
    from pretrain.engine.zero.zero import start_engine

    config = {
        "train_micro_batch_size_per_gpu": args.batch,
        "gradient_accumulation_steps": args.micro_steps,
        "gradient_clipping": 1.0 if args.tasks == 1 else 0.0,
        "zero_optimization": {"stage": args.zero},
        "steps_per_print": 10**12,
        "zero_allow_untested_optimizer": True,
    }
    return start_engine(lambda: _model(args), _settings(args), config, 0, ranks.device)


def _model(args: argparse.Namespace):
    from pretrain.models.git.decoder import GitDecoder
    from pretrain.models.multitask import MultiTaskModel
    from pretrain.models.vit import VisionTransformer
    from pretrain.objectives.captioning.captioning import Captioning
    from pretrain.objectives.classification import ClassificationSettings

    encoder = VisionTransformer(image_size=64, patch_size=8, width=args.width, layers=4, heads=4)
    pixels = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.25, 0.25, 0.25)}
    decoder = GitDecoder(
        VOCABULARY,
        args.width,
        width=args.width,
        layers=2,
        heads=4,
        mlp_width=4 * args.width,
        max_positions=64,
    )
    objectives = {
        "caption": Captioning(
            decoder,
            encoder="image",
            encoder_cost=lambda h, w: (encoder.tokens(h, w), 3 * encoder.flops(h, w)),
            visual_width=args.width,
            bos_id=1,
            eos_id=2,
            pad_id=0,
            **pixels,
        )
    }
    if args.tasks == 2:
        settings = ClassificationSettings(type="classification")
        objectives["classify"] = settings.build(
            BuildContext({"image": encoder}, None, **pixels, classes=CLASSES)
        )
    return MultiTaskModel({"image": encoder}, objectives)


def _batches(args: argparse.Namespace, task: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [_batch(args.batch, task, generator) for _ in range(args.micro_steps)]


def _batch(size: int, task: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    images = torch.randint(256, (size, 3, 64, 64), dtype=torch.uint8, generator=generator)
    batch = {"images": images, "valid": torch.ones(size, dtype=torch.bool)}
    if task == "classify":
        return batch | {"labels": torch.randint(CLASSES, (size,), generator=generator)}
    loss_mask = torch.ones((size, 1, 24), dtype=torch.bool)
    loss_mask[..., 0] = False
    tokens = torch.randint(3, VOCABULARY, loss_mask.shape, generator=generator)
    return batch | {"tokens": tokens, "loss_mask": loss_mask}


def _bare(args: argparse.Namespace, engine, batches: dict[str, list]) -> int:
    """DeepSpeed as its tutorials use it: the tasks of a fixed list, counts known beforehand."""
    from pretrain.engine.zero.zero import to_device

    schedule = _schedule(args)
    for task in [schedule(step)[0] for step in range(args.steps)]:
        objective = engine.module.objectives[task]
        totals: dict[str, int] = {}
        for batch in batches[task]:
            for name, count in objective.counts(batch).items():
                totals[name] = totals.get(name, 0) + count
        last = len(batches[task]) - 1
        _tell_task(engine, task)
        for index, batch in enumerate(batches[task]):
            engine.set_gradient_accumulation_boundary(index == last)
            loss = engine(task, "undivided", to_device(batch, engine.device), totals)["loss"]
            engine.backward(loss, scale_wrt_gas=False)
        engine.step()
    return args.steps


def _tell_task(engine, task: str) -> None:
    """MT-AdamW cannot step without it."""
    inner = engine.optimizer.optimizer
    if hasattr(inner, "begin_step"):
        inner.begin_step(task, WEIGHTS[task] / sum(WEIGHTS.values()))


def _ours(args: argparse.Namespace, engine, batches: dict[str, list], ranks, folder: Path):
    from data_pipeline.loader.loader import Part, StepWindow
    from pretrain.engine.control.control import ControlFolder, StopSignals
    from pretrain.engine.control.ownership import claim
    from pretrain.engine.loop import Loop, TrainerState
    from pretrain.engine.report.metrics_log import LoggingSettings, MetricsLog
    from pretrain.engine.report.throughput import Throughput
    from pretrain.engine.zero.balance import TaskBalance

    control = ControlFolder(folder, claim(folder, {}))
    throughput = Throughput(ranks, peak_tflops_per_device=None)
    schedule = _schedule(args)
    loop = Loop(
        engine,
        ranks,
        0,
        (1e-4, lambda step: 1.0),
        0,
        dict.fromkeys(_weights(args), args.batch * args.micro_steps),
        control,
        StopSignals(),
        schedule.loss_weights,
        before_step=TaskBalance(engine, _settings(args), schedule.ratio).before_step,
    )
    settings = LoggingSettings(every_steps=args.log_every)
    log = MetricsLog(folder, ranks.rank, 0, args.steps, settings)

    def windows():
        for step in range(args.steps):
            task, _ = schedule(step)
            yield StepWindow(step, [Part(task, batches[task])], {"wait": 0.0})

    def case() -> int:
        loop.run(
            windows(),
            TrainerState(),
            wants_report=lambda step, stops: log.due(step + 1, args.steps),
            on_report=lambda state, report: log.log(
                state.step, report.task, throughput.describe(report)
            ),
            after_step=lambda state, save: log.progress(state.step),
        )
        return args.steps

    return case

"""What the training loop costs above the DeepSpeed engine that it drives.

Both cases train the same GIT with the same engine on the same batches, which lie in memory, and
take turns. The bare one is what DeepSpeed's tutorials show: forward, backward, step. Ours adds
counts, agreement of the ranks, schedule, randomness, metrics to JSON lines and TensorBoard, control
files and progress.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tools.bench_measure import interleaved

VOCABULARY = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Size of the model and of the repetitions."""
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps per repetition")
    parser.add_argument("--width", type=int, default=128, help="channels of encoder and decoder")
    parser.add_argument("--batch", type=int, default=16, help="images per micro-batch")
    parser.add_argument("--micro-steps", type=int, default=2, help="micro-batches per step")
    parser.add_argument("--zero", type=int, choices=(1, 2, 3), default=2, help="ZeRO stage")
    parser.add_argument("--log-every", type=int, default=10, help="steps between metrics")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; see `tools.benchmark` for the form of the result."""
    from pretrain.engine.distributed import init_distributed, shutdown

    ranks = init_distributed(threads_per_rank=1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _measure(args, ranks, Path(folder))
    finally:
        shutdown()


def _measure(args: argparse.Namespace, ranks, folder: Path) -> dict[str, Any]:
    engine = _engine(args, ranks)
    windows = _windows(args)
    cases = {
        "bare DeepSpeed engine": lambda: _bare(engine, windows, ranks),
        "training loop": _ours(args, engine, windows, ranks, folder),
    }
    results = interleaved(cases, args.repeats, lambda text: None)
    seconds = {name: [m.cpu_seconds / m.items for m in ms] for name, ms in results.items()}
    wall = {name: [m.wall_seconds / m.items for m in ms] for name, ms in results.items()}
    bare, ours = seconds.values()
    overhead = median(o / b for o, b in zip(ours, bare, strict=True)) - 1
    return {
        "title": f"One optimizer step (ZeRO-{args.zero}, {args.micro_steps} micro-steps of "
                 f"{args.batch} images, one process)",
        "rows": [
            {"case": name, "wall ms": 1e3 * median(wall[name]),
             "CPU ms": 1e3 * median(seconds[name])}
            for name in cases
        ],
        "bars": [{"what": "CPU time of the loop above the bare engine, share of a step",
                  "measured": overhead, "bar": 0.02, "at_least": False}],
        "notes": [f"the difference is {1e3 * (median(ours) - median(bare)):.2f} ms a step; metrics "
                  f"are reduced and written every {args.log_every} steps"],
    }


def _engine(args: argparse.Namespace, ranks):
    from pretrain.engine.zero import start_engine
    from pretrain.models.git import GitDecoder
    from pretrain.models.multitask import MultiTaskModel
    from pretrain.models.vit import VisionTransformer
    from pretrain.objectives.captioning import Captioning
    from pretrain.optim.groups import OptimizerSettings

    def build() -> MultiTaskModel:
        encoder = VisionTransformer(
            image_size=64, patch_size=8, width=args.width, layers=4, heads=4
        )
        decoder = GitDecoder(
            VOCABULARY, args.width, width=args.width, layers=2, heads=4, mlp_width=4 * args.width,
            max_positions=64,
        )
        captioning = Captioning(
            decoder, encoder="image",
            encoder_cost=lambda h, w: (encoder.tokens(h, w), encoder.flops(h, w)),
            visual_width=args.width, bos_id=1, eos_id=2, pad_id=0,
            image_mean=(0.5, 0.5, 0.5), image_std=(0.25, 0.25, 0.25),
        )
        return MultiTaskModel({"image": encoder}, {"caption": captioning})

    config = {
        "train_micro_batch_size_per_gpu": args.batch,
        "gradient_accumulation_steps": args.micro_steps,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": args.zero},
        "steps_per_print": 10**12,
    }
    return start_engine(build, OptimizerSettings(lr=1e-4), config, 0, ranks.device)


def _windows(args: argparse.Namespace) -> list:
    from data_pipeline.loader import Part, StepWindow

    generator = torch.Generator().manual_seed(0)
    windows = []
    for step in range(args.steps):
        micro_batches = []
        for _ in range(args.micro_steps):
            shape = (args.batch, 1, 24)
            loss_mask = torch.ones(shape, dtype=torch.bool)
            loss_mask[..., 0] = False
            micro_batches.append({
                "images": torch.randint(256, (args.batch, 3, 64, 64), dtype=torch.uint8,
                                        generator=generator),
                "tokens": torch.randint(3, VOCABULARY, shape, generator=generator),
                "loss_mask": loss_mask,
                "valid": torch.ones(args.batch, dtype=torch.bool),
            })
        windows.append(StepWindow(step, [Part("caption", micro_batches)], {"wait": 0.0}))
    return windows


def _bare(engine, windows: list, ranks) -> int:
    """DeepSpeed as its tutorials use it."""
    for window in windows:
        tokens = sum(int(b["loss_mask"].sum()) for b in window.micro_batches)
        last = len(window.micro_batches) - 1
        for index, batch in enumerate(window.micro_batches):
            engine.set_gradient_accumulation_boundary(index == last)
            loss = engine("caption", batch, {"tokens": tokens})["loss"]
            engine.backward(loss, scale_wrt_gas=False)
        engine.step()
    return len(windows)


def _ours(args: argparse.Namespace, engine, windows: list, ranks, folder: Path):
    from pretrain.engine.control import ControlFolder, StopSignals
    from pretrain.engine.loop import Loop, TrainerState
    from pretrain.engine.metrics_log import LoggingSettings, MetricsLog
    from pretrain.engine.throughput import Throughput

    control = ControlFolder(folder)
    control.take_ownership()
    throughput = Throughput(ranks, peak_tflops_per_device=None)
    loop = Loop(
        engine, ranks, 0, (1e-4, lambda step: 1.0), 0,
        {"caption": args.batch * args.micro_steps}, control, StopSignals(),
    )
    settings = LoggingSettings(every_steps=args.log_every)
    log = MetricsLog(folder, ranks.rank, 0, args.steps, settings)

    def case() -> int:
        loop.run(
            windows, TrainerState(),
            wants_report=lambda step: log.due(step + 1, args.steps),
            on_report=lambda state, report: log.log(
                state.step, report.task, throughput.describe(report)
            ),
            after_step=lambda state, save: log.progress(state.step),
        )
        return len(windows)

    return case

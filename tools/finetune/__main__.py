"""Fine-tune what was trained, and get a folder that transformers loads without this project.

    python -m tools.finetune classify runs/my_run --data flowers/ --out flower_model
    python -m tools.finetune classify runs/my_run --data flowers/ --per-class 10 --out few epochs=50
    python -m tools.finetune classify scratch --like runs/my_run --data flowers/ --out from_nothing
    python -m tools.finetune caption exports/git --data coco/captions.json --out captioner lr=1e-5
    torchrun --nproc-per-node 8 -m tools.finetune classify ...

SOURCE is a run, an export, a folder of transformers, or `scratch` with --like SOURCE. PLACE is
shards, a folder with a folder of images per class, or a COCO JSON of captions beside its images.
The same command goes on after an interruption.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.console import parse_in_any_order, write_utf8
from data_pipeline.files import write_atomically
from tools.finetune.settings import FinetuneSettings, read_settings
from tools.support.arguments import add_weights, positive

if TYPE_CHECKING:  # --help and wrong arguments do without torch
    from accelerate import Accelerator

WORK = "finetune"
"""Folder in OUT: checkpoint, log, TensorBoard, and what SOURCE and PLACE became."""
_DEFAULTS: dict[str, dict[str, Any]] = {
    "classify": {},
    "caption": {"lr": 5e-5, "epochs": 10, "label_smoothing": 0.0},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 1 after an error that was printed."""
    write_utf8()
    options = parse_in_any_order(_parser(), arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate asks whether DeepSpeed is there
    from data_pipeline.loader.stream import DataError
    from data_pipeline.storage.errors import ShardError
    from pretrain.engine.checkpoint.files import CheckpointError

    try:
        settings = read_settings(options.settings, **_DEFAULTS[options.kind])
        _finetune(options, settings)
        return 0
    except (CheckpointError, DataError, ShardError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 1


def _finetune(options: argparse.Namespace, settings: FinetuneSettings) -> None:
    import torch
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    gpu = torch.cuda.is_available()
    precision = {"auto": "bf16" if gpu else "no"}.get(settings.precision, settings.precision)
    work = options.out / WORK
    accelerator = Accelerator(
        cpu=not gpu,
        mixed_precision=precision,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(work), logging_dir=str(work)),
    )
    world = accelerator.num_processes
    if accelerator.is_main_process:
        print(
            f"{world} process{'es' if world > 1 else ''} on {accelerator.device.type}", flush=True
        )
        _claim(options, settings)
    accelerator.wait_for_everyone()
    try:
        _train(options, settings, accelerator)
    finally:
        accelerator.end_training()


def _train(
    options: argparse.Namespace, settings: FinetuneSettings, accelerator: "Accelerator"
) -> None:
    from tools.finetune.loop import Loop
    from tools.finetune.result import write_result
    from tools.finetune.setup import set_up

    job = set_up(options, settings, accelerator, options.out / WORK)
    loop = Loop(job.task, settings, accelerator, options.out / WORK)
    accelerator.init_trackers(
        "tensorboard", init_kwargs={"tensorboard": {"purge_step": loop.step + 1}}
    )
    if accelerator.is_main_process:
        says = f"{job.task.stream.n_rows} samples to learn from, {job.task.test.n_rows} held out"
        print(f"{says}; {loop.steps} steps of {job.task.stream.global_batch}", flush=True)
        if loop.step:
            print(f"going on from step {loop.step}", flush=True)
    metrics = loop.run()
    if accelerator.is_main_process:
        with loop.averaged():
            write_result(job, options, settings, loop.steps, metrics)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        print(f"{options.out}: {shown}", flush=True)


def _claim(options: argparse.Namespace, settings: FinetuneSettings) -> None:
    """Write down what OUT is for. Raises ValueError: it is for something else."""
    asked = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in ("out", "settings", "json")
    } | {"settings": settings.model_dump(mode="json", exclude={"workers", "save_steps"})}
    place = options.out / WORK / "asked.json"
    if place.is_file():
        known = json.loads(place.read_text(encoding="utf-8"))
        different = sorted(
            {n for n in asked if asked[n] != known.get(n)} - {"settings"}
            | {n for n, v in asked["settings"].items() if v != known["settings"].get(n)}
        )
        if different:
            raise ValueError(
                f"{options.out} holds a fine-tuning with another {', '.join(different)}; choose "
                "another --out, or give the same to go on with it"
            )
        return
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ValueError(
            f"--out {options.out} is there already and is no fine-tuning: choose another"
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(place, [json.dumps(asked, indent=1).encode()])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.finetune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="settings:\n"
        + "\n".join(
            f"  {name}={field.default!r}" for name, field in FinetuneSettings.model_fields.items()
        ),
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, text in (("classify", "classes of images"), ("caption", "captions of images")):
        one = kinds.add_parser(kind, help=text)
        one.add_argument("source", metavar="SOURCE", help="run, export, folder of transformers")
        one.add_argument("settings", nargs="*", metavar="key=value", help="see --help of finetune")
        one.add_argument("--data", required=True, metavar="PLACE", help="what is learned from")
        one.add_argument("--test", metavar="PLACE", help="held-out data; default: a part of --data")
        one.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the model")
        one.add_argument("--like", metavar="SOURCE", help="with scratch: whose shape")
        one.add_argument(
            "--part", metavar="NAME", help="which encoder, or captioning task, of a run"
        )
        add_weights(one)
        if kind == "classify":
            one.add_argument("--label-source", default="cls", help="as in recipes (default cls)")
            one.add_argument(
                "--per-class", type=positive, metavar="N", help="learn from N samples of each class"
            )
            one.add_argument("--probe", action="store_true", help="train the head alone")
        else:
            one.add_argument(
                "--caption-source", nargs="+", help="as in recipes, e.g. json:captions"
            )
            one.add_argument("--images", help="folder of a COCO JSON's images; default: beside it")
            one.add_argument("--text-length", type=positive, default=40, help="tokens at most")
    return parser


if __name__ == "__main__":
    sys.exit(main())

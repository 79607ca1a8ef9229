"""The main job from end to end on a laptop: `make demo`.

Packs digit scenes into shards, trains a tokenizer, pre-trains a GIT captioner and a classifier on
one encoder with DeepSpeed ZeRO-2 on two CPU processes, kills it in the middle, resumes it exactly,
exports it to transformers and captions held-out scenes with transformers' own model. Each stage
shows the command that a user would type, and what changes on real data.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.markup import escape
from rich.rule import Rule

from data_pipeline.console import parse_in_any_order, write_utf8

console = Console(soft_wrap=True)
# What the script `deepspeed` runs. The script itself does not start where the environment's path
# has a space, since its first line names the interpreter.
LAUNCHER = (sys.executable, "-m", "deepspeed.launcher.runner")
TRAIN = (*LAUNCHER, "--quiet", "--num_gpus", 2, "--module", "pretrain.train")
# What must be equal, digit for digit, in steps that were computed before the kill and again after.
EXACT = ("loss", "gradient_norm", "token_accuracy", "top1", "update_rms", "learning_rate")
TASKS = ("caption", "classify")


class StageFailed(RuntimeError):
    """A command of the demo failed; its output is above."""


@dataclass(frozen=True)
class Demo:
    """Folders and sizes of one demo."""

    folder: Path
    scenes: int
    heldout: int
    kill_after: int

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def export(self) -> Path:
        return self.folder / "export"

    @property
    def settings(self) -> list[str]:
        """Overrides that point the shipped recipe to the demo's folders."""
        return [
            f"run_dir={self.run}",
            f"tokenizer.path={self.data / 'tokenizer'}",
            *(f"tasks.{task}.data.shards=[{self.data / 'train'}]" for task in TASKS),
            *(f"tasks.{task}.evaluation.shards=[{self.data / 'heldout'}]" for task in TASKS),
        ]


def main(argv: list[str] | None = None) -> int:
    """Run all stages; returns the exit code."""
    write_utf8()
    parser = argparse.ArgumentParser(prog="tools.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        help="everything goes here; an earlier demo's run and export are replaced",
    )
    parser.add_argument("--scenes", type=int, default=12000, help="training scenes to pack")
    parser.add_argument("--heldout", type=int, default=256, help="held-out scenes to pack")
    parser.add_argument(
        "--kill-after",
        type=int,
        default=250,
        metavar="STEP",
        help="kill the run once this step is logged",
    )
    arguments = parse_in_any_order(parser, argv)
    demo = Demo(arguments.out, arguments.scenes, arguments.heldout, arguments.kill_after)
    stages = (pack, tokenizer, train_and_kill, resume, export, evaluate)
    started = time.monotonic()
    # Two processes, and equal steps bit for bit after the resume: a machine with a GPU may have no
    # second one, and attention's gradients on GPUs are not the same twice.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        for number, stage in enumerate(stages, 1):
            title = stage.__doc__.splitlines()[0].rstrip(".")
            console.print(Rule(f"[bold]{number}/{len(stages)}  {title}"), style="cyan")
            stage(demo)
    except StageFailed as error:
        console.print(f"[red]{error}")
        return 1
    minutes = (time.monotonic() - started) / 60
    console.print(Rule(f"[bold]done in {minutes:.1f} minutes"), style="cyan")
    console.print(
        f"run        {demo.run}   (tensorboard --logdir {demo.run / 'tensorboard'})\n"
        f"model      {demo.export}   (transformers: GitForCausalLM.from_pretrained)\n"
        f"pictures   {demo.export / 'captions.png'}",
        highlight=False,
    )
    return 0


# ---- stages ------------------------------------------------------------------------------------


def pack(demo: Demo) -> None:
    """Pack images and captions into WebDataset shards."""
    real(
        "python -m tools.make_shards coco --out data/coco --images train2017/ "
        "--captions captions_train2017.json"
    )
    for split, count in (("train", demo.scenes), ("heldout", demo.heldout)):
        python(
            "tools.make_shards",
            "scenes",
            "--out",
            demo.data,
            "--split",
            split,
            "--count",
            count,
            "--max-samples",
            4000,
        )


def tokenizer(demo: Demo) -> None:
    """Train a tokenizer on the captions."""
    real("the same command on your shards, or a local Hugging Face tokenizer folder in the recipe")
    python(
        "tools.train_tokenizer",
        demo.data / "tokenizer",
        "--shards",
        demo.data / "train",
        "--caption-source",
        "json:captions",
        "--vocab-size",
        400,
    )


def train_and_kill(demo: Demo) -> None:
    """Pre-train two tasks with ZeRO-2 on two processes, and kill them all in the middle."""
    real(
        "deepspeed --quiet --num_gpus 8 --module pretrain.train git_base "
        "tasks.caption.data.shards=[data/coco/train] tokenizer.path=..."
    )
    for old in (demo.run, demo.export):
        shutil.rmtree(old, ignore_errors=True)
    process = start(*TRAIN, "digits_demo", *demo.settings)
    while process.poll() is None:
        if last_step(demo.run) >= demo.kill_after:
            kill_tree(process)
            console.print(f"\n[bold red]kill -9[/] of all processes after step {demo.kill_after}")
            return
        time.sleep(0.05)
    raise StageFailed("the run ended before it could be killed; its output is above")


def resume(demo: Demo) -> None:
    """Resume from the last checkpoint, and compare the steps that are computed twice."""
    real("the same: --resume RUN_DIR needs nothing else, also with another number of processes")
    before = training_lines(demo.run)
    process = start(*TRAIN, "--resume", demo.run)
    if process.wait():
        raise StageFailed("the resumed run failed")
    after = training_lines(demo.run)
    lines = (demo.run / "starts.jsonl").read_text(encoding="utf-8").splitlines()
    starts = [json.loads(line) for line in lines]
    repeated = [step for step in before if step > starts[-1]["from_step"]]
    for step in repeated:
        same = all(before[step].get(name) == after[step].get(name) for name in EXACT)
        console.print(
            f"step {step}, {before[step]['task']}: "
            f"loss {before[step]['loss']!r} before the kill, "
            f"{after[step]['loss']!r} after: {'equal' if same else 'NOT EQUAL'}",
            highlight=False,
        )
        if not same:
            raise StageFailed(f"step {step} differs after the resume")
    console.print(f"{len(repeated)} logged steps were computed twice, bit for bit alike")


def export(demo: Demo) -> None:
    """Export the checkpoint to transformers, and compare its scores with ours."""
    real("the same; weights of other people come in with `python -m tools.convert import-git`")
    python("tools.convert", "export-git", "--run", demo.run, "--out", demo.export)


def evaluate(demo: Demo) -> None:
    """Caption held-out scenes with transformers' GitForCausalLM."""
    real("the same with your held-out shards")
    python(
        "tools.evaluate",
        demo.export,
        "--shards",
        demo.data / "heldout",
        "--caption-source",
        "json:captions",
        "--sheet",
        demo.export / "captions.png",
        "--json",
        demo.export / "metrics.json",
    )


# ---- helpers -----------------------------------------------------------------------------------


def real(text: str) -> None:
    """Say what a user does instead on real data."""
    console.print(f"[dim]on real data: {escape(text)}", highlight=False)


def python(module: str, *arguments) -> None:
    """Run one of our tools as a user would."""
    if start(sys.executable, "-m", module, *arguments).wait():
        raise StageFailed(f"{module} failed; its output is above")


def start(*command) -> subprocess.Popen:
    """Show a command and start it."""
    words = [str(word) for word in command]
    launched = command[: len(LAUNCHER)] == LAUNCHER
    shown = ["deepspeed", *words[3:]] if launched else [Path(words[0]).name, *words[1:]]
    console.print("[bold green]$[/] " + escape(shlex.join(shown)), highlight=False, markup=True)
    return subprocess.Popen(words)


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL a process and all that it started; nobody gets to clean up."""
    root = psutil.Process(process.pid)
    for victim in [root, *root.children(recursive=True)]:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def training_lines(run: Path) -> dict[int, dict]:
    """step -> metrics of the logged training steps; a line that is being written is left out."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return {}
    lines = [
        json.loads(line)
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
        if line.endswith("\n")
    ]
    return {line["step"]: line for line in lines if line["kind"] == "train"}


def last_step(run: Path) -> int:
    """The last step whose metrics are written."""
    return max(training_lines(run), default=0)


if __name__ == "__main__":
    sys.exit(main())

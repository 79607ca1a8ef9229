"""Runs of the trainer itself on an emulated cluster, and what they are compared with."""

import json
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import kill_ranks, start_ranks, tails
from tests.slurm.conftest import DevCluster, attempts, wait_for
from tests.tiny_run import tiny_recipe, write_recipe

SITE = f"""
gpus_per_node: 0
ranks_per_node: 1
memory: null
signal_lead_s: 60
local_folders: []
python: {sys.executable}
environment: {{DS_ACCELERATOR: cpu, OMP_NUM_THREADS: 1}}
"""
FACTS = ("loss", "cross_entropy", "token_accuracy", "gradient_norm", "learning_rate", "epoch")
"""What is compared of each logged step."""


class TrainerRun:
    """A run that was handed to SLURM by `slurm.submit`, and is asked about by its files."""

    def __init__(self, emulated: DevCluster, folder: Path, data: Path, **changes) -> None:
        self.cluster, self.folder, self.run = emulated, folder, folder / "run"
        folder.mkdir(exist_ok=True)
        (folder / "site.yaml").write_text(SITE, encoding="utf-8")
        recipe = tiny_recipe(data, self.run, **changes)
        del recipe["tasks"]["caption"]["evaluation"]
        self.recipe = write_recipe(folder / "recipe.yaml", recipe)
        self.steps = recipe["steps"]

    def submit(self, *words: str) -> list[str]:
        """Numbers of the jobs."""
        said = self.slurm(
            "submit",
            str(self.recipe),
            "--site",
            str(self.folder / "site.yaml"),
            "--no-code-copy",
            *words,
        )
        return said.split("submitted: ")[1].split(" (")[0].split(", ")

    def slurm(self, *words: str) -> str:
        """Output of `python -m slurm ...`."""
        return self.cluster.ask(sys.executable, "-m", "slurm", *words)

    def lines(self) -> list[dict]:
        """The logged steps so far."""
        return lines_of(self.run)

    def last(self) -> int:
        """The last logged step."""
        lines = self.lines()
        return lines[-1]["step"] if lines else 0

    def train(self, more: int = 3, seconds: float = 240) -> int:
        """Wait for so many more steps, in the try that is running then; returns the last one."""
        tries, before = len(attempts(self.run)), self.last()
        wait_for(lambda: self.last() >= before + more, seconds, self.story)
        assert len(attempts(self.run)) == tries, self.story()
        return self.last()

    def wait_tries(self, count: int, seconds: float = 240) -> dict:
        """Wait until so many tries have ended; returns the last one."""
        wait_for(lambda: len(attempts(self.run)) >= count, seconds, self.story)
        return attempts(self.run)[count - 1]

    def finish(self, seconds: float = 400) -> None:
        """Wait for the run's end."""
        wait_for(
            lambda: any(a["decision"] == "done" for a in attempts(self.run)), seconds, self.story
        )

    def story(self) -> str:
        """What the run says, for a test that fails."""
        logs = "\n".join(
            f"--- {p.name}\n{p.read_text(errors='replace')[-2500:]}"
            for p in sorted(self.run.glob("logs/*.log"))
        )
        return f"step {self.last()}; {attempts(self.run)}\n{logs}"


def uninterrupted(of: TrainerRun, patience_s: float) -> list[dict]:
    """The logged steps of the same recipe in one go, without SLURM, as far as that run came."""
    last, logs, straight, world = of.last(), of.folder / "logs", of.folder / "straight", 2
    words = [of.recipe, f"run_dir={straight}", "checkpoint.every_steps=100000"]
    ranks = start_ranks("pretrain.train", words, world, logs)
    try:
        wait_for(
            lambda: len(lines_of(straight)) >= last or any(r.poll() for r in ranks), patience_s
        )
        (straight / "control/stop").touch()
        assert [rank.wait(120) for rank in ranks] == [0] * world, tails(logs)
    finally:
        kill_ranks(ranks)
    return [line for line in lines_of(straight) if line["step"] <= last]


def lines_of(run: Path) -> list[dict]:
    """The logged steps of a run so far."""
    try:
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    except OSError:
        return []
    whole = text[: text.rfind("\n") + 1].splitlines()
    return [line for line in map(json.loads, whole) if line["kind"] == "train"]


def assert_same(run: TrainerRun, alone_from: int | None = None, patience_s: float = 1800) -> None:
    """Every step once, and its facts those of the uninterrupted run: bit for bit on two ranks, to
    rounding behind the step from which the run went on with one."""
    lines = run.lines()
    assert [line["step"] for line in lines] == list(range(1, run.last() + 1))
    straight = uninterrupted(run, patience_s)
    for line, other in zip(lines, straight, strict=True):
        rounded = alone_from is not None and line["step"] > alone_from
        for name in FACTS:
            wanted = pytest.approx(other[name], rel=1e-5) if rounded else other[name]
            assert line[name] == wanted, (line["step"], name)

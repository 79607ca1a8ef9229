"""What `pretrain` says of a recipe, asked as a command: this room knows no trainer."""

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml


class SubmitError(RuntimeError):
    """The run cannot be submitted; the message says what to do."""


def resolved(recipe: str, overrides: Sequence[str]) -> dict:
    """The recipe with all its values, as `pretrain show` prints it.

    Raises:
        SubmitError: what is wrong with it, in the words of the trainer.
    """
    done = _pretrain("show", recipe, *overrides)
    if done.returncode:
        raise SubmitError(done.stderr.strip() or done.stdout.strip())
    return yaml.safe_load(done.stdout)


def require_fit(recipe: str, overrides: Sequence[str], world: int) -> str:
    """What `pretrain check` says for this number of ranks.

    Raises:
        SubmitError: it refuses the run.
    """
    done = _pretrain("check", recipe, *overrides, "--world", str(world))
    if done.returncode:
        raise SubmitError(
            f"`pretrain check` refuses the run on {world} ranks:\n"
            f"{(done.stdout + done.stderr).strip()}"
        )
    return done.stdout.strip()


def _pretrain(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pretrain", *words], capture_output=True, text=True, check=False
    )


def sweep(path: Path) -> list[list[str]]:
    """Overrides of every element of a grid: `key: [values]` lines, all combinations.

    Raises:
        SubmitError: it is no such file.
    """
    try:
        grid = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SubmitError(f"{path}: {error}") from None
    if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()):
        raise SubmitError(f"{path}: expected `key: [value, value]` lines")
    return [
        [
            f"{key}={json.dumps(value) if not isinstance(value, str) else value}"
            for key, value in zip(grid, values, strict=True)
        ]
        for values in itertools.product(*grid.values())
    ]

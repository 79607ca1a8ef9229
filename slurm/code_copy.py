"""The code of a run, copied when it is submitted: later edits do not reach jobs that wait."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pretrain", "data_pipeline", "ds_configs", "slurm", "tools")


def copy_code(target: Path) -> None:
    """Copy the packages to `target`, with the commit and the changes since then beside them."""
    target.mkdir(parents=True, exist_ok=True)
    for name in PACKAGES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name,
                target / name,
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns("__pycache__", "*.pyc"),
            )
    commit = _git("rev-parse", "HEAD")
    (target / "COMMIT").write_text(commit or "not a git checkout\n", encoding="utf-8")
    if changes := _git("diff", "HEAD"):
        (target / "CHANGES.diff").write_text(changes, encoding="utf-8")


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""

"""Names of checkpoint folders, for those that must not wait for torch."""

import re
from pathlib import Path

_NAME = re.compile(r"step_(\d{9,})$")


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps; sorts by step."""
    return f"step_{step:09d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders under `root`, newest first; their contents are not looked at."""
    if not root.is_dir():
        return []
    found = [(int(m[1]), p) for p in root.iterdir() if (m := _NAME.match(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]

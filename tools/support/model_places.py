"""What lies where a trained model is sought: a run, a folder of transformers, or something else."""

import json
from pathlib import Path
from typing import Any

from pretrain.engine.checkpoint.files import MANIFEST


def is_run(place: Path) -> bool:
    """Whether a place is a run directory or a checkpoint."""
    return (place / "checkpoints").is_dir() or (place / MANIFEST).is_file()


def json_of(path: Path) -> dict[str, Any]:
    """Contents of a JSON file; nothing if there is none, or no object in it.

    Raises ValueError: it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def image_size(processor: dict[str, Any], config: dict[str, Any]) -> int:
    """Side of the images by an image processor of transformers, else by the model; 224 if neither
    says it."""
    size = processor.get("crop_size") or processor.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    size = size or config.get("image_size") or config.get("vision_config", {}).get("image_size")
    return size or 224


def names_in(place: Path) -> str:
    """The first few names in a folder."""
    return ", ".join(sorted(one.name for one in place.iterdir())[:5])

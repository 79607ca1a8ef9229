"""README.md of an export, as the Hugging Face hub takes it: a head in YAML, how to load it, where
it came from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.recipe.overlay import to_yaml

HUB_LICENCES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0", "cc-by-nc-4.0"}
"""Names of licences that the hub knows, as far as data have them."""
_LIBRARY = {"timm": "timm", "clip": "open_clip", "transformers": "transformers"}


def hub_head(library: str, task: str, tags: list[str], licence: str = "") -> str:
    """The head in YAML, without the lines around it. licence: as the data's manifest says; what is
    none of the hub's own names stands beside `other`."""
    name = licence.lower().replace(" ", "-")
    known = name if name in HUB_LICENCES else ("other" if licence else "unknown")
    more = {"license_name": " ".join(licence.split())[:100]} if known == "other" else {}
    return to_yaml(
        {
            "library_name": library,
            "pipeline_tag": task,
            "license": known,
            **more,
            "tags": tags,
        }
    )


def card(record: Mapping[str, Any], loading: str, checkpoint: Path) -> str:
    """The text.

    record: contents of omnipretrain.json; loading: Python that makes `model` of the folder ".";
    checkpoint: where the weights were read, whose run has the metrics.
    """
    contrast = record["to"] == "clip" or "CLIPModel" in loading
    task = "zero-shot-image-classification" if contrast else "image-feature-extraction"
    if record["to"] == "timm" and record["task"]:
        task = "image-classification"
    head = hub_head(_LIBRARY[record["to"]], task, ["omnipretrain", record["recipe"]])
    shards = "\n".join(f"- {', '.join(one['shards'])}" for one in record["training_shards"])
    notes = [
        *record["notes"],
        *(f"left out: {name}: {why}" for name, why in record["left_out"].items()),
    ]
    different = "\n".join(f"- {note}" for note in notes) or "- nothing"
    image = record["image"]
    return f"""\
---
{head}---

# {record["recipe"]}, step {record["step"]} ({record["weights"]} weights)

```python
{loading}```

Images: RGB, bicubic resize of the short side to {image["size"]} pixels, centre crop, values of
0..1, mean {image["mean"]}, std {image["std"]}.

Exported by omnipretrain; `omnipretrain.json` has the checkpoint's hash and how far the file that
was read back is from the trained model.

Trained on:

{shards}

Last metrics:

{_metrics(checkpoint)}

What differs from training:

{different}
"""


def _metrics(checkpoint: Path) -> str:
    """The last evaluation of each task, or else its last line of training."""
    file = checkpoint.parent.parent / "metrics.jsonl"
    if not file.is_file():
        return "- the run has no metrics.jsonl beside this checkpoint"
    last: dict[str, dict[str, Any]] = {}
    with file.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            known = last.get(row.get("task"), {})
            if "task" in row and (row["kind"] == "evaluation" or known.get("kind") != "evaluation"):
                last[row["task"]] = row
    return (
        "\n".join(
            f"- {task} ({row['kind']}, step {row.get('step')}): "
            + ", ".join(
                f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float)
            )
            for task, row in last.items()
        )
        or "- none"
    )

"""What a fine-tuning leaves in OUT: the model, its image processor, a record and a model card."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from data_pipeline.files import write_atomically
from data_pipeline.samples.tokenizer import CONFIG_FILE, TOKENIZER_FILE
from pretrain import __version__
from tools.convert.export_git import image_processor
from tools.convert.formats.card import hub_head
from tools.convert.record import RECORD, ExportRecord
from tools.convert.transformers_git import without_bars
from tools.finetune.settings import FinetuneSettings
from tools.finetune.setup import Job
from tools.support.shard_facts import licence
from tools.support.training_images import TrainingShards

_CLASSES = """\
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained(".").eval()
processor = AutoImageProcessor.from_pretrained(".")
pixels = processor(images=Image.open("picture.jpg"), return_tensors="pt").pixel_values
print(model.config.id2label[model(pixel_values=pixels).logits.argmax(-1).item()])
"""
_CAPTIONS = """\
from PIL import Image
from transformers import AutoProcessor, GitForCausalLM

model = GitForCausalLM.from_pretrained(".").eval()
processor = AutoProcessor.from_pretrained(".")
pixels = processor(images=Image.open("picture.jpg"), return_tensors="pt").pixel_values
print(processor.batch_decode(model.generate(pixel_values=pixels), skip_special_tokens=True)[0])
"""


def write_result(
    job: Job,
    options: argparse.Namespace,
    settings: FinetuneSettings,
    steps: int,
    metrics: dict[str, float],
) -> None:
    """Write the folder; the model has the weights that are handed out."""
    out: Path = options.out
    captions = options.kind == "caption"
    with without_bars():
        job.task.model.save_pretrained(out)
    processor = image_processor(job.held_out, "GitProcessor" if captions else None)
    write_atomically(out / "preprocessor_config.json", [json.dumps(processor, indent=2).encode()])
    seen = [*_before(job), TrainingShards(shards=job.shards)]
    if captions:
        for name in (TOKENIZER_FILE, CONFIG_FILE):
            shutil.copy(job.source.folder / name, out / name)
    record = _record(job, options, steps, seen)
    write_atomically(out / RECORD, [json.dumps(record, indent=1, ensure_ascii=False).encode()])
    write_atomically(out / "README.md", [_card(job, options, settings, steps, metrics).encode()])


def _before(job: Job) -> list[TrainingShards]:
    """What SOURCE was trained on, as far as it says so."""
    if job.source.scratch:
        return []
    return [TrainingShards(**one) for one in job.source.record.get("training_shards") or ()]


def _record(
    job: Job, options: argparse.Namespace, steps: int, seen: list[TrainingShards]
) -> dict[str, Any]:
    """omnipretrain.json; of captioners that of an export, which `tools.evaluate` reads."""
    common = {
        "recipe": options.out.name,
        "step": steps,
        "image": job.held_out.model_dump(mode="json"),
        "training_shards": [one.model_dump(mode="json") for one in seen],
    }
    if options.kind == "classify":
        return {
            "format": "omnipretrain.classifier",
            "version": 1,
            **common,
            "classes": job.classes,
            "label_source": options.label_source,
            "source": options.source,
        }
    data = job.data
    return ExportRecord(
        **common,
        checkpoint_sha256="",
        task="caption",
        encoder="image",
        tokenizer_digest=job.task.tokenizer.digest,
        image_extensions=data.image_extensions,
        caption_source=data.caption_source,
        cleaning=data.cleaning,
        captions_per_image=1,
        text_length=data.text_length,
        max_new_tokens=job.task.model.generation_config.max_new_tokens or data.text_length,
        notes=[f"fine-tuned from {options.source}"],
    ).model_dump(mode="json")


def _card(
    job: Job,
    options: argparse.Namespace,
    settings: FinetuneSettings,
    steps: int,
    metrics: dict[str, float],
) -> str:
    captions = options.kind == "caption"
    head = hub_head(
        "transformers",
        "image-to-text" if captions else "image-classification",
        ["omnipretrain", options.kind],
        licence(job.shards),
    )
    numbers = "\n".join(f"- {name}: {value:.4g}" for name, value in metrics.items())
    shards = "\n".join(f"- {', '.join(one.shards)}" for one in _before(job)) or "- not known"
    begin = options.source
    if job.source.scratch:
        begin = f"random weights, in the shape of {options.like}"
    of_same = "" if options.test else " (a part of the same data)"
    changed = "\n".join(f"- {n}: {v}" for n, v in settings.model_dump(mode="json").items())
    rights = f"; {licence(job.shards)}" if licence(job.shards) else ""
    mark = job.task.stream.fingerprint[:16]
    return f"""\
---
{head}---

# {options.out.name}: {options.kind}, fine-tuned for {steps} steps

```python
{_CAPTIONS if captions else _CLASSES}```

Made by omnipretrain {__version__} from {begin}.

Fine-tuned on {job.task.stream.n_rows} samples of:

- {", ".join(job.shards)} (fingerprint {mark}{rights})

Before that it was trained on:

{shards}

On {job.task.test.n_rows} held-out samples{of_same}:

{numbers}

Settings:

{changed}
"""

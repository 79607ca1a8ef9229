"""omnipretrain.json: what an exported model came from, and what its inputs looked like.

transformers passes the file over. `tools.evaluate` reads it to prepare held-out images exactly as
training did, and `tools.convert` to know which folders are exports that it may replace.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from data_pipeline.files import write_atomically
from data_pipeline.images.transforms import ImageSettings
from data_pipeline.loader.loader import EvaluationLoader, TaskStream
from data_pipeline.order.sources import open_source
from data_pipeline.reading.reader import SampleReader
from data_pipeline.samples.caption_texts import CaptionSources, CleaningSettings
from data_pipeline.samples.captions import CaptionDataSettings, CaptionProcessor
from data_pipeline.samples.tokenizer import Tokenizer
from data_pipeline.settings import Settings
from pretrain.engine.checkpoint.files import newest_whole
from pretrain.recipe.load import load_resolved
from tools.support.model_places import is_run
from tools.support.training_images import TrainingShards

RECORD = "omnipretrain.json"


class Verification(Settings):
    """How far transformers' scores, read back from the export, are from ours."""

    passed: bool
    """Whether all differences stay below the tolerance."""
    tolerance: float
    """Largest difference of natural log-probabilities that passes."""
    differences: dict[str, float]
    """Kind of input -> largest difference found, over all words of the vocabulary."""
    preprocessing: dict[str, float]
    """Mean and largest difference, in levels of 0..255, between held-out images prepared by the
    exported image processor and by our evaluation; empty if no held-out image was read."""
    transformers: str
    """Version that read the export back."""


class ExportRecord(Settings):
    """Contents of omnipretrain.json."""

    format: Literal["omnipretrain.export"] = "omnipretrain.export"
    version: Literal[1] = 1
    recipe: str
    """Name of the recipe."""
    step: int
    """Optimizer steps that the weights have seen."""
    checkpoint_sha256: str
    """Of the checkpoint's manifest, which holds the hashes of all its files."""
    weights: Literal["master", "ema"] = "master"
    """Trained weights, or their moving average."""
    task: str
    """The captioning task that was exported."""
    encoder: str
    """The encoder that it reads."""
    tokenizer_digest: str
    """Digest of the tokenizer in the checkpoint."""
    image: ImageSettings
    """Preprocessing of held-out images."""
    image_extensions: list[str]
    """As in the recipe's data settings; so are the next four."""
    caption_source: CaptionSources
    cleaning: CleaningSettings = CleaningSettings()
    captions_per_image: int
    text_length: int
    max_new_tokens: int = Field(gt=0)
    """Longest caption that generation writes, in tokens, EOS counted."""
    notes: list[str]
    """Where the export cannot do what training did."""
    verification: Verification | None = None
    """None: never verified."""
    training_shards: list[TrainingShards] | None = None
    """What all tasks of the run read; None in exports that were written before this was kept."""

    def write(self, folder: Path) -> None:
        """Put the record into `folder`."""
        write_atomically(folder / RECORD, [self.model_dump_json(indent=1).encode()])

    @classmethod
    def read(cls, folder: str | Path) -> "ExportRecord":
        """The record of an export.

        Raises:
            ValueError: `folder` is no export, or one of another version.
        """
        path = Path(folder) / RECORD
        if not path.is_file():
            raise ValueError(f"{folder} is no export of tools.convert: it has no {RECORD}")
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ValueError(
                f"{path}: {_first(error)}; export the checkpoint again with this version"
            ) from None

    def data(
        self,
        shards: Sequence[str],
        caption_source: Sequence[str] | None = None,
        where: str | None = None,
    ) -> CaptionDataSettings:
        """Settings that read `shards` as the exported task did.

        Args:
            caption_source: other sources than those of the task; the first that a sample has.
            where: only samples that meet this condition.

        Raises:
            ValueError: `caption_source` or `where` is not understood.
        """
        try:
            return CaptionDataSettings(
                shards=list(shards),
                where=where,
                image_extensions=self.image_extensions,
                caption_source=list(caption_source or self.caption_source),
                cleaning=self.cleaning,
                captions_per_image=self.captions_per_image,
                text_length=self.text_length,
                image=self.image,
            )
        except ValidationError as error:
            raise ValueError(_first(error)) from None


def _first(error: ValidationError) -> str:
    """The first fault on one line."""
    fault = error.errors()[0]
    return f"{'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg']}"


def way_to_export(folder: Path) -> str:
    """What to do about a folder without a record, by what it is."""
    if is_run(folder):
        path = newest_whole(folder / "checkpoints") if (folder / "checkpoints").is_dir() else folder
        tasks = load_resolved(path / "recipe.yaml").tasks
        if any(task.objective.type == "captioning" for task in tasks.values()):
            return (
                f"{folder} is a run, not an export: make one with `python -m tools.convert "
                f"export-git --run {folder} --out EXPORT`, and evaluate EXPORT"
            )
        kinds = ", ".join(f"{name} ({task.objective.type})" for name, task in tasks.items())
        return (
            f"{folder} is a run without a captioning task (it has {kinds}): judge it by `--metrics "
            "knn,linear --train SHARDS`, top1, zeroshot or what else fits; the run also evaluates "
            "its tasks itself, every `evaluation_every_steps` and at its end: see the lines with "
            '"kind": "evaluation" of its metrics.jsonl'
        )
    if (folder / "config.json").is_file():
        return (
            f"{folder} has no {RECORD}, which says how its images are to be prepared; transformers "
            "does not copy it. Models other than captioners are judged by --metrics knn, top1 "
            "or zeroshot. If this one was made from an export of this project, copy that file: cp "
            f"EXPORT/{RECORD} {folder}"
        )
    return (
        f"{folder} is no export: it has no {RECORD}; make one with `python -m tools.convert "
        "export-git --run RUN --out EXPORT`"
    )


def heldout_loader(
    data: CaptionDataSettings,
    tokenizer: Tokenizer,
    batch: int,
    max_samples: int | None = None,
    workers: int = 0,
) -> EvaluationLoader:
    """Batches of held-out samples in one process.

    Raises:
        FileNotFoundError, ShardError: the shards cannot be opened.
        ExpressionError: no sample meets the condition `where`.
    """
    source = open_source(data.shards, data.where)
    fields = CaptionProcessor(data, tokenizer, train=False)
    stream = TaskStream(
        "heldout", SampleReader(source.shards), None, fields, 0, batch, batch, source.selection
    )
    return EvaluationLoader(stream, 0, 1, workers=workers, max_samples=max_samples)

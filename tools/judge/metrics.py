"""The metrics of `tools.evaluate --metrics`, each over all images of some shards."""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.images.transforms import ImageSettings
from data_pipeline.loader.loader import EvaluationLoader, TaskStream
from data_pipeline.order.sources import open_source
from data_pipeline.reading.reader import SampleReader
from data_pipeline.samples.caption_texts import CaptionTexts, CleaningSettings
from data_pipeline.samples.captions import CaptionDataSettings
from data_pipeline.samples.labels import NO_LABEL, LabelDataSettings, LabelProcessor
from pretrain.objectives.probing import knn_top1, linear_top1
from pretrain.objectives.retrieval import retrieval_recalls
from tools.judge.models import Judged, normalised
from tools.judge.moves import MOVES, amounts, directions, moved
from tools.judge.prompts import Prompts, read_prompts

_MOST_CLASSES = 1 << 20
"""Of labels: their number says the model, or the file of class names."""


class Metrics:
    """A model, the images that it is judged on, and the options of the command."""

    def __init__(self, judged: Judged, options: argparse.Namespace, device: torch.device) -> None:
        self.judged, self.options, self.device = judged, options, device
        self.left_out: dict[str, dict[str, int]] = {}
        """Shards -> why images of them took no part, and how many did not."""

    # ---- images --------------------------------------------------------------------------------

    def _batches(
        self, shards: Sequence[str], image: ImageSettings | None = None
    ) -> Iterator[dict[str, Any]]:
        """Batches with images, labels (NO_LABEL where there is none), row and valid."""
        options = self.options
        image = image or self.judged.image
        data = LabelDataSettings(
            shards=list(shards),
            image=image,
            label_source=options.label_source,
            classes=_MOST_CLASSES,
        )
        source = open_source(data.shards, options.where)
        size = 1 if image.mode == "keep_aspect" else options.batch
        fields = LabelProcessor(data, train=False)
        stream = TaskStream(
            "judged", SampleReader(source.shards), None, fields, 0, size, size, source.selection
        )
        loader = EvaluationLoader(
            stream, 0, 1, workers=options.workers, max_samples=options.max_samples
        )
        yield from loader
        bad = sum(count.replaced for count in loader.faults().values())
        self.left_out.setdefault(", ".join(shards), {})["bad"] = bad

    def _labelled(
        self, shards: Sequence[str], image: ImageSettings | None = None
    ) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """Pixels on the device, labels and rows of the images that have a class. Raises ValueError:
        none has."""
        found = without = 0
        for batch in self._batches(shards, image):
            known = batch["valid"] & (batch["labels"] != NO_LABEL)
            found += int(known.sum())
            without += int((batch["valid"] & ~known).sum())
            if known.any():
                pixels = normalised(batch["images"][known], self.judged.image, self.device)
                yield pixels, batch["labels"][known], batch["row"][known].tolist()
        self.left_out[", ".join(shards)]["without a class"] = without
        if not found:
            raise ValueError(
                f"{', '.join(shards)}: no sample has a class at {self.options.label_source}; "
                "--label-source says where it is"
            )

    def _all(self, compute, shards: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What is computed of all labelled images, (N, ...) on the CPU, and their labels (N,)."""
        parts = [(compute(p).cpu(), y) for p, y, _ in self._labelled(shards)]
        values, labels = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(labels)

    # ---- metrics -------------------------------------------------------------------------------

    def features(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Vectors and labels of --train, and of --shards."""
        if not self.options.train:
            raise ValueError("knn and linear learn from labelled images: give them with --train")
        parts = [
            self._all(self.judged.vectors, s) for s in (self.options.train, self.options.shards)
        ]
        return *parts[0], *parts[1]

    def knn(self) -> dict[str, Any]:
        """Top-1 of the votes of the 20 nearest neighbours in --train."""
        return {"knn_top1": knn_top1(*self.features())}

    def linear(self) -> dict[str, Any]:
        """Top-1 of logistic regression on --train."""
        top1, strength = linear_top1(*self.features())
        return {"linear_top1": top1, "linear_strength": strength}

    def top1(self) -> dict[str, Any]:
        """top1, top5, and how often which class was taken for which: confusion[true][said]."""
        scores, labels = self._all(self.judged.scores, self.options.shards)
        return _accuracy(scores, labels)

    def zeroshot(self) -> dict[str, Any]:
        """top1 and top5 of the class whose prompts are most similar."""
        prompts = read_prompts(self.options.prompts)
        images, labels = self._all(self.judged.image_features, self.options.shards)
        found = _accuracy(images @ self.class_vectors(prompts).cpu().T, labels)
        return {f"zeroshot_{name}": value for name, value in found.items()}

    def class_vectors(self, prompts: Prompts) -> Tensor:
        """(classes, D): the mean of the vectors of a class's prompts, made of unit length."""
        rows = [self.judged.text_features(texts).mean(0) for texts in prompts.texts()]
        return F.normalize(torch.stack(rows), dim=1)

    def retrieval(self) -> dict[str, Any]:
        """Recall at 1, 5 and 10 in both directions; equal texts match each other's images."""
        source = open_source(self.options.shards, self.options.where)
        texts, reader = (
            CaptionTexts(_sources(self.options), CleaningSettings()),
            SampleReader(source.shards),
        )
        images, words, image_of = [], [], []
        for batch in self._batches(self.options.shards):
            for place in batch["valid"].nonzero()[:, 0].tolist():
                sample = reader.read(int(batch["row"][place]))
                pixels = normalised(
                    batch["images"][place : place + 1], self.judged.image, self.device
                )
                captions = texts.references(sample)[0]
                words += captions
                image_of += [len(images)] * len(captions)
                images.append(self.judged.image_features(pixels).cpu())
        unique = list(dict.fromkeys(words))
        size = self.options.batch
        parts = [
            self.judged.text_features(unique[at : at + size]).cpu()
            for at in range(0, len(unique), size)
        ]
        number = {text: n for n, text in enumerate(unique)}
        kind = torch.tensor([number[text] for text in words])
        vectors = torch.cat(parts)[kind]
        recalls = retrieval_recalls(torch.cat(images), vectors, torch.tensor(image_of), kind)
        return recalls | {"images": len(images), "texts": len(words)}

    def resolutions(self) -> dict[str, Any]:
        """top1 at several sizes of the images."""
        size = self.judged.image.size
        # Multiples of 32, or of a quarter of small images: of every usual patch size.
        step = 32 if size % 32 == 0 and size >= 128 else max(1, size // 4)
        parts = (0.5, 0.75, 1, 1.25, 1.5, 2)
        sizes = self.options.sizes or sorted({max(1, round(size * p / step)) * step for p in parts})
        curve = {}
        for one in sizes:
            image = self.judged.image.model_copy(update={"size": one})
            hits = [
                (self.judged.scores(p).argmax(1).cpu() == y)
                for p, y, _ in self._labelled(self.options.shards, image)
            ]
            curve[one] = float(torch.cat(hits).float().mean())
        return {"resolutions": {"size": list(curve), "top1": list(curve.values())}}

    def invariance(self) -> dict[str, Any]:
        """Of images moved, turned and zoomed: top1, agreement with what is said of the image left
        alone, and cross-entropy to its class probabilities."""
        size = self.judged.image.size
        sums = {move: {a: [0.0, 0.0, 0.0] for a in amounts(move, size)} for move in MOVES}
        count = 0
        for pixels, labels, rows in self._labelled(self.options.shards):
            before = self.judged.scores(pixels).cpu()
            ways = directions(rows)
            count += len(labels)
            for move, of_move in sums.items():
                for amount, total in of_move.items():
                    after = self.judged.scores(moved(pixels, move, amount, ways)).cpu()
                    said = after.argmax(1)
                    total[0] += float((said == labels).sum())
                    total[1] += float((said == before.argmax(1)).sum())
                    total[2] += float(F.cross_entropy(after, before.softmax(1), reduction="sum"))
        names = ("top1", "agreement", "cross_entropy")
        return {
            move: {"amount": list(of_move)}
            | {n: [t[i] / count for t in of_move.values()] for i, n in enumerate(names)}
            for move, of_move in sums.items()
        }


def _accuracy(scores: Tensor, labels: Tensor) -> dict[str, Any]:
    classes = scores.shape[1]
    if int(labels.max()) >= classes:
        raise ValueError(
            f"the images have a class {int(labels.max())}, and {classes} classes are known"
        )
    best = scores.topk(min(5, classes)).indices
    right = best == labels[:, None]
    table = torch.zeros(classes, classes, dtype=torch.int64)
    table.index_put_((labels, best[:, 0]), torch.ones_like(labels), accumulate=True)
    found: dict[str, Any] = {"top1": float(right[:, 0].float().mean())}
    if classes > 5:
        found["top5"] = float(right.any(1).float().mean())
    return found | {"images": len(labels), "confusion": table.tolist()}


def _sources(options: argparse.Namespace) -> Any:
    """Where captions are, as settings."""
    words = options.caption_source or ["json:captions"]
    return CaptionDataSettings(shards=list(options.shards), caption_source=words).caption_source

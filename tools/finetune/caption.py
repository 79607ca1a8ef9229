"""`caption`: transformers' GIT, scored by CIDEr-D."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import AutoConfig, GitForCausalLM

from data_pipeline.loader.loader import EvaluationLoader, TaskStream
from data_pipeline.samples.tokenizer import Tokenizer
from pretrain.models.pixels import normalise_pixels
from pretrain.objectives.captioning.evaluation import evaluate_captions
from tools.convert.transformers_git import read_git
from tools.finetune.settings import FinetuneSettings
from tools.finetune.source import Source


def build_captioner(source: Source, seed: int) -> GitForCausalLM:
    """The model of a folder, or one of its shape. Raises ValueError: it is no GIT."""
    if source.config["model_type"] != "git":
        raise ValueError(
            f"{source.folder}: model_type is {source.config['model_type']}; caption takes a GIT: "
            "a run with a captioning task, or its export (--to transformers)"
        )
    if not source.scratch:
        return read_git(source.folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GitForCausalLM(AutoConfig.from_pretrained(source.folder, local_files_only=True))


class Caption:
    """A `Task` of the loop."""

    def __init__(
        self,
        model: GitForCausalLM,
        tokenizer: Tokenizer,
        stream: TaskStream,
        test: TaskStream,
        image: Any,
        settings: FinetuneSettings,
    ) -> None:
        self.model, self.tokenizer, self.stream, self.test = model, tokenizer, stream, test
        self.image, self.settings = image, settings

    def groups(self) -> list[dict[str, Any]]:
        """As of `Task`: one rate for all; vectors do not decay."""
        learned = [p for p in self.model.parameters() if p.requires_grad]
        matrices = [p for p in learned if p.dim() > 1]
        vectors = [p for p in learned if p.dim() <= 1]
        rate, decay = self.settings.lr, self.settings.weight_decay
        return [
            {"params": matrices, "lr": rate, "weight_decay": decay},
            {"params": vectors, "lr": rate, "weight_decay": 0.0},
        ]

    def probe_batch(self) -> dict[str, Tensor]:
        """As of `Task`."""
        tokens = torch.tensor([[[self.tokenizer.bos_id, self.tokenizer.eos_id]]])
        size = self.image.size
        return {
            "images": torch.zeros(1, 3, size, size, dtype=torch.uint8),
            "tokens": tokens,
            "loss_mask": torch.tensor([[[False, True]]]),
        }

    def count(self, batch: Mapping[str, Any]) -> int:
        """As of `Task`: words that are predicted."""
        return int(batch["loss_mask"][..., 1:].sum())

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """As of `Task`."""
        scores, targets = self._scores(model, batch)
        smoothing = self.settings.label_smoothing
        return nn.functional.cross_entropy(
            scores, targets, reduction="sum", label_smoothing=smoothing
        )

    def evaluate(self, accelerator: Accelerator) -> dict[str, float]:
        """Metrics of captions as `tools.evaluate` has them."""
        loader = EvaluationLoader(
            self.test,
            accelerator.process_index,
            accelerator.num_processes,
            workers=self.settings.workers,
        )

        def judge(batch: Mapping[str, Any]) -> tuple[dict[str, float], list[list[int]]]:
            device = accelerator.device
            moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            with accelerator.autocast():
                scores, targets = self._scores(self.model, moved)
                ids = self.model.generate(
                    pixel_values=self._pixels(moved["images"]), do_sample=False, num_beams=1
                )
            losses = nn.functional.cross_entropy(scores, targets, reduction="sum")
            right = (scores.argmax(-1) == targets).sum()
            return {"cross_entropy": float(losses), "token_accuracy": float(right)}, ids.tolist()

        found = evaluate_captions(
            judge, loader, self.tokenizer, lambda one: gather_object([one]), keep_images=0
        )
        if not found.metrics["images"]:
            raise ValueError("none of the held-out images could be used")
        return {name: value for name, value in found.metrics.items() if value is not None}

    def _scores(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Scores (N, vocabulary) float32 and answers (N,) of the predicted words of a batch."""
        tokens, mask = (batch[name][:, 0] for name in ("tokens", "loss_mask"))
        logits = model(
            pixel_values=self._pixels(batch["images"]),
            input_ids=tokens[:, :-1],
            use_cache=False,
            logits_to_keep=tokens.shape[1] - 1,
        ).logits
        supervised = mask[:, 1:]
        return logits[supervised].float(), tokens[:, 1:][supervised]

    def _pixels(self, images: Tensor) -> Tensor:
        return normalise_pixels(images, self.image.mean, self.image.std, torch.float32)

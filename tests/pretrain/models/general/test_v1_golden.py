"""The released Uni-Perceiver and Uni-Perceiver-MoE: logits, losses and mask of four tasks."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from pretrain.models.bert.settings import BertSettings
from pretrain.models.general.decoder import Part, caption_masks, folded
from pretrain.models.general.settings import (
    ExpertSettings,
    GeneralDecoderSettings,
    PatchesSettings,
)
from pretrain.models.general.v1 import to_ours
from tests.pretrain.contexts import text_context

GOLDENS = Path(__file__).parents[3] / "goldens"
SPECIAL = 63


class V1:
    """The model of a golden file, and its tensors."""

    def __init__(self, kind: str) -> None:
        with safe_open(GOLDENS / f"uniperceiver_v1_tiny_{kind}.safetensors", "pt") as file:
            self.data = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        experts = None
        if kind == "moe":
            experts = ExpertSettings(number=4, chosen=2, every=2, attention=True)
        self.decoder = GeneralDecoderSettings(
            width=32,
            layers=2,
            heads=4,
            hidden=64,
            norm="before",
            layer_scale=0.5,
            experts=experts,
            max_queries=16,
        ).build()
        self.text = BertSettings(
            layout="bert", width=32, layers=0, heads=4, max_positions=16, token_types=2
        ).build(text_context(64, 62))
        self.image = PatchesSettings(image_size=32, patch_size=16, width=32).build()
        weights = {n.removeprefix("weight."): t for n, t in self.data.items() if "weight." in n[:7]}
        ours = to_ours(weights, SPECIAL, "image", "text", "decoder")
        torch.nn.ModuleDict(
            {"image": self.image, "text": self.text, "decoder": self.decoder}
        ).load_state_dict(ours)
        self.decoder.eval()

    def spe(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.decoder.special(len(tokens)), tokens], dim=1)

    def texts(self, name: str, pads: str | None, attribute: str) -> torch.Tensor:
        """Outputs of [SPE, text] for each text."""
        ids = self.data[name]
        there = torch.ones_like(ids, dtype=torch.bool)
        if pads is not None:
            there = self.data[pads] == 0
        tokens, _ = self.text.sequence(ids, there)
        mask = F.pad(there, (1, 0), value=True)[:, None, None]
        return self.decoder.run([Part(self.spe(tokens), attribute, mask)])[0]

    def logits(self, vectors: torch.Tensor, others: torch.Tensor, family: str) -> torch.Tensor:
        compared = self.decoder.compared(vectors) @ self.decoder.compared(others).T
        return self.decoder.scales[family]() * compared

    def task_logits(self) -> dict[str, torch.Tensor]:
        prefix = self.spe(self.image(self.data["image"]))
        image = self.decoder.run([Part(prefix, "image")])[0][:, 0]
        classes = self.texts("class_tokens", "class_pad", "text")[:, 0]
        words = self.texts("vocab_tokens", None, "words")[:, 0]
        captions = self.texts("caption_tokens", "caption_pad", "text")[:, 0]
        masked = self.texts("mlm_tokens", None, "masked_text")[:, 1:]
        text, _ = self.text.sequence(
            self.data["caption_tokens"], torch.ones(2, 4, dtype=torch.bool)
        )
        masks = caption_masks(4, prefix.shape[1])
        queries = self.decoder.special(2, 4)
        found = self.decoder.run(
            [
                Part(prefix, "caption_image", masks[0]),
                Part(text, "caption_text", masks[1]),
                Part(queries, "caption_text", masks[2]),
            ]
        )[2]
        asked = self.data["coco_caption.target_idx"] != -1
        predicted = self.data["books.target_idx"] != -1
        return {
            "imagenet": self.logits(image, classes, "classification"),
            "coco_retrieve": self.logits(image, captions, "retrieval"),
            "books": self.logits(masked[predicted], words, "mlm"),
            "coco_caption": self.logits(found[asked], words, "caption"),
        }


@pytest.fixture(scope="module", params=["dense", "moe"])
def v1(request) -> V1:
    return V1(request.param)


def test_logits_and_losses_are_those_of_the_released_code(v1):
    for task, logits in v1.task_logits().items():
        torch.testing.assert_close(logits, v1.data[f"{task}.logits0"], rtol=1e-5, atol=1e-5)
        targets = v1.data[f"{task}.targets0"]
        smooth = 0.1 if task in ("imagenet", "coco_retrieve") else 0.0
        weight = 0.5 if task in ("books", "coco_retrieve") else 1.0
        sides = [logits, logits.T] if task == "coco_retrieve" else [logits]
        losses = [weight * F.cross_entropy(s, targets, label_smoothing=smooth) for s in sides]
        prefix = f"{task}.loss."
        expected = [v1.data[name] for name in sorted(v1.data) if name.startswith(prefix)]
        torch.testing.assert_close(torch.stack(losses), torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_the_three_masks_are_the_whole_mask(v1):
    """Joined, they say of 13 tokens what the released code's mask says."""
    masks = caption_masks(4, 5)
    rows = [torch.ones(5, 5, dtype=torch.bool), *(mask[0, 0] for mask in masks[1:])]
    whole = torch.cat([F.pad(row, (0, 13 - row.shape[1])) for row in rows])
    assert torch.equal(~whole, v1.data["caption_attn_mask_blocked"].bool())


def test_folded_experts_give_the_same():
    v1 = V1("moe")
    before = v1.task_logits()
    kinds = ["image", "masked_text", "caption_image", "caption_text", "text", "words"]
    v1.decoder = folded(v1.decoder, kinds)
    for task, logits in v1.task_logits().items():
        torch.testing.assert_close(logits, before[task], rtol=1e-6, atol=1e-6)
    v1.decoder = folded(V1("moe").decoder, ["image"])
    with pytest.raises(ValueError, match="folded for image, and not for text"):
        v1.task_logits()

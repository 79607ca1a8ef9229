"""Caption metrics against the COCO evaluation's own values."""

import json
import time

import numpy as np
import pytest

from pretrain.objectives.captioning.metrics import caption_scores
from pretrain.objectives.captioning.words import caption_words
from tests.pretrain.models.git.git_models import GOLDENS

METRICS = json.loads((GOLDENS / "git_caption_metrics.json").read_text(encoding="utf-8"))
WORDS = json.loads((GOLDENS / "git_caption_words.json").read_text(encoding="utf-8"))["captions"]


@pytest.mark.parametrize("case", METRICS["sets"], ids=lambda case: str(case["hypothesis_index"]))
def test_golden_scores(case: dict) -> None:
    images, index = METRICS["images"], case["hypothesis_index"]
    scores = caption_scores(
        [image["hypotheses"][index] for image in images],
        [image["references"] for image in images],
    )
    assert scores.means["cider_d"] == pytest.approx(case["CIDEr"], rel=1e-12)
    assert scores.means["rouge_l"] == pytest.approx(case["ROUGE_L"], rel=1e-12)
    np.testing.assert_allclose(scores.per_image["cider_d"], case["CIDEr_per_image"], rtol=1e-12)
    np.testing.assert_allclose(scores.per_image["rouge_l"], case["ROUGE_L_per_image"], rtol=1e-12)
    for order in range(4):
        key = f"bleu_{order + 1}"
        assert scores.means[key] == pytest.approx(case["Bleu"][order], rel=1e-12)
        np.testing.assert_allclose(scores.per_image[key], case["Bleu_per_image"][order], rtol=1e-9)


@pytest.mark.parametrize("case", METRICS["sets"], ids=lambda case: str(case["hypothesis_index"]))
def test_golden_words(case: dict) -> None:
    for i, image in enumerate(METRICS["images"]):
        hypothesis = image["hypotheses"][case["hypothesis_index"]]
        assert " ".join(caption_words(hypothesis)) == case["tokenized_hypotheses"][i]
        found = [" ".join(caption_words(text)) for text in image["references"]]
        assert found == case["tokenized_references"][i]


@pytest.mark.parametrize("case", WORDS, ids=lambda case: case["caption"])
def test_words_are_those_of_the_java_tokenizer(case: dict) -> None:
    assert " ".join(caption_words(case["caption"])) == case["words"]


def test_perfect_captions() -> None:
    references = [["a dog runs on the sand"], ["two birds sit on a wire"], ["an empty street"]]
    scores = caption_scores([texts[0] for texts in references], references)
    assert scores.means["bleu_1"] == pytest.approx(1)
    assert scores.means["rouge_l"] == pytest.approx(1)
    # No 4-gram fits into three words, so that image has 3 of 4 orders.
    np.testing.assert_allclose(scores.per_image["cider_d"], [10, 10, 7.5])


def test_empty_texts_score_zero() -> None:
    scores = caption_scores(["", "a dog", "..."], [["a dog"], [""], ["a cat", ""]])
    assert all(value == pytest.approx(0, abs=1e-8) for value in scores.means.values())
    assert all(np.isfinite(values).all() for values in scores.per_image.values())


def test_images_do_not_touch_each_other() -> None:
    """Same words in another image's references must not count as matches."""
    scores = caption_scores(["red bus", "blue boat"], [["blue boat"], ["red bus"]])
    assert scores.means["rouge_l"] == 0 and scores.means["cider_d"] == 0


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="2 captions for 1 images"):
        caption_scores(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="0 captions for 0 images"):
        caption_scores([], [])
    with pytest.raises(ValueError, match="image number 1 has no reference"):
        caption_scores(["a", "b"], [["a"], []])


def test_a_thousand_images_take_a_moment() -> None:
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, 3001)
    share /= share.sum()

    def caption() -> str:
        return " ".join(f"w{i}" for i in rng.choice(3000, rng.integers(8, 16), p=share))

    references = [[caption() for _ in range(5)] for _ in range(1000)]
    captions = [caption() for _ in range(1000)]
    start = time.process_time()
    caption_scores(captions, references)
    # About 0.15 s of CPU here; the reference implementation needs seconds.
    assert time.process_time() - start < 1.5

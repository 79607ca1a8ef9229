"""CIDEr-D, BLEU-1..4 and ROUGE-L of a set of captions, in numpy.

The definitions are those of the COCO caption evaluation. All n-grams of the set become integers
once; counting, matching and weighting are then array operations over the whole set.

CIDEr-D weighs words by how rare they are among the references of the set, so scores of sets of
different size or content cannot be compared: report the number of images with the score.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.objectives.captioning.words import caption_words

_ORDERS = 4
# CIDEr-D: spread in words of the penalty on a difference in length, and the customary factor.
_CIDER_SIGMA = 6.0
_CIDER_SCALE = 10.0
_ROUGE_BETA = 1.2
# Keep BLEU's ratios defined; the values are part of the published scores of short captions.
_BLEU_TINY = 1e-15
_BLEU_SMALL = 1e-9

Array = np.ndarray


@dataclass(frozen=True)
class CaptionScores:
    """Scores of a set: cider_d (0 to 10, not the percentage), bleu_1 .. bleu_4, rouge_l."""

    means: dict[str, float]
    """Score of the whole set. BLEU pools its counts; the others are means over images."""
    per_image: dict[str, Array]
    """Score of each image, float64 (images,)."""


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Score one caption per image against that image's references.

    Raises:
        ValueError: no images, different numbers of captions and images, or an image without
            references.
    """
    if len(captions) != len(references) or not captions:
        raise ValueError(
            f"{len(captions)} captions for {len(references)} images; one caption per image, and "
            "at least one image, are needed"
        )
    if missing := [i for i, texts in enumerate(references) if not texts]:
        raise ValueError(f"image number {missing[0]} has no reference captions")
    corpus = _Corpus.of(captions, references)
    counts = [_NgramCounts.of(corpus, order) for order in range(1, _ORDERS + 1)]
    cider = _cider_d(corpus, counts)
    bleu, bleu_per_image = _bleu(corpus, counts)
    rouge = _rouge_l(corpus)
    means, per_image = {"cider_d": float(cider.mean())}, {"cider_d": cider}
    for order in reversed(range(_ORDERS)):  # the longest says most
        means[f"bleu_{order + 1}"] = float(bleu[order])
        per_image[f"bleu_{order + 1}"] = bleu_per_image[order]
    means["rouge_l"], per_image["rouge_l"] = float(rouge.mean()), rouge
    return CaptionScores(means, per_image)


@dataclass(frozen=True)
class _Corpus:
    """Sentences as one run of word ids: first the caption of every image, then all references."""

    images: int
    words: Array
    """int64 (W,): word ids of all sentences, one after the other."""
    lengths: Array
    """int64 (S,): words in each sentence."""
    image_of: Array
    """int64 (S,): the image that each sentence belongs to."""

    @classmethod
    def of(cls, captions: Sequence[str], references: Sequence[Sequence[str]]) -> "_Corpus":
        vocabulary: dict[str, int] = {}
        words: list[int] = []
        lengths: list[int] = []
        sentences = [*captions, *(text for texts in references for text in texts)]
        for sentence in sentences:
            found = caption_words(sentence)
            words.extend(vocabulary.setdefault(word, len(vocabulary)) for word in found)
            lengths.append(len(found))
        owners = np.arange(len(captions))
        image_of = np.concatenate([owners, owners.repeat([len(texts) for texts in references])])
        return cls(len(captions), np.array(words, np.int64), np.array(lengths, np.int64), image_of)

    @property
    def reference_counts(self) -> Array:
        return np.bincount(self.image_of[self.images :], minlength=self.images)


@dataclass(frozen=True)
class _NgramCounts:
    """How often each n-gram of one order occurs in each sentence, and its counterparts.

    Entries are sorted by (sentence, n-gram), so those of the captions come first.
    """

    sentence: Array
    """int64 (E,): sentence of each entry."""
    ngram: Array
    """int64 (E,): id of the n-gram, 0 .. kinds - 1."""
    count: Array
    """int64 (E,): occurrences in that sentence."""
    kinds: int
    of_captions: int
    """Entries that belong to captions; the rest belongs to references."""
    partner: Array
    """int64 (E - of_captions,): for a reference's entry the entry of the same n-gram in the caption
    of that image, or -1."""

    @classmethod
    def of(cls, corpus: _Corpus, order: int) -> "_NgramCounts":
        ids, owners = _ngram_ids(corpus, order)
        kinds = int(ids.max()) + 1 if len(ids) else 1
        entries, count = np.unique(owners * kinds + ids, return_counts=True)
        sentence, ngram = entries // kinds, entries % kinds
        of_captions = int(np.searchsorted(sentence, corpus.images))
        # The caption of an image is the sentence with the image's number.
        wanted = corpus.image_of[sentence[of_captions:]] * kinds + ngram[of_captions:]
        partner = np.full(len(wanted), -1)
        if of_captions:
            place = np.minimum(np.searchsorted(entries[:of_captions], wanted), of_captions - 1)
            found = entries[place] == wanted
            partner[found] = place[found]
        return cls(sentence, ngram, count, kinds, of_captions, partner)


def _ngram_ids(corpus: _Corpus, order: int) -> tuple[Array, Array]:
    """Dense ids of all n-grams of one order in reading order, and the sentence of each."""
    owners = np.arange(len(corpus.lengths)).repeat(corpus.lengths)
    starts = np.arange(len(owners))
    if order > 1:
        # An n-gram must end in the sentence that it starts in.
        starts = starts[: -(order - 1)]
        starts = starts[owners[starts] == owners[starts + order - 1]]
    ids = corpus.words[starts] if len(starts) else np.zeros(0, np.int64)
    radix = int(corpus.words.max()) + 1 if len(corpus.words) else 1
    for offset in range(1, order):
        # Compress after every word: the product of a dense id and a word id stays far below 2^63.
        ids = np.unique(ids * radix + corpus.words[starts + offset], return_inverse=True)[1]
    return ids.reshape(-1), owners[starts]


def _cider_d(corpus: _Corpus, counts: list[_NgramCounts]) -> Array:
    """CIDEr-D of each image."""
    sentences = len(corpus.lengths)
    # The evaluation code takes the number of bigrams for the length of a sentence.
    bigrams = np.maximum(corpus.lengths - 1, 0)
    difference = bigrams[corpus.image_of] - bigrams
    penalty = np.exp(-(difference**2) / (2 * _CIDER_SIGMA**2))
    total = np.zeros(sentences)
    for entry in counts:
        weight = entry.count * _inverse_frequency(corpus, entry)
        norm = np.sqrt(np.bincount(entry.sentence, weight**2, minlength=sentences))
        theirs = weight[entry.of_captions :]
        ours = np.where(entry.partner >= 0, weight[entry.partner], 0.0)
        products = np.minimum(ours, theirs) * theirs
        overlap = np.bincount(entry.sentence[entry.of_captions :], products, minlength=sentences)
        scale = norm[corpus.image_of] * norm
        total += np.divide(overlap, scale, out=np.zeros(sentences), where=scale > 0)
    similarity = (total * penalty / _ORDERS)[corpus.images :]
    sums = np.bincount(corpus.image_of[corpus.images :], similarity, minlength=corpus.images)
    return _CIDER_SCALE * sums / corpus.reference_counts


def _inverse_frequency(corpus: _Corpus, entry: _NgramCounts) -> Array:
    """log(images / images whose references hold the n-gram), for each entry."""
    ngram = entry.ngram[entry.of_captions :]
    image = corpus.image_of[entry.sentence[entry.of_captions :]]
    seen = np.unique(image * entry.kinds + ngram) % entry.kinds
    frequency = np.maximum(np.bincount(seen, minlength=entry.kinds), 1)
    return (np.log(corpus.images) - np.log(frequency))[entry.ngram]


def _bleu(corpus: _Corpus, counts: list[_NgramCounts]) -> tuple[Array, Array]:
    """BLEU-1..4 of the set (4,), and of each image (4, images)."""
    images = corpus.images
    lengths = corpus.lengths[:images].astype(float)
    closest = _closest_lengths(corpus)
    correct = np.stack([_clipped_matches(entry, images) for entry in counts])
    guessed = np.maximum(lengths - np.arange(_ORDERS)[:, None], 0)
    per_image = _bleu_of(correct, guessed, lengths, closest)
    pooled = _bleu_of(
        correct.sum(1, keepdims=True),
        guessed.sum(1, keepdims=True),
        lengths.sum(keepdims=True),
        closest.sum(keepdims=True),
    )
    return pooled[:, 0], per_image


def _bleu_of(correct: Array, guessed: Array, length: Array, closest: Array) -> Array:
    """Geometric means of the precisions, with the penalty on short captions: (4, n)."""
    precision = (correct + _BLEU_TINY) / (guessed + _BLEU_SMALL)
    orders = np.arange(1, _ORDERS + 1)[:, None]
    mean = np.cumprod(precision, axis=0) ** (1 / orders)
    ratio = (length + _BLEU_TINY) / (closest + _BLEU_SMALL)
    return np.where(ratio < 1, mean * np.exp(np.minimum(0, 1 - 1 / ratio)), mean)


def _clipped_matches(entry: _NgramCounts, images: int) -> Array:
    """N-grams of each caption that occur in one of its references, each as often as there."""
    allowed = np.zeros(entry.of_captions, np.int64)
    matched = entry.partner >= 0
    np.maximum.at(allowed, entry.partner[matched], entry.count[entry.of_captions :][matched])
    clipped = np.minimum(allowed, entry.count[: entry.of_captions])
    return np.bincount(entry.sentence[: entry.of_captions], clipped, minlength=images)


def _closest_lengths(corpus: _Corpus) -> Array:
    """Length of the reference nearest in length, the shorter one if two are equally near."""
    lengths, image = corpus.lengths[corpus.images :], corpus.image_of[corpus.images :]
    distance = np.abs(lengths - corpus.lengths[image])
    order = np.lexsort((lengths, distance, image))
    first = order[np.unique(image[order], return_index=True)[1]]
    return lengths[first].astype(float)


def _rouge_l(corpus: _Corpus) -> Array:
    """F-measure of the longest common subsequence, best precision and recall over references."""
    common = _longest_common_subsequences(corpus).astype(float)
    image = corpus.image_of[corpus.images :]
    precision = common / np.maximum(corpus.lengths[image], 1)
    recall = common / np.maximum(corpus.lengths[corpus.images :], 1)
    best_precision, best_recall = np.zeros(corpus.images), np.zeros(corpus.images)
    np.maximum.at(best_precision, image, precision)
    np.maximum.at(best_recall, image, recall)
    beta = _ROUGE_BETA**2
    below = best_recall + beta * best_precision
    above = (1 + beta) * best_precision * best_recall
    return np.divide(above, below, out=np.zeros(corpus.images), where=below > 0)


def _longest_common_subsequences(corpus: _Corpus) -> Array:
    """Length of the longest common subsequence of every reference with its caption, int64 (R,)."""
    starts = np.cumsum(corpus.lengths) - corpus.lengths
    width = int(corpus.lengths.max(initial=0))
    # Sentences as rows, padded with a value that is no word (and differs between the two sides).
    column = np.arange(width)
    inside = column < corpus.lengths[:, None]
    table = np.full(inside.shape, -1)
    table[inside] = corpus.words[(starts[:, None] + column)[inside]]
    ours = table[corpus.image_of[corpus.images :]]
    theirs = np.where(inside[corpus.images :], table[corpus.images :], -2)
    row = np.zeros((len(ours), width + 1), np.int64)
    for i in range(width):
        equal = ours[:, i, None] == theirs
        # Extending a match found before position j, or leaving word i out; then carry to the right.
        best = np.maximum(row[:, 1:], np.where(equal, row[:, :-1] + 1, 0))
        row[:, 1:] = np.maximum.accumulate(best, axis=1)
    return row[:, -1]

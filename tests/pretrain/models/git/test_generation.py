"""Generated texts obey their rules: beams, tries, draws and scores against plain counterparts."""

import itertools

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pretrain.models.git.beams import generate_beams
from pretrain.models.git.reading import Prompt, TextReader
from pretrain.models.git.sampling import Draws, draw, generate_words, likely_words
from pretrain.models.git.scoring import score_texts
from pretrain.models.git.trie import Trie
from tests.pretrain.models.git.git_models import small_model

SPECIAL = {"eos_id": 2, "pad_id": 0}
PROMPTS = [[1], [1, 9, 8, 7], [1, 5]]


@pytest.fixture(scope="module")
def decoder():
    model = small_model(3, initial_std=0.3)
    return model.objectives["caption"].decoder.eval()


@pytest.fixture(scope="module")
def image_tokens():
    return torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))


def log_likelihood(decoder, image, prompt, text) -> torch.Tensor:
    """By one pass of training over the whole text."""
    whole = [*prompt, *text]
    logits = decoder(image[None], torch.tensor([[whole[:-1]]]), torch.arange(len(whole) - 1))
    by_word = logits.log_softmax(-1).gather(1, torch.tensor(whole[1:])[:, None])[:, 0]
    return by_word[len(prompt) - 1 :].sum()


def test_reading_in_pieces_is_reading_at_once(decoder, image_tokens):
    """Texts side by side, in any pieces and among padding, are what training reads."""
    texts = torch.randint(3, 97, (3, 2, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = decoder(image_tokens, texts, torch.arange(texts.numel())).view(3, 2, 7, -1)
        reader = TextReader(decoder, image_tokens)
        lengths = torch.tensor([[2, 4], [3, 3], [1, 4]])
        hidden = reader.read(texts[..., :4], lengths)
        for row, column in itertools.product(range(3), range(2)):
            n = int(lengths[row, column])
            got = reader.scores(hidden[row, column, :n])
            torch.testing.assert_close(got, whole[row, column, :n].log_softmax(-1))
        for place in range(3):
            words = texts.gather(2, (lengths + place)[..., None])
            got = reader.scores(reader.read(words)[:, :, 0])
            at = (lengths + place)[..., None, None].expand(-1, -1, 1, whole.shape[-1])
            torch.testing.assert_close(got, whole.gather(2, at)[:, :, 0].log_softmax(-1))


@pytest.mark.parametrize("normalisation", ["transformers", "original"])
def test_as_many_beams_as_texts_find_the_best(decoder, image_tokens, normalisation):
    names = [[4], [4, 5], [4, 5, 6], [7, 4], [8, 8, 8, 8], [9]]
    prompt = Prompt.of(PROMPTS, 0, "cpu")
    ids, scores = generate_beams(
        decoder,
        image_tokens,
        prompt,
        max_new_tokens=6,
        beams=len(names),
        length_penalty=0.7,
        normalisation=normalisation,
        trie=Trie.build(names, 97, 2),
        **SPECIAL,
    )
    for row, start in enumerate(PROMPTS):

        def worth(name, row=row, start=start):
            found = log_likelihood(decoder, image_tokens[row], start, [*name, 2]).detach()
            if normalisation == "transformers":
                return float(found) / (len(name) + 1) ** 0.7
            return float(found) / ((5 + len(start) + len(name)) / 6) ** 0.7

        best = max(names, key=worth)
        assert ids[row].tolist()[: len(best) + 1] == [*best, 2]
        assert float(scores[row]) == pytest.approx(worth(best), abs=1e-4)


def test_scores_of_many_texts(decoder, image_tokens):
    generator = torch.Generator().manual_seed(5)
    texts = [
        torch.randint(3, 97, (n,), generator=generator).tolist() for n in (1, 5, 2, 3, 1, 6, 2)
    ]
    found = [
        score_texts(
            decoder, image_tokens, Prompt.of(PROMPTS, 0, "cpu"), texts, eos_id=2, chunk_tokens=chunk
        )
        for chunk in (1, 24, 4096)
    ]
    for (row, start), (n, text) in itertools.product(enumerate(PROMPTS), enumerate(texts)):
        wanted = log_likelihood(decoder, image_tokens[row], start, [*text, 2])
        for sums, means in found:
            torch.testing.assert_close(sums[row, n], wanted, atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(means[row, n], wanted / (len(text) + 1))


def test_drawn_words_belong_to_rows(decoder, image_tokens):
    """The same in another batch, others with another seed, and likely ones more often."""
    prompt = Prompt.of_bos(3, 1, image_tokens.device)
    how = {"max_new_tokens": 9, "temperature": 1.5, **SPECIAL}
    ids, scores = generate_words(decoder, image_tokens, prompt, draws=Draws(0, [4, 8, 6]), **how)
    alone = Prompt.of_bos(1, 1, image_tokens.device)
    for place, row in enumerate([4, 8, 6]):
        one, score = generate_words(
            decoder, image_tokens[place : place + 1], alone, draws=Draws(0, [row]), **how
        )
        assert one[0].tolist() == ids[place, : one.shape[1]].tolist()
        torch.testing.assert_close(score[0], scores[place])
    other, _ = generate_words(decoder, image_tokens, prompt, draws=Draws(1, [4, 8, 6]), **how)
    assert other.tolist() != ids.tolist()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1, 0, 1), (0.7, 5, 1), (2, 0, 0.6), (1.3, 9, 0.4), (1, 1, 1)],
)
def test_the_likely_words_are_those_of_transformers(temperature, top_k, top_p):
    scores = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    wanted = TemperatureLogitsWarper(float(temperature))(None, scores)
    if top_k:
        wanted = TopKLogitsWarper(top_k)(None, wanted)
    if top_p < 1:
        wanted = TopPLogitsWarper(top_p)(None, wanted)
    probabilities = likely_words(scores, temperature, top_k, top_p)
    torch.testing.assert_close(probabilities, wanted.softmax(-1))
    # Even numbers give each word its share.
    count = 20_000
    numbers = (torch.arange(count) + 0.5) / count
    for row in probabilities:
        drawn = draw(row.expand(count, -1), numbers).bincount(minlength=30)
        torch.testing.assert_close(drawn / count, row, atol=2 / count, rtol=0)


def test_all_ranks_run_as_many_passes(decoder, image_tokens):
    """A rank whose texts have ended goes on until the others' have."""
    prompt = Prompt.of_bos(3, 1, image_tokens.device)
    trie = Trie.build([[4]], 97, 2)
    for write in (generate_words, generate_beams):
        asked = []

        def agree(done, asked=asked):
            asked.append(done)
            return len(asked) == 5

        ids, _ = write(
            decoder, image_tokens, prompt, max_new_tokens=9, trie=trie, agree=agree, **SPECIAL
        )
        assert asked[1:] == [True] * 4 and ids[:, :2].tolist() == [[4, 2]] * 3
        assert (ids[:, 2:] == 0).all()


def test_what_is_no_trie_and_no_length(decoder, image_tokens):
    for texts in ([], [[]], [[4, 2, 5]], [[97]]):
        with pytest.raises(ValueError, match="no text"):
            Trie.build(texts, 97, 2)
    with pytest.raises(ValueError, match=r"prompt of 4 tokens .* at most 21"):
        generate_words(
            decoder, image_tokens, Prompt.of(PROMPTS, 0, "cpu"), max_new_tokens=18, **SPECIAL
        )
    with pytest.raises(ValueError, match="at most 21"):
        score_texts(decoder, image_tokens, Prompt.of(PROMPTS, 0, "cpu"), [[5] * 17], eos_id=2)

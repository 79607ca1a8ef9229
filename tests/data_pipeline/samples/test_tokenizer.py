"""Three kinds of files, roles read from them, a digest of the content."""

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_pipeline.samples.tokenizer import Tokenizer, TokenizerError, train_byte_level_bpe
from tests.data_pipeline.photos import caption, tokenizer

WORDPIECE = [
    "[PAD]",
    "[unused0]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "cat",
    "##s",
    ".",
    "on",
]
BPE = tokenizer()


@given(st.text())
def test_any_text_survives(text):
    assert BPE.decode(BPE.encode(text)) == text.strip()


def test_special_tokens_come_first_and_are_never_encoded():
    assert (BPE.pad_id, BPE.bos_id, BPE.eos_id) == (0, 1, 2)
    ids = BPE.encode("a <eos> in a caption <pad>")
    assert not {0, 1, 2} & set(ids)
    assert BPE.decode(ids) == "a <eos> in a caption <pad>"
    assert max(ids) < BPE.vocab_size <= 300


def test_decode_stops_at_the_end_token():
    ids = BPE.encode("a red bird")
    assert BPE.decode([1, *ids, 2, *ids, 0, 0]) == "a red bird"
    assert BPE.decode([1, 2, *ids]) == ""
    assert BPE.decode([*ids, 0, 0]) == "a red bird"


def test_training_is_deterministic():
    texts = [caption(number) for number in range(500)]
    first, second = (train_byte_level_bpe(iter(texts), 320) for _ in range(2))
    assert first.definition == second.definition
    assert first.digest == second.digest
    assert train_byte_level_bpe(texts[:50], 320).digest != first.digest


def test_lowercase():
    folded = train_byte_level_bpe(["a red bird"] * 3, 270, lowercase=True)
    assert folded.encode("A Red BIRD") == folded.encode("a red bird")
    assert BPE.encode("A Red BIRD") != BPE.encode("a red bird")


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(TokenizerError, match="259"):
        train_byte_level_bpe(["a"], 258)


def test_saved_bytes_and_digest_are_stable(tmp_path):
    BPE.save(tmp_path / "a")
    again = Tokenizer.load(tmp_path / "a")
    again.save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert again.digest == Tokenizer.load(tmp_path / "a" / "tokenizer.json").digest == BPE.digest


def test_digest_depends_on_the_roles(tmp_path):
    BPE.save(tmp_path)
    other = Tokenizer.load(tmp_path, bos_token="<eos>")
    assert other.bos_id == other.eos_id == 2
    assert other.digest != BPE.digest
    ids = other.encode("a boat")
    assert other.decode([2, *ids, 2]) == "a boat"


def test_pickled_by_content():
    copy = pickle.loads(pickle.dumps(BPE))
    assert copy.digest == BPE.digest
    assert copy.encode("a <eos> tree") == BPE.encode("a <eos> tree")
    assert copy.bos_id == BPE.bos_id


def test_transformers_reads_what_we_save(tmp_path):
    BPE.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs("a small boat", add_special_tokens=False).input_ids == BPE.encode("a small boat")
    ids = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ids == (BPE.bos_id, BPE.eos_id, BPE.pad_id)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_wordpiece_vocabulary(tmp_path, line_end):
    (tmp_path / "vocab.txt").write_bytes((line_end.join(WORDPIECE) + line_end).encode())
    found = Tokenizer.load(tmp_path / "vocab.txt")
    assert (found.bos_id, found.eos_id, found.pad_id) == (3, 4, 0)
    assert found.vocab_size == len(WORDPIECE)
    assert found.encode("A cats, on.") == [6, 7, 8, 2, 10, 9]
    assert found.decode([3, 6, 7, 8, 9, 4, 0]) == "a cats."
    assert found.digest == Tokenizer.load(tmp_path).digest  # the folder
    found.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").digest == found.digest


def test_wordpiece_agrees_with_transformers(tmp_path):
    from transformers import BertTokenizer

    (tmp_path / "vocab.txt").write_text("\n".join(WORDPIECE) + "\n", encoding="utf-8")
    theirs = BertTokenizer.from_pretrained(str(tmp_path))
    ours = Tokenizer.load(tmp_path)
    for text in ("a cat on cats.", "Cat ON a\tcat", "été", "a   cat . ."):
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids


def test_cased_wordpiece_keeps_case(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDPIECE, "Cat"]), encoding="utf-8")
    found = Tokenizer.load(tmp_path / "vocab.txt")
    assert found.encode("Cat cat") == [11, 7]


def test_unicode_line_ends_inside_a_vocabulary(tmp_path):
    entries = [*WORDPIECE, "\u2028", "\x85", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(entries), encoding="utf-8")
    assert Tokenizer.load(tmp_path / "vocab.txt").encode("dog") == [13]


def test_older_folders_are_converted(tmp_path):
    """vocab.json and merges.txt, as GPT-2 and CLIP have them."""
    letters = {chr(code): number for number, code in enumerate(range(33, 127))}
    vocabulary = letters | {"Ġ": 94, "ca": 95, "<|endoftext|>": 96}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc a\n")
    config = {"model_type": "gpt2"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer"})
    )
    found = Tokenizer.load(tmp_path)
    assert found.encode("cat") == [95, vocabulary["t"]]
    assert found.bos_id == found.eos_id == found.pad_id == 96


def test_missing_files_and_roles_are_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"nowhere does not exist.*train_tokenizer"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor vocab\.txt"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(TokenizerError, match="no \\[UNK\\] line"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").write_text("[UNK]\na\nb\n")
    with pytest.raises(TokenizerError, match=r"no bos token .* set tokenizer\.bos_token"):
        Tokenizer.load(tmp_path)
    with pytest.raises(TokenizerError, match="no token 'zz' for the role bos"):
        Tokenizer.load(tmp_path, bos_token="zz", eos_token="a")
    found = Tokenizer.load(tmp_path, bos_token="a", eos_token="b")
    assert (found.bos_id, found.eos_id, found.pad_id) == (1, 2, 2)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="not valid JSON"):
        Tokenizer.load(tmp_path)

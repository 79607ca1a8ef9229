"""Text to token ids and back, from local files only.

Reads a `tokenizer.json` of the `tokenizers` library (our byte-level BPE is one), a local Hugging
Face tokenizer folder, or a WordPiece `vocab.txt`. Which tokens begin, end and fill a text is read
from the files, never assumed from ids. A tokenizer is identified by a digest of its content, so
that a resumed run can refuse another one.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from data_pipeline.plain_text import read_text
from data_pipeline.settings import Settings

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"

ID_TYPES = {"u16": np.dtype("<u2"), "u32": np.dtype("<u4")}
"""Extension of the member that holds a row of ids in a shard -> their type."""

# Names under which known vocabularies keep the three roles, tried in this order when no
# configuration beside the vocabulary names them.
KNOWN_SPECIALS = {
    "bos": ("<bos>", "[CLS]", "<s>", "<|startoftext|>", "[BOS]", "[SOS]", "<|endoftext|>"),
    "eos": ("<eos>", "[SEP]", "</s>", "<|endoftext|>", "[EOS]"),
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
}
# In BERT's files the first and last token are called by their use in classification.
CONFIG_KEYS = {
    "bos": ("bos_token", "cls_token"),
    "eos": ("eos_token", "sep_token"),
    "pad": ("pad_token",),
}


class TokenizerSettings(Settings):
    """Where the tokenizer's file is, and which of its tokens play the special roles."""

    path: str
    """A tokenizer.json, a local Hugging Face tokenizer folder, or a WordPiece vocab.txt."""
    bos_token: str | None = None
    """Token that begins every text; none: read from the files ([CLS] in BERT vocabularies)."""
    eos_token: str | None = None
    """Token that ends every text; none: read from the files ([SEP] in BERT vocabularies)."""
    pad_token: str | None = None
    """Token that fills short rows; none: read from the files, or else the end token."""


class TokenizerError(ValueError):
    """A tokenizer file is missing or cannot be used; the text says what to do."""


class Tokenizer:
    """Ids without special tokens from text, and back. Picklable by content."""

    bos_id: int
    eos_id: int
    pad_id: int

    def __init__(self, definition: dict[str, Any], specials: dict[str, str]) -> None:
        """Use `load`. `definition`: parsed tokenizer.json; `specials`: role -> token."""
        self.definition, self.specials = definition, specials
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
        self._backend.no_truncation()
        self._backend.no_padding()
        # A caption that contains the text "<eos>" must not end there.
        self._backend.encode_special_tokens = True
        for role, token in specials.items():
            token_id = self._backend.token_to_id(token)
            if token_id is None:
                raise TokenizerError(f"the vocabulary has no token {token!r} for the role {role}")
            setattr(self, f"{role}_id", token_id)

    @classmethod
    def load(
        cls,
        path: str | Path,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
    ) -> "Tokenizer":
        """Read a file or folder (see the module's text); the tokens override what it names.

        Raises:
            TokenizerError: nothing usable at `path`, or no token for a role.
        """
        path = Path(path)
        definition, config = _read_files(path)
        vocabulary = tokenizers.Tokenizer.from_str(json.dumps(definition)).get_vocab()
        given = {"bos": bos_token, "eos": eos_token, "pad": pad_token}
        specials = {}
        for role in ("bos", "eos", "pad"):
            token = given[role] or _find_special(role, config, vocabulary)
            if token is None and role == "pad":
                token = specials["eos"]  # padding never carries loss, so any id serves
            if token is None:
                raise TokenizerError(
                    f"{path}: no {role} token is named in {CONFIG_FILE} and none of "
                    f"{', '.join(KNOWN_SPECIALS[role])} is in the vocabulary; "
                    f"set tokenizer.{role}_token to a token of this vocabulary"
                )
            specials[role] = token
        return cls(definition, specials)

    @classmethod
    def from_settings(cls, settings: TokenizerSettings) -> "Tokenizer":
        """`load` with the fields of `settings`."""
        return cls.load(settings.path, settings.bos_token, settings.eos_token, settings.pad_token)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any special token."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, by several threads of the library."""
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first end token; special tokens are left out."""
        kept: list[int] = []
        for place, token_id in enumerate(ids):
            if place == 0 and token_id == self.bos_id:
                continue  # some vocabularies begin and end a text with the same token
            if token_id == self.eos_id:
                break
            if token_id not in (self.bos_id, self.pad_id):
                kept.append(int(token_id))
        return self._backend.decode(kept, skip_special_tokens=True).strip()

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding table needs: the largest id + 1."""
        return max(self._backend.get_vocab().values()) + 1

    @property
    def digest(self) -> str:
        """sha256 of the content: equal exactly if all texts and roles get equal ids."""
        content = {"definition": self.definition, "specials": self.specials}
        return hashlib.sha256(_canonical(content)).hexdigest()

    @property
    def mark(self) -> str:
        """The start of the digest, with which rows of ids say which tokenizer made them."""
        return self.digest[:16]

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers reads too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {f"{role}_token": token for role, token in self.specials.items()}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / TOKENIZER_FILE).write_bytes(_canonical(self.definition))
        (folder / CONFIG_FILE).write_bytes(_canonical(config))

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[dict[str, Any], dict[str, str]]]:
        return Tokenizer, (self.definition, self.specials)


def train_byte_level_bpe(
    texts: Iterable[str], vocab_size: int, min_frequency: int = 2, lowercase: bool = False
) -> Tokenizer:
    """Train a byte-level BPE; every text can be encoded. Same texts and arguments, same bytes.

    Args:
        texts: captions.
        vocab_size: entries including 3 special tokens and 256 bytes; fewer if the texts have fewer.
        min_frequency: pairs seen less often are not merged.
        lowercase: fold case before anything else.
    """
    if vocab_size < 259:
        raise TokenizerError(f"vocab_size {vocab_size}: 256 bytes and 3 special tokens need 259")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    if lowercase:
        backend.normalizer = tokenizers.normalizers.Lowercase()
    # With the space before the first word, a word has the same ids wherever it stands.
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = tokenizers.decoders.ByteLevel()
    specials = {"pad": "<pad>", "bos": "<bos>", "eos": "<eos>"}
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(specials.values()),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(json.loads(backend.to_str()), specials)


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, sort_keys=True, indent=1).encode()


def _read_files(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parsed tokenizer.json (or an equal one) and the configuration beside it, {} if none."""
    if not path.exists():
        raise TokenizerError(
            f"tokenizer {path} does not exist; give a tokenizer.json, a local tokenizer folder or "
            f"a vocab.txt, or train one: python -m tools.train_tokenizer {path} --shards SHARDS"
        )
    folder = path if path.is_dir() else path.parent
    config = _read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    if path.is_file() and path.suffix == ".json":
        return _read_json(path), config
    if path.is_file():
        return _wordpiece_definition(path, config), config
    if (folder / TOKENIZER_FILE).is_file():
        return _read_json(folder / TOKENIZER_FILE), config
    if (folder / "vocab.txt").is_file():
        return _wordpiece_definition(folder / "vocab.txt", config), config
    return _converted_definition(folder)


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except ValueError as error:
        raise TokenizerError(str(error)) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_text(path))
    except ValueError as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} does not hold a JSON object")
    return content


def _converted_definition(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Older folders (vocab.json and merges.txt, sentencepiece): transformers converts them."""
    from transformers import AutoTokenizer  # seconds to import, and rarely needed

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        definition = json.loads(loaded.backend_tokenizer.to_str())
    except Exception as error:
        raise TokenizerError(
            f"{folder}: found neither {TOKENIZER_FILE} nor vocab.txt, and transformers cannot read "
            f"the folder either: {error}"
        ) from error
    names = ("bos_token", "eos_token", "pad_token", "cls_token", "sep_token")
    return definition, {name: getattr(loaded, name, None) for name in names}


def _find_special(role: str, config: dict[str, Any], vocabulary: dict[str, int]) -> str | None:
    for key in CONFIG_KEYS[role]:
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            return token
    return next((token for token in KNOWN_SPECIALS[role] if token in vocabulary), None)


def _wordpiece_definition(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """BERT's tokenizer as a tokenizer.json. Written here field by field, so that the digest of a
    vocabulary does not depend on the version of the library."""
    # Not splitlines(): real vocabularies hold characters that it takes for line ends.
    entries = _text(path).replace("\r\n", "\n").rstrip("\n").split("\n")
    if "[UNK]" not in entries:
        raise TokenizerError(f"{path}: not a WordPiece vocabulary, it has no [UNK] line")
    bracketed = [entry for entry in entries if entry.startswith("[") and entry.endswith("]")]
    specials = [e for e in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if e in bracketed]
    cased = any(entry != entry.lower() for entry in entries if entry not in bracketed)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": entries.index(entry), "content": entry, **flags, "special": True}
            for entry in sorted(specials, key=entries.index)
        ],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": config.get("do_lower_case", not cased),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {entry: number for number, entry in enumerate(entries)},
        },
    }

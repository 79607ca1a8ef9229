"""Text to token ids and back, from local files only."""

from data_pipeline.settings import Settings


class TokenizerSettings(Settings):
    """Where the tokenizer's file is, and which of its tokens play the special roles."""

    path: str
    """A tokenizer.json, a local Hugging Face tokenizer folder, or a WordPiece vocab.txt."""
    bos_token: str | None = None
    """Token that begins every text; none: read from the files ([CLS] in BERT vocabularies)."""
    eos_token: str | None = None
    """Token that ends every text; none: read from the files ([SEP] in BERT vocabularies)."""
    pad_token: str | None = None
    """Token that fills short rows; none: read from the files, or the end token if they name none."""

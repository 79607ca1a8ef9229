"""What settings are told in tests that build a module without a recipe."""

from types import SimpleNamespace

from pretrain.models.build_context import BuildContext


def text_context(vocab_size: int, eos_id: int) -> BuildContext:
    """That of a text encoder."""
    return BuildContext(vocabulary=SimpleNamespace(vocab_size=vocab_size, eos_id=eos_id))

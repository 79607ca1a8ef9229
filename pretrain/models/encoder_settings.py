"""What the settings of an encoder tell a recipe, without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from data_pipeline.settings import Settings

if TYPE_CHECKING:
    from pretrain.models.build_context import BuildContext
    from pretrain.models.encoder import Encoder


class EncoderSettings(Settings):
    """Base of the settings of everything in `model.encoders`; subclasses name their `type`."""

    reads: ClassVar[str]
    """`images` or `text`; of a module that reads what others make, a word of its own, by which the
    settings of objectives and of further modules ask for it (`encoder_fields`)."""
    reads_text: ClassVar[bool] = False
    """Whether it needs the tokenizer."""
    encoder_fields: ClassVar[dict[str, str]] = {}
    """Fields that name modules above this one, which it reads -> what these must read."""
    type: str
    """Selects this encoder among the kinds that a recipe may name."""

    def build(self, context: BuildContext) -> Encoder:
        """The encoder these settings describe, on torch's default device."""
        raise NotImplementedError

    def as_target(self) -> Self:
        """The same network for a target that is not trained: nothing is dropped or recomputed."""
        return self

    @property
    def size_multiple(self) -> int:
        """Sides of images must be multiples of this, so that nothing is left out or refused."""
        return 1

    @property
    def any_sides(self) -> bool:
        """Whether images of other sides are taken too."""
        return True

    @property
    def longest_text(self) -> int | None:
        """Tokens of the longest text; None: any."""
        return None

    @property
    def pools(self) -> tuple[str, ...]:
        """The ways to one vector per image that an objective may choose as `pool`."""
        return ()

    @property
    def pool_hint(self) -> str:
        """What would give more of `pools`, to end a message."""
        return ""

    @property
    def smallest_cell(self) -> int:
        """Side in pixels of what the encoder cannot take apart, where cells of images are mixed."""
        return self.size_multiple

    @property
    def groups_cells(self) -> bool:
        """Whether it can keep cells of different groups from seeing each other."""
        return False

    @property
    def cells_problem(self) -> str | None:
        """Why there is no vector for each cell of an image, and the way out; None: there is."""
        return f"which a {self.type} does not have: name another encoder"


def multiple_problem(key: str, size: int, step: int, needs: str) -> list[str]:
    """A line if `size`, at the path `key`, is not a multiple of `step`, as `needs` says."""
    below = size // step * step
    if not size % step:
        return []
    return [
        f"{key}={size} is not a multiple of {step}, as {needs}: use {below or step} or "
        f"{below + step}"
    ]

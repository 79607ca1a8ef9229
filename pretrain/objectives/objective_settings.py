"""What the settings of an objective tell a recipe, without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from data_pipeline.settings import Settings

if TYPE_CHECKING:
    from torch import nn

    from pretrain.models.build_context import BuildContext


class EnginePlan(NamedTuple):
    """How the engine would run a task."""

    file: str
    """Of DeepSpeed's settings, for messages."""
    stage: int
    """Of ZeRO."""
    precision: str
    world: int
    """Ranks."""
    micro_steps: int
    """Of a rank in one step of the task."""


class ObjectiveSettings(Settings):
    """Base of the settings of every objective; subclasses name their `type`."""

    writes_texts: ClassVar[bool] = False
    """Whether an evaluation writes texts, which takes most of its time and can be left out."""
    data_type: ClassVar[str]
    """The kind of data that it reads."""
    encoder_fields: ClassVar[dict[str, str]]
    """Its fields that name encoders -> what these must read: `images`, `text`, or the `reads` of a
    module that tasks share. A field may be null."""
    pairs: ClassVar[bool] = False
    """Whether it mixes neighbours, so that a micro-batch must be even."""
    type: str
    """Selects this objective among the kinds that a recipe may name."""

    def build(self, context: BuildContext) -> nn.Module:
        """The objective for these encoders and what the task's data know.

        Raises ValueError: an encoder that is not there, or has not what is needed.
        """
        raise NotImplementedError

    def problems(self, where: str, task: Any, recipe: Any) -> list[str]:
        """One line per combination that cannot work, naming both fields and the way out.

        Args:
            where: key path of the task, such as tasks.caption.
            task, recipe: the settings of all of it; only their fields are read. The data are of
                `data_type`, but encoders may be missing, or read something else.
        """
        return []

    def engine_problems(self, where: str, task: Any, engine: EnginePlan) -> list[str]:
        """As `problems`, for what the engine is to do."""
        return []

    def held_out_changes(self) -> dict[str, Any]:
        """Fields of the data that are others in an evaluation -> their values."""
        return {}

    @property
    def wanted_pool(self) -> str | None:
        """How one vector is made of an image (`EncoderSettings.pools`); None: that is not asked."""
        return None

    @property
    def uses_head(self) -> bool:
        """Whether the encoder's own head takes part."""
        return self.wanted_pool == "head"

    @property
    def further_sizes(self) -> tuple[int, ...]:
        """Sizes to which images of a step are resized besides, under `smaller_sizes`."""
        return ()

    @property
    def unread_targets(self) -> frozenset[str]:
        """Kinds of targets (`data_pipeline.samples.target`) of its data that it does not learn
        from."""
        return frozenset()

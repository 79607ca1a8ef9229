"""What the samples of a data set may teach, as kinds of data name it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from data_pipeline.reading.reader import Sample


class Target(NamedTuple):
    """What a sample may teach, and where it is."""

    kind: str
    """label, text or boxes."""
    setting: str
    """The key of the data's settings that says where, such as label_source."""
    source: str
    """What it says, such as json:label."""
    extension: str
    """The member in which that is."""
    read: Callable[[Sample], Any]
    """Raises AbsentValue where a sample has none, BadSample where it is none that could be used."""
    required: bool
    """Whether a sample with none of this kind is a bad one."""

    @property
    def name(self) -> str:
        """As a user would write it."""
        return f"{self.setting}={self.source}"

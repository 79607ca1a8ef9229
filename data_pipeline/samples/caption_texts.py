"""Which text of a sample is used, and what is done to it before it becomes tokens."""

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import BeforeValidator, Field, field_validator

from data_pipeline.plain_text import MARK
from data_pipeline.reading.reader import Sample
from data_pipeline.samples.labels import NO_LABEL, LabelSource
from data_pipeline.samples.members import AbsentValue, MemberSource, bad, check_source
from data_pipeline.settings import Settings

RngFor = Callable[[str], np.random.Generator]
"""purpose -> generator of one sample."""


class CaptionSourceSettings(Settings):
    """One place in which a sample may have texts."""

    source: str
    """A text member's extension ("txt"), or "json:KEY" for a string or a list of strings under KEY
    of the json member (dots descend: "json:annotations.captions")."""
    weight: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """How often this source is chosen, relative to the others; sources that a sample lacks are out
    of its choice."""
    templates: list[str] = Field(default=[])
    """Sentences around a text of this source, for example "a photo of a {}." around the name of a
    class: one is drawn by seed for each text, in evaluation the first is taken. [] = the text."""
    class_names: list[str] = Field(default=[])
    """Names of classes in the order of their numbers: the source then holds the number of a class
    ("cls", "json:label"), and its name is the text. [] = the source holds texts."""

    @field_validator("source")
    @classmethod
    def _source(cls, value: str) -> str:
        return check_source("source", value)

    @field_validator("templates")
    @classmethod
    def _templates(cls, value: list[str]) -> list[str]:
        for template in value:
            if template.count("{}") != 1:
                raise ValueError(f"template {template!r} must hold {{}} once, for the text")
        return value

    @field_validator("class_names")
    @classmethod
    def _names(cls, value: list[str]) -> list[str]:
        for number, name in enumerate(value):
            if not name.strip():
                raise ValueError(f"class_names: class {number} has an empty name")
        return value


def _listed(value: Any) -> Any:
    """Let a name stand for a source, and one source for a list of it."""
    sources = [value] if isinstance(value, str | dict) else value
    if not isinstance(sources, list):
        return value
    return [{"source": source} if isinstance(source, str) else source for source in sources]


CaptionSources = Annotated[
    list[CaptionSourceSettings], BeforeValidator(_listed), Field(min_length=1)
]
"""Type of a setting that names one or several sources of texts."""


class CleaningSettings(Settings):
    """What is done to each text, in this order; white space is folded in any case."""

    replace: dict[str, str] = Field(default={})
    """Literal parts of texts -> what stands in their place, for example {"<PERSON>": "person"}; of
    several that begin at the same place, the longest. Templates come after it."""
    lowercase: bool = False
    """Fold case."""
    max_words: int | None = Field(default=None, ge=1)
    """Longer texts lose their end before they become tokens; references of an evaluation stay
    whole. null = only `text_length` cuts."""
    final_period: bool = False
    """Put a period behind texts that end in a letter or digit."""

    @field_validator("replace")
    @classmethod
    def _replace(cls, value: dict[str, str]) -> dict[str, str]:
        if "" in value:
            raise ValueError("the empty text cannot be replaced")
        return value


class SampleTexts(NamedTuple):
    """Texts of one source of a sample."""

    texts: list[str]
    prompt_class: int = NO_LABEL
    """Of texts that were made from the name of a class: a number that all texts of that name have
    in common, in any task and data set; else NO_LABEL."""


class CaptionSource(MemberSource):
    """Finds the captions of a sample; see `CaptionSourceSettings.source`."""

    def read(self, sample: Sample) -> list[str]:
        """All captions, at least one, with white space folded.

        Raises:
            AbsentValue: no such member or key, or nothing but null or white space.
            BadSample: not text.
        """
        found = self.value(sample)
        if found is None:
            raise bad(sample, f"{self.source} is null", AbsentValue)
        if isinstance(found, str):
            found = [found]
        elif not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise bad(sample, f"{self.source} is neither a string nor a list of strings")
        if not all(_is_unicode(text) for text in found):
            raise bad(sample, f"{self.source} holds half a surrogate pair")
        captions = [folded for text in found if (folded := _fold(text.removeprefix(MARK)))]
        if not captions:
            raise bad(sample, f"{self.source} holds no caption", AbsentValue)
        return captions


class ClassNameSource:
    """Finds the class number of a sample and gives the name of the class, as a `CaptionSource`."""

    def __init__(self, source: str, names: Sequence[str]) -> None:
        self._labels, self._names = LabelSource(source, len(names)), [_fold(n) for n in names]
        self.extension = self._labels.extension

    def read(self, sample: Sample) -> list[str]:
        """One text: the name.

        Raises:
            AbsentValue: no such member or key, or null under the key.
            BadSample: not a whole number, or none of the classes.
        """
        return [self._names[self._labels.read(sample)]]


class CaptionTexts:
    """Reads texts of samples from weighted sources.

    Args:
        sources: at least one.
        cleaning: of every text.
    """

    def __init__(
        self,
        sources: Sequence[CaptionSourceSettings],
        cleaning: CleaningSettings = CleaningSettings(),  # noqa: B008 (it is immutable)
    ) -> None:
        self._sources = [
            ClassNameSource(settings.source, settings.class_names)
            if settings.class_names
            else CaptionSource(settings.source)
            for settings in sources
        ]
        self._names = [settings.source for settings in sources]
        self._templates = [settings.templates for settings in sources]
        self._weights = np.array([settings.weight for settings in sources])
        self.cleaning = cleaning
        # One pass, so that nothing is replaced in what has been put in place of something else.
        parts = sorted(cleaning.replace, key=len, reverse=True)
        self._replaced = re.compile("|".join(map(re.escape, parts))) if parts else None

    @property
    def sources(self) -> dict[str, "CaptionSource | ClassNameSource"]:
        """What the settings call each source -> what reads it."""
        return dict(zip(self._names, self._sources, strict=True))

    @property
    def extensions(self) -> frozenset[str]:
        """Members in which texts are."""
        return frozenset(source.extension for source in self._sources)

    def draw(self, sample: Sample, count: int, rng_for: RngFor) -> SampleTexts:
        """At most `count` texts of one source, chosen by seed.

        A source is drawn by weight among those that the sample has; then texts of it; then a
        template for each. Draws with one possible outcome are not made.

        Raises:
            AbsentValue: the sample has none of the sources.
            BadSample: a source that was drawn is there, but not text.
        """
        number, texts = self._first(sample, self._drawn_order(rng_for))
        prompt_class = self._prompt_class(number, texts)
        if len(texts) > 1:
            texts = [texts[i] for i in np.argsort(rng_for("caption").random(len(texts)))[:count]]
        templates = self._templates[number]
        if len(templates) < 2:
            chosen = [templates[0] if templates else "{}"] * len(texts)
        else:
            which = rng_for("template").integers(len(templates), size=len(texts)).tolist()
            chosen = [templates[i] for i in which]
        return SampleTexts(list(map(self.clean, texts, chosen)), prompt_class)

    def references(self, sample: Sample) -> SampleTexts:
        """All texts of the first source that the sample has, whole, for evaluation.

        Raises as `draw`.
        """
        number, texts = self._first(sample, range(len(self._sources)))
        template = (self._templates[number] or ["{}"])[0]
        cleaned = [self.clean(text, template) for text in texts]
        return SampleTexts(cleaned, self._prompt_class(number, texts))

    def every(self, sample: Sample) -> list[str]:
        """The texts of all sources, neither cleaned nor in templates. Raises as `draw`."""
        found, absent = [], []
        for source in self._sources:
            try:
                found += source.read(sample)
            except AbsentValue as error:
                absent.append(error)
        if not found:
            raise _all_absent(sample, absent)
        return found

    def clean(self, text: str, template: str = "{}") -> str:
        """A folded text as the settings of cleaning want it, but for its length."""
        if self._replaced is not None:
            text = self._replaced.sub(lambda match: self.cleaning.replace[match[0]], text)
        if template != "{}" or self._replaced is not None:
            text = _fold(template.replace("{}", text))
        return self._end(text.lower() if self.cleaning.lowercase else text)

    def cut(self, text: str) -> str:
        """A cleaned text with at most `max_words` words."""
        words = text.split(" ", self.cleaning.max_words or 0)
        if self.cleaning.max_words is None or len(words) <= self.cleaning.max_words:
            return text
        return self._end(" ".join(words[:-1]))

    def _end(self, text: str) -> str:
        return text + "." if self.cleaning.final_period and text[-1:].isalnum() else text

    def _drawn_order(self, rng_for: RngFor) -> Sequence[int]:
        """Numbers of all sources: each next one is drawn by weight among those that are left."""
        if len(self._sources) == 1:
            return [0]
        draws = rng_for("caption source").random(len(self._sources))
        # The least of exponential waiting times belongs to each source in proportion to its rate.
        return np.argsort(-np.log1p(-draws) / self._weights).tolist()

    def _prompt_class(self, number: int, texts: list[str]) -> int:
        """Of texts as source `number` has read them."""
        is_name = isinstance(self._sources[number], ClassNameSource)
        return _name_number(texts[0]) if is_name else NO_LABEL

    def _first(self, sample: Sample, order: Iterable[int]) -> tuple[int, list[str]]:
        """The first source in `order` that the sample has, and its texts."""
        absent = []
        for number in order:
            try:
                return number, self._sources[number].read(sample)
            except AbsentValue as error:
                absent.append(error)
        raise _all_absent(sample, absent)


def _all_absent(sample: Sample, absent: list[AbsentValue]) -> AbsentValue:
    return bad(sample, "; ".join(error.reason for error in absent), AbsentValue)


def _fold(text: str) -> str:
    return " ".join(text.split())


@functools.lru_cache(maxsize=1 << 16)
def _name_number(name: str) -> int:
    """A number that stands for a name: not below 0, and the same in any process."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _is_unicode(text: str) -> bool:
    """Whether a tokenizer takes the text; JSON may escape what no text can hold."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)

"""Which text of a sample is chosen, and what becomes of it."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.images.transforms import ImageSettings
from data_pipeline.reading.reader import BadSample, Sample
from data_pipeline.rng import sample_rng
from data_pipeline.samples.caption_texts import (
    CaptionSourceSettings,
    CaptionTexts,
    CleaningSettings,
)
from data_pipeline.samples.captions import CaptionDataSettings, CaptionProcessor
from data_pipeline.samples.labels import NO_LABEL
from data_pipeline.samples.members import AbsentValue
from tests.data_pipeline.photos import jpeg, picture, tokenizer

TITLE, DESCRIPTION = "json:title", "json:description"


def sample(txt: str | None = None, **record) -> Sample:
    members = {"json": json.dumps(record).encode()}
    if txt is not None:
        members["txt"] = txt.encode()
    return Sample(3, "a.tar", "key", members)


def texts(sources, **cleaning) -> CaptionTexts:
    settings = CaptionDataSettings(shards=["x"], caption_source=sources, cleaning=cleaning)
    return CaptionTexts(settings.caption_source, settings.cleaning)


def rng_for(position: int):
    return lambda purpose: sample_rng(0, "caption", position, purpose)


def forbidden(purpose: str):
    raise AssertionError(f"drew {purpose}")


def drawn(reader: CaptionTexts, of: Sample, positions: int = 600, count: int = 1) -> Counter:
    return Counter(tuple(reader.draw(of, count, rng_for(p)).texts) for p in range(positions))


def test_one_source_is_written_as_before_and_draws_nothing():
    for written in ("txt", ["txt"], {"source": "txt"}, [{"source": "txt", "weight": 3}]):
        assert texts(written).draw(sample(" a  bird\n"), 1, forbidden).texts == ["a bird"]
    assert CaptionDataSettings(shards=["x"]).caption_source == [CaptionSourceSettings(source="txt")]


def test_sources_are_drawn_by_weight_and_by_seed():
    reader = texts([{"source": TITLE, "weight": 0.3}, {"source": DESCRIPTION, "weight": 0.7}])
    both = sample(title="t", description="d")
    found = drawn(reader, both)
    assert found.keys() == {("t",), ("d",)}
    assert abs(found["t",] / 600 - 0.3) < 0.06
    assert drawn(reader, both) == found
    three = texts([TITLE, {"source": DESCRIPTION, "weight": 2}, {"source": "txt", "weight": 5}])
    counts = drawn(three, sample("x", title="t", description="d"), 1600)
    shares = [counts[name,] / 1600 for name in ("t", "d", "x")]
    np.testing.assert_allclose(shares, [1 / 8, 2 / 8, 5 / 8], atol=0.04)


@pytest.mark.parametrize("absent", [{}, {"title": None}, {"title": " \n"}, {"title": []}])
def test_a_source_that_a_sample_lacks_is_out_of_its_choice(absent):
    reader = texts([{"source": TITLE, "weight": 1000}, DESCRIPTION, "txt"])
    found = drawn(reader, sample("x", description="d", **absent), 400)
    assert found.keys() == {("d",), ("x",)}
    assert abs(found["d",] / 400 - 0.5) < 0.09  # as if there were no title at all


def test_without_any_source_the_sample_is_bad_and_says_all_reasons():
    reader = texts([TITLE, "txt"])
    for read in (lambda s: reader.draw(s, 1, rng_for(0)), reader.references, reader.every):
        with pytest.raises(AbsentValue, match="KeyError: 'title'") as error:
            read(sample())
        fault = error.value
        assert "has no member txt" in fault.reason
        assert (fault.shard, fault.key, fault.row) == ("a.tar", "key", 3)


def test_what_is_there_but_is_no_text_is_bad_not_absent():
    reader = texts([TITLE, DESCRIPTION])
    with pytest.raises(BadSample, match="json:title is neither a string nor a list") as error:
        reader.references(sample(title=3, description="d"))
    assert not isinstance(error.value, AbsentValue)


def test_captions_of_one_source_share_an_image():
    reader = texts([TITLE, DESCRIPTION])
    found = drawn(reader, sample(title=["t1", "t2", "t3"], description=["d"]), 300, count=2)
    assert {len(chosen) for chosen in found if chosen[0] == "d"} == {1}
    pairs = {chosen for chosen in found if chosen[0] != "d"}
    assert len(pairs) == 6 and all(a != b for a, b in pairs)


def test_evaluation_takes_all_texts_of_the_first_source_there_is():
    title = {"source": TITLE, "weight": 0.01, "templates": ["a {}", "the {}"]}
    reader = texts([title, DESCRIPTION])
    assert reader.references(sample(title=["t", " u "], description="d")).texts == ["a t", "a u"]
    assert reader.references(sample(title="", description="d")).texts == ["d"]
    assert reader.every(sample(title="t", description="d")) == ["t", "d"]


def test_templates_are_drawn_for_each_text():
    source = {"source": "json:class", "templates": ["a photo of a {}.", "{}", "{} {{}"]}
    with pytest.raises(ValueError, match=r"template '\{\} \{\{\}' must hold \{\} once"):
        texts(source)
    source["templates"].pop()
    names = sample(**{"class": ["owl", "emu"]})
    found = drawn(texts(source), names, 400, count=2)
    assert len(found) == 8  # two orders, two templates for each of the two
    assert min(found.values()) > 20
    single = texts({"source": "json:class", "templates": ["a {} of {{tricks"]})
    (found,) = single.draw(sample(**{"class": "bag {}"}), 1, forbidden).texts
    assert found == "a bag {} of {{tricks"


def test_numbers_of_classes_become_their_names():
    source = {"source": "json:label", "class_names": ["owl", " red  kite"], "templates": ["a {}"]}
    reader = texts([source, TITLE])
    assert reader.references(sample(label=1, title="t")).texts == ["a red kite"]
    assert drawn(reader, sample(label=0, title="t"), 100).keys() == {("a owl",), ("t",)}
    assert drawn(reader, sample(title="t"), 20).keys() == {("t",)}
    with pytest.raises(BadSample, match=r"json:label: label 2 is not in 0\.\.1 \(classes\)"):
        reader.references(sample(label=2))
    with pytest.raises(ValueError, match="class 1 has an empty name"):
        texts([{"source": "cls", "class_names": ["owl", " "]}])


def test_texts_say_which_class_their_name_is_of():
    """Whatever number it has, in whatever template; texts of other sources are of no class."""
    source = {"source": "json:label", "class_names": ["owl", "red kite"]}
    source["templates"] = ["a {}", "{}"]
    other = {"source": "json:label", "class_names": ["emu", " red  kite", "owl"]}
    one, two = texts([source, TITLE]), texts(other)
    owl, kite = (one.draw(sample(label=n), 1, rng_for(n)).prompt_class for n in (0, 1))
    assert owl != kite and min(owl, kite) >= 0
    for position in range(8):
        assert one.draw(sample(label=0), 1, rng_for(position)).prompt_class == owl
    assert two.references(sample(label=2)).prompt_class == owl
    assert two.references(sample(label=1)).prompt_class == kite
    assert one.references(sample(title="owl")).prompt_class == NO_LABEL


def test_cleaning():
    reader = texts(
        "txt",
        replace={"<PERSON>": "person", "<PER": "x", "person": "y"},
        lowercase=True,
        max_words=4,
        final_period=True,
    )
    (found,) = reader.draw(sample("A <PERSON>  and\na <PER in Ulm"), 1, forbidden).texts
    assert found == "a person and a x in ulm."
    assert reader.cut(found) == "a person and a."
    assert reader.cut("a b c d.") == "a b c d."
    (found,) = reader.references(sample("ONE two three four five!")).texts
    assert found == "one two three four five!"
    assert texts("txt").cut("a b c") == "a b c"
    with pytest.raises(ValueError, match="empty text cannot be replaced"):
        CleaningSettings(replace={"": "x"})


@given(st.text("aB. é\n", max_size=40).filter(str.strip), st.integers(1, 6), st.booleans())
def test_cut_texts_keep_whole_words(text, most, period):
    reader = texts("txt", max_words=most, final_period=period)
    (found,) = reader.draw(sample(text), 1, forbidden).texts
    words, kept = text.split(), reader.cut(found).split()
    assert len(kept) == min(len(words), most)
    assert [word.rstrip(".") for word in kept] == [word.rstrip(".") for word in words[:most]]
    assert not period or not kept[-1][-1].isalnum()


def test_tokens_are_cut_and_references_are_not():
    settings = CaptionDataSettings(
        shards=["x"], image=ImageSettings(size=16), cleaning={"max_words": 2, "lowercase": True}
    )
    of = Sample(0, "a.tar", "k", {"jpg": jpeg(picture(1)), "txt": b"A red BIRD on a table"})
    for train in (True, False):
        fields = CaptionProcessor(settings, tokenizer(), train)
        item = fields.sample(of, rng_for(0))
        tokens = fields.collate([item], [True])["tokens"][0, 0]
        assert tokenizer().decode(tokens.tolist()) == "a red"
        assert item["captions"] == ["a red bird on a table"]


def test_faulty_sources():
    for sources, message in (
        ([], "at least 1 item"),
        (["txt", "txt"], "'txt' is named twice"),
        ([{"source": "json:"}], "write an extension, or json:KEY"),
        ([{"source": "txt", "weight": 0}], "greater than 0"),
        (3, "valid list"),
    ):
        with pytest.raises(ValueError, match=message):
            texts(sources)

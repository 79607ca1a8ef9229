"""Data that teach nothing are told of before a run begins, whichever target is missing."""

import json

import pytest

from data_pipeline.images.transforms import ImageSettings
from data_pipeline.loader.stream import TaskStream
from data_pipeline.loader.targets import SPREAD, look
from data_pipeline.order.plan import plan_order
from data_pipeline.order.sources import open_source
from data_pipeline.reading.reader import SampleReader
from data_pipeline.samples.boxes import BoxDataSettings, BoxProcessor
from data_pipeline.shards.packer import ShardWriter
from data_pipeline.shards.shard_set import ShardSet
from pretrain.build import build_evaluation_loader, build_stream, build_tokenizer
from pretrain.check_targets import look_for_targets
from pretrain.recipe.load import load_recipe
from tests.data_pipeline.photos import jpeg, picture
from tests.distributed.test_m3i import tiny_m3i
from tests.tiny_run import pack_scenes, three_tasks, write_recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    pack_scenes(folder)
    image = jpeg(picture(0, 16, 16))
    with ShardWriter(str(folder / "few"), "few", max_samples=200) as writer:
        for number in range(600):
            record = {"captions": ["a word"], "info": {"label": number % 10}}
            members = {"jpg": image, "json": json.dumps(record).encode()}
            if number % 50 == 0:
                members["cls"] = b"3"
            writer.write(f"{number:04d}", members)
    with ShardWriter(str(folder / "bare"), "bare", max_samples=200) as writer:
        for number in range(20):
            writer.write(f"{number:04d}", {"jpg": image, "json": b'{"captions": ["a word"]}'})
    return folder


def findings(data, name: str, tmp_path, *overrides: str, make=three_tasks, held_out=False):
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", make(data, tmp_path / "run")), overrides)
    tokenizer = build_tokenizer(recipe)
    stream = build_stream(recipe, name, tokenizer)
    if held_out:
        stream = build_evaluation_loader(recipe, name, tokenizer).stream
    return look_for_targets(recipe, name, stream, held_out)


@pytest.mark.parametrize("name", ["caption", "classify", "contrast"])
@pytest.mark.parametrize("held_out", [False, True])
def test_data_that_teach_are_not_remarked_on(data, tmp_path, name, held_out):
    """A third of the scenes has no label."""
    found = findings(data, name, tmp_path, held_out=held_out)
    assert (found.faults, found.warnings) == ([], [])


@pytest.mark.parametrize(
    "name, make, setting, value, says",
    [
        ("classify", three_tasks, "label_source", "json:lable", "keys of the json: "),
        ("classify", three_tasks, "label_source", "clss", "did you mean cls?"),
        ("caption", three_tasks, "caption_source", "json:caption", "did you mean json:captions?"),
        ("contrast", three_tasks, "caption_source", "text", "has no member text"),
        ("m3i", tiny_m3i, "label_source", "json:clas", "has a usable label at json:clas"),
        ("m3i", tiny_m3i, "caption_source", "txt", "has a usable text at txt"),
        # One of two sources is there: the other is as much a slip.
        ("caption", three_tasks, "caption_source", "[json:captions, json:capt]", "at json:capt ("),
    ],
)
@pytest.mark.parametrize("held_out", [False, True])
def test_none_is_a_fault_that_says_what_there_is(
    data, tmp_path, name, make, setting, value, says, held_out
):
    override = f"tasks.{name}.data.{setting}={value}"
    found = findings(data, name, tmp_path, override, make=make, held_out=held_out)
    (fault,) = found.faults
    place = "evaluation" if held_out else "data"
    assert fault.startswith(f"tasks.{name}.{place}.{setting}: none of {10 if held_out else 60} ")
    assert says in fault and "they hold members cls, jpg, json" in fault
    # The advice, followed.
    if name != "caption" and "unlabelled=expected" in fault:
        allowed = f"tasks.{name}.data.unlabelled=expected"
        assert not findings(data, name, tmp_path, override, allowed, make=make).faults


def test_a_text_that_no_encoder_reads_is_not_missed(data, tmp_path):
    overrides = [
        "tasks.m3i.objective.text_encoder=null",
        "model.encoders.text=null",
        "tasks.m3i.data.caption_source=nothing",
    ]
    assert not findings(data, "m3i", tmp_path, *overrides, make=tiny_m3i).faults


def test_few_are_a_warning_with_their_share(data, tmp_path):
    found = findings(data, "classify", tmp_path, f"tasks.classify.data.shards=[{data}/few]")
    assert not found.faults and "of 256 samples (" in found.warnings[0]
    assert "have a usable label at cls" in found.warnings[0]
    replaced = findings(
        data,
        "classify",
        tmp_path,
        f"tasks.classify.data.shards=[{data}/few]",
        "tasks.classify.data.unlabelled=fault",
    )
    assert any("they are bad samples" in warning for warning in replaced.warnings)


def test_labels_that_are_none_of_the_classes_are_no_targets(data, tmp_path):
    shards = f"tasks.classify.data.shards=[{data}/few]"
    nested = "tasks.classify.data.label_source=json:info.label"
    assert not findings(data, "classify", tmp_path, shards, nested).warnings
    few = findings(data, "classify", tmp_path, shards, nested, "tasks.classify.data.classes=5")
    assert "is not in 0..4" in few.warnings[0]
    wrong = "tasks.classify.data.label_source=json:info"
    (fault,) = findings(data, "classify", tmp_path, shards, wrong).faults
    assert "is not a whole number" in fault and "info.label" in fault


def test_of_several_data_sets_each_has_to_have_something(data, tmp_path):
    def two(task: str) -> list[str]:
        return [
            f"tasks.{task}.data.shards=null",
            f"tasks.{task}.data.sources={{full: {{shards: [{data}/train]}}, "
            f"bare: {{shards: [{data}/bare]}}}}",
        ]

    (fault,) = findings(data, "classify", tmp_path, *two("classify")).faults
    assert fault.startswith("tasks.classify.data.sources.bare: none of ") and "at cls" in fault
    found = findings(data, "m3i", tmp_path, *two("m3i"), make=tiny_m3i)
    assert not found.faults and "sources.bare: none of " in found.warnings[0]


def test_streams_are_looked_at_too(data, tmp_path):
    tars = sorted(map(str, (data / "train").glob("*.tar")))
    stream = [
        "tasks.classify.data.shards=null",
        f"tasks.classify.data.stream={{shards: {json.dumps(tars)}}}",
    ]
    assert not findings(data, "classify", tmp_path, *stream).faults
    wrong = "tasks.classify.data.label_source=json:lable"
    assert findings(data, "classify", tmp_path, *stream, wrong).faults


def test_boxes_and_the_spread(data, monkeypatch):
    """At most SPREAD samples, over all shards, and not through what a run reads with: its cache
    would fetch a block for each of them."""
    settings = BoxDataSettings(image=ImageSettings(size=16), shards=["x"], classes=3)
    fields, source = BoxProcessor(settings, train=True), open_source([str(data / "few")])
    order = plan_order([source], 8, 0, "boxes")
    shards = ShardSet.open(str(data / "few"))
    stream = TaskStream("boxes", SampleReader(shards), order, fields, 0, 8, 8)
    stream.reader.read = stream.reader.expect = None
    rows, read = [], SampleReader.read

    def noted(reader, row, wanted=None):
        rows.append(row)
        return read(reader, row, wanted)

    monkeypatch.setattr(SampleReader, "read", noted)
    seen = look(stream, fields.targets())[""]
    assert seen.samples == SPREAD and not seen.with_kind
    assert {shards.locate(row)[0] for row in rows} == {0, 1, 2}
    assert len(set(rows)) == SPREAD

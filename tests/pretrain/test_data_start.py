"""The look at the data before the first step, on one rank; also what a resume meets."""

import os
import time

import pytest
import torch

from data_pipeline.shards.presence import changed_shards
from data_pipeline.shards.shard_set import Shard, ShardSet
from data_pipeline.storage.errors import ShardError
from pretrain.build import build_streams, build_tokenizer
from pretrain.check import report
from pretrain.data_start import DataFault, look_at_data
from pretrain.engine.launch.distributed import Ranks
from pretrain.recipe.load import load_recipe
from tests.tiny_run import pack_scenes, three_tasks, write_recipe

RANKS = Ranks(0, 1, 0, 1, torch.device("cpu"))
pytestmark = pytest.mark.usefixtures("group_of_one")


@pytest.fixture
def start(tmp_path):
    """Opens the data of a recipe, with overrides, and looks at them."""
    pack_scenes(tmp_path)
    path = write_recipe(tmp_path / "r.yaml", three_tasks(tmp_path, tmp_path / "run"))

    def look(*overrides: str) -> None:
        recipe = load_recipe(path, overrides)
        tokenizer = build_tokenizer(recipe)
        look_at_data(recipe, RANKS, build_streams(recipe, tokenizer), tokenizer)

    look.recipe = lambda *overrides: load_recipe(path, overrides)
    return look


def faults(recipe) -> list[str]:
    return [finding.text for finding in report(recipe, 1, 1) if not finding.ok]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_shards_that_are_gone_or_changed_end_a_start_by_name(tmp_path, start, split):
    """The manifest tells of them as if they were there; `check` says the same."""
    start()
    shards = sorted((tmp_path / split).glob("*.tar"))
    first, last = shards[0], shards[-1]
    kept = first.read_bytes()
    first.write_bytes(kept + bytes(512))
    if split == "train":
        last.unlink()
    with pytest.raises(DataFault) as error:
        start()
    said = str(error.value)
    assert f"{first}: has {len(kept) + 512} bytes, its index says {len(kept)}" in said
    assert (f"{last}: is not there" in said) == (split == "train")
    assert any(f"{first}: has " in line for line in faults(start.recipe()))
    first.write_bytes(kept)
    if split == "heldout":
        start()  # restored, as the message says


def test_shards_that_no_manifest_covers_are_all_named(tmp_path, start):
    """By a list of paths, as foreign data are given; the first one's error says what to do."""
    shards = sorted((tmp_path / "train").glob("*.tar"))
    (tmp_path / "train" / "manifest.json").unlink()
    given = f"tasks.classify.data.shards=[{', '.join(map(str, shards))}]"
    start(given)
    for path in shards[1:]:
        path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(ShardError) as error:
        start(given)
    assert str(error.value).startswith(f"{shards[1]}: has ")
    assert str(error.value).endswith(f"and so it is with {shards[2]}")
    for path in shards[1:]:
        path.unlink()
    with pytest.raises((ShardError, FileNotFoundError)) as error:
        start(given)
    assert all(str(path) in str(error.value) for path in shards[1:])


def test_ten_thousand_shards_take_about_a_second(tmp_path):
    names = [tmp_path / f"{number:05d}.tar" for number in range(10_000)]
    for name in names:
        name.touch()
    shards = [Shard(str(name), 1, 0, "") for name in names]
    names[17].unlink()
    os.truncate(names[4711], 100)
    began = time.monotonic()
    found = changed_shards([*shards, Shard("https://host/x.tar", 1, 5, "")])
    assert time.monotonic() - began < 10  # on a busy machine, too
    assert [line.split(":")[0] for line in found] == [str(names[17]), str(names[4711])]


def test_an_empty_shard_is_as_its_index_says(tmp_path, start):
    (tmp_path / "train" / "zz.tar").write_bytes(bytes(10240))
    (tmp_path / "train" / "manifest.json").unlink()
    assert len(ShardSet.open(str(tmp_path / "train")).shards) == 4
    start()


def test_a_name_without_a_label_ends_a_start_and_a_check(start):
    wrong = "tasks.classify.data.label_source=json:lable"
    with pytest.raises(DataFault, match=r"label_source: none of 60 samples .* at json:lable"):
        start(wrong)
    lines = faults(start.recipe(wrong))
    assert len(lines) == 2 and all("json:lable" in line for line in lines)
    start(wrong, "tasks.classify.data.unlabelled=expected")


def test_check_warns_of_ranks_that_would_idle(start):
    recipe = start.recipe()
    warnings = [finding for finding in report(recipe, 32, 8) if finding.warns]
    assert len(warnings) == 3 and all(finding.ok for finding in warnings)
    assert warnings[0].text == (
        "tasks.caption: 28 of 32 ranks would get padding only, since global_batch=8 is 4 pairs: "
        "set global_batch to a multiple of 64, or take at most 4 ranks"
    )
    # Both ways out, followed.
    larger = start.recipe(*(f"tasks.{name}.global_batch=64" for name in recipe.tasks))
    assert not any(finding.warns for finding in report(larger, 32, 8))
    assert not any(finding.warns for finding in report(recipe, 4, 8))

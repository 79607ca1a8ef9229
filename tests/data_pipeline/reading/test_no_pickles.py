"""Nothing that a shard holds is ever unpickled, whatever its member is called."""

import os
import pickle
from pathlib import Path

import pytest

from data_pipeline.order.step_sampler import MicroBatch
from data_pipeline.reading.reader import BadSample, SampleReader
from data_pipeline.samples.caption_texts import CaptionSource
from data_pipeline.shards.packer import ShardWriter
from data_pipeline.shards.shard_set import ShardSet
from tests.data_pipeline.photos import caption, jpeg, picture, stream
from tools.shards import __main__ as tool

# Names that webdataset, torch or numpy would unpickle.
EXTENSIONS = ("pkl", "pyd", "pickle", "pth", "pt", "npy", "npz", "bin")


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_the_bomb_would_go_off(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "proof")))
    assert (tmp_path / "proof").is_dir()


@pytest.fixture
def bombs(tmp_path) -> Path:
    payload = pickle.dumps(Bomb(tmp_path / "exploded"))
    with ShardWriter(tmp_path / "set", max_samples=4) as writer:
        for number in range(8):
            members = {"jpg": jpeg(picture(number)), "txt": caption(number).encode()}
            members |= dict.fromkeys(EXTENSIONS, payload)
            writer.write(f"{number}", members | {"json": payload if number % 2 else b"{}"})
    for path in [*(tmp_path / "set").glob("*.idx"), tmp_path / "set" / "manifest.json"]:
        path.unlink()  # as if the shards came from elsewhere
    return tmp_path / "set"


def test_index_read_train_verify_and_inspect(bombs, tmp_path, capsys):
    shards = ShardSet.open(bombs)
    with SampleReader(shards) as reader:
        sample = reader.read(1)
    assert sample.members["pkl"] == pickle.dumps(Bomb(tmp_path / "exploded"))
    batch = stream(shards, 4, 4).load(MicroBatch(0, 0, "caption", (0, 1, 2, 3), (True,) * 4))
    assert batch["valid"].all() and not batch["faults"]
    for command in (["index", "--force"], ["verify"], ["inspect", "--sample", "1"]):
        assert tool.main([command[0], str(bombs), *command[1:]]) == 0
    assert ".pkl" in capsys.readouterr().out
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("source", ["pkl", "pyd", "json:captions"])
def test_as_captions_they_are_bad_text(bombs, tmp_path, source):
    with SampleReader(ShardSet.open(bombs)) as reader, pytest.raises(BadSample, match=source):
        CaptionSource(source).read(reader.read(1))
    assert not (tmp_path / "exploded").exists()

"""What is said where a sample lacks a member."""

import io
import tarfile

import pytest

from data_pipeline.loader.targets import _judged
from data_pipeline.reading.reader import Sample, SampleReader
from data_pipeline.samples.members import AbsentValue, MemberSource
from data_pipeline.samples.target import Target
from data_pipeline.shards.shard_set import ShardSet


def sample(**members: bytes) -> Sample:
    named = {name.replace("_", "."): data for name, data in members.items()}
    return Sample(0, "dots.tar", "shot", named)


def test_files_that_became_one_sample_by_their_dots_are_named():
    dotted = sample(**{f"2023_{n:02d}_{e}": b"x" for n in range(30) for e in ("jpg", "txt")})
    with pytest.raises(AbsentValue) as error:
        MemberSource("txt").value(dotted)
    assert "has no member txt, but 60 like '2023.00.txt'" in str(error.value)
    assert "ends at its first dot" in str(error.value)
    with pytest.raises(AbsentValue) as error:
        MemberSource("txt").value(sample(jpg=b"x"))
    assert "dot" not in str(error.value).replace("dots.tar", "")


def tar_of(path, names: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))


def test_the_advice_about_dots_can_be_followed(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path / "cache"))
    names = [f"v1.0/shot.2023.{n:02d}.{e}" for n in range(3) for e in ("jpg", "txt")]
    tar_of(tmp_path / "dots.tar", names)
    with SampleReader(ShardSet.open(tmp_path / "dots.tar")) as reader:
        assert len(reader.shards) == 1
        with pytest.raises(AbsentValue, match="no dot but the one of the suffix"):
            MemberSource("txt").value(reader.read(0))

    # A check and a start look at samples that were read without the members that nobody wants.
    target = Target("text", "caption_source", "txt", "txt", MemberSource("txt").value, True)
    with SampleReader(ShardSet.open(tmp_path / "dots.tar")) as reader:
        look = _judged([(reader.read(0, {"txt"}), lambda: reader.read(0))], [target])
    assert "no dot but the one of the suffix" in look.holds("txt")
    assert "dot" not in look.holds("cls")

    def plain(name: str) -> str:
        folder, _, file = name.rpartition("/")
        stem, _, suffix = file.rpartition(".")
        return f"{folder}/{stem.replace('.', '_')}.{suffix}"

    tar_of(tmp_path / "plain.tar", [plain(name) for name in names])
    with SampleReader(ShardSet.open(tmp_path / "plain.tar")) as reader:
        texts = [MemberSource("txt").value(reader.read(row)) for row in range(len(reader.shards))]
    assert texts == [plain(name) for name in names if name.endswith("txt")]

"""Packing gives the same bytes with any number of processes, interrupted or not, and spoils
nothing."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.files import exclusive
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.packing import PackJob, SampleFault, pack, plan_ranges
from data_pipeline.shards.shard_set import ShardSet
from tests.data_pipeline.small_shards import sample


@dataclass(frozen=True)
class Build:
    """Makes numbered samples; `bad` ones are faults, and each takes a while if asked."""

    bad: tuple[int, ...] = ()
    wait_s: float = 0.0

    def __call__(self, item: int) -> dict[str, bytes]:
        time.sleep(self.wait_s)
        if item in self.bad:
            raise SampleFault(f"list.csv, row {item}: no such image")
        return sample(item)[1]


def job(folder: Path, count: int = 23, per_shard: int = 5, **changes) -> PackJob:
    made = PackJob(
        folder=folder,
        prefix="train",
        keys=[f"{n:06d}" for n in range(count)],
        items=range(count),
        ranges=plan_ranges([1000] * count, per_shard),
        build=Build(),
        details={"seed": 0},
    )
    return replace(made, **changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@given(
    st.lists(st.integers(1, 5000), max_size=60),
    st.integers(1, 20),
    st.one_of(st.none(), st.integers(1, 20_000)),
)
def test_plans_cover_everything_within_the_limits(sizes, max_samples, max_bytes):
    ranges = plan_ranges(sizes, max_samples, max_bytes)
    assert [n for begin, end in ranges for n in range(begin, end)] == list(range(len(sizes)))
    for begin, end in ranges:
        assert 1 <= end - begin <= max_samples
        assert max_bytes is None or end - begin == 1 or sum(sizes[begin:end]) + 1024 <= max_bytes


def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path):
    counted = []
    one = pack(job(tmp_path / "one"), processes=1)
    two = pack(job(tmp_path / "two"), processes=2, progress=counted.append)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert one.manifest == two.manifest == Manifest.load(tmp_path / "one")
    assert sum(counted) == 23
    assert sorted(contents(tmp_path / "one"))[0] == "manifest.json"
    assert len(contents(tmp_path / "one")) == 1 + 2 * 5


def test_finished_shards_are_kept_and_damaged_ones_written_again(tmp_path):
    pack(job(tmp_path))
    whole = contents(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "packing.json").write_text(f'{{"plan": "{job(tmp_path).digest()}"}}')
    for name, byte in (("train-000001.tar", 700), ("train-000002.tar.idx", 1500)):
        damaged = bytearray(whole[name])
        damaged[byte] ^= 1
        (tmp_path / name).write_bytes(damaged)
    (tmp_path / "train-000003.tar").unlink()
    (tmp_path / ".train-000003.tar.12-ab.tmp").write_bytes(b"half a shard")
    result = pack(job(tmp_path))
    assert result.reused_shards == 2
    assert contents(tmp_path) == whole


def test_a_finished_folder_is_checked_and_stays(tmp_path):
    pack(job(tmp_path))
    whole = contents(tmp_path)
    assert pack(job(tmp_path)).reused_shards == 5
    assert contents(tmp_path) == whole


@pytest.mark.parametrize(
    "change",
    [
        {"items": range(1, 24)},
        {"keys": [f"{n:07d}" for n in range(23)]},
        {"ranges": plan_ranges([1] * 23, 6)},
        {"build": Build(bad=(99,))},
        {"details": {"seed": 1}},
        {"prefix": "other"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_shards_of_another_packing_are_left_alone(tmp_path, change):
    pack(job(tmp_path))
    whole = contents(tmp_path)
    with pytest.raises(FileExistsError, match="shards of another packing"):
        pack(job(tmp_path, **change))
    assert contents(tmp_path) == whole


def test_tars_of_unknown_origin_are_left_alone(tmp_path):
    (tmp_path / "mine.tar").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="shards of another packing"):
        pack(job(tmp_path))
    assert contents(tmp_path) == {"mine.tar": b"precious"}


def test_two_packers_in_one_folder(tmp_path):
    with (
        exclusive(tmp_path / "packing.json"),
        pytest.raises(FileExistsError, match="another process is packing into it"),
    ):
        pack(job(tmp_path))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_fault_stops_the_packing_and_is_named(tmp_path, processes):
    with pytest.raises(SampleFault, match=r"list\.csv, row 7: no such image"):
        pack(job(tmp_path, build=Build(bad=(7,))), processes=processes)
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "manifest.json").exists()
    with pytest.raises(ValueError, match="packing is not finished"):
        ShardSet.open(tmp_path)


def test_faults_are_left_out_and_counted(tmp_path):
    bad = (0, 7, 8, 22)
    skipping = job(tmp_path, build=Build(bad), skip_faults=True)
    for reused in (0, 5):
        result = pack(skipping)
        assert result.skipped == [f"{n:06d}" for n in bad]
        assert result.manifest.samples == 19 and result.manifest.details["left_out"] == 4
        assert result.reused_shards == reused


def test_a_stopped_packing_goes_on_with_faults_left_out(tmp_path):
    stopped = job(tmp_path, build=Build(bad=(17,)))
    with pytest.raises(SampleFault):
        pack(stopped)
    result = pack(replace(stopped, skip_faults=True))
    assert (result.reused_shards, result.skipped) == (3, ["000017"])
    with pytest.raises(SampleFault):  # and what was left out is missed again
        pack(stopped)


def test_a_shard_may_lose_all_its_samples_but_not_the_set(tmp_path):
    result = pack(job(tmp_path / "a", build=Build(tuple(range(5, 10))), skip_faults=True))
    assert [s.samples for s in result.manifest.shards] == [5, 0, 5, 5, 3]
    shards = ShardSet.open(tmp_path / "a")
    assert shards.index(shards.locate(5)[0]).key(0) == "000010"
    with pytest.raises(SampleFault, match="none of the 23 items"):
        pack(job(tmp_path / "b", build=Build(tuple(range(23))), skip_faults=True))
    assert not contents(tmp_path / "b")


def test_a_plan_without_a_shard_is_replaced(tmp_path):
    """Who mistypes an option and starts again need not clean up."""
    with pytest.raises(SampleFault):
        pack(job(tmp_path, build=Build(bad=(0,))))
    assert list(contents(tmp_path)) == ["packing.json"]
    assert pack(job(tmp_path, details={"seed": 1})).manifest.samples == 23


def test_a_manifest_of_something_else_is_left_alone(tmp_path):
    for text in ("[1]", "no json", "{}"):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(FileExistsError, match="shards of another packing"):
            pack(job(tmp_path))
        assert contents(tmp_path) == {"manifest.json": text.encode()}


def test_keys_must_be_unique_and_sound(tmp_path):
    with pytest.raises(ValueError, match="'000001' stands for two items"):
        pack(job(tmp_path, 3, keys=["000000", "000001", "000001"]))
    with pytest.raises(ValueError, match="must have no dot"):
        pack(job(tmp_path, 1, keys=["a.b"]))
    with pytest.raises(ValueError, match="nothing to pack"):
        pack(job(tmp_path, 0))


SLOW_PACKING = """
import sys
from pathlib import Path
from data_pipeline.shards.packing import pack
from tests.data_pipeline.shards.test_packing import Build, job

if __name__ == "__main__":
    pack(job(Path(sys.argv[1]), build=Build(wait_s=0.02)), processes=int(sys.argv[2]))
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_started_again(tmp_path, processes):
    script = tmp_path / "slow.py"
    script.write_text(SLOW_PACKING)
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(script), str(tmp_path / "out"), str(processes)]
    running = subprocess.Popen(command, env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "train-000001.tar").exists():
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "out" / "manifest.json").exists()
    result = pack(job(tmp_path / "out", build=Build(wait_s=0.02)), processes=processes)
    assert 1 <= result.reused_shards < 5
    pack(job(tmp_path / "whole", build=Build(wait_s=0.02)))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "to_workers", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_stopped_by_the_user_or_by_the_system(tmp_path, to_workers):
    """Two interrupts in a row, or a worker that is killed, end the packing soon, and it goes on."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW_PACKING)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, str(script), str(tmp_path / "out"), "2"]
    with subprocess.Popen(
        command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    ) as running:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out" / "train-000001.tar").exists():
            assert time.monotonic() < deadline and running.poll() is None
            time.sleep(0.01)
        if to_workers == signal.SIGKILL:
            children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
            for child in children.read_text(encoding="utf-8").split():
                os.kill(int(child), to_workers)
        else:
            os.killpg(running.pid, to_workers)
            os.kill(running.pid, to_workers)
        errors = running.communicate(timeout=60)[1]
    assert running.returncode != 0
    named = "ChildProcessError: a packing process was killed"
    assert (named if to_workers == signal.SIGKILL else "KeyboardInterrupt") in errors
    result = pack(job(tmp_path / "out", build=Build(wait_s=0.02)), processes=2)
    assert 1 <= result.reused_shards < 5

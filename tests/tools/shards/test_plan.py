"""`tools.shards plan`: the simulation, on the command line."""

import re
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data_pipeline.cache.test_eviction import COUNT, Script, batches, scripts
from tests.data_pipeline.small_shards import write_shards
from tools.shards.__main__ import main
from tools.shards.plan import simulate_lru


def figures(text: str) -> dict[tuple[str, str], tuple[float, float]]:
    """(cache, policy) -> hits in %, GiB downloaded."""
    row = r"│ (.*?) GiB +│ (.*?) +│ (.*?)% +│ (.*?) GiB"
    return {(m[1], m[2]): (float(m[3]), float(m[4])) for m in re.finditer(row, text)}


def test_a_larger_cache_downloads_less(tmp_path, capsys):
    shards = write_shards(tmp_path / "set", 3000, 500)
    size = sum(shard.bytes for shard in shards.shards) / 2**30
    caps = [f"{share * size:.6f}" for share in (0.25, 0.5, 1.2)]
    command = ["plan", str(tmp_path / "set"), "--global-batch", "64", "--block-mib", "0.003"]
    assert main([*command, "--max-gib", *caps]) == 0
    text = capsys.readouterr().out
    assert "3,000 samples" in text and "140 steps of 64 = 2.99 epochs" in text
    found = figures(text)
    hits = [found[f"{float(cap):g}", "known future"][0] for cap in caps]
    assert hits == sorted(hits) and hits[-1] > 60
    for cap in caps:
        assert found[f"{float(cap):g}", "known future"][0] >= found[f"{float(cap):g}", "LRU"][0]
    assert main([*command, "--max-gib", caps[0], "--nodes", "2", "--block-mib", "null"]) == 0
    assert "in 6 blocks" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*command, "--max-gib", "-1"])
    assert "-1 is not a positive number" in capsys.readouterr().err


@given(scripts, st.integers(1, COUNT), batches)
def test_lru_is_lru(script, capacity, batch):
    held: OrderedDict[int, None] = OrderedDict()
    fetched = 0
    for step in script:
        for block in sorted(set(step)):
            fetched += block not in held
            held[block] = None
            held.move_to_end(block)
            if len(held) > capacity:
                held.popitem(last=False)
    outcome = simulate_lru(Script(script, [1.0] * COUNT, batch), capacity, 0, len(script))
    assert (outcome.fetched, outcome.fetched_bytes) == (fetched, fetched)
    assert outcome.most_held_bytes <= capacity

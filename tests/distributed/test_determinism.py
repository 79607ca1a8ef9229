"""The engine under the deterministic switch: nothing is read before it is written, and nothing runs
whose order of addition torch cannot fix. In the steps of objectives themselves:
tests/pretrain/objectives/test_determinism.py."""

import json

import pytest

from tests.distributed.determinism_worker import CELLS
from tests.distributed.launch import run_ranks, tails


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("determinism")
    codes = run_ranks("tests.distributed.determinism_worker", [out], 2, out)
    assert codes == [0, 0], tails(out)
    return [json.loads((out / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.parametrize("stage, precision", CELLS)
def test_the_engine_under_the_switch(ranks, stage, precision):
    """`filled`: the switch itself leaves torch's filling of memory, which costs time, off."""
    for results in ranks:
        found = results[f"zero{stage}-{precision}"]
        assert found.pop("tensors") > 10
        assert found == {"same": True, "finite": True, "found": [], "filled": False}

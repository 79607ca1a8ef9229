"""The engine under the deterministic switch: nothing is read before it is written, and nothing runs
whose order of addition torch cannot fix. In the steps of objectives themselves:
tests/pretrain/objectives/test_determinism.py."""

import pytest

from tests.distributed.determinism_worker import CELLS as ALL
from tests.distributed.determinism_worker import FAST, cell_name
from tests.distributed.launch import Cells

CELLS = Cells("tests.distributed.determinism_worker", 2, ALL, FAST, cell_name)


@pytest.mark.parametrize("cell", CELLS.params)
def test_the_engine_under_the_switch(tmp_path_factory, cell):
    """`filled`: the switch itself leaves torch's filling of memory, which costs time, off."""
    _, ranks = CELLS.result(cell, tmp_path_factory)
    assert len(ranks) == 2
    for found in ranks:
        assert found.pop("tensors") > 10
        assert found == {"same": True, "finite": True, "found": [], "filled": False}

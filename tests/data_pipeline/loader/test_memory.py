"""Memory of all processes of a loader is flat over three epochs, whatever the data set's size."""

import pytest

from tools.benchmark.memory import MOST_GROWTH, growth, measure
from tools.support.measure import in_fresh_process


@pytest.mark.parametrize(
    ("workers", "rows", "steps"),
    [
        pytest.param(2, 4_000, 62, marks=pytest.mark.slow),
        pytest.param(8, 10**8, 600, marks=pytest.mark.slow),
        pytest.param(2, 64_000, 10**9, marks=pytest.mark.slow),
    ],
)
def test_memory_is_flat_over_three_epochs(workers, rows, steps):
    found = in_fresh_process(measure, workers, rows, 64, steps, 5)
    assert [row["epoch"] for row in found] == [1, 2, 3]
    assert found[0]["samples"] == min(steps, rows // 64) * 64
    assert growth(found) < MOST_GROWTH, found

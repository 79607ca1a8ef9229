"""Spikes of the loss against the rule written down again."""

import math
import statistics

from hypothesis import given
from hypothesis import strategies as st

from pretrain.engine.spikes import SpikeSettings, SpikeWatch

losses = st.lists(
    st.tuples(st.sampled_from("ab"), st.none() | st.floats(0.01, 100) | st.just(math.nan)),
    max_size=60,
)


@given(losses, st.floats(1.1, 5), st.integers(5, 8))
def test_a_spike_is_above_the_median_of_its_own_task(series, factor, window):
    watch, seen = SpikeWatch(SpikeSettings(factor=factor, window=window)), {"a": [], "b": []}
    for step, (task, loss) in enumerate(series):
        said = watch.observe(task, step, loss)
        before = seen[task][-window:]
        counts = loss is not None and math.isfinite(loss)
        spike = counts and len(before) == window and loss > factor * statistics.median(before)
        assert (said is not None) == spike
        if spike:
            assert f"step {step}, {task}: the loss jumped to {loss:.4g}" in said
        if counts:
            seen[task].append(loss)

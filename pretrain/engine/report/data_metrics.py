"""What loading did for a task, over all ranks: rates of storage, retries, cache, bad samples."""

import time

import torch
import torch.distributed as dist

from data_pipeline.loader.loader import StepLoader
from pretrain.engine.launch.distributed import Ranks

# The same on every rank, whatever its storage counts: they travel by their place.
_COUNTERS = ("bytes_read", "retries", "cache_hits", "cache_misses")


class DataMetrics:
    """Numbers for the metrics of one task at a time.

    Args:
        ranks: this process.
        loader: of this rank.
    """

    def __init__(self, ranks: Ranks, loader: StepLoader) -> None:
        self.ranks, self.loader = ranks, loader
        self._last: dict[str, tuple[float, int]] = {}
        self._started = time.monotonic()

    def describe(self, task: str) -> dict[str, float]:
        """Totals since this start, and MB/s since the last call for the task. A collective.

        Cache numbers are left out while nothing has asked a cache or a read-ahead.
        """
        counts, faults = self.loader.counters(task), self.loader.faults()
        replaced = faults[task].replaced if task in faults else 0
        values = torch.tensor(
            [replaced, *(counts.get(name, 0) for name in _COUNTERS)],
            dtype=torch.int64,
            device=self.ranks.device,
        )
        dist.all_reduce(values)
        replaced, read, retries, hits, misses = values.tolist()
        now = time.monotonic()
        since, before = self._last.get(task, (self._started, 0))
        self._last[task] = now, read
        metrics = {
            "replaced_samples": replaced,
            "read_retries": retries,
            "read_mb_per_second": (read - before) / 1e6 / max(now - since, 1e-9),
        }
        if hits + misses:
            metrics |= {
                "cache_hits": hits,
                "cache_misses": misses,
                "cache_hit_rate": hits / (hits + misses),
            }
        return metrics

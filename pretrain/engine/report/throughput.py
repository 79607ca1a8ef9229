"""From counts and times of a step to rates that can be compared: samples/s, FLOP/s, MFU, memory."""

import resource
import sys

import torch
import torch.distributed as dist

from data_pipeline.timing import STAGES
from pretrain.engine.launch.distributed import Ranks
from pretrain.engine.report.slow_rank import SlowRanks
from pretrain.engine.report.step_report import StepReport

# The same on every rank, whatever its share of the batch was: times travel by their place.
_TIMES = (*STAGES, "wait", "own", "step", "total")


class Throughput:
    """Adds rates over all ranks to a step's metrics.

    Args:
        ranks: this process.
        peak_tflops_per_device: what the device could do; without it no MFU is given.
    """

    def __init__(self, ranks: Ranks, peak_tflops_per_device: float | None) -> None:
        self.ranks = ranks
        self.peak = peak_tflops_per_device
        self.slow = SlowRanks(ranks.places)

    def describe(self, report: StepReport) -> dict[str, float | None]:
        """The report as flat metrics. A collective; every rank gets the same values.

        Times are the slowest rank's seconds per step; memory is the largest rank's peak in GiB.
        With several ranks, `slowest_rank` is the one that the others waited for (`slow_rank`).
        """
        metrics = dict(report.metrics)
        mine = [
            *(report.seconds.get(name, 0.0) for name in _TIMES),
            self._peak_memory_gib(),
            float(metrics.pop("flops")),
        ]
        everyone = self._of_all_ranks(mine)
        *times, memory, _ = everyone.amax(0).tolist()
        work = everyone[:, -1].sum()
        metrics |= {f"seconds_{name}": value for name, value in zip(_TIMES, times, strict=True)}
        total = metrics["seconds_total"]
        metrics["samples_per_second"] = metrics["samples"] / total
        rate = float(work) / total / self.ranks.world
        metrics["model_tflops_per_device"] = rate / 1e12
        if self.peak:
            metrics["mfu"] = rate / 1e12 / self.peak
        metrics["peak_memory_gib"] = memory
        if self.ranks.world > 1:
            metrics["slowest_rank"] = self.slow.observe(everyone[:, _TIMES.index("own")].tolist())
        return metrics

    def _of_all_ranks(self, mine: list[float]) -> torch.Tensor:
        """The numbers of every rank, (world, n) float64 on the CPU."""
        own = torch.tensor(mine, dtype=torch.float64, device=self.ranks.device)
        everyone = own.new_empty(self.ranks.world * len(own))
        dist.all_gather_into_tensor(everyone, own)
        return everyone.view(self.ranks.world, -1).cpu()

    def _peak_memory_gib(self) -> float:
        if self.ranks.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.ranks.device) / 2**30
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

"""Momentum targets: networks that follow the weights of others instead of being trained.

He et al., MoCo (arXiv 1911.05722), section 3.2; the rising momentum of BYOL (arXiv 2006.07733),
section 3.3, which SiameseIM and M3I use. What an objective declares is here; `engine.momentum`
does it under ZeRO.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class MomentumTargets:
    """Which modules of an objective are momentum targets: its attribute `momentum_targets`.

    An objective builds a target like any other submodule, a second one of the same settings, calls
    `requires_grad_(False)` on it and runs it in evaluation mode under `torch.no_grad()`. It neither
    copies nor updates weights: the engine gives the target those of the online module when a run
    starts, and after every optimizer step that was applied

        target = m * target + (1 - m) * online        (float32 beside ZeRO's master weights)

    and a copy of the online buffers. Every step counts, whatever its task: each one moves the
    weights of an encoder that tasks share, and a target that followed in some steps only would
    average over another stretch of them at every change of the sampling.

    Attributes:
        pairs: path of a target module -> path of its online module. Paths are relative to the
            objective, as in `objective.get_submodule`; an online path `encoders.NAME` (or deeper)
            is the model's shared encoder of that name. The two modules have parameters and
            buffers of the same names and shapes.
        start: momentum after the first step, in [0, 1].
        end: momentum that a run ends with, in [0, 1].

    Raises:
        ValueError: no pair, an empty or nested target path, or a momentum outside [0, 1].
    """

    pairs: dict[str, str]
    start: float = 0.995
    end: float = 1.0

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ValueError("momentum targets: no pair of a target and an online module")
        for target, online in self.pairs.items():
            if not target or not online:
                raise ValueError(f"momentum targets: an empty path in {target!r}: {online!r}")
            inside = [other for other in self.pairs if target.startswith(f"{other}.")]
            if inside:
                raise ValueError(
                    f"momentum targets: {target} lies within {inside[0]}, which is a target itself"
                )
        for name in ("start", "end"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"momentum targets: {name}={value} is not in [0, 1]")

    def momentum_at(self, update: int, updates: int) -> float:
        """Momentum of update number `update`, counted from 0, of a run of `updates` updates.

        Half a cosine from `start` to `end`; a pure function, so it needs no state. Later updates
        keep `end`. Raises ValueError for a negative update or a run without any.
        """
        if update < 0 or updates < 1:
            raise ValueError(f"momentum of update {update} of {updates}: out of range")
        progress = min(1.0, update / updates)
        return self.end - (self.end - self.start) * 0.5 * (1.0 + math.cos(math.pi * progress))

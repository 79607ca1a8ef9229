"""Where the time of a micro-batch goes."""

import time

STAGES = ("read", "decode", "transform", "collate")
"""What loading a micro-batch consists of: the same names for every batch, also for one that is all
padding and decodes nothing, since ranks reduce these times by their places."""


class StageClock:
    """Adds up seconds per stage; each lap ends one stage and starts the next."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._mark = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Book the time since the previous lap (or since construction) under one of `STAGES`."""
        now = time.perf_counter()
        self.seconds[stage] += now - self._mark
        self._mark = now

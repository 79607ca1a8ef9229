"""Where the time of a micro-batch goes."""

import time


class StageClock:
    """Adds up seconds per stage; each lap ends one stage and starts the next."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._mark = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Book the time since the previous lap (or since construction) under `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._mark
        self._mark = now

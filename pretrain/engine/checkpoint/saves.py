"""When the checkpoints of a run are written, and what is said of them.

Asynchronous ones are copied between two steps and written while the next steps run. That no rank is
busy with it any more is agreed in the all-reduce of each step (`loop.Loop`): once for what the
ranks write, and once for the commit of rank 0.
"""

import contextlib
import logging
import time
from collections.abc import Callable

from pretrain.engine.checkpoint.background_save import BackgroundCheckpoints
from pretrain.engine.control.control import ControlFolder

log = logging.getLogger("omnipretrain.checkpoint")


class Saves:
    """The checkpoints of a run, as its steps come to them. All methods are called on all ranks.

    Args:
        checkpoints: writes them.
        control: rank 0's; None on other ranks.
        saving: a context in which the run is known to save.
        state: gives the arguments of `Checkpoints.save` by name, as of now.
    """

    def __init__(
        self,
        checkpoints: BackgroundCheckpoints,
        control: ControlFolder | None,
        saving: Callable[[], contextlib.AbstractContextManager],
        state: Callable[[], dict],
    ) -> None:
        self._checkpoints, self._control = checkpoints, control
        self._saving, self._state = saving, state
        self.step = 0
        """Of the newest checkpoint, be it still written."""
        self._answers = self._awaited = False
        self._observed: int | None = None

    def due(self, step: int, asked: bool) -> bool:
        """Whether a checkpoint is to be written after this step.

        asked: somebody asked for one when this step began; who was waiting for one then, which
            was being written, had asked for that one.
        """
        planned = step % self._checkpoints.settings.every_steps == 0
        return planned or (asked and not self._awaited)

    def save(self, asked: bool) -> None:
        """Write the checkpoint of this step, or begin to.

        Args:
            asked: by somebody who waits for it.
        """
        if not self._checkpoints.settings.asynchronous:
            self.finish()
            self._answer(asked)
            return
        with self._saving():
            self._wait()
            state = self._state()
            if state["step"] != self.step:
                self._checkpoints.begin(**state)
                self.step = state["step"]
                self._answers = asked
            else:
                self._answer(asked)

    def observe(self) -> bool:
        """Whether this rank is busy with a checkpoint; before the ranks agree on it."""
        self._observed, self._awaited = self._checkpoints.unfinished, self._answers
        return self._checkpoints.busy()

    def written(self) -> None:
        """No rank was busy when they observed it: go on, if it is still that one."""
        step = self._checkpoints.unfinished
        if step is not None and self._observed == step and self._checkpoints.advance():
            self._note(step)

    def wait(self) -> None:
        """Commit what is being written, as soon as it is."""
        with self._saving():
            self._wait()

    def finish(self) -> None:
        """Write the checkpoint of this step, if there is none; return when it is durable."""
        state = self._state()
        if state["step"] == self.step and self._checkpoints.unfinished is None:
            return
        with self._saving():
            self._wait()
            if state["step"] == self.step:
                return
            self._checkpoints.save(**state)
        self.step = state["step"]
        self._tell(self.step)

    def _wait(self) -> None:
        step = self._checkpoints.unfinished
        if step is None:
            return
        begun = time.monotonic()
        if self._control is not None and self._checkpoints.busy():
            log.info("waiting for the checkpoint of step %d, which is still being written", step)
        self._checkpoints.settle()
        self._note(step)
        if self._control is not None and (waited := time.monotonic() - begun) > 1:
            log.info("waited %.1f s for the checkpoint of step %d", waited, step)

    def _note(self, step: int) -> None:
        """An asynchronous one is committed."""
        self._tell(step)
        self._answer(self._answers)

    def _tell(self, step: int) -> None:
        if self._control is not None:
            self._control.status("running", step)

    def _answer(self, asked: bool) -> None:
        if asked and self._control is not None:
            self._control.save_done()
        self._answers = False

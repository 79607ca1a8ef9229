"""A count in a buffer, known to the host without asking the device each time."""

from torch import Tensor


class StepCount:
    """Follows a buffer (1,) int64 that counts steps.

    To read a buffer on a GPU is to wait for all that the GPU has been given. So it is read once,
    and again only after something else has written it (a resumed checkpoint), which shows in the
    tensor's version.
    """

    def __init__(self) -> None:
        self._seen: tuple[Tensor | None, int] = (None, 0)  # the tensor, and its version
        self._steps = 0

    def of(self, buffer: Tensor) -> int:
        """Steps so far."""
        tensor, version = self._seen
        if tensor is not buffer or version != buffer._version:
            self._steps, self._seen = int(buffer), (buffer, buffer._version)
        return self._steps

    def advance(self, buffer: Tensor) -> None:
        """One more, in the buffer too."""
        steps = self.of(buffer)
        buffer += 1
        self._steps, self._seen = steps + 1, (buffer, buffer._version)

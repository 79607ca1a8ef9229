"""The time that a rank needs for itself in a step, before it waits for any other.

The time of a whole step says nothing of that: all ranks leave its collectives together. So what is
clocked is the layers of a forward pass. Under ZeRO-3 a layer's weights are gathered before its
clock starts, and losses that look at other ranks' samples are no layers.
"""

import time

import torch
from torch import nn


class OwnTime:
    """Clocks the layers (modules without children) of one forward pass, in a `with` block.

    The hooks are there within the block only, and only until the first pass is over: steps that
    are not reported pay nothing.

    Args:
        module: the model; its own forward is the pass.
        device: on a GPU the clock is the GPU's.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module, self._on_gpu = module, device.type == "cuda"
        self._handles: list = []
        self._laps: list[tuple] = []

    def __enter__(self) -> None:
        self._laps = []
        layers = [m for m in self._module.modules() if not any(m.children())]
        for layer in layers:
            self._handles.append(layer.register_forward_pre_hook(lambda *_: self._start()))
            self._handles.append(layer.register_forward_hook(lambda *_: self._stop()))
        self._handles.append(self._module.register_forward_hook(lambda *_: self._remove()))

    def __exit__(self, *_) -> None:
        self._remove()

    def seconds(self) -> float:
        """What the pass took; to be asked when the device has finished the step."""
        if self._on_gpu:
            return sum(start.elapsed_time(end) for start, end in self._laps) / 1e3
        return sum(end - start for start, end in self._laps)

    def _mark(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _start(self) -> None:
        self._began = self._mark()

    def _stop(self) -> None:
        self._laps.append((self._began, self._mark()))

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

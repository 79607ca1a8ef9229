"""PyTorch's meta device in the place of a GPU: what may not happen there in a step shows itself.

Meta tensors have no values, so that reading one on the host (`item`, `nonzero`, a mask as an index)
is an error already. `watched()` finds the rest: operators on tensors of two devices, and copies
between devices for which the host would wait until the GPU has done all that it was given.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


def on_stand_in(module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The module as a run in that precision has it."""
    return module.to(dtype).to(DEVICE)


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Within, collects what would make the host wait, or fail; one text for each."""
    found: list[str] = []
    with _Calls(found), _Operators(found):
        yield found


class _Operators(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        if len({t.device for t in inputs + outputs}) == 1:
            return result
        if func in _COPIES:
            if not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
                self.found.append(f"{func}: a copy that is waited for")
        elif any(t.dim() for t in inputs if t.device != DEVICE):  # single numbers may mix
            self.found.append(f"{func}: tensors of two devices")
        return result


class _Calls(TorchFunctionMode):
    """Sees what never reaches an operator of the meta device: values that Python hands over."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
            device = kwargs.get("device")
            if device is not None and torch.device(device) == DEVICE:
                self.found.append(f"torch.{func.__name__}({args[0]}): a copy that is waited for")
        return func(*args, **kwargs)

"""The count of a buffer, on the host: right whoever writes it, and read only when needed."""

import copy

import torch
from torch import nn

from pretrain.objectives.step_count import StepCount


class Reads(torch.Tensor):
    """A tensor that counts how often its value is asked for."""

    asked = 0

    def __int__(self) -> int:
        Reads.asked += 1
        return super().__int__()


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count = StepCount()
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))


def stepped(count: StepCount, buffer: torch.Tensor) -> int:
    """Steps before one more."""
    before = count.of(buffer)
    count.advance(buffer)
    return before


def test_the_buffer_is_read_once_for_many_steps():
    Reads.asked = 0
    buffer, count = torch.zeros(1, dtype=torch.int64).as_subclass(Reads), StepCount()
    assert [stepped(count, buffer) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert buffer.tolist() == [5] and count.of(buffer) == 5 and Reads.asked == 1


def test_what_others_write_counts():
    module = Counted()
    assert stepped(module.count, module.steps) == 0
    module.load_state_dict({"steps": torch.tensor([40])})
    assert [stepped(module.count, module.steps) for _ in range(2)] == [40, 41]
    with torch.no_grad():
        module.steps.copy_(torch.tensor([7]))
    assert stepped(module.count, module.steps) == 7
    module.steps = torch.tensor([100])  # another tensor, as `module.to(device)` makes
    module.count.advance(module.steps)
    assert (module.steps.tolist(), module.count.of(module.steps)) == ([101], 101)
    other = copy.deepcopy(module)
    other.steps.zero_()
    assert (stepped(other.count, other.steps), stepped(module.count, module.steps)) == (0, 101)
    assert (other.steps.tolist(), module.steps.tolist()) == ([1], [102])

"""What is said of checkpoints that are written while training goes on, and when."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from pretrain.engine.checkpoint.background_save import BackgroundPart
from pretrain.engine.checkpoint.saves import Saves


class Run:
    """Steps of a run as the loop calls for them; a checkpoint is written for `steps_to_write`."""

    def __init__(self, every: int, steps_to_write: int) -> None:
        self.settings = SimpleNamespace(asynchronous=True, every_steps=every)
        self.unfinished, self.left, self.steps_to_write = None, 0, steps_to_write
        self.step, self.asked, self.said, self.committing = 0, False, [], False
        control = SimpleNamespace(
            status=lambda state, step: self.said.append(f"committed {step}"),
            save_done=self.save_done,
        )
        self.saves = Saves(self, control, nullcontext, lambda: {"step": self.step})

    def save_done(self) -> None:
        self.asked = False
        self.said.append("answered")

    def begin(self, step: int) -> None:
        assert self.unfinished is None
        self.unfinished, self.left = step, self.steps_to_write

    def save(self, step: int) -> None:
        assert self.unfinished is None

    def busy(self) -> bool:
        return self.unfinished is not None and self.left > 0

    def advance(self) -> bool:
        """Two steps: to the commit, which takes no time here, and behind it."""
        self.committing = not self.committing
        if not self.committing:
            self.unfinished = None
        return not self.committing

    def settle(self) -> None:
        while not self.advance():
            pass

    def take_step(self) -> None:
        self.said.append(self.step + 1)
        writing, asked = self.saves.observe(), self.asked
        self.step += 1
        self.left -= 1
        if not writing:
            self.saves.written()
        if self.saves.due(self.step, asked):
            self.saves.save(asked)


def test_a_checkpoint_is_committed_when_all_have_written_it():
    run = Run(every=4, steps_to_write=1)
    for _ in range(7):
        run.take_step()
    run.saves.finish()
    assert run.said == [1, 2, 3, 4, 5, 6, 7, "committed 4", "committed 7"]


def test_a_second_one_waits_for_the_first():
    run = Run(every=2, steps_to_write=9)
    for _ in range(4):
        run.take_step()
    assert run.said == [1, 2, 3, 4, "committed 2"] and run.unfinished == 4
    run.saves.finish()
    assert run.said[-1] == "committed 4"


@pytest.mark.parametrize(
    "steps_to_write, said",
    [
        (2, [1, 2, 3, 4, 5, 6, "committed 2", "answered"]),
        (0, [1, 2, 3, 4, "committed 2", "answered", 5, 6]),
    ],
)
def test_who_asks_is_answered_once_and_when_it_is_there(steps_to_write, said):
    run = Run(every=100, steps_to_write=steps_to_write)
    run.take_step()
    run.asked = True
    for _ in range(5):
        run.take_step()
    assert run.said == said


def test_asked_for_while_another_is_written():
    run = Run(every=2, steps_to_write=3)
    run.take_step()
    run.take_step()
    run.asked = True
    run.take_step()
    assert run.said == [1, 2, 3, "committed 2"] and run.unfinished == 3
    run.saves.finish()
    assert run.said[-2:] == ["committed 3", "answered"]


def test_files_are_those_of_the_library(tmp_path):
    """Of all types, sizes and orders of names; and the copy is what was there at the start."""
    generator = torch.Generator().manual_seed(0)
    dtypes = (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.float16,
        torch.bfloat16,
        torch.int32,
        torch.float32,
        torch.float64,
        torch.int64,
    )
    tensors = {
        f"{index}.{name}é": torch.randint(100, shape, generator=generator).to(dtype)
        for index, (name, shape) in enumerate([("a", (3, 5)), ("b", ()), ("c", (0,)), ("d", (7,))])
        for dtype in dtypes
        for name in (f"{name}.{dtype}",)
    }
    save_file(tensors, tmp_path / "library")
    background = BackgroundPart(torch.device("cpu"))
    try:
        for number, size in enumerate((1, 3, 2)):  # the memory grows once
            folder = tmp_path / str(number)
            folder.mkdir()
            contents = {"t": tensors, "empty": b"", "deep/file": b"x" * 5000 * size}
            background.start(contents, folder)
            for tensor in tensors.values():
                tensor.logical_not_()
            entries = background.result()
            for tensor in tensors.values():  # booleans come back; the rest is as of the new save
                tensor.logical_not_()
            if number == 0:
                assert (folder / "t").read_bytes() == (tmp_path / "library").read_bytes()
            assert (folder / "deep/file").read_bytes() == contents["deep/file"]
            assert entries["empty"]["bytes"] == 0 and (folder / "empty").read_bytes() == b""
    finally:
        background.close()

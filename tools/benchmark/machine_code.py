"""Machine code of Triton kernels for a GPU that need not be here: compiled, taken apart, counted.

Triton brings NVIDIA's assembler and disassembler along, so a kernel's registers, spills and the
instructions that it executes are known before any GPU has run it.
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

# `  /*01b0*/   @!P0 LDG.E.128 R12, desc[UR8][R22.64] ;` and `.L_x_0:`
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);")
_LABEL = re.compile(r"(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\S+?)\)")


class Code(NamedTuple):
    """A compiled kernel.

    registers: of a thread. spilled: bytes of a thread's stack, which lies in slow memory. shared:
    bytes of a program's shared memory. warps: of a program. instructions: (name, label or
    subroutine that it names, or None), in order. loops: (first, one past the last) numbers of
    instructions. ptx: the virtual machine's code that it comes from.
    """

    registers: int
    spilled: int
    shared: int
    warps: int
    instructions: list[tuple[str, str | None]]
    loops: list[tuple[int, int]]
    ptx: str

    def count(self, name: str, start: int = 0, end: int | None = None) -> int:
        """How often an instruction stands in the code."""
        return sum(found == name for found, _ in self.instructions[start:end])


def compiled(
    kernel: Any, arguments: Sequence[Any], settings: dict[str, Any], config: Any, capability: int
) -> Code:
    """The code of a kernel for one of its configurations.

    Args:
        kernel: autotuned; called with `arguments` and `settings`, whose tensors may be on the CPU.
        config: one of `kernel.configs`.
        capability: of the GPU: 80 is an A100, 90 an H100.
    """
    with _gpu_elsewhere(capability):
        binary = kernel.fn.warmup(
            *arguments, **settings, **config.kwargs, num_warps=config.num_warps, grid=(1,)
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary.asm["cubin"])
        usage = _said("cuobjdump", "-res-usage", file)
        listing = _said("nvdisasm", "-c", file)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    instructions, loops = _parsed(listing)
    return Code(
        registers,
        stack,
        binary.metadata.shared,
        config.num_warps,
        instructions,
        loops,
        binary.asm["ptx"],
    )


def executed(code: Code, mark: str, expected: int, inner: int) -> int:
    """Instructions that a warp executes, though the code has loops.

    The trips of a loop follow from how often a certain instruction is known to be executed.

    Args:
        mark: how the names of that instruction begin; outside of loops a few more may do.
        expected: how often a warp executes it.
        inner: how often within one trip of an outer loop, if loops are nested.

    Raises:
        ValueError: the trips do not come out whole, or there are subroutines: the code is not as
            this function thinks.
    """
    # Some loops end with a call of a label in the kernel, which does not return.
    called = {
        target
        for name, target in code.instructions
        if name.startswith("CALL") and not str(target).startswith(".L_x_")
    }
    if called:
        raise ValueError(f"what {called} execute is not known")
    marked = [name.startswith(mark) for name, _ in code.instructions]
    trips = [1] * len(code.instructions)
    for start, end in sorted(code.loops, key=lambda loop: loop[1] - loop[0]):
        within = any(s <= start and end <= e and (s, e) != (start, end) for s, e in code.loops)
        found = sum(trips[n] for n in range(start, end) if marked[n])
        wanted = inner if within else expected
        if not found or wanted % found:
            raise ValueError(f"a loop has {found} {mark}, which does not divide {wanted}")
        for n in range(start, end):
            trips[n] *= wanted // found
    found = sum(count for count, is_marked in zip(trips, marked, strict=True) if is_marked)
    if not expected <= found <= 1.25 * expected:
        raise ValueError(f"{found} {mark} are executed, not {expected}")
    return sum(trips)


class _Elsewhere:
    """What Triton asks the driver of a GPU when it compiles, but for one that is not here."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        """A number of its own for each kind, far from those of GPUs that are here."""
        return 1000 + self.capability

    def get_current_stream(self, device: int) -> int:
        """Nothing is launched."""
        return 0

    def get_current_target(self) -> Any:
        """What is compiled for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_device_interface(self) -> Any:
        """Tensors are the CPU's."""
        return torch.cpu


@contextlib.contextmanager
def _gpu_elsewhere(capability: int) -> Iterator[None]:
    from triton.runtime import driver

    # Without a GPU there is none to go back to, and `reset_active` would fail.
    before = getattr(driver, "_active", None)
    driver.set_active(_Elsewhere(capability))
    try:
        yield
    finally:
        driver.set_active(before)


def _said(program: str, *arguments: Any) -> str:
    from triton import knobs

    path = getattr(knobs.nvidia, program).path
    done = subprocess.run(
        [path, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{program} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def _parsed(listing: str) -> tuple[list[tuple[str, str | None]], list[tuple[int, int]]]:
    """Instructions up to the last exit, which padding follows, and loops."""
    labels: dict[str, int] = {}
    instructions: list[tuple[str, str | None]] = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            target = _TARGET.search(found[2])
            instructions.append((found[1], target[1] if target else None))
    last = max(n for n, (name, _) in enumerate(instructions) if name == "EXIT")
    instructions = instructions[: last + 1]
    loops = [
        (labels[target], n + 1)
        for n, (name, target) in enumerate(instructions)
        if name.startswith("BRA") and target in labels and labels[target] <= n
    ]
    return instructions, loops

"""PTX, the code that Triton compiles a kernel to for an NVIDIA GPU, run on the CPU.

The threads of a program go in step; a branch that only some take is refused. Each access of memory
must lie in a tensor that the kernel was given, and be aligned to its size. The instructions are
those that the kernels of this folder are compiled to: another one is a NotImplementedError.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.pretrain.models.operators.ptx_arithmetic import BITS, calculated, size_of, viewed

_PARAMETER = re.compile(r"\.param\s+\.\w+\s+(?:\.ptr\s+\.global\s+\.align\s+\d+\s+)?(\w+)")
_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", re.S)
_SHARED_BYTES = 2**17


class _Instruction(NamedTuple):
    """predicate: register that says which threads execute it, or None."""

    negated: bool
    predicate: str | None
    name: list[str]
    operands: list[str]


def run(ptx: str, arguments: Sequence[Tensor | int], programs: int, warps: int) -> None:
    """Run a kernel; what it writes is in the tensors afterwards.

    Args:
        arguments: those that are not compile-time constants. Tensors are contiguous, on the CPU.
        programs, warps: of the launch, and of one program.

    Raises:
        IndexError: an access outside of the tensors, or not aligned.
        NotImplementedError: an instruction that is not known, or threads that part.
    """
    parameters, code, labels = _parsed(ptx)
    memory = [
        (t.data_ptr(), t.view(-1).view(torch.uint8).numpy())
        for t in arguments
        if isinstance(t, Tensor)
    ]
    numbers = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    numbers += [0] * (len(parameters) - len(numbers))  # pointers that Triton adds for itself
    values = dict(zip(parameters, numbers, strict=True))
    with np.errstate(all="ignore"):
        for number in range(programs):
            _Program(memory, values, number, 32 * warps).execute(code, labels)


def _parsed(ptx: str) -> tuple[list[str], list[_Instruction], dict[str, int]]:
    head, body = ptx[ptx.index(".entry") :].split("{", 1)
    body = re.sub(r"//[^\n]*", "", body[: body.index("// -- End function")])
    body = re.sub(r"\n\s*\.(loc|pragma|file)[^\n]*", "\n", body)
    code: list[_Instruction] = []
    labels: dict[str, int] = {}
    for text in body.split(";"):
        while begin := re.match(r"\s*(?:(\$\w+):|[{}])", text):
            if begin[1]:
                labels[begin[1]] = len(code)
            text = text[begin.end() :]
        text = text.strip()
        if text and not text.startswith("."):
            negated, predicate, name, operands = _STATEMENT.fullmatch(text).groups()
            found = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s{}\[\]]+", operands)
            code.append(_Instruction(bool(negated), predicate, name.split("."), found))
    return _PARAMETER.findall(head), code, labels


class _Program:
    """Registers of all threads of a program, as bits, and its shared memory."""

    def __init__(self, memory: list, values: dict[str, int], number: int, threads: int) -> None:
        self.memory, self.values, self.threads = memory, values, threads
        self.shared = np.zeros(_SHARED_BYTES, np.uint8)
        self.registers = {
            "%tid.x": np.arange(threads, dtype=np.uint32),
            "%ctaid.x": np.full(threads, number, np.uint32),
        }

    def execute(self, code: list[_Instruction], labels: dict[str, int]) -> None:
        at = 0
        while True:
            negated, predicate, name, operands = code[at]
            on = self.registers[predicate] ^ negated if predicate else np.ones(self.threads, bool)
            at += 1
            if name[0] in ("ret", "exit", "bra"):
                if on.any() != on.all():
                    raise NotImplementedError(f"threads part at {name} {operands}")
                if on.all() and name[0] != "bra":
                    return
                at = labels[operands[0]] if on.all() else at
            elif name[0] != "bar":
                self._step(name, operands, on)

    def _step(self, name: list[str], operands: list[str], on: np.ndarray) -> None:
        if name[0] in ("ld", "st", "red", "atom"):
            getattr(self, f"_{name[0]}")(name, operands, on)
            return
        targets = re.findall(r"%\w+|\b_\b", operands[0])  # _ takes what no one needs
        results = calculated(name, operands[1:], len(targets), self.read)
        for target, result in zip(targets, np.atleast_2d(results), strict=True):
            self._write(target, result, on)

    def read(self, operand: str, kind: str) -> np.ndarray:
        """An operand's numbers of a type."""
        if operand.startswith("{"):
            parts = re.findall(r"%\w+", operand)
            pieces = [self.read(part, f"b{8 * size_of(kind) // len(parts)}") for part in parts]
            return np.stack(pieces, 1).view(BITS[size_of(kind)])[:, 0]
        if operand.startswith("%"):
            bits = self.registers[operand]
        elif operand == "global_smem":
            bits = np.zeros(self.threads, np.uint64)
        else:
            number = int(operand[2:], 16) if operand[:2] in ("0f", "0d") else int(operand, 0)
            bits = np.full(self.threads, number % 2 ** (8 * size_of(kind)), BITS[size_of(kind)])
        return viewed(bits, kind)

    def _write(self, target: str, result: np.ndarray, on: np.ndarray) -> None:
        if result.dtype != bool:
            result = np.ascontiguousarray(result).view(BITS[result.dtype.itemsize])
        before = self.registers.get(target, np.zeros_like(result))
        self.registers[target] = np.where(on, result, before)

    def _place(self, operand: str, space: str, size: int, on: np.ndarray) -> list:
        """[(bytes of a memory, which threads access it, their places there)]."""
        base, shift = re.fullmatch(r"\[\s*([%\w]+)\s*\+?\s*(-?\d+)?\s*\]", operand).groups()
        address = self.read(base, "s64") + int(shift or 0)
        if (address[on] % size).any():
            raise IndexError(f"an access of {size} bytes is not aligned")
        found = []
        for start, data in [(0, self.shared)] if space.startswith("shared") else self.memory:
            inside = on & (address >= start) & (address + size <= start + len(data))
            found.append((data, inside, address[inside, None] - start + np.arange(size)))
        if not np.logical_or.reduce([inside for _, inside, _ in found])[on].all():
            raise IndexError(f"an access of {size} bytes outside of all tensors")
        return found

    def _ld(self, name: list[str], operands: list[str], on: np.ndarray) -> None:
        targets, size = re.findall(r"%\w+", operands[0]), size_of(name[-1])
        if name[1] == "param":
            number = self.values[operands[1].strip("[]")] % 2 ** (8 * size)
            self._write(targets[0], np.full(self.threads, number, BITS[size]), on)
            return
        read = np.zeros((self.threads, size * len(targets)), np.uint8)
        for data, inside, places in self._place(operands[1], name[1], read.shape[1], on):
            read[inside] = data[places]
        for target, numbers in zip(targets, read.view(BITS[size]).T, strict=True):
            self._write(target, numbers, on)

    def _sources(self, operand: str, kind: str) -> np.ndarray:
        parts = re.findall(r"[^,\s{}]+", operand)
        return np.ascontiguousarray(np.stack([self.read(part, kind) for part in parts], 1))

    def _st(self, name: list[str], operands: list[str], on: np.ndarray) -> None:
        new = self._sources(operands[1], name[-1]).view(np.uint8)
        for data, inside, places in self._place(operands[0], name[1], new.shape[1], on):
            data[places] = new[inside]

    def _red(self, name: list[str], operands: list[str], on: np.ndarray) -> None:
        """One thread after another: they may add to the same place."""
        new = self._sources(operands[-1], name[-1])
        place = self._place(operands[-2], name[1], new.dtype.itemsize * new.shape[1], on)
        for data, inside, places in place:
            for added, at in zip(new[inside], places, strict=True):
                data[at] = (data[at].view(new.dtype) + added).view(np.uint8)

    _atom = _red  # what was there before is not used

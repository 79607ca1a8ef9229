"""What the instructions of PTX compute, for all threads at once; for `ptx.py`."""

import operator
import re
from collections.abc import Callable, Sequence

import numpy as np

BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_FLOATS = {2: np.float16, 4: np.float32, 8: np.float64}
_COMPARISONS = {name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")}

Read = Callable[[str, str], np.ndarray]
"""Numbers (threads,) of an operand, as a type of PTX."""


def size_of(kind: str) -> int:
    """Bytes of a type."""
    if kind == "pred":
        return 1
    size, several = re.fullmatch(r"[a-z]+(\d+)(x2)?", kind).groups()
    return int(size) // 8 * (2 if several else 1)


def viewed(bits: np.ndarray, kind: str) -> np.ndarray:
    """Bits as numbers of a type, the lower ones if there are more. bf16 becomes float32."""
    if kind == "pred":
        return bits.astype(bool)
    bits = bits.astype(BITS[size_of(kind)])
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    types = {"f": _FLOATS, "s": _SIGNED}.get(kind[0], BITS) if "x2" not in kind else BITS
    return bits.view(types[size_of(kind)])


def calculated(name: list[str], operands: Sequence[str], targets: int, read: Read) -> np.ndarray:
    """Result (threads,), or one for each of several targets, of an instruction split at its points.

    Raises:
        NotImplementedError: it is not known.
    """
    kind = name[-1]
    if name[0] == "mov":
        source = read(operands[0], kind)
        parts = source.view(BITS[size_of(kind) // targets]) if targets > 1 else source
        return parts.reshape(-1, targets).T
    if name[0] == "cvt":
        return _converted(name, operands, read)
    if name[0] == "shfl":
        return _shuffled(name, operands, read)
    if name[0] == "setp":
        return _compared(name, operands, read)
    if name[0] == "selp":
        yes, no, which = (read(o, k) for o, k in zip(operands, (kind, kind, "pred"), strict=True))
        return np.where(which, yes, no)
    if name[0] in ("mul", "mad") and kind[0] != "f":
        return _multiplied(name, operands, read)
    if name[0] in ("shl", "shr"):
        return _shifted(name[0], read(operands[0], kind), read(operands[1], "u32"))
    if kind in ("s16x2", "u16x2"):
        halves = (read(operand, kind).view(np.int16) for operand in operands)
        return _arithmetic(name[0], *halves).view(np.uint32)
    return _arithmetic(name[0], *(read(operand, kind) for operand in operands))


def _arithmetic(name: str, first: np.ndarray, *others: np.ndarray) -> np.ndarray:
    floating = first.dtype.kind == "f"
    if name == "neg":
        return -first
    if name == "not":
        return ~first
    if name == "bfe":
        start, length = others
        return (first >> start) & ((np.ones_like(first) << length) - 1)
    if name == "fma":  # rounded once, in the next wider type
        wide = np.float64 if first.dtype == np.float32 else np.longdouble
        return (first.astype(wide) * others[0] + others[1]).astype(first.dtype)
    if name in ("min", "max"):  # a number beats what is not one
        return getattr(np, f"f{name}" if floating else f"{name}imum")(first, *others)
    if name in ("div", "rem") and not floating:  # truncated
        quotient = np.trunc(first.astype(np.longdouble) / others[0]).astype(first.dtype)
        return quotient if name == "div" else first - quotient * others[0]
    names = {
        "add": "add",
        "sub": "sub",
        "mul": "mul",
        "div": "truediv",
        "and": "and_",
        "or": "or_",
        "xor": "xor",
    }
    if name not in names:
        raise NotImplementedError(name)
    return getattr(operator, names[name])(first, *others)


def _multiplied(name: list[str], operands: Sequence[str], read: Read) -> np.ndarray:
    """mul and mad of whole numbers: the lower half of the product, the upper one, or all of it."""
    kind = name[-1]
    size = size_of(kind)
    first, second = (read(operand, kind) for operand in operands[:2])
    twice = f"{kind[0]}{16 * size}"
    if name[1] == "lo":
        product = first * second
    elif size == 8:
        raise NotImplementedError(".".join(name))
    else:
        wide = (_SIGNED if kind[0] == "s" else BITS)[2 * size]
        product = first.astype(wide) * second.astype(wide)
        if name[1] == "hi":
            product = (product >> (8 * size)).astype(first.dtype)
    if name[0] == "mad":
        product = product + read(operands[2], twice if name[1] == "wide" else kind)
    return product


def _shifted(name: str, numbers: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Bits that are shifted out are gone, also where that is all of them."""
    width = 8 * numbers.dtype.itemsize
    shift = np.minimum(by, width - 1).astype(numbers.dtype)
    if name == "shl":
        return np.where(by < width, numbers << shift, 0).astype(numbers.dtype)
    signed = numbers.dtype.kind == "i"
    return np.where((by < width) | signed, numbers >> shift, 0).astype(numbers.dtype)


def _compared(name: list[str], operands: Sequence[str], read: Read) -> np.ndarray:
    """A comparison with what is not a number is false, but true if it ends in u."""
    if len(name) != 3:
        raise NotImplementedError(".".join(name))
    first, second = (read(operand, name[-1]) for operand in operands)
    unordered = (first != first) | (second != second)
    if name[1] in ("nan", "num"):
        return unordered if name[1] == "nan" else ~unordered
    found = _COMPARISONS[name[1][:2]](first, second)
    return found | unordered if name[1].endswith("u") else found & ~unordered


def _shuffled(name: list[str], operands: Sequence[str], read: Read) -> np.ndarray:
    """From another thread of the warp: the one of a number, or the neighbour by its bits."""
    if name[2] not in ("bfly", "idx") or int(operands[2], 0) != 31:
        raise NotImplementedError(".".join(name))
    numbers, which = (read(o, "u32").reshape(-1, 32) for o in operands[:2])
    source = which ^ np.arange(32, dtype=np.uint32) if name[2] == "bfly" else which
    return np.take_along_axis(numbers, source.astype(np.int64) & 31, 1).reshape(-1)


def _converted(name: list[str], operands: Sequence[str], read: Read) -> np.ndarray:
    to, of = name[-2:]
    if to in ("bf16x2", "f16x2"):  # the first operand comes to lie above
        above, below = (_narrowed(read(operand, of), to[:-2]) for operand in operands)
        return (above.astype(np.uint32) << 16) | below
    numbers = read(operands[0], of)
    if to in ("bf16", "f16"):
        return _narrowed(numbers, to)
    if to[0] == "f":
        return (np.floor(numbers) if "rmi" in name else numbers).astype(_FLOATS[size_of(to)])
    kind = (_SIGNED if to[0] == "s" else BITS)[size_of(to)]
    if of[0] != "f" and of != "bf16":
        return numbers.astype(kind)
    if "rzi" not in name:
        raise NotImplementedError(".".join(name))
    # What does not fit becomes the least or the largest number, and no number 0.
    info = np.iinfo(kind)
    inside = np.trunc(np.nan_to_num(numbers, nan=0.0)).astype(np.longdouble)
    return inside.clip(info.min, info.max).astype(kind)


def _narrowed(numbers: np.ndarray, kind: str) -> np.ndarray:
    """Bits of float16 or bfloat16, rounded to the nearest, to the even one of two."""
    if kind == "f16":
        return numbers.astype(np.float16).view(np.uint16)
    bits = numbers.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), 0x7FFF, rounded).astype(np.uint16)

"""Binomial and hypergeometric draws that every machine repeats, for counts of any size.

numpy's generators may change between versions, and floating-point logarithms differ between
machines; a schedule must do neither. Here the random bits are blake2b digests of the draw's name,
and the arithmetic is `decimal`, which the language defines digit by digit (its logarithm is
correctly rounded). The sampler is Devroye's rejection for log-concave laws: it needs the
probability of the mode only and is exact. What rounding leaves, 128-bit uniforms and 40 digits,
changes the law of a draw by less than 1e-20 in total variation for counts below 10**12.
"""

from collections.abc import Callable
from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP, Context, Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from math import factorial

from data_pipeline.rng import keyed_bytes

_CONTEXT = Context(prec=40, rounding=ROUND_HALF_EVEN)

# Below this a logarithm of a factorial is computed from the factorial itself, above by Stirling's
# series, whose first term left out is then below 1e-37.
_STIRLING_FROM = 256
_STIRLING = [
    Fraction(1, 12),
    Fraction(-1, 360),
    Fraction(1, 1260),
    Fraction(-1, 1680),
    Fraction(1, 1188),
    Fraction(-691, 360360),
    Fraction(1, 156),
]
_HALF_LN_2PI = Decimal("0.918938533204672741780329736405617639861397473637783")


def binomial(trials: int, chance: Fraction, *name: int | str) -> int:
    """Successes among `trials` of probability `chance` each; `name` keys the draw."""
    if trials == 0 or chance <= 0:
        return 0
    if chance >= 1:
        return trials
    with localcontext(_CONTEXT):
        success = _ln(chance)
        failure = _ln(1 - chance)

        def log_mass(k: int) -> Decimal:
            arrangements = -_ln_factorial(k) - _ln_factorial(trials - k)
            return _ln_factorial(trials) + arrangements + k * success + (trials - k) * failure

        mode = min(int((trials + 1) * chance), trials)
        return _draw(log_mass, mode, 0, trials, name)


def hypergeometric(marked: int, unmarked: int, taken: int, *name: int | str) -> int:
    """Marked ones among `taken` drawn without replacement; `name` keys the draw."""
    least, most = max(0, taken - unmarked), min(marked, taken)
    if least == most:
        return least
    with localcontext(_CONTEXT):
        total = marked + unmarked
        constant = (
            _ln_factorial(marked)
            + _ln_factorial(unmarked)
            + _ln_factorial(taken)
            + _ln_factorial(total - taken)
            - _ln_factorial(total)
        )

        def log_mass(k: int) -> Decimal:
            chosen = _ln_factorial(k) + _ln_factorial(marked - k)
            rest = _ln_factorial(taken - k) + _ln_factorial(unmarked - taken + k)
            return constant - chosen - rest

        mode = (taken + 1) * (marked + 1) // (total + 2)
        return _draw(log_mass, mode, least, most, name)


def _draw(
    log_mass: Callable[[int], Decimal],
    mode: int,
    least: int,
    most: int,
    name: tuple[int | str, ...],
) -> int:
    """One draw from a log-concave law on [least, most].

    With p the mass of the mode, such a law has mass(mode + d) <= p min(1, exp(1 - p |d|)). A
    continuous variable with the density p min(1, exp(w - p |y|)), w = 1 + p / 2, rounded to the
    next integer, therefore covers it; 4 + p trials are expected.
    """
    peak = log_mass(mode)
    mass = peak.exp()
    width = 1 + mass / 2
    attempt = 0
    while True:
        flat_or_tail, place, height, sign = _uniforms(*name, attempt)
        attempt += 1
        is_flat = flat_or_tail * (1 + width) <= width
        distance = (place * width if is_flat else width - place.ln()) / mass
        step = int(distance.to_integral_value(ROUND_HALF_UP))
        k = mode + (step if sign else -step)
        if not least <= k <= most:
            continue
        if height.ln() + min(Decimal(0), width - mass * distance) <= log_mass(k) - peak:
            return k


def _uniforms(*name: int | str) -> tuple[Decimal, Decimal, Decimal, bool]:
    """Three numbers in (0, 1] of 128 bits, and a coin."""
    digest = keyed_bytes(49, *name)
    first, second, third = (
        Decimal(int.from_bytes(digest[start : start + 16], "little") + 1) / 2**128
        for start in (0, 16, 32)
    )
    return first, second, third, bool(digest[48] & 1)


def _ln(value: Fraction) -> Decimal:
    return (Decimal(value.numerator) / Decimal(value.denominator)).ln()


@lru_cache(maxsize=8192)
def _ln_factorial(n: int) -> Decimal:
    with localcontext(_CONTEXT) as context:
        context.prec = 48  # differences of large numbers must keep their digits behind the point
        if n < _STIRLING_FROM:
            return Decimal(factorial(n)).ln()
        x = Decimal(n)
        series = sum(
            Decimal(c.numerator) / Decimal(c.denominator) / x ** (2 * i + 1)
            for i, c in enumerate(_STIRLING)
        )
        return (x + Decimal("0.5")) * x.ln() - x + _HALF_LN_2PI + series

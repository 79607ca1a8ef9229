"""Draws by exact arithmetic: the right law, the same everywhere."""

from collections import Counter
from fractions import Fraction
from math import comb

import pytest

from pretrain.sampler.binomial import binomial, hypergeometric

DRAWS = 4000


def chi_squared(drawn: list[int], law: dict[int, Fraction]) -> tuple[float, int]:
    """Statistic and degrees of freedom; values expected fewer than 5 times are one class."""
    counts = Counter(drawn)
    assert set(counts) <= set(law), "a value of probability 0"
    statistic, classes, rare_expected, rare_found = 0.0, 0, 0.0, 0
    for value, mass in law.items():
        expected = float(mass) * len(drawn)
        if expected < 5:
            rare_expected += expected
            rare_found += counts[value]
            continue
        statistic += (counts[value] - expected) ** 2 / expected
        classes += 1
    if rare_expected > 1:
        statistic += (rare_found - rare_expected) ** 2 / rare_expected
        classes += 1
    return statistic, classes - 1


def assert_law(drawn: list[int], law: dict[int, Fraction]) -> None:
    statistic, freedom = chi_squared(drawn, law)
    assert statistic < freedom + 4.5 * (2 * max(freedom, 1)) ** 0.5, (statistic, freedom)


@pytest.mark.parametrize(
    ("trials", "chance"),
    [(1, Fraction(1, 3)), (7, Fraction(1, 2)), (40, Fraction(1, 50)), (300, Fraction(7, 10))],
)
def test_binomial_law(trials, chance):
    law = {k: comb(trials, k) * chance**k * (1 - chance) ** (trials - k) for k in range(trials + 1)}
    assert_law([binomial(trials, chance, "test", i) for i in range(DRAWS)], law)


@pytest.mark.parametrize(
    ("marked", "unmarked", "taken"), [(3, 5, 4), (1, 99, 50), (200, 312, 256), (90, 10, 50)]
)
def test_hypergeometric_law(marked, unmarked, taken):
    whole = comb(marked + unmarked, taken)
    law = {
        k: Fraction(comb(marked, k) * comb(unmarked, taken - k), whole)
        for k in range(min(marked, taken) + 1)
        if taken - k <= unmarked
    }
    assert_law([hypergeometric(marked, unmarked, taken, "test", i) for i in range(DRAWS)], law)


def test_large_counts_have_the_right_mean_and_spread():
    trials, chance = 2**34, Fraction(1, 7)
    drawn = [binomial(trials, chance, "large", i) for i in range(400)]
    deviation = float(trials * chance * (1 - chance)) ** 0.5
    scores = [(k - trials / 7) / deviation for k in drawn]
    assert abs(sum(scores) / 400) < 4 / 400**0.5
    assert sum(score**2 for score in scores) / 400 == pytest.approx(1, abs=0.3)


def test_certain_outcomes_draw_nothing():
    assert binomial(0, Fraction(1, 2), "x") == binomial(9, Fraction(0), "x") == 0
    assert binomial(9, Fraction(1), "x") == 9
    assert hypergeometric(0, 5, 3, "x") == 0
    assert hypergeometric(4, 0, 3, "x") == 3


def test_is_the_same_forever():
    """Frozen: other numbers here would silently change what resumed runs train on."""
    assert [binomial(1000, Fraction(3, 10), 7, i) for i in range(8)] == GOLDEN_SMALL
    assert binomial(10**12, Fraction(1, 3), 7) == GOLDEN_LARGE
    assert hypergeometric(10**9, 2 * 10**9, 15 * 10**8, 7) == GOLDEN_SPLIT


GOLDEN_SMALL = [272, 311, 303, 308, 316, 275, 325, 280]
GOLDEN_LARGE = 333333268759
GOLDEN_SPLIT = 499998232

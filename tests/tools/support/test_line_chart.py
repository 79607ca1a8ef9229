"""Curves as images: what is drawn where."""

import numpy as np
import pytest
from PIL import ImageColor

from tools.support.line_chart import COLOURS, Line, Panel, line_chart, ticks


def near(image, colour: str) -> np.ndarray:
    """(H, W) bool: pixels of about that colour."""
    wanted = np.array(ImageColor.getrgb(colour))
    return np.abs(np.asarray(image, dtype=int) - wanted).sum(-1) < 30


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (10, 50, [10, 20, 30, 40, 50]),
        (0.31, 0.37, [0.31, 0.32, 0.33, 0.34, 0.35, 0.36, 0.37]),
        (5, 5, [5.0]),
    ],
)
def test_ticks_are_round_and_within(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_a_rising_curve_rises_and_a_falling_one_falls():
    steps = list(range(0, 101, 10))
    panel = Panel(
        "p",
        [
            Line("up", steps, [s / 100 for s in steps]),
            Line("down", steps, [1 - s / 100 for s in steps]),
        ],
    )
    image = line_chart([panel])
    for colour, sign in zip(COLOURS, (-1, 1), strict=False):
        rows, columns = np.nonzero(near(image, colour)[:320])  # above the legend
        assert np.sign(np.corrcoef(columns, rows)[0, 1]) == sign and len(rows) > 200


def test_panels_stand_side_by_side_with_one_legend():
    one = Panel("a", [Line("x", [0, 1], [0, 1])])
    single, double = line_chart([one]), line_chart([one, one], title="both", x_title="step")
    assert double.width == 2 * single.width and double.height > single.height
    marks = near(single, COLOURS[0])[-26:].sum()
    assert marks and near(double, COLOURS[0])[-26:].sum() == marks


def test_a_band_lies_around_its_curve():
    plain = Line("x", [0, 1], [0.5, 0.5])
    banded = Line("x", [0, 1], [0.5, 0.5], [0.0, 0.0], [1.0, 1.0])
    frame = Line("y", [0, 1], [0.0, 1.0])  # the same axes in both

    def middle(line: Line):
        return np.asarray(line_chart([Panel("p", [line, frame])]))[110, 200].tolist()

    assert middle(plain) == [255, 255, 255] != middle(banded)


@pytest.mark.parametrize("panels", [[], [Panel("empty", [])], [Panel("none", [Line("x", [], [])])]])
def test_nothing_to_draw_is_an_error(panels):
    with pytest.raises(ValueError, match=r"at least one panel|has no points"):
        line_chart(panels)

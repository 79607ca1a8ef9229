"""Curves side by side as one image, drawn with Pillow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_SCALE = 2  # drawn so much larger, then shrunk: Pillow's lines have hard edges
_WIDTH, _HEIGHT = 430, 280  # of the area of one panel that holds curves
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 20, 42, 52
_HEAD, _LEGEND = 40, 26
_TEXT, _TITLE = 13, 18
_TICKS = 7

_PAPER, _FRAME, _GRID = "#ffffff", "#9aa4b0", "#e6eaef"
_INK, _FAINT = "#16202c", "#6b7785"
COLOURS = ("#0b5cad", "#d1495b", "#2c6e49", "#b35900", "#6f42c1", "#007a8a")
"""Of the lines, in their order."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Line:
    """One curve; lines of one name have one colour in all panels."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    """With `high`: the edges of a band around the curve."""
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """Curves over one pair of axes."""

    title: str
    lines: Sequence[Line]

    def ranges(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """(from, to) of x and of y. Raises ValueError: no points."""
        xs = [x for line in self.lines for x in line.x]
        ys = [y for line in self.lines for y in (*line.y, *line.low, *line.high)]
        if not xs or not ys:
            raise ValueError(f"panel {self.title!r} has no points")
        return (min(xs), max(xs)), (min(ys), max(ys))


def line_chart(panels: Sequence[Panel], *, title: str = "", x_title: str = "") -> Image.Image:
    """Draw the panels in a row, with one legend below.

    Raises:
        ValueError: no panels, or one without points.
    """
    if not panels:
        raise ValueError("a chart needs at least one panel")
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    colours = {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(names)}
    step = _LEFT + _WIDTH + _RIGHT
    head = _HEAD if title else 0
    size = (step * len(panels), head + _TOP + _HEIGHT + _BOTTOM + _LEGEND)
    image = Image.new("RGB", tuple(side * _SCALE for side in size), _PAPER)
    for index, panel in enumerate(panels):
        _Axes(image, panel, index * step + _LEFT, head + _TOP).draw(colours, x_title)
    draw = ImageDraw.Draw(image)
    if title:
        place = (_LEFT * _SCALE, _HEAD // 2 * _SCALE)
        draw.text(place, title, fill=_INK, font=_font(_TITLE), anchor="lm")
    _legend(draw, colours, size[1] - _LEGEND)
    return image.resize(size, Image.Resampling.LANCZOS)


class _Axes:
    """Where values of one panel lie on the (enlarged) image."""

    def __init__(self, image: Image.Image, panel: Panel, left: int, top: int) -> None:
        self.image, self.panel = image, panel
        self.left, self.top = left * _SCALE, top * _SCALE
        self.width, self.height = _WIDTH * _SCALE, _HEIGHT * _SCALE
        self.x_range, (low, high) = panel.ranges()
        self.y_ticks = ticks(low, high)
        self.y_range = (min(low, self.y_ticks[0]), max(high, self.y_ticks[-1]))

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixel of a point."""
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        across = (x - x0) / (x1 - x0 or 1)
        up = (y - y0) / (y1 - y0 or 1)
        return self.left + across * self.width, self.top + (1 - up) * self.height

    def draw(self, colours: dict[str, str], x_title: str) -> None:
        """Grid, numbers, bands, and curves over all of them."""
        draw = ImageDraw.Draw(self.image, "RGBA")
        self._grid(draw)
        for line in self.panel.lines:
            if line.low and line.high:
                edge = [self.place(*point) for point in zip(line.x, line.high, strict=True)]
                back = [self.place(*point) for point in zip(line.x, line.low, strict=True)]
                draw.polygon(edge + back[::-1], fill=colours[line.name] + "30")
        for line in self.panel.lines:
            points = [self.place(*point) for point in zip(line.x, line.y, strict=True)]
            draw.line(points, fill=colours[line.name], width=2 * _SCALE, joint="curve")
        below = self.top + self.height + 34 * _SCALE
        middle = self.left + self.width / 2
        draw.text((middle, below), x_title, fill=_FAINT, font=_font(_TEXT), anchor="mm")
        above = (self.left, self.top - 16 * _SCALE)
        draw.text(above, self.panel.title, fill=_INK, font=_font(_TEXT + 2), anchor="lm")

    def _grid(self, draw: ImageDraw.ImageDraw) -> None:
        font, gap = _font(_TEXT), 6 * _SCALE
        right, bottom = self.left + self.width, self.top + self.height
        for value in self.y_ticks:
            _, y = self.place(self.x_range[0], value)
            draw.line((self.left, y, right, y), fill=_GRID, width=_SCALE)
            draw.text((self.left - gap, y), f"{value:g}", fill=_FAINT, font=font, anchor="rm")
        for value in ticks(*self.x_range):
            x, _ = self.place(value, self.y_range[0])
            draw.line((x, bottom, x, bottom + gap / 2), fill=_FRAME, width=_SCALE)
            draw.text((x, bottom + gap), f"{value:g}", fill=_FAINT, font=font, anchor="ma")
        draw.line(
            (self.left, self.top, self.left, bottom, right, bottom), fill=_FRAME, width=_SCALE
        )


def ticks(low: float, high: float) -> list[float]:
    """At most `_TICKS` + 1 round numbers within [low, high], at least one at or beyond its
    middle."""
    span = high - low or 1.0
    power = 10.0 ** math.floor(math.log10(span / _TICKS))
    step = next(f * power for f in (1, 2, 5, 10, 20) if span / (f * power) <= _TICKS)
    first = math.ceil(low / step - 1e-9)
    count = max(0, math.floor((high / step) + 1e-9) - first) + 1
    return [round((first + n) * step, 12) for n in range(count)]


def _legend(draw: ImageDraw.ImageDraw, colours: dict[str, str], top: int) -> None:
    x, y = _LEFT * _SCALE, (top + _LEGEND // 2 - 6) * _SCALE
    font = _font(_TEXT)
    for name, colour in colours.items():
        draw.line((x, y, x + 22 * _SCALE, y), fill=colour, width=3 * _SCALE)
        x += 28 * _SCALE
        draw.text((x, y), name, fill=_INK, font=font, anchor="lm")
        x += font.getlength(name) + 24 * _SCALE


def _font(size: int) -> Font:
    return ImageFont.load_default(size=size * _SCALE)

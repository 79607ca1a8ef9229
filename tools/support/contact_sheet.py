"""Pictures in a grid, with boxes on them and texts beneath, as one image.

`tools.shards sheet` draws what is in shards; `tools.evaluate --sheet` what a model says about them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_PICTURE = 256  # longest side of a picture on the sheet, in pixels; 32, 64 and 128 divide it
_PADDING = 12
_GAP = 16
_MARGIN = 28
_TEXT = 14
_LABEL = 11
_LINE = _TEXT + 4
_APART = 7  # between texts
_MAX_LINES = 6

_PAPER, _CARD, _BORDER, _BACKDROP = "#eef1f5", "#ffffff", "#d5dbe3", "#f6f8fa"
_INK, _FAINT, _PREDICTED, _REFERENCE = "#16202c", "#6b7785", "#0b5cad", "#2c6e49"

_BOX_COLOURS = ("#d1495b", "#0b5cad", "#2c6e49", "#b35900", "#6f42c1", "#007a8a", "#8a6d00")

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Cell:
    """One picture and what is said about it."""

    image: np.ndarray
    """(H, W, 3) uint8."""
    name: str = ""
    predicted: str | None = None
    references: Sequence[str] = field(default_factory=tuple)
    boxes: Sequence["Box"] = field(default_factory=tuple)


class Box(NamedTuple):
    """A rectangle drawn on a picture."""

    corners: Sequence[float]
    """x0, y0, x1, y1 in pixels of the picture."""
    name: str = ""
    group: int = 0
    """Boxes of one group, a class for example, have one colour."""


def contact_sheet(
    cells: Sequence[Cell],
    *,
    title: str = "",
    subtitle: str = "",
    columns: int = 4,
    font: str | Path | None = None,
) -> Image.Image:
    """Draw the cells row by row; text is wrapped and never cut but at six lines.

    font: a TrueType file, for scripts that Pillow's built-in font lacks.

    Raises:
        ValueError: no cells.
    """
    if not cells:
        raise ValueError("a contact sheet needs at least one picture")
    columns = min(columns, len(cells))
    fonts = {size: _font(size, font) for size in (_LABEL, _TEXT, 15, 24)}
    cards = [_Card.layout(cell, fonts) for cell in cells]
    rows = [cards[start : start + columns] for start in range(0, len(cards), columns)]
    heights = [max(card.height for card in row) for row in rows]
    head = _MARGIN + (34 if title else 0) + (24 if subtitle else 0) + (6 if title else 0)
    width = 2 * _MARGIN + columns * _CARD_WIDTH + (columns - 1) * _GAP
    height = head + sum(heights) + (len(rows) - 1) * _GAP + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        line = _wrap(title, fonts[24], width - 2 * _MARGIN)[0]
        draw.text((_MARGIN, _MARGIN - 4), line, fill=_INK, font=fonts[24])
    if subtitle:
        line = _wrap(subtitle, fonts[15], width - 2 * _MARGIN)[0]
        draw.text((_MARGIN, head - 32), line, fill=_FAINT, font=fonts[15])
    top = head
    for row, row_height in zip(rows, heights, strict=True):
        for column, card in enumerate(row):
            left = _MARGIN + column * (_CARD_WIDTH + _GAP)
            card.draw(sheet, draw, left, top, row_height, fonts)
        top += row_height + _GAP
    return sheet


_CARD_WIDTH = _PICTURE + 2 * _PADDING


@dataclass(frozen=True)
class _Card:
    """A cell whose text is wrapped, so that its height is known."""

    picture: Image.Image
    name: str
    blocks: list[tuple[str, str, list[list[str]]]]
    """(label, colour, texts as lines)."""

    @classmethod
    def layout(cls, cell: Cell, fonts: dict[int, Font]) -> "_Card":
        blocks = []
        if cell.predicted is not None:
            texts = [_wrap(cell.predicted or "(nothing)", fonts[_TEXT], _PICTURE)]
            blocks.append(("PREDICTED", _PREDICTED, texts))
        if cell.references:
            texts = [_wrap(text, fonts[_TEXT], _PICTURE) for text in cell.references]
            label = "REFERENCES" if len(texts) > 1 else "REFERENCE"
            blocks.append((label, _REFERENCE, texts))
        name = _cut(cell.name, fonts[_LABEL], _PICTURE)
        picture = _scaled(cell.image)
        if cell.boxes:
            _draw_boxes(picture, cell.boxes, picture.width / cell.image.shape[1], fonts[_LABEL])
        return cls(picture, name, blocks)

    @property
    def height(self) -> int:
        text = sum(
            _LABEL + 6 + sum(len(lines) * _LINE + _APART for lines in texts)
            for _, _, texts in self.blocks
        )
        return _PADDING + _PICTURE + 8 + (_LABEL + 8 if self.name else 0) + text + _PADDING - 4

    def draw(
        self,
        sheet: Image.Image,
        draw: ImageDraw.ImageDraw,
        left: int,
        top: int,
        height: int,
        fonts: dict[int, Font],
    ) -> None:
        box = (left, top, left + _CARD_WIDTH - 1, top + height - 1)
        draw.rounded_rectangle(box, radius=10, fill=_CARD, outline=_BORDER)
        x, y = left + _PADDING, top + _PADDING
        draw.rectangle((x, y, x + _PICTURE - 1, y + _PICTURE - 1), fill=_BACKDROP)
        across, down = (_PICTURE - side for side in self.picture.size)
        sheet.paste(self.picture, (x + across // 2, y + down // 2))
        y += _PICTURE + 8
        if self.name:
            draw.text((x, y), self.name, fill=_FAINT, font=fonts[_LABEL])
            y += _LABEL + 8
        for label, colour, texts in self.blocks:
            draw.text((x, y), label, fill=_FAINT, font=fonts[_LABEL])
            y += _LABEL + 6
            for lines in texts:
                for line in lines:
                    draw.text((x, y), line, fill=colour, font=fonts[_TEXT])
                    y += _LINE
                y += _APART


def _scaled(image: np.ndarray) -> Image.Image:
    """The picture with its longest side near `_PICTURE` pixels.

    Small ones grow by a whole factor, so that every pixel of theirs stays a square.
    """
    picture = Image.fromarray(np.ascontiguousarray(image))
    longest = max(picture.size)
    if (factor := _PICTURE // longest) > 1:
        size = tuple(side * factor for side in picture.size)
        return picture.resize(size, Image.Resampling.NEAREST)
    size = tuple(max(1, round(side * _PICTURE / longest)) for side in picture.size)
    return picture.resize(size, Image.Resampling.BICUBIC)


def _draw_boxes(picture: Image.Image, boxes: Sequence[Box], scale: float, font: Font) -> None:
    """Draw on the picture; large boxes first, so that none hides a smaller one."""
    draw = ImageDraw.Draw(picture)
    right, bottom = picture.width - 1, picture.height - 1
    labels: list[tuple[str, str, tuple[float, float, float, float]]] = []

    def area(box: Box) -> float:
        x0, y0, x1, y1 = box.corners
        return (x1 - x0) * (y1 - y0)

    for box in sorted(boxes, key=area, reverse=True):
        colour = _BOX_COLOURS[box.group % len(_BOX_COLOURS)]
        x0, y0, x1, y1 = (value * scale for value in box.corners)
        # A box ends behind its last pixel.
        x0, x1 = max(0.0, x0), min(right, max(x0, x1 - 1))
        y0, y1 = max(0.0, y0), min(bottom, max(y0, y1 - 1))
        if x0 > x1 or y0 > y1:
            continue  # outside of the picture
        draw.rectangle((x0, y0, x1, y1), outline=colour, width=2)
        if box.name:
            labels.append((_cut(box.name, font, right - 4), colour, (x0, y0, x1, y1)))
    taken: list[tuple[float, float, float, float]] = []
    for name, colour, corners in reversed(labels):  # small boxes have the fewest places
        size = font.getlength(name) + 3, _LABEL + 2
        place = _free_place(corners, size, (right, bottom), taken)
        if place is None:
            continue  # in a crowd: its colour still tells the class
        taken.append(place)
        draw.rectangle(place, fill=colour)
        draw.text((place[0] + 2, place[1]), name, fill=_CARD, font=font)


def _free_place(
    box: tuple[float, float, float, float],
    size: tuple[float, float],
    picture: tuple[int, int],
    taken: list[tuple[float, float, float, float]],
) -> tuple[float, float, float, float] | None:
    """Where a label of `size` covers no other: above its box, in its corners, below it."""
    x0, y0, x1, y1 = box
    width, height = size
    right = min(max(x1 - width, 0.0), picture[0] - width)
    left = max(0.0, min(x0, picture[0] - width))
    for top in (y0 - height, y0, y1 - height, y1 + 1):
        if not 0 <= top <= picture[1] - height:
            continue
        for at in (left, right):
            place = at, top, at + width, top + height
            if not any(
                place[0] <= other[2]
                and other[0] <= place[2]
                and place[1] <= other[3]
                and other[1] <= place[3]
                for other in taken
            ):
                return place
    return None


def _cut(text: str, font: Font, width: float) -> str:
    """One line of at most `width` pixels, cut in the middle: keys differ at both ends."""
    line = " ".join(text.split())
    keep = len(line)
    while keep > 1 and font.getlength(line) > width:
        keep -= 1
        whole = " ".join(text.split())
        line = f"{whole[: keep // 2]}...{whole[-(keep - keep // 2) :]}"
    return line


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """Lines of at most `width` pixels; words that are longer are broken."""
    lines, line = [], ""
    for word in text.split():
        while word:
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) <= width:
                line, word = longer, ""
            elif line:
                lines.append(line)
                line = ""
            else:
                end = next(
                    n
                    for n in range(len(word), 0, -1)
                    if n == 1 or font.getlength(word[:n]) <= width
                )
                lines.append(word[:end])
                word = word[end:]
    lines = [*lines, line] if line or not lines else lines
    if len(lines) > _MAX_LINES:
        last = lines[_MAX_LINES - 1]
        while last and font.getlength(f"{last} ...") > width:
            last = last[:-1]
        lines = [*lines[: _MAX_LINES - 1], f"{last} ..."]
    return lines


def _font(size: int, path: str | Path | None) -> Font:
    if path is None:
        return ImageFont.load_default(size=size)
    try:
        return ImageFont.truetype(str(path), size)
    except OSError as error:
        raise ValueError(f"font {path} cannot be read: {error}; give a TrueType file") from None

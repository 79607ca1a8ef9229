"""Pictures with their captions drawn below, for TensorBoard (which shows images without text)."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_CELL_WIDTH = 224
_TEXT_SIZE = 12
_LINE_HEIGHT = 15
_CHARACTERS_PER_LINE = 34  # of the default font at this size in one cell
_MARGIN = 4


def contact_strip(images: list[np.ndarray], captions: list[str]) -> np.ndarray:
    """Lay images side by side, four in a row, each scaled to one width with its caption below.

    Args:
        images: uint8 arrays (H, W, 3) of any size.
        captions: one text per image; line breaks are kept, long lines are wrapped.

    Returns:
        uint8 array (H', W', 3).
    """
    if len(images) != len(captions) or not images:
        raise ValueError(f"{len(images)} images for {len(captions)} captions")
    cells = [_cell(image, text) for image, text in zip(images, captions, strict=True)]
    columns = min(4, len(cells))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    sheet = Image.new("RGB", (columns * _CELL_WIDTH, sum(heights)), "white")
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            sheet.paste(cell, (j * _CELL_WIDTH, sum(heights[:i])))
    return np.asarray(sheet)


def _cell(image: np.ndarray, text: str) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(image))
    inner = _CELL_WIDTH - 2 * _MARGIN
    height = max(1, round(picture.height * inner / picture.width))
    # Small training images stay crisp: whole pixels are repeated, none are blended.
    filter_ = Image.Resampling.NEAREST if inner > picture.width else Image.Resampling.BILINEAR
    picture = picture.resize((inner, height), filter_)
    lines = [
        part
        for line in text.splitlines()
        for part in textwrap.wrap(line, _CHARACTERS_PER_LINE) or [""]
    ]
    cell = Image.new(
        "RGB", (_CELL_WIDTH, height + 3 * _MARGIN + _LINE_HEIGHT * len(lines)), "white"
    )
    cell.paste(picture, (_MARGIN, _MARGIN))
    draw = ImageDraw.Draw(cell)
    font = ImageFont.load_default(_TEXT_SIZE)
    for number, line in enumerate(lines):
        top = height + 2 * _MARGIN + number * _LINE_HEIGHT
        draw.text((_MARGIN, top), line, fill="black", font=font)
    return cell

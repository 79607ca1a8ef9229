"""Pictures in a grid with their captions beneath, as one PNG.

    python -m tools.contact_sheet data/coco/train --out look.png --caption-source json:captions

Shows what is in shards; `tools.evaluate --sheet` draws what a model says about them.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from data_pipeline.caption_texts import CaptionSource
from data_pipeline.captions import CaptionDataSettings
from data_pipeline.decode import DecodeError, decode, read_header
from data_pipeline.reader import BadSample, SampleReader
from data_pipeline.shards import ShardSet
from data_pipeline.tar_headers import ShardError

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

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Cell:
    """One picture and what is said about it."""

    image: np.ndarray
    """(H, W, 3) uint8."""
    name: str = ""
    predicted: str | None = None
    references: Sequence[str] = field(default_factory=tuple)


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
        name = _wrap(cell.name, fonts[_LABEL], _PICTURE)[0] if cell.name else ""
        return cls(_scaled(cell.image), name, blocks)

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
                end = next(n for n in range(len(word), 0, -1)
                           if n == 1 or font.getlength(word[:n]) <= width)
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


# ---- shards ------------------------------------------------------------------------------------


def cells_of_shards(shards: ShardSet, source: str, count: int) -> Iterator[Cell | BadSample]:
    """Cells of `count` samples spread evenly over the shards, or what is wrong with one."""
    settings = CaptionDataSettings(shards=["-"], caption_source=source)
    captions = CaptionSource(source)
    count = min(count, len(shards))
    with SampleReader(shards) as reader:
        for place in range(count):
            try:
                sample = reader.read(place * len(shards) // count)
                names = [e for e in settings.image_extensions if e in sample.members]
                if not names:
                    raise DecodeError("has no image")
                data = sample.members[names[0]]
                image = decode(data, read_header(data, settings.image.max_pixels))
                yield Cell(np.array(image), sample.key, None, captions.read(sample))
            except DecodeError as error:
                yield BadSample(str(error), sample.shard, sample.key, sample.row)
            except BadSample as fault:
                yield fault


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    options = _parser().parse_args(arguments)
    console = Console(stderr=True)
    try:
        shards = ShardSet.open(options.shards)
        found = list(cells_of_shards(shards, options.caption_source, options.count))
        cells = [cell for cell in found if isinstance(cell, Cell)]
        faults = [fault for fault in found if isinstance(fault, BadSample)]
        if faults:
            text = f"left out {len(faults)} of {len(found)} samples; first: {faults[0]}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        if not cells:
            raise ValueError("none of the samples could be drawn")
        sheet = contact_sheet(
            cells,
            title=" ".join(options.shards),
            subtitle=f"{len(cells)} of {len(shards):,} samples, captions from "
            f"{options.caption_source}",
            columns=options.columns,
            font=options.font,
        )
        sheet.save(options.out)
    except (ShardError, OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    console.print(f"{options.out}: {len(cells)} pictures", highlight=False, soft_wrap=True)
    return 0


def positive(text: str) -> int:
    """Parse a count from the command line."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.contact_sheet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", nargs="+", help="folders, tars, globs or {000..123} expressions")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    parser.add_argument("--caption-source", default="txt", help="as in recipes: txt or json:KEY")
    parser.add_argument("--count", type=positive, default=16, help="samples (default %(default)s)")
    parser.add_argument("--columns", type=positive, default=4, help="(default %(default)s)")
    parser.add_argument("--font", help="TrueType file, for scripts that the built-in font lacks")
    return parser


if __name__ == "__main__":
    sys.exit(main())

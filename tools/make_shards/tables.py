"""Tables of image paths as a list of items: CSV, TSV and JSON lines.

CSV is strict: a quote that never closes is an error that names its row, and what a text spans
beyond a line is counted. TSV has no quotes, as everybody writes it, unless `quoted` says so.
"""

import csv
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.plain_text import parsed_json, read_lines
from tools.make_shards.images import OWN_COLUMNS, beside_ours
from tools.make_shards.sources import Source, stat_items

_LINES_SHOWN = 5
_Row = tuple[int, dict[str, Any]]


def table_source(
    table: Path,
    *,
    image_field: str,
    root: Path | None = None,
    label_field: str | None = None,
    number_fields: Sequence[str] = (),
    classes: Sequence[str] | None = None,
    quoted: bool = False,
) -> Source:
    """Read a table of image paths and fields: .csv, .tsv (with a header line) or .jsonl.

    All fields go into the json member, as `beside_ours` says; those of a CSV are strings, unless in
    `number_fields`.

    Args: root: what relative paths are relative to (default: the folder of the table);
    label_field: field with the class name; classes: names in label order (default: sorted);
    quoted: texts of a TSV may stand in quotes, as in a CSV.
    Errors: ValueError naming table and row.
    """
    if table.suffix not in (".csv", ".tsv", ".jsonl"):
        raise ValueError(f"{table}: must end in .csv, .tsv or .jsonl")
    spans: list[int] = []
    if table.suffix == ".jsonl":
        rows = list(_json_rows(table))
    else:
        rows = list(_text_rows(table, quoted or table.suffix == ".csv", number_fields, spans))
    if not rows:
        raise ValueError(f"{table}: has no rows")
    _check_filled(table, rows, [name for name in (image_field, label_field) if name is not None])
    names = list(classes) if classes is not None else None
    if label_field is not None and names is None:
        names = sorted({_class(row, label_field) for _, row in rows})
    labels = {name: label for label, name in enumerate(names or [])}

    def describe() -> Iterator[tuple[str, Path, dict[str, Any], int | None, str]]:
        for number, row in rows:
            label = None
            if label_field is not None:
                label = labels.get(_class(row, label_field))
                if label is None:
                    raise ValueError(
                        f"{table}, line {number}: {row[label_field]!r} is not in the classes"
                    )
            file = str(row[image_field])
            theirs = {name: value for name, value in row.items() if name != image_field}
            record = beside_ours({"file": file}, theirs, *(["label"] if label_field else []))
            yield f"{number:09d}", root / file, record, label, f"{table.name}, line {number}"

    root = root or table.parent
    items, missing = stat_items(describe())
    account: dict[str, Any] = {}
    if spans:
        account["rows_of_several_lines"] = {"rows": len(spans), "first": spans[:_LINES_SHOWN]}
    if table.suffix == ".tsv" and not quoted and (count := _in_quotes(rows)):
        account["texts_in_quotes"] = {"texts": count, "without them": "--quoted"}
    if clashing := sorted({n for item in items for n in item.record.get(OWN_COLUMNS, ())}):
        account[f"kept_under_{OWN_COLUMNS}"] = clashing
    used = names if label_field is not None else None
    return Source(items, used, missing=missing, account=account, rows=len(rows))


def _check_filled(table: Path, rows: Sequence[_Row], fields: Sequence[str]) -> None:
    for number, row in rows:
        for name in fields:
            if not str("" if row.get(name) is None else row[name]).strip():
                raise ValueError(
                    f"{table}, line {number}: no {name!r}; it has {', '.join(map(str, row))}"
                )


def _in_quotes(rows: Sequence[_Row]) -> int:
    """How many texts look as if a writer of CSV had put them in quotes."""
    texts = (text for _, row in rows for text in row.values() if isinstance(text, str))
    return sum(len(text) > 1 and text[0] == text[-1] == '"' for text in texts)


def _class(row: dict[str, Any], field: str) -> str:
    return str(row[field]).strip()


def _json_rows(table: Path) -> Iterator[_Row]:
    for number, line in enumerate(read_lines(table), 1):
        if line.strip():
            row = parsed_json(line, f"{table}, line {number}")
            if not isinstance(row, dict):
                raise ValueError(f"{table}, line {number}: is not a JSON object")
            yield number, row


def _text_rows(
    table: Path, quoted: bool, number_fields: Sequence[str], spans: list[int]
) -> Iterator[_Row]:
    """Yield (last line of the row, fields); enter first lines of rows of several into `spans`."""
    delimiter = "\t" if table.suffix == ".tsv" else ","
    rows = _quoted(table, delimiter) if quoted else _unquoted(table, delimiter)
    _, _, names = next(rows, (1, 1, []))
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{table}: has the fields {repeated} twice")
    if unknown := sorted(set(number_fields) - set(names)):
        raise ValueError(f"{table}: has no fields {unknown}; it has {names}")
    for first, last, fields in rows:
        if len(fields) != len(names):
            hint = "" if quoted or delimiter == "," else " (--quoted if texts stand in quotes)"
            raise ValueError(
                f"{table}, line {first}: not {len(names)} fields, as the header has, but "
                f"{len(fields)}{hint}"
            )
        if last > first:
            spans.append(first)
        row: dict[str, Any] = dict(zip(names, fields, strict=True))
        yield last, row | {n: _number(table, first, n, row[n]) for n in number_fields}


def _unquoted(table: Path, delimiter: str) -> Iterator[tuple[int, int, list[str]]]:
    for number, line in enumerate(read_lines(table), 1):
        if line := line.rstrip("\r\n"):
            yield number, number, line.split(delimiter)


def _quoted(table: Path, delimiter: str) -> Iterator[tuple[int, int, list[str]]]:
    """Yield first and last line of each row, and its fields."""
    reader = csv.reader(read_lines(table, newline=""), delimiter=delimiter, strict=True)
    while True:
        first = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            what = str(error)
            if reader.line_num > first or "unexpected end" in what:
                what = f"a quote that opens in this row does not close where it should: {what}"
            raise ValueError(
                f"{table}, line {first}: {what}. A text with quotes or line breaks stands in "
                'quotes, and its own quotes are doubled ("")'
            ) from None
        if fields:
            yield first, reader.line_num, fields


def _number(table: Path, line: int, name: str, text: str) -> int | float | None:
    """Return the number of a cell; None if it is empty, or no number that JSON can hold."""
    if not text.strip():
        return None
    try:
        number = int(text) if re.fullmatch(r"\s*[+-]?\d+\s*", text) else float(text)
    except ValueError:
        raise ValueError(f"{table}, line {line}: {name} {text!r} is not a number") from None
    return number if isinstance(number, int) or math.isfinite(number) else None

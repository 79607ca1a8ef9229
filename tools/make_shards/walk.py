"""The files of a folder that take part in a packing: one rule for all packers.

Passed over, and counted by reason and suffix: names that begin with a dot, anywhere in the path;
what systems and programs leave beside people's files; and files that are not of the kind that is
looked for. Images are told by their content, or by a suffix that says so: what then is none is a
fault of that item when it is packed.
"""

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.images.formats import HEAD_BYTES, SUFFIXES, is_image
from data_pipeline.plain_text import is_utf8

_OF_SYSTEMS = frozenset(
    name.lower()
    for name in (
        "__MACOSX",
        "@eaDir",
        "lost+found",
        "$RECYCLE.BIN",
        "System Volume Information",
        "#recycle",
        "#snapshot",
        "@Recycle",
        "@Recently-Snapshot",
        "__pycache__",
        "Thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "Icon\r",
    )
)
# TIFF and JPEG files of which the picture is a small preview of something else.
_PREVIEWS = frozenset(
    {
        ".3fr",
        ".arw",
        ".cr2",
        ".dcr",
        ".dng",
        ".erf",
        ".iiq",
        ".kdc",
        ".mos",
        ".nef",
        ".nrw",
        ".pef",
        ".sr2",
        ".srw",
        ".thm",
    }
)
HIDDEN, OF_A_SYSTEM, OTHER, UNREADABLE = "hidden", "of a system", "of another kind", "unreadable"
_NO_SUFFIX = "no suffix"


@dataclass
class Found:
    """What a folder holds."""

    files: list[Path] = field(default_factory=list)
    """Those that take part, relative to the folder, sorted."""
    passed_over: dict[str, Counter[str]] = field(default_factory=dict)
    """Reason -> suffix -> number of files."""

    def pass_over(self, reason: str, path: Path) -> None:
        """Count a file that takes no part."""
        counts = self.passed_over.setdefault(reason, Counter())
        counts[path.suffix.lower() or _NO_SUFFIX] += 1

    def account(self) -> dict[str, dict[str, int]]:
        """What the report and the manifest say of the files that take no part."""
        return {
            reason: dict(sorted(counts.items()))
            for reason, counts in sorted(self.passed_over.items())
        }


def walk(root: Path, takes: Callable[[Path], bool]) -> Found:
    """Find the files below `root` that `takes` accepts; links to folders are followed.

    Errors: ValueError if `root` is no folder, a name is not UTF-8, or links lead round in a circle;
    OSError if a folder cannot be listed.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: is not a folder")
    found = Found()
    for path, reason in _entries(root, Path(), None, (_identity(root),)):
        if reason is None:
            try:
                reason = None if takes(root / path) else OTHER
            except OSError:
                reason = UNREADABLE
        if reason is not None:
            found.pass_over(reason, path)
            continue
        if not is_utf8(os.fspath(path)):
            raise ValueError(f"{os.fsencode(root / path)!r}: its name is not UTF-8: rename it")
        found.files.append(path)
    return found


def walk_images(root: Path) -> Found:
    """Find the images below `root`, as `walk`."""
    return walk(root, _may_be_image)


def walk_suffix(root: Path, suffix: str) -> Found:
    """Find the files with a suffix, in capitals or not, below `root`, as `walk`."""
    return walk(root, lambda path: path.suffix.lower() == suffix)


def is_passed_over(name: str) -> bool:
    """Whether a file or folder of this name takes part in nothing."""
    return _reason(name) is not None


def _may_be_image(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix in SUFFIXES or suffix in _PREVIEWS:
        return suffix in SUFFIXES
    if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for ever
        return False
    with open(path, "rb") as file:
        return is_image(file.read(HEAD_BYTES))


def _reason(name: str) -> str | None:
    if name.startswith("."):
        return HIDDEN
    return OF_A_SYSTEM if name.lower() in _OF_SYSTEMS else None


def _entries(
    root: Path, below: Path, reason: str | None, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[Path, str | None]]:
    """Yield each file, in the order of paths, and why it takes no part by its path, if so.

    `above` identifies the folders that this one lies in: a link to one of them has no end.
    """
    with os.scandir(root / below) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path, why = below / entry.name, reason or _reason(entry.name)
            if not entry.is_dir():
                yield path, why
                continue
            identity = _identity(root / path)
            if identity not in above:
                yield from _entries(root, path, why, (*above, identity))
            elif why is None:
                raise ValueError(f"{root / path}: is a link to a folder that it lies in")


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino

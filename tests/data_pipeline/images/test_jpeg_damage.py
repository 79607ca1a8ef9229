"""Damaged JPEGs are refused by every way of decoding; what is harmless is not."""

import io

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.images import decode as decoding
from data_pipeline.images.crops import Box
from data_pipeline.images.decode import DecodeError, Scratch, decode, read_header
from tests.data_pipeline.photos import photograph

END = b"\xff\xd9"
HEIGHT, WIDTH = 120, 160
PIXELS = np.ascontiguousarray(photograph(0, HEIGHT, WIDTH))
PAGE = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>" * 9


def saved(mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def with_441() -> bytes:
    """Of 4:4:1, which simplejpeg's header has no name for and Pillow decodes."""
    pixels = np.ascontiguousarray(PIXELS[:, :HEIGHT])
    data = bytearray(simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling="411"))
    sampling = data.index(b"\xff\xc0") + 11
    data[sampling] = 0x14
    return bytes(data)


FILES = {
    "plain": saved(),
    "grey": saved("L"),
    "own tables": saved(optimize=True),
    "progressive": saved(progressive=True),
    "restarts": saved(restart_marker_blocks=7),
    "inks": saved("CMYK"),
    "4:4:1": with_441(),
}
WALKED = ["plain", "grey", "own tables", "restarts"]


def pixels_at(data: bytes) -> int:
    """Where the coded pixels of the first scan begin."""
    at = data.index(b"\xff\xda")
    return at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def overwritten(data: bytes, at: int, stretch: bytes) -> bytes:
    """The file keeps its length and its end marker."""
    return (data[:at] + stretch + data[at + len(stretch) :])[: len(data) - 2] + END


def damaged(data: bytes) -> dict[str, bytes]:
    half = (pixels_at(data) + len(data)) // 2
    rest = len(data) - half - 2
    noise = np.random.default_rng(0).integers(0, 255, rest, dtype=np.uint8).tobytes()
    return {
        "cut": data[:half],
        "cut, with an end marker": data[:half] + END,
        "cut, with an end marker and a tail": data[:half] + END + b"tail",
        "zeros": overwritten(data, half, bytes(500)),
        "zeros to the end": overwritten(data, half, bytes(rest)),
        "a page": overwritten(data, half, PAGE),
        "noise": overwritten(data, half, noise),
        "0xff": overwritten(data, half, b"\xff" * 500),
        "a stretch twice": data[:half] + data[half - rest // 2 :],
        "a stretch missing": data[:half] + data[half + rest // 2 :],
    }


def read(data: bytes, **how) -> np.ndarray:
    return decode(data, read_header(data, 10**7), **how)


WAYS = {
    "whole": {},
    "1/2": {"factor": 2},
    "1/8": {"factor": 8},
    "all as a window": {"window": Box(0, 0, HEIGHT, HEIGHT)},
    "above": {"window": Box(10, 5, 60, 20)},
    "around": {"window": Box(10, 40, 60, 40), "scratch": Scratch()},
    "below": {"window": Box(10, 100, 60, 20)},
    "1/2, above": {"factor": 2, "window": Box(5, 2, 30, 10)},
}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_seen_whatever_is_decoded(name, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(decoding, "_jpeg_window", None)
    assert read(FILES[name]).shape[0] == HEIGHT
    for kind, data in damaged(FILES[name]).items():
        for way, how in WAYS.items():
            if read_header(FILES[name], 10**7).picture is not None and "factor" in how:
                continue  # not decoded at a scale
            with pytest.raises(DecodeError, match="damaged JPEG image"):
                pytest.fail(f"{kind}, {way}: {read(data, **how).shape}")


@given(st.sampled_from(sorted(FILES)), st.floats(0, 1), st.integers(160, 900), st.booleans())
@settings(max_examples=80, deadline=None)
def test_pages_and_zeros_are_seen_anywhere(name, share, size, zeros):
    """Also where they happen to decode to as many blocks as they took."""
    data = FILES[name]
    begin = pixels_at(data)
    at = begin + int(share * (len(data) - 2 - size - begin))
    stretch = bytes(size) if zeros else (PAGE * 2)[:size]
    try:
        found = read(overwritten(data, at, stretch))
    except DecodeError as error:
        assert "damaged JPEG image" in str(error)
    else:  # zeros may stand for a flat area, of as many blocks
        flat = ("own tables", "grey", "progressive")
        assert zeros and name in flat, (name, at, found.shape)


def test_a_scan_without_its_head_is_missed():
    """Its bytes belong to nothing then, and the picture would be made of the scans before."""
    data = FILES["progressive"]
    at = data.rindex(b"\xff\xda")
    with pytest.raises(DecodeError, match="damaged JPEG image"):
        read(overwritten(data, at, b"no such marker"))


# Not any bytes: of a hundred, one ends as coded pixels do, and is taken for some.
JUNK = st.one_of(
    st.integers(1, 400).map(bytes),
    st.just(b"junk"),
    st.just(PAGE),
    st.just(b"\xff" * 20),
)


@given(st.sampled_from(sorted(FILES)), st.binary(max_size=300), st.booleans())
@settings(max_examples=60, deadline=None)
def test_bytes_behind_the_end_are_harmless(name, tail, page):
    data = FILES[name]
    tail = PAGE if page else tail
    for how in ({}, WAYS["above"]):
        assert np.array_equal(read(data + tail, **how), read(data, **how))


@given(st.sampled_from(WALKED), JUNK)
@settings(max_examples=60, deadline=None)
def test_junk_in_front_of_the_end_marker_is_harmless(name, junk):
    data = FILES[name]
    for how in ({}, WAYS["above"]):
        assert np.array_equal(read(data[:-2] + junk + END, **how), read(data, **how))


@pytest.mark.parametrize("name", FILES)
def test_a_few_bytes_of_junk_are_harmless_in_every_kind(name):
    data = FILES[name]
    for junk in (b"\0", b"\0\0\0\0", b"junk", b"\xff\xff"):
        assert np.array_equal(read(data[:-2] + junk + END), read(data))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.replace(b"\xff\xdb", b"abc\xff\xdb", 1),
        lambda data: data.replace(b"JFIF\0\1", b"JFIF\0\7"),
        lambda data: data.replace(b"\0\x3f\0", b"\0\0\0", 1),
        lambda data: data[:2] + b"\xff\xe2\0\x12ICC_PROFILE\0\x05\x01ab" + data[2:],
        lambda data: data[:2] + b"\xff\xff\xff\xfe\0\6text" + data[2:],
    ],
    ids=["junk", "version", "band", "half a profile", "comment"],
)
def test_odd_headers_are_harmless(change):
    data = FILES["plain"]
    odd = change(data)
    assert odd != data
    assert np.array_equal(read(odd), read(data))

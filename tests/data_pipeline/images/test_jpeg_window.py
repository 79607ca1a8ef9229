"""Windows of JPEGs: the pixels of a full decode, whoever decodes them."""

import base64
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
from tests.data_pipeline.photos import encoded, photograph

compiled = pytest.mark.skipif(
    decoding._jpeg_window is None, reason="libjpeg-turbo's headers were missing at installation"
)
SUBSAMPLINGS = ("444", "422", "420", "440", "411", "Gray")


def jpeg(subsampling: str, height: int, width: int, seed: int = 0) -> bytes:
    pixels = np.ascontiguousarray(photograph(seed, height, width))
    if subsampling == "Gray":
        grey = np.ascontiguousarray(pixels[:, :, :1])
        return simplejpeg.encode_jpeg(grey, quality=90, colorspace="GRAY", colorsubsampling="Gray")
    return simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling=subsampling)


def progressive(data: bytes) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).save(file, "JPEG", quality=90, progressive=True)
    return file.getvalue()


def window_of(data: bytes, factor: int, window: Box) -> np.ndarray:
    return decode(data, read_header(data, 10**7), factor, Scratch(), window)


def full(data: bytes, factor: int) -> np.ndarray:
    return decode(data, read_header(data, 10**7), factor)


FILES = {
    (kind, height, width): jpeg(kind, height, width)
    for kind in SUBSAMPLINGS
    for height, width in ((97, 131), (64, 48), (9, 200), (1, 1))
}
# 264 x 40 pixels with colours at 66 x 20 (4:1:0), which no encoder in reach writes.
RARE = base64.b64decode(
    "/9j/2wBDACAWGBwYFCAcGhwkIiAmMFA0MCwsMGJGSjpQdGZ6eHJmcG6AkLicgIiuim5woNqirr7EztDOfJri8uDI8LjK"
    "zsb/2wBDASIkJDAqMF40NF7GhHCExsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbG"
    "xsb/wAARCAAoAQgDAUIAAhEBAxEB/8QAGQABAQEBAQEAAAAAAAAAAAAAAAECBAMF/8QAFRABAQAAAAAAAAAAAAAAAAAA"
    "ABL/xAAXAQEBAQEAAAAAAAAAAAAAAAACAwUE/8QAGxEAAwEBAQEBAAAAAAAAAAAAAAECEiERAyP/2gAMAwEAAhEDEQA/"
    "AN2Wtlua1tbLZ2TMUHRbVrZbltq1stSZ4NQdFlt2W5bLbstSJFg6LLW2rctlrbVqTPRqDostbLc9lrZauRqDqstbLc9l"
    "rZauRKDot5WWtsW8rLW2b95/Rlpjh72ttWtuS1tq1tOJKYPewHhYB5Fg+La2Wtua1stbdmTOUHvbdlrbktuy1tSZ4NQe"
    "9rbVrbktbatbUiRqD3tbLbtyWtlt2pM9EoPe1stbc1rZa2pkag1Za2tuay1tbY+S6g97atbW3JbVrZakzwag6LW2rLct"
    "rbVlqRI8HRYDwsA8iwfFstbLAHV4ZiRbatbLAFJXBpFtbassAUhC8LZa28rAA+6/NlJXS2WtlgDM8LpG7LWywBbwSRba"
    "tbLAFJXBpFstuywBSELwtgAB+C8P/9k="
)


def with_scans(data: bytes, count: int) -> bytes:
    """A progressive JPEG that ends, as is allowed, behind its first scans."""
    begins = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    return data[: begins[count]] + b"\xff\xd9"


FILES |= {("progressive", *key[1:]): progressive(FILES[key]) for key in list(FILES)[:4]}
FILES |= {
    (f"{count} scans", 97, 131): with_scans(FILES["progressive", 97, 131], count)
    for count in (1, 4, 7)
}


@given(st.sampled_from(sorted(FILES)), st.sampled_from([1, 2, 4, 8]), st.data())
@settings(max_examples=400, deadline=None)
def test_a_window_has_the_pixels_of_the_whole(name, factor, data):
    """With the compiled decoder these are two pieces of code, and libjpeg has to be told to look
    beyond the edges of the window; without it, one is a slice of the other."""
    whole = full(FILES[name], factor)
    height, width, _ = whole.shape
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = Box(x, y, data.draw(st.integers(1, width - x)), data.draw(st.integers(1, height - y)))
    found = window_of(FILES[name], factor, box)
    assert np.array_equal(found, whole[y : y + box.height, x : x + box.width])


@pytest.mark.parametrize("count", [1, 4, 7])
def test_missing_scans_are_smoothed_as_in_the_whole(count):
    data = with_scans(FILES["progressive", 97, 131], count)
    whole = full(data, 1)
    for x in range(0, 119, 5):
        for y in range(0, 88, 5):
            found = window_of(data, 1, Box(x, y, 12, 9))
            assert np.array_equal(found, whole[y : y + 9, x : x + 12]), (x, y)


@compiled
def test_windows_that_libjpeg_gets_wrong_are_left_to_others():
    """At 1/2 the colours of 4:1:0 are enlarged once, and libjpeg loses count of them."""
    out = np.empty(12 * 9 * 3, np.uint8)
    assert [decoding._jpeg_window.decode(RARE, out, f, 30, 3, 12, 9) for f in (1, 2)] == [1, 0]


@compiled
def test_the_compiled_decoder_is_the_one_that_is_used(monkeypatch):
    data, box = jpeg("420", 97, 131), Box(10, 20, 30, 40)
    expected = full(data, 1)[20:60, 10:40]
    monkeypatch.setattr(decoding, "_decode_all", None)
    assert np.array_equal(window_of(data, 1, box), expected)


@compiled
@pytest.mark.parametrize("orientation", range(2, 9))
def test_turned_images_are_decoded_whole(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photograph(1, 60, 80), "JPEG", exif=exif)
    assert np.array_equal(window_of(data, 1, Box(5, 7, 20, 30)), full(data, 1)[7:37, 5:25])


@pytest.mark.parametrize("share", [0.3, 0.6, 0.97])
def test_a_file_that_is_cut_below_the_window_is_refused(share):
    data = jpeg("420", 97, 131)
    with pytest.raises(DecodeError):
        window_of(data[: int(len(data) * share)], 1, Box(0, 0, 20, 8))


@compiled
def test_damage_above_the_window_is_seen():
    """The compiled decoder leaves such a file to the others, which know what to make of it."""
    data = bytearray(jpeg("444", 97, 131))
    at = data.index(b"\xff\xda") + 200
    data[at : at + 2] = b"\xff\xd9"  # the end, in the midst of the pixels
    out = np.empty(20 * 20 * 3, np.uint8)
    assert decoding._jpeg_window.decode(bytes(data), out, 1, 0, 70, 20, 20) == 0


@compiled
@given(st.data())
@settings(max_examples=300, deadline=None)
def test_no_bytes_make_it_crash(data):
    file = bytearray(FILES[data.draw(st.sampled_from(sorted(FILES)))])
    for _ in range(data.draw(st.integers(1, 6))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    out = np.full(40 * 40 * 3 + 64, 7, np.uint8)
    args = (data.draw(st.integers(0, 200)), data.draw(st.integers(0, 200)), 40, 40)
    assert decoding._jpeg_window.decode(bytes(file), out[:-64], 1, *args) in (0, 1)
    assert (out[-64:] == 7).all()


@compiled
def test_what_does_not_fit_is_refused():
    data, out = jpeg("444", 20, 20), np.empty(300, np.uint8)
    decoder = decoding._jpeg_window.decode
    for window in ((0, 0, 11, 10), (0, 0, 0, 5), (2**32 - 5, 0, 10, 10), (0, 2**31, 10, 10)):
        with pytest.raises(ValueError, match="larger than the buffer"):
            decoder(data, out, 1, *window)
    assert decoder(data, out, 1, 11, 0, 10, 10) == 0  # beyond the image
    assert decoder(b"no image", out, 1, 0, 0, 10, 10) == 0

"""Small members that would become large: refused without the memory that they ask for."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from data_pipeline.images.decode import DecodeError, decode, read_header
from tests.data_pipeline.photos import encoded, jpeg, picture

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")

MAX_PIXELS = 1_000_000
HUGE = 12_000


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(chunk: bytes) -> bytes:
    """A PNG of 8 x 8 pixels with one more chunk behind its header."""
    data = encoded(picture(1, 8, 8), "PNG")
    return data[:33] + chunk + data[33:]


def deflated(size: int) -> bytes:
    packer = zlib.compressobj(9)
    block = bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(size >> 20)) + packer.flush()


def huge_png() -> bytes:
    header = struct.pack(">IIBBBBB", HUGE, HUGE, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", deflated(HUGE * 300))
        + png_chunk(b"IEND", b"")
    )


def patched(data: bytes, at: int, layout: str, *values: int) -> bytes:
    size = struct.calcsize(layout)
    return data[:at] + struct.pack(layout, *values) + data[at + size :]


def large_gif_frame() -> bytes:
    """The screen is small, the first frame is not."""
    data = encoded(picture(1, 8, 8), "GIF")
    at = data.index(b"\x2c\0\0\0\0") + 5
    return patched(data, at, "<HH", HUGE, HUGE)


def sof(data: bytes) -> int:
    return data.index(b"\xff\xc0")


SMALL_JPEG = jpeg(picture(1, 8, 8))
ODD_JPEG = encoded(picture(1, 8, 8), "JPEG", progressive=True)  # its frame is an SOF2

HUGE_IMAGES = {
    "jpeg": patched(SMALL_JPEG, sof(SMALL_JPEG) + 5, ">HH", HUGE, HUGE),
    "progressive jpeg": patched(ODD_JPEG, ODD_JPEG.index(b"\xff\xc2") + 5, ">HH", HUGE, HUGE),
    "png": huge_png(),
    "gif": patched(encoded(picture(1, 8, 8), "GIF"), 6, "<HH", HUGE, HUGE),
    "gif frame": large_gif_frame(),
    "bmp": patched(encoded(picture(1, 8, 8), "BMP"), 18, "<ii", HUGE, HUGE),
    "ppm": b"P6 %d %d 255\n" % (HUGE, HUGE),
}


@pytest.mark.parametrize("name", HUGE_IMAGES)
def test_huge_images_are_refused_by_their_header(name):
    with pytest.raises(DecodeError, match=r"of \d+ x \d+ pixels exceeds max_pixels 1000000"):
        read_header(HUGE_IMAGES[name], MAX_PIXELS)


@pytest.mark.parametrize("kind", ["WEBP", "TIFF"])
def test_huge_images_of_formats_that_pillow_writes_small(kind):
    data = encoded(np.zeros((1200, 1200, 3), np.uint8), kind)
    with pytest.raises(DecodeError, match="1200 x 1200 pixels exceeds"):
        read_header(data, MAX_PIXELS)


def test_a_jpeg_that_states_a_second_size_is_refused():
    at = sof(SMALL_JPEG)
    length = 2 + int.from_bytes(SMALL_JPEG[at + 2 : at + 4], "big")
    frame = SMALL_JPEG[at : at + length]
    second = patched(frame, 5, ">HH", HUGE, HUGE)
    data = SMALL_JPEG[: at + length] + second + SMALL_JPEG[at + length :]
    with pytest.raises(DecodeError, match="12000 x 12000 pixels exceeds"):
        read_header(data, MAX_PIXELS)


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"zTXt", b"Comment\0\0" + deflated(200 << 20)),
        png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + deflated(200 << 20)),
        png_chunk(b"iCCP", b"profile\0\0" + deflated(200 << 20)),
    ],
    ids=["zTXt", "iTXt", "iCCP"],
)
def test_compressed_metadata_is_not_unpacked_without_limit(chunk):
    """200 MB in 200 kB: refused or passed over, in a process that may not have them."""
    data = png_with(chunk)
    assert len(data) < 300_000
    script = (
        "import resource, sys\n"
        "from data_pipeline.images.decode import DecodeError, decode, read_header\n"
        "data = sys.stdin.buffer.read()\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)\n"
        "try:\n"
        "    print(decode(data, read_header(data, 1000)).shape)\n"
        "except DecodeError as error:\n"
        "    print('refused', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().startswith(("(8, 8, 3)", "refused"))


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n",
        encoded(picture(1, 8, 8), "PCX"),
        encoded(picture(1, 16, 16), "ICO"),
    ],
    ids=["eps", "pcx", "ico"],
)
def test_formats_that_shards_do_not_hold_are_never_opened(data):
    try:
        Image.open(io.BytesIO(data))
    except Exception:
        pytest.fail("Pillow would open this: otherwise the test proves nothing")
    with pytest.raises(DecodeError, match="not a readable image"):
        read_header(data, MAX_PIXELS)


def test_frames_behind_the_first_one_are_not_decoded():
    frames = [Image.fromarray(picture(n, 8, 8)) for n in range(3)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    data = file.getvalue()
    second = data.index(b"\x2c", data.index(b"\x2c\0\0\0\0") + 10)
    data = data[: second + 20]  # the second frame is cut
    assert decode(data, read_header(data, MAX_PIXELS)).shape == (8, 8, 3)

"""Packers and the loader mean the same picture: its colours, how it stands, what is refused."""

import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from data_pipeline.images.decode import MAX_PIXELS, DecodeError, decode, read_header
from data_pipeline.shards.packing import SampleFault
from tools.make_shards.images import ImageItem, StoredImage, store_image

GREY = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
HALF_CLEAR = np.where(np.arange(64) < 32, 0, 255).astype(np.uint8)[None].repeat(48, 0)
XMP = b'<x tiff:Orientation="6"/>'


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def pictures() -> dict[str, bytes]:
    light = Image.fromarray(GREY)
    colour = Image.merge("RGB", (light, light.transpose(Image.Transpose.ROTATE_180), light))
    clear = Image.fromarray(HALF_CLEAR)
    rgba = Image.merge("RGBA", (*colour.split(), clear))
    palette = colour.quantize(8)
    wide = Image.fromarray(GREY.astype(np.uint16) * 257)
    xmp = PngImagePlugin.PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", XMP.decode())
    large = PngImagePlugin.PngInfo()
    large.add_text("note", "x" * 2_000_000, zip=True)
    return {
        "16 bits, png": saved(wide, "PNG"),
        "16 bits, tiff": saved(wide, "TIFF"),
        "transparent png": saved(rgba, "PNG"),
        "transparent webp": saved(rgba, "WEBP", lossless=True),
        "grey and transparent": saved(Image.merge("LA", (light, clear)), "PNG"),
        "transparent palette": saved(palette, "PNG", transparency=2),
        "gif": saved(palette, "GIF", transparency=2),
        "two colours": saved(light.convert("1"), "PNG"),
        "inks": saved(colour.convert("CMYK"), "JPEG", quality=95),
        "grey jpeg": saved(light, "JPEG", quality=95),
        "turned jpeg": saved(colour, "JPEG", quality=95, exif=turned()),
        "turned jpeg, xmp": saved(colour, "JPEG", quality=95, xmp=XMP),
        "turned png": saved(colour, "PNG", exif=turned()),
        "turned png, xmp": saved(colour, "PNG", pnginfo=xmp),
        "turned tiff": saved(colour, "TIFF", tiffinfo={0x0112: 6}),
        "large text": saved(colour, "PNG", pnginfo=large),
        "large profile": saved(colour, "PNG", icc_profile=bytes(1_500_000)),
    }


PICTURES = pictures()


def store(path, data: bytes, short_side: int | None, **limits) -> StoredImage:
    path.write_bytes(data)
    item = ImageItem("key", str(path), len(data), {}, None, "the test")
    return store_image(item, short_side, **limits)


def loaded(data: bytes) -> np.ndarray:
    return decode(data, read_header(data, MAX_PIXELS))


@pytest.mark.parametrize("name", PICTURES)
def test_a_shrunk_picture_is_the_one_that_the_loader_sees(tmp_path, name):
    data = PICTURES[name]
    plain, small = (store(tmp_path / "image", data, side) for side in (None, 24))
    assert plain.data == data
    seen = loaded(data)
    upright = seen.shape[1], seen.shape[0]
    assert plain.size == small.size == (upright[::-1] if plain.turned else upright)
    assert plain.turned == name.startswith("turned")
    assert small.stored == (upright[0] // 2, upright[1] // 2)
    expected = Image.fromarray(np.ascontiguousarray(seen)).resize(small.stored, Image.BICUBIC)
    error = np.abs(loaded(small.data).astype(int) - np.asarray(expected).astype(int))
    assert error.mean() < 6


REFUSED = {
    "floats": saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
    "32 bits": saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"),
    "cut": PICTURES["transparent png"][:120],
    "cut jpeg": PICTURES["grey jpeg"][:-200],
    "page": b"<!DOCTYPE html><title>404</title>",
}


@pytest.mark.parametrize("short_side", [None, 24])
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_loader_refuses_is_not_packed(tmp_path, name, short_side):
    data = REFUSED[name]
    with pytest.raises(DecodeError) as refused:
        loaded(data)
    if (name, short_side) == ("cut jpeg", None):
        pytest.skip("the pixels of a JPEG that is stored as it is are not decoded")
    with pytest.raises(SampleFault) as fault:
        store(tmp_path / "image", data, short_side)
    assert str(refused.value) in str(fault.value)
    assert str(tmp_path / "image") in str(fault.value)


@pytest.mark.filterwarnings("error")
def test_the_limit_of_pixels_is_one_for_all_formats(tmp_path):
    for kind in ("PNG", "TIFF", "JPEG"):
        data = saved(Image.new("L", (100, 60)), kind)
        assert store(tmp_path / "image", data, None, max_pixels=6000).size == (100, 60)
        with pytest.raises(SampleFault, match="100 x 60 pixels exceeds max_pixels 5999"):
            store(tmp_path / "image", data, None, max_pixels=5999)

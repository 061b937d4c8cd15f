"""Pictures open as people hand them over, or are named."""

import numpy as np
import pytest
from PIL import Image

from iabn_hub.datasets.images import ImageError, open_rgb


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    if mode == "I;16":
        image = Image.fromarray(np.full((6, 5), 32896, dtype=np.uint16))
    else:
        grey = Image.new("RGB", (5, 6), (128, 128, 128))
        image = grey.quantize(4) if mode == "P" else grey.convert(mode)
    image.save(tmp_path / f"x.{suffix}")
    opened = open_rgb(tmp_path / f"x.{suffix}")
    assert (opened.mode, opened.size) == ("RGB", (5, 6))
    if mode != "1":
        assert np.abs(np.asarray(opened).astype(int) - 128).max() <= 3


def test_exif_rotation_is_undone(tmp_path):
    image = Image.new("RGB", (8, 4), "black")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_rgb(tmp_path / "turned.jpg").size == (4, 8)


def test_transparency_becomes_white(tmp_path):
    Image.new("RGBA", (3, 3), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_rgb(tmp_path / "clear.png").getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("brightest", [1.0, 255.0])
def test_floating_point_picture_keeps_its_light(tmp_path, brightest):
    Image.fromarray(np.array([[0.0, brightest / 2, brightest]], dtype=np.float32)).save(tmp_path / "float.tiff")
    opened = np.asarray(open_rgb(tmp_path / "float.tiff"))[0, :, 0]
    assert np.abs(opened.astype(int) - [0, 127, 255]).max() <= 1


def test_one_pixel_is_a_picture(tmp_path):
    Image.new("L", (1, 1), 7).save(tmp_path / "dot.png")
    assert open_rgb(tmp_path / "dot.png").getpixel((0, 0)) == (7, 7, 7)


def _cut(path):
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:600])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: None, "there is no such file"),
        (lambda p: p.write_text("hello"), "is not an image"),
        (lambda p: p.write_bytes(b""), "is not an image"),
        (lambda p: p.mkdir(), "is a folder, not an image"),
        (_cut, "cannot be read as an image"),
        (lambda p: p.write_bytes(b"DDS " + bytes(124)), "cannot be read as an image|is not an image"),
    ],
    ids=["missing", "text", "empty", "folder", "cut", "dds"],
)
def test_bad_file_is_named(tmp_path, make, says):
    path = tmp_path / "odd.png"
    make(path)
    with pytest.raises(ImageError, match=rf"odd\.png: {says}"):
        open_rgb(path)

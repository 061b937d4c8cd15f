"""The command makes every kind of output from every kind of picture, names what it cannot read, and goes on."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import iabn_hub
from iabn_hub.cli import main
from iabn_hub.datasets.images import ImageError, find_images
from iabn_hub.segmentation.outputs import check_names, draw
from iabn_hub.segmentation.palette import palette_of, vistas

from ..paths import ROOT

CLASSES = 5


@pytest.fixture
def weights(tmp_path):
    """Random weights of the small network, with statistics that let every class win somewhere."""
    torch.manual_seed(3)
    network = iabn_hub.create_model("test_resnet_deeplab3_iabn", num_classes=CLASSES)
    network.train()(torch.randn(8, 3, 64, 64))
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


@pytest.fixture
def segment(weights, tmp_path, capsys):
    """Run `iabn-hub segment` in this process: its exit code, and what it says as JSON, or its complaints."""

    def run(what, *more, out=tmp_path / "out"):
        capsys.readouterr()
        line = ["segment", str(what), str(out), "--model", "test_resnet_deeplab3_iabn", "--checkpoint", str(weights)]
        code = main([*line, "--long-side", "64", "--json", *more])
        said = capsys.readouterr()
        return code, json.loads(said.out) if said.out else None, said.err

    return run


def a_photo(width=70, height=50, mode="RGB"):
    pixels = np.random.RandomState(width * height).randint(0, 256, (height, width, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    return image.convert(mode)


def test_every_kind_of_output(segment, tmp_path):
    a_photo().save(tmp_path / "photo.png")
    code, found, _ = segment(
        tmp_path / "photo.png", "--output", "palette,raw,prob,overlay", "--scales", "0.7,1", "--flip"
    )
    assert code == 0
    outputs = {kind: Image.open(path) for kind, path in found["images"][0]["outputs"].items()}
    assert {kind: (image.mode, image.size) for kind, image in outputs.items() if kind != "overlay"} == {
        "palette": ("P", (70, 50)), "raw": ("L", (70, 50)), "prob": ("L", (70, 50)),
    }  # fmt: skip
    assert outputs["overlay"].width > 70
    raw = np.asarray(outputs["raw"])
    assert (np.asarray(outputs["palette"]) == raw).all()
    colors = palette_of(CLASSES).colors
    assert outputs["palette"].convert("RGB").getpixel((3, 4)) == colors[raw[4, 3]]
    assert np.asarray(outputs["prob"]).min() >= 255 // CLASSES - 1
    shares = found["images"][0]["classes"]
    assert sum(shares.values()) == pytest.approx(100)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_the_colours_of_vistas():
    palette = vistas()
    assert len(palette.names) == len(palette.colors) == 65
    assert (palette.names[0], palette.colors[0]) == ("Bird", (165, 42, 42))
    assert (palette.names[64], palette.colors[64]) == ("Ego Vehicle", (120, 10, 10))
    classes = np.arange(64, dtype=np.uint8).reshape(8, 8)
    drawn = draw("palette", a_photo(8, 8), classes, np.ones((8, 8), np.float32), palette).convert("RGB")
    assert [drawn.getpixel((i % 8, i // 8)) for i in range(64)] == list(palette.colors[:64])


def test_other_palettes_have_colours_that_differ():
    assert len(set(palette_of(36).colors)) == 36


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "I;16"])
def test_pictures_of_every_mode(segment, tmp_path, mode):
    name = "photo.tif" if mode == "CMYK" else "photo.png"
    a_photo(mode=mode).save(tmp_path / name)
    code, found, _ = segment(tmp_path / name)
    assert code == 0
    assert Image.open(found["images"][0]["outputs"]["palette"]).size == (70, 50)


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (1, 1), (300, 20)])
def test_pictures_of_every_shape(segment, tmp_path, size):
    a_photo(*size).save(tmp_path / "photo.png")
    code, found, _ = segment(tmp_path / "photo.png", "--output", "palette,overlay")
    assert code == 0
    assert Image.open(found["images"][0]["outputs"]["palette"]).size == size


def test_a_photo_is_turned_upright(segment, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    a_photo().save(tmp_path / "photo.jpg", exif=exif)
    _, found, _ = segment(tmp_path / "photo.jpg")
    assert Image.open(found["images"][0]["outputs"]["palette"]).size == (50, 70)


def test_a_folder_goes_on_after_bad_files(segment, tmp_path):
    folder = tmp_path / "photos"
    (folder / "deep" / "er").mkdir(parents=True)
    a_photo().save(folder / "a.jpg")
    a_photo(60, 60).save(folder / "deep" / "er" / "b.png")
    (folder / "bad.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not looked at")
    code, found, complaints = segment(folder)
    assert code == 1
    assert f"{folder}/bad.jpg: is not an image" in complaints
    assert {row["image"]: "error" in row for row in found["images"]} == {
        f"{folder}/a.jpg": False, f"{folder}/bad.jpg": True, f"{folder}/deep/er/b.png": False,
    }  # fmt: skip
    assert (tmp_path / "out" / "deep" / "er" / "b.palette.png").is_file()
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_what_is_there_is_kept(segment, tmp_path):
    for name in "abc":
        a_photo().save(tmp_path / f"{name}.png")
    pattern = str(tmp_path / "[abc].png")
    segment(pattern)
    (tmp_path / "out" / "b.palette.png").unlink()
    (tmp_path / "out" / "c.palette.png").write_bytes(b"mine")
    _, found, _ = segment(pattern)
    assert [row["image"][-5:] for row in found["images"] if row.get("kept")] == ["a.png", "c.png"]
    assert (tmp_path / "out" / "c.palette.png").read_bytes() == b"mine"
    segment(pattern, "--overwrite")
    assert (tmp_path / "out" / "c.palette.png").read_bytes() != b"mine"


def test_batches_give_what_single_photos_give(segment, tmp_path):
    for number, size in enumerate([(70, 50), (70, 50), (50, 70), (70, 50)]):
        pixels = np.random.RandomState(number).randint(0, 256, (*size[::-1], 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    pattern = str(tmp_path / "?.png")
    segment(pattern, "--output", "raw", out=tmp_path / "single")
    segment(pattern, "--output", "raw", "--batch-size", "2", out=tmp_path / "batches")
    for number in range(4):
        one, other = (np.asarray(Image.open(tmp_path / k / f"{number}.raw.png")) for k in ("single", "batches"))
        assert (one == other).mean() > 0.999


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--scales", "0"), "scales are"),
        (("--tile", "8"), "a tile needs 64 pixels or more"),
        (("--device", "toaster"), "device 'toaster' cannot be used"),
        (("--batch-size", "0"), "Invalid value for '--batch-size': 0 is not in the range x>=1"),
    ],
)
def test_wrong_usage(segment, tmp_path, more, says):
    a_photo().save(tmp_path / "photo.png")
    code, _, complaints = segment(tmp_path / "photo.png", *more)
    assert code == 2
    assert says in complaints


def test_files_that_cannot_be_told_apart_or_are_not_there(tmp_path):
    a_photo().save(tmp_path / "x.png")
    a_photo().save(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match=r"x\.png and .*x\.jpg would be written under one name"):
        check_names(find_images(str(tmp_path)))
    with pytest.raises(ImageError, match="none: there is no such file"):
        find_images(str(tmp_path / "none"))


def test_a_classifier_does_not_segment(capsys, tmp_path):
    a_photo().save(tmp_path / "photo.png")
    assert main(["segment", str(tmp_path / "photo.png"), str(tmp_path), "--model", "test_resnet_iabn.mnist"]) == 2
    assert "is for classification, not for segmentation" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_share_the_photos(weights, tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        a_photo(64, 40 + number).save(tmp_path / "photos" / f"{number}.png")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line += [str(ROOT / "tools" / "segment.py"), str(tmp_path / "photos"), str(tmp_path / "out"), "--long-side", "64"]
    line += ["--model", "test_resnet_deeplab3_iabn", "--checkpoint", str(weights), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, check=False, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["images"]
    assert sorted(row["image"][-5:] for row in found) == ["0.png", "1.png", "2.png"]
    assert len(list((tmp_path / "out").glob("*.palette.png"))) == 3

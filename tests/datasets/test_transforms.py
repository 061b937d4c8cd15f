"""Validation sees what timm's own transform shows; colours vary as they should."""

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torchvision import transforms as torchvisions

from iabn_hub.datasets.transforms import EIGENVALUES, EIGENVECTORS, LIGHTING, Normalize, train_transform, val_transform
from iabn_hub.recipes import recipe_from

from ..conftest import TINY

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(width, height):
    pixels = np.random.RandomState(width * height).randint(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("size", [(300, 400), (400, 300), (256, 256), (60, 500), (224, 257)])
def test_validation_is_timms(size):
    theirs = timm.data.create_transform(
        (3, 224, 224), crop_pct=224 / 256, interpolation="bilinear", mean=MEAN, std=STD
    )(picture(*size))
    ours = Normalize(MEAN, STD)(val_transform(256, 224)(picture(*size))[None])[0]
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("size", [(300, 400), (224, 224), (100, 400), (30, 40)])
@pytest.mark.parametrize("scale", [256, -1])
def test_ten_crops(size, scale):
    crops = val_transform(scale, 224, ten_crop=True)(picture(*size))
    assert crops.shape == (10, 3, 224, 224)
    assert crops.dtype == torch.uint8
    # Corners (top left, top right, bottom left, bottom right) and centre, then those of the mirrored picture.
    assert crops[5:9].flip(-1).equal(crops[[1, 0, 3, 2]])
    mirrored = picture(*size).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert crops[9].equal(val_transform(scale, 224)(mirrored))
    assert crops[4].equal(val_transform(scale, 224)(picture(*size)))


def test_normalising_keeps_the_shape_of_ten_crops():
    images = torch.randint(256, (2, 10, 3, 8, 8), dtype=torch.uint8)
    found = Normalize(MEAN, STD)(images)
    expected = torchvisions.Normalize(MEAN, STD)(images.flatten(0, 1).double() / 255).view(images.shape)
    assert torch.allclose(found.double(), expected, atol=1e-6)


def test_lighting_has_the_covariance_of_its_components():
    torch.manual_seed(0)
    normalize = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), lighting=True)
    images = torch.full((20_000, 3, 2, 2), 128, dtype=torch.uint8)
    shifts = normalize.train()(images) - 128 / 255
    assert (shifts - shifts[:, :, :1, :1]).abs().max() < 1e-6  # the whole image alike
    found = torch.cov(shifts[:, :, 0, 0].T)
    components = torch.tensor(EIGENVECTORS) * torch.tensor(EIGENVALUES)
    expected = LIGHTING**2 * components @ components.T
    assert torch.allclose(found, expected, atol=0.05 * expected.max().item())
    assert normalize.eval()(images).equal(torch.full_like(shifts, 128 / 255))


@pytest.mark.parametrize("augment", ["none", "trivial", "rand", "auto"])
def test_training_images_have_their_size_and_vary(augment):
    content = {**TINY, "training": {"augment": augment, "erase": 1.0}, "input": {"crop_train": 48, "scale_train": 64}}
    content["input"] |= {"color_jitter_train": True}
    transform = train_transform(recipe_from(content, ""))
    first, second = (transform(picture(90, 70)) for _ in range(2))
    assert first.shape == (3, 48, 48)
    assert first.dtype == torch.uint8
    assert not first.equal(second)


def test_colours_vary_by_two_fifths_each_way():
    content = {**TINY, "input": {"crop_train": 16, "color_jitter_train": True}, "training": {"hflip": 0.0}}
    transform = train_transform(recipe_from(content, ""))
    grey = Image.new("RGB", (20, 20), (100, 100, 100))  # only its brightness can change
    values = torch.stack([transform(grey) for _ in range(300)]).float().amax((1, 2, 3))
    assert 59 <= values.min() < 65
    assert 135 < values.max() <= 141


def test_erased_pixels_are_the_mean():
    content = {**TINY, "input": {"crop_train": 32}, "training": {"erase": 1.0}}
    white = Image.new("RGB", (40, 40), "white")
    image = train_transform(recipe_from(content, ""))(white)
    erased = image[:, (image != 255).any(0)]
    assert erased.shape[1] > 0
    assert (erased == torch.tensor([124, 116, 104])[:, None]).all()

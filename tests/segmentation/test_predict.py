"""Fusion, orientations and tiles give what a plain loop gives, and no more memory is used than is said."""

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from iabn_hub.segmentation.predict import Views, _logits, predict

CLASSES = 5


@pytest.fixture(scope="module")
def network():
    """Three strided convolutions: a map at an eighth of the size."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, CLASSES, 3, stride=2, padding=1),
    ).eval()  # fmt: skip


def views_of(network, images, scales, flip):
    """The probabilities of each view in float64, one after the other, as the publication computes them."""
    network, images, found = network.double(), images.double(), []
    with torch.no_grad():
        for scale in scales:
            size = [round(side * scale) for side in images.shape[2:]]
            scaled = images if scale == 1 else F.interpolate(images, size=size, mode="bilinear")
            for mirrored in (False, True) if flip else (False,):
                logits = network(scaled.flip(-1) if mirrored else scaled)
                logits = F.interpolate(logits, size=images.shape[2:], mode="bilinear")
                found.append((logits.flip(-1) if mirrored else logits).softmax(1).numpy())
    network.float()
    return found


def fused(found, fusion):
    """Probability and class of every pixel, by a loop."""
    images, _, height, width = found[0].shape
    values, classes = np.zeros((images, height, width)), np.zeros((images, height, width), int)
    for at in np.ndindex(images, height, width):
        n, y, x = at
        views = [view[n, :, y, x] for view in found]
        if fusion == "mean":
            mean = sum(views) / len(views)
            classes[at], values[at] = mean.argmax(), mean.max()
        elif fusion == "voting":
            chosen = [view.argmax() for view in views]
            classes[at] = np.bincount(chosen).argmax()
            values[at] = np.mean([view.max() for view, c in zip(views, chosen) if c == classes[at]])
        else:
            surest = max(views, key=lambda view: view.max())
            classes[at], values[at] = surest.argmax(), surest.max()
    return values, classes


@pytest.mark.parametrize("fusion", ["mean", "voting", "max"])
@pytest.mark.parametrize(("scales", "flip"), [((1,), False), ((1,), True), ((0.7, 1, 1.2), True), ((0.5, 2), False)])
def test_fusion_is_that_of_a_plain_loop(network, fusion, scales, flip):
    torch.manual_seed(1)
    images = torch.randn(2, 3, 41, 50)
    values, classes = predict(network, images, Views(scales, flip, fusion))
    expected_values, expected_classes = fused(views_of(network, images, scales, flip), fusion)
    assert classes.dtype == torch.uint8
    assert (classes.numpy() == expected_classes).mean() > 0.999  # float32 may decide a tie otherwise
    same = classes.numpy() == expected_classes
    assert np.allclose(values.numpy()[same], expected_values[same], atol=1e-5)


def test_a_mirrored_image_gives_the_mirrored_map(network):
    images = torch.randn(1, 3, 48, 64)
    views = Views((1, 0.75), flip=True)
    values, classes = predict(network, images, views)
    mirrored_values, mirrored_classes = predict(network, images.flip(-1), views)
    assert torch.allclose(mirrored_values.flip(-1), values, atol=1e-6)
    assert (mirrored_classes.flip(-1) == classes).float().mean() > 0.999


@given(height=st.integers(1, 300), width=st.integers(1, 300), tile=st.integers(64, 160))
def test_tiles_of_a_local_network_are_seamless(height, width, tile):
    """A network whose output depends on its own 8 × 8 pixels alone gives the same map in tiles."""
    image = torch.arange(3.0 * height * width).view(1, 3, height, width).sin()
    local = nn.AvgPool2d(8, ceil_mode=True)
    assert torch.allclose(_logits(local, image, tile, 8), local(image), atol=1e-5)


def test_an_image_that_fits_into_a_tile_is_seen_whole(network):
    images = torch.randn(1, 3, 64, 50)
    assert predict(network, images, Views(tile=64))[0].equal(predict(network, images, Views())[0])


def test_tiles_equal_the_whole_where_they_have_its_context(network):
    """Its field of view is 15 pixels: further than that from a seam nothing changes, and at seams it is blended."""
    image = torch.randn(1, 3, 200, 264)
    with torch.no_grad():
        whole, tiled = network(image), _logits(network, image, 128, 8)
    assert whole.shape == tiled.shape
    different = ((whole - tiled).abs().amax(1)[0] > 1e-5).float()
    assert 0 < different.mean() < 0.3
    assert (whole - tiled).abs().max() < (whole - whole.mean()).abs().max()


class Live(TorchDispatchMode):
    """The most bytes that large tensors have taken at a time."""

    def __init__(self, least):
        super().__init__()
        self.least, self.now, self.most, self.known = least, 0, 0, set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage.nbytes() >= self.least and storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("fusion", ["mean", "voting", "max"])
def test_no_more_than_two_and_a_half_tensors_of_probabilities_exist(fusion):
    classes, height, width = 60, 128, 192
    network = nn.Conv2d(3, classes, 8, stride=8).eval()
    images = torch.randn(1, 3, height, width)
    with Live(least=height * width * 4) as live:
        predict(network, images, Views((0.5, 1, 1.5), flip=True, fusion=fusion))
    one = classes * height * width * 4
    assert one < live.most <= 2.5 * one


@pytest.mark.parametrize(
    ("views", "says"),
    [
        ({"scales": ()}, "scales are"),
        ({"scales": (1, 0)}, "scales are"),
        ({"fusion": "median"}, "choose one of mean, voting, max"),
        ({"tile": 8}, "a tile needs 64 pixels or more"),
    ],
)
def test_what_cannot_be_is_refused(views, says):
    with pytest.raises(ValueError, match=says):
        Views(**views)

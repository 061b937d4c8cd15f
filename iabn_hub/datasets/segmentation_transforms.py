"""Transforms of an image together with its label map."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from ..recipes import Recipe
from .segmentation import IGNORE_INDEX
from .transforms import JITTER, resize_long_side


class SegmentationCrop:
    """For training: a random scale, a random crop, a horizontal flip and colour jitter.

    Returns (3, crop, crop) and (crop, crop), uint8. An image smaller than the crop is padded with the mean colour and
    with IGNORE_INDEX.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.crop, self.base = recipe.input.crop_train, recipe.input.scale_train
        self.scales = (recipe.segmentation.min_scale, recipe.segmentation.max_scale)
        self.hflip = recipe.training.hflip
        self.grey = tuple(round(255 * value) for value in recipe.input.mean)
        jitter = recipe.input.color_jitter_train
        self.colors = v2.ColorJitter(brightness=JITTER, contrast=JITTER, saturation=JITTER) if jitter else None

    def __call__(self, image: Image.Image, label: Image.Image, target_class: int) -> tuple[Tensor, Tensor]:
        low, high = self.scales
        scale = low + (high - low) * float(torch.rand(()))
        if self.base > 0:
            scale *= self.base / min(image.size)
        size = [max(1, round(side * scale)) for side in image.size]
        start = self._start(size, label, target_class)
        shown = [min(self.crop, side) for side in size]
        # The crop in coordinates of the unscaled image: only its content is resized.
        (left, right), (top, bottom) = (
            (at * whole / side, (at + part) * whole / side)
            for at, part, side, whole in zip(start, shown, size, image.size)
        )
        box = (left, top, right, bottom)
        canvas = Image.new("RGB", (self.crop, self.crop), self.grey)
        canvas.paste(image.resize((shown[0], shown[1]), Image.Resampling.BILINEAR, box))
        classes = Image.new("L", (self.crop, self.crop), IGNORE_INDEX)
        classes.paste(label.resize((shown[0], shown[1]), Image.Resampling.NEAREST, box))
        if self.colors is not None:
            canvas = self.colors(canvas)
        pixels, numbers = v2.functional.pil_to_tensor(canvas), v2.functional.pil_to_tensor(classes)[0]
        if float(torch.rand(())) < self.hflip:
            pixels, numbers = pixels.flip(-1), numbers.flip(-1)
        return pixels, numbers

    def _start(self, size: list[int], label: Image.Image, target_class: int) -> list[int]:
        """Left and top of the crop in the scaled image: random, or so that it contains a pixel of the target class."""
        point: list[int] | None = None
        if target_class >= 0:
            there = np.flatnonzero(np.asarray(label) == target_class)
            if len(there):  # empty where this image replaces one that cannot be read
                at = int(there[int(torch.randint(len(there), ()))])
                inside = (at % label.width + 0.5, at // label.width + 0.5)
                point = [int(where * side / whole) for where, side, whole in zip(inside, size, label.size)]
        starts = []
        for axis, side in enumerate(size):
            low, high = 0, max(side - self.crop, 0)
            if point:
                low, high = min(max(low, point[axis] - self.crop + 1), high), min(high, point[axis])
            starts.append(low + int(torch.randint(high - low + 1, ())))
        return starts


class WholeImage:
    """For validation: the image with its longer side resized to `long_side` pixels (0: as it is); labels unchanged."""

    def __init__(self, long_side: int) -> None:
        self.long_side = long_side

    def __call__(self, image: Image.Image, label: Image.Image, target_class: int) -> tuple[Tensor, Tensor]:
        shown = resize_long_side(image, self.long_side)
        return v2.functional.pil_to_tensor(shown), v2.functional.pil_to_tensor(label)[0]

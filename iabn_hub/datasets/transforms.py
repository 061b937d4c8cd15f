"""From an image to the network's input: transforms that run in the workers, and normalisation on the device.

Workers return uint8, which is a quarter of float32 to copy; the device converts it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from ..recipes import Recipe

Transform = Callable[[Image.Image], Tensor]
JITTER = 0.4  # saturation, brightness and contrast change by up to this part
BLUR = v2.InterpolationMode.BILINEAR

# AlexNet's colour augmentation (Krizhevsky et al., 2012, section 4.1): a multiple of each principal component of the
# colours of ImageNet, sampled with this standard deviation in units of the component's eigenvalue.
LIGHTING = 0.1
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))

AUGMENTS: dict[str, Callable[[], nn.Module]] = {
    "trivial": lambda: v2.TrivialAugmentWide(interpolation=BLUR),
    "rand": lambda: v2.RandAugment(interpolation=BLUR),
    "auto": lambda: v2.AutoAugment(interpolation=BLUR),
}


def train_transform(recipe: Recipe) -> Transform:
    """Augmentation of an RGB image as the recipe says: a random crop (3, crop, crop), uint8."""
    images, training = recipe.input, recipe.training
    steps: list[nn.Module] = []
    if images.scale_train > 0:
        steps.append(v2.Resize(images.scale_train))
    steps.append(v2.RandomResizedCrop(images.crop_train, scale=(training.min_scale, 1.0), interpolation=BLUR))
    if training.hflip > 0:
        steps.append(v2.RandomHorizontalFlip(training.hflip))
    if images.color_jitter_train:
        steps.append(v2.ColorJitter(brightness=JITTER, contrast=JITTER, saturation=JITTER))  # in random order
    if training.augment != "none":
        steps.append(AUGMENTS[training.augment]())
    steps.append(v2.PILToTensor())
    if training.erase > 0:
        grey = [round(255 * value) for value in images.mean]  # 0 once it is normalised
        steps.append(v2.RandomErasing(training.erase, value=grey))
    return v2.Compose(steps)


def val_transform(resize: int, crop: int, ten_crop: bool = False, interpolation: str = "bilinear") -> Transform:
    """The shorter side to `resize` pixels (−1: as it is) and the centre crop: (3, crop, crop), uint8.

    With `ten_crop`: the centre, the four corners, and all of them mirrored, (10, 3, crop, crop). `interpolation` is
    that of the resize, such as 'bicubic'.
    """
    steps: list[Any] = [v2.Resize(resize, v2.InterpolationMode(interpolation))] if resize > 0 else []
    if ten_crop:
        steps.append(v2.Lambda(functools.partial(_ten_crops, crop=crop)))
    else:
        steps += [v2.CenterCrop(crop), v2.PILToTensor()]
    return v2.Compose(steps)


def _ten_crops(image: Image.Image, crop: int) -> Tensor:
    width, height = (max(side, crop) for side in image.size)
    padded = v2.functional.center_crop(image, [height, width])  # an image that is smaller, as CenterCrop does it
    return torch.stack([v2.functional.pil_to_tensor(part) for part in v2.functional.ten_crop(padded, [crop])])


def resize_long_side(image: Image.Image, long_side: int) -> Image.Image:
    """The image with its longer side resized to `long_side` pixels; 0: as it is."""
    if long_side == 0 or max(image.size) == long_side:
        return image
    scale = long_side / max(image.size)
    width, height = (max(1, int(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


class Normalize(nn.Module):
    """Bytes to the network's input, on the bytes' device: `(x / 255 [+ lighting] − mean) / std`, float32.

    Args:
        mean, std: of the RGB channels, in 0..1.
        lighting: in training mode, shift the colours of each image along the principal components of ImageNet's.
    """

    mean: Tensor
    std: Tensor
    components: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], lighting: bool = False) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.register_buffer("components", torch.tensor(EIGENVECTORS) * torch.tensor(EIGENVALUES))
        self.lighting = lighting

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) or (N, 10, 3, H, W), uint8, to the same shape in float32."""
        x = images.float().div_(255)
        if self.lighting and self.training:
            amounts = torch.randn(len(x), 3, device=x.device) * LIGHTING
            x += (amounts @ self.components.T).view(-1, 3, 1, 1)
        return x.sub_(self.mean).div_(self.std)

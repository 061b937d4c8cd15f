"""A segmentation network on whole images: scales, orientations and tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fusion import FUSIONS, probabilities_

OVERLAP = 0.25  # of a tile with the next, as a part of its side


@dataclass(frozen=True)
class Views:
    """How an image is looked at.

    Args:
        scales: of the image's sides, one view each.
        flip: also look at each mirrored left to right.
        fusion: 'mean', 'voting' or 'max', see `fusion`.
        tile: side of the largest piece that the network sees, in pixels, a multiple of its stride; None sees all.
    """

    scales: Sequence[float] = (1.0,)
    flip: bool = False
    fusion: str = "mean"
    tile: int | None = None

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales are {list(self.scales)}: give one or more numbers above 0")
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion is {self.fusion!r}: choose one of {', '.join(FUSIONS)}")
        if self.tile is not None and self.tile < 64:
            raise ValueError(f"tile is {self.tile}: a tile needs 64 pixels or more")


def predict(network: nn.Module, images: Tensor, views: Views, stride: int = 8) -> tuple[Tensor, Tensor]:
    """What is where.

    Args:
        network: in eval mode; images to logits (N, C, ⌈H / stride⌉, ⌈W / stride⌉), C at most 256.
        images: (N, 3, H, W), normalised for it.

    Returns:
        The probability of the chosen class, (N, H, W), and the class, (N, H, W) uint8. Beside the network no more than
        2.5 tensors of the size of the probabilities, (N, C, H, W) float32, exist at a time (for C of 60 and more).
    """
    fusion = FUSIONS[views.fusion]()
    height, width = images.shape[2:]
    with torch.inference_mode():
        for scale in views.scales:
            size = [max(1, round(side * scale)) for side in (height, width)]
            scaled = images if scale == 1 else F.interpolate(images, size=size, mode="bilinear")
            for mirrored in (False, True) if views.flip else (False,):
                logits = _logits(network, scaled.flip(-1) if mirrored else scaled, views.tile, stride).float()
                logits = logits.flip(-1) if mirrored else logits  # the small map: it is the same, and cheaper
                fusion.update(probabilities_(F.interpolate(logits, size=(height, width), mode="bilinear")))
        return fusion.output()


def _logits(network: nn.Module, image: Tensor, tile: int | None, stride: int) -> Tensor:
    """The network's map of the whole image, put together from tiles where it is larger than one.

    Neighbours overlap, and their maps are blended there in proportion to the distance from the tile's edge. An image
    that fits into one tile gives what it gives without tiles.
    """
    height, width = image.shape[2:]
    if tile is None or max(height, width) <= tile:
        return network(image)
    side = tile // stride * stride
    overlap = max(stride, int(side * OVERLAP) // stride * stride)
    rows, columns = -(-height // stride), -(-width // stride)
    total: Tensor | None = None
    weights = torch.zeros(1, 1, rows, columns, device=image.device)
    for top in _starts(height, side, overlap, stride):
        for left in _starts(width, side, overlap, stride):
            part = network(image[:, :, top : top + side, left : left + side]).float()
            if total is None:
                total = part.new_zeros(len(part), part.shape[1], rows, columns)
            weight = _ramp(top, part.shape[2], rows, overlap, stride, image.device)[:, None]
            weight = weight * _ramp(left, part.shape[3], columns, overlap, stride, image.device)[None, :]
            y, x = top // stride, left // stride
            place = (slice(None), slice(None), slice(y, y + part.shape[2]), slice(x, x + part.shape[3]))
            total[place] += part * weight
            weights[place] += weight
    assert total is not None
    return total / weights


def _starts(length: int, side: int, overlap: int, stride: int) -> list[int]:
    """Where tiles begin along one axis, in pixels; the last one ends with the image."""
    if length <= side:
        return [0]
    last = -(-(length - side) // stride) * stride
    return [*range(0, last, side - overlap), last]


def _ramp(start: int, size: int, whole: int, overlap: int, stride: int, device: torch.device) -> Tensor:
    """The weights of a tile along one axis of the map: rising from its inner edges, 1 at those of the image."""
    at = torch.arange(size, device=device, dtype=torch.float32) + 0.5
    steps = overlap / stride
    first = start // stride
    rising = at / steps if first > 0 else torch.full_like(at, torch.inf)
    falling = (size - at) / steps if first + size < whole else torch.full_like(at, torch.inf)
    return torch.minimum(rising, falling).clamp(max=1)

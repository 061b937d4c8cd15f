"""How a segmentation network is validated: its protocol, the published figures, and the results in words."""

from __future__ import annotations

import dataclasses
import html
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..checkpoints.catalogue import Checkpoint
from ..datasets.folders import DataError, Location
from ..datasets.loaders import val_loader
from ..datasets.segmentation import SegmentationSamples, open_segmentation
from ..datasets.segmentation_transforms import WholeImage
from ..models.pretrained import Pretrained
from ..pages import page, picture, table
from ..world import World
from .metrics import SegmentationMetrics
from .predict import Views


class SegmentationProtocol:
    """Whole images at one or several scales; see `training.validation.Protocol`.

    Args:
        network: which states its own sizes.
        views: scales, flips and tiles.
        long_side: longer side that the network is shown, in pixels; 0 does not resize; None for the network's.
        ignore_index: value in the label files that is not scored; None for the network's.
    """

    def __init__(
        self, network: Pretrained, views: Views, long_side: int | None = None, ignore_index: int | None = None
    ) -> None:
        usual = network.evaluation
        self.network, self.views = network, views
        self.long_side = usual.long_side if long_side is None else long_side
        self.ignore_index = usual.ignore_index if ignore_index is None else ignore_index

    def settings(self) -> dict[str, Any]:
        return {"long_side": self.long_side, **dataclasses.asdict(self.views)}

    @property
    def name(self) -> str:
        """As in the catalogue: '2048_flip', '2048_0.7_1_1.2'."""
        scales = [] if tuple(self.views.scales) == (1.0,) else [f"{scale:g}" for scale in self.views.scales]
        return "_".join([str(self.long_side), *scales, *(["flip"] if self.views.flip else [])])

    def published(self, record: Checkpoint) -> dict[str, Any]:
        if self.views.fusion != "mean" or self.views.tile is not None:
            raise ValueError("--check compares with published figures, which are without --fusion and --tile")
        result = record.result(self.name)
        if result is None or result.miou is None:
            known = ", ".join(each.protocol for each in record.results if each.miou is not None)
            raise ValueError(
                f"the catalogue has no figure of {record.name} for the protocol {self.name}; there are: {known}"
            )
        return {
            "protocol": self.name,
            "dataset": result.dataset,
            "published": {"miou": result.miou},
            "images": result.images,
        }

    def open(
        self, location: Location, batch_size: int, workers: int, world: World
    ) -> tuple[Any, tuple[str, ...] | None]:
        count = self.network.options["num_classes"]
        dataset = open_segmentation(Path(location.root), location.val_split, count, self.ignore_index)
        samples = SegmentationSamples(dataset, WholeImage(self.long_side))
        return val_loader(samples, 1, workers, world), dataset.classes  # the images differ in size

    def new_metrics(self, classes: tuple[str, ...], device: torch.device) -> SegmentationMetrics:
        return SegmentationMetrics(len(classes), device, classes, self.views)

    def results(self, metrics: SegmentationMetrics, classes: tuple[str, ...]) -> dict[str, Any]:
        if not metrics.confusion.any():
            raise DataError("no pixel is scored: are there labels? See --ignore-index")
        pixels = metrics.confusion.sum(1).tolist()
        per_class = [
            {"class": number, "label": name, "pixels": pixels[number], "iou": iou}
            for number, (name, iou) in enumerate(zip(classes, metrics.iou.tolist()))
            if not math.isnan(iou)
        ]
        return {**metrics.values(), "per_class": per_class}

    def lines(self, facts: dict[str, Any]) -> list[str]:
        size = f"longer side {self.long_side}" if self.long_side else "original size"
        scales = ", ".join(f"{scale:g}" for scale in self.views.scales)
        return [
            f"{'class':<30} {'pixels':>15} {'IoU':>8}",
            *(f"{row['label'][:30]:<30} {row['pixels']:>15,} {row['iou']:>7.2f}%" for row in facts["per_class"]),
            f"{facts['model']}: mIoU {facts['miou']:.2f} % of {len(facts['per_class'])} classes, pixel accuracy "
            f"{facts['pixel_accuracy']:.2f} % on {facts['images']:,} images ({size}, scales {scales}"
            f"{', with flips' if self.views.flip else ''}); "
            f"{facts['images_per_second']:.2f} images/s on {facts['ranks']} × {facts['device']}",
        ]

    def report(
        self, facts: dict[str, Any], metrics: SegmentationMetrics, classes: tuple[str, ...], dataset: Any
    ) -> str:
        names = ("network", "images", "miou", "pixel_accuracy", "images_per_second", "ranks", "device")
        rows = sorted(facts["per_class"], key=lambda row: row["iou"])
        return page(
            f"Validation of {facts['model']}",
            table(("", ""), [*((name, facts[name]) for name in names), *facts["protocol"].items()]),
            "".join(f"<p>{html.escape(change)}</p>" for change in facts["changes"]),
            "<h2>Classes, worst first</h2>",
            table(("class", "pixels", "IoU, %"), [(row["label"], row["pixels"], row["iou"]) for row in rows]),
            "<h2>Image, labels, prediction</h2>",
            *(f"<p>{picture(Image.fromarray(np.asarray(shown)))}</p>" for shown in metrics.pictures()),
        )

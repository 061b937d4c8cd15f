"""How a classifier is validated: its protocol, the published figures to compare with, and the results in words."""

from __future__ import annotations

import html
from typing import Any

import torch

from ..checkpoints.catalogue import Checkpoint
from ..datasets.folders import Location, classes_of, open_split
from ..datasets.loaders import val_loader
from ..datasets.samples import samples_of
from ..datasets.transforms import val_transform
from ..models.pretrained import Pretrained
from ..pages import page, table
from ..world import World
from .figures import figures
from .metrics import ClassificationMetrics

MANY_CLASSES = 20  # with more, only the worst are printed
WORST = 10


class ClassificationProtocol:
    """A centre crop, or ten crops, after a resize; see `training.validation.Protocol`.

    Args:
        network: which states its own sizes.
        crop: side of the crop in pixels; None for the network's.
        resize: shorter side before it; −1 does not resize; None keeps the network's proportion.
        ten_crop: centre and corners, also flipped: the mean of their logits.

    Raises:
        ValueError: the crop is larger than the resized image.
    """

    def __init__(
        self, network: Pretrained, crop: int | None = None, resize: int | None = None, ten_crop: bool = False
    ) -> None:
        usual = network.evaluation
        self.network, self.ten_crop = network, ten_crop
        self.crop = crop or usual.crop
        self.resize = resize or (round(usual.resize * self.crop / usual.crop) if usual.resize > 0 else usual.resize)
        if 0 < self.resize < self.crop:
            raise ValueError(f"--resize {self.resize} is less than --crop {self.crop}: the crop would not fit")

    def settings(self) -> dict[str, Any]:
        return {"resize": self.resize, "crop": self.crop, "ten_crop": self.ten_crop}

    def published(self, record: Checkpoint) -> dict[str, Any]:
        for result in record.results:
            same = (result.crop, result.ten_crop) == (self.crop, self.ten_crop)
            if same and result.top1 is not None and result.resize in (None, self.resize):
                metrics = {"top1": result.top1, "top5": result.top5}
                return {
                    "protocol": result.protocol,
                    "dataset": result.dataset,
                    "published": {name: value for name, value in metrics.items() if value is not None},
                    "images": result.images,
                }
        known = "; ".join(
            f"--crop {r.crop}" + (f" --resize {r.resize}" if r.resize else "") + (" --ten-crop" if r.ten_crop else "")
            for r in record.results
        )
        raise ValueError(f"the catalogue has no figure of {record.name} for this protocol; there are: {known}")

    def open(
        self, location: Location, batch_size: int, workers: int, world: World
    ) -> tuple[Any, tuple[str, ...] | None]:
        split = open_split(location, location.val_split)
        transform = val_transform(self.resize, self.crop, self.ten_crop, self.network.evaluation.interpolation)
        samples = samples_of(split, transform, world)
        return val_loader(samples, batch_size, workers, world), classes_of(split)

    def new_metrics(self, classes: tuple[str, ...], device: torch.device) -> ClassificationMetrics:
        return ClassificationMetrics(len(classes))

    def results(self, metrics: ClassificationMetrics, classes: tuple[str, ...]) -> dict[str, Any]:
        per_class = [
            {"class": i, "label": name, "images": n, "top1": 100 * metrics.correct_per_class[i] / n}
            for i, name in enumerate(classes)
            if (n := metrics.per_class[i])
        ]
        return {**metrics.values(), "per_class": per_class}

    def lines(self, facts: dict[str, Any]) -> list[str]:
        worst_first = sorted(facts["per_class"], key=lambda row: row["top1"])
        many = len(worst_first) > MANY_CLASSES
        rows = worst_first[:WORST] if many else facts["per_class"]
        top5 = f"top-5 {facts['top5']:.2f} %, " if "top5" in facts else ""
        crops = "ten crops" if self.ten_crop else "centre crop"
        return [
            f"{'class':<30} {'images':>7} {'top-1':>8}" + (f"   (the worst {WORST})" if many else ""),
            *(f"{row['label'][:30]:<30} {row['images']:>7} {row['top1']:>7.2f}%" for row in rows),
            f"{facts['model']}: top-1 {facts['top1']:.2f} %, {top5}loss {facts['loss']:.4f} on "
            f"{facts['images']:,} images ({crops} of {self.crop} from {self.resize}); "
            f"{facts['images_per_second']:.0f} images/s on {facts['ranks']} × {facts['device']}",
        ]

    def report(
        self, facts: dict[str, Any], metrics: ClassificationMetrics, classes: tuple[str, ...], dataset: Any
    ) -> str:
        names = ("network", "images", "top1", "top5", "loss", "images_per_second", "ranks", "device")
        rows = []
        for row in sorted(facts["per_class"], key=lambda row: row["top1"])[:MANY_CLASSES]:
            found = sorted(((n, p) for (of, p), n in metrics.confusions.items() if of == row["class"]), reverse=True)
            confused = ", ".join(f"{classes[prediction]} ({count})" for count, prediction in found[:5])
            rows.append((row["label"], row["images"], row["top1"], confused or "nothing else"))
        return page(
            f"Validation of {facts['model']}",
            table(("", ""), [*((name, facts[name]) for name in names if name in facts), *facts["protocol"].items()]),
            "".join(f"<p>{html.escape(change)}</p>" for change in facts["changes"]),
            "<h2>Worst classes</h2>",
            table(("class", "images", "top-1, %", "predicted as"), rows),
            figures(metrics.errors, dataset.name, classes),
        )

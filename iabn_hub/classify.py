"""What is in a picture: a pretrained classifier, its labels, and its first guesses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm.data
import torch

from .checkpoints.catalogue import Checkpoint, find
from .checkpoints.errors import UnknownNameError
from .images import open_rgb
from .models import ARCHITECTURES, create_model, in_repository
from .segmentation.palette import VISTAS, vistas

DEFAULT_MODEL = "test_resnet_iabn.mnist"
SAMPLES = Path(__file__).parent / "data" / "samples"


@dataclass(frozen=True)
class Guess:
    """One class of the network with its probability, 0 to 1."""

    index: int
    label: str
    probability: float


class Classifier:
    """A pretrained network with its preprocessing and its class names.

    Args:
        name: `model` or `model.tag` from the catalogue, or 'hf-hub:ORG/NAME[@COMMIT]'.
        checkpoint: a file to load instead of the published one; it must have the same classes.
        device: where to run.

    Raises:
        UnknownNameError: no such checkpoint, or it does not classify.
        CheckpointError: its weights cannot be fetched, verified or loaded.
    """

    def __init__(
        self, name: str = DEFAULT_MODEL, *, checkpoint: str | os.PathLike[str] | None = None, device: str = "cpu"
    ) -> None:
        # A file of the caller's goes with any architecture, published weights or not.
        named = (checkpoint is not None and name in ARCHITECTURES) or in_repository(name)
        record = None if named else find(name)
        if record and record.task != "classification":
            raise UnknownNameError(f"{record.name} is for {record.task}, not for classification")
        self.name = record.name if record else name
        self.device = torch.device(device)
        self.model = create_model(self.name, pretrained=True, checkpoint=checkpoint).to(self.device).eval()
        cfg = timm.data.resolve_model_data_config(self.model)
        self.transform = timm.data.create_transform(**cfg)
        num_classes: Any = self.model.num_classes
        cfg_labels = self.model.pretrained_cfg.get("label_names")  # type: ignore[union-attr, operator]
        self.labels = cfg_labels if record is None and cfg_labels else labels_of(record, num_classes)

    def classify(self, path: str | os.PathLike[str], topk: int = 5) -> list[Guess]:
        """The `topk` most probable classes of one image file, most probable first.

        Raises:
            ImageError: the file is missing or not an image.
        """
        image = self.transform(open_rgb(path)).unsqueeze(0).to(self.device)
        with torch.inference_mode():
            probabilities = self.model(image).float().softmax(1)[0]
        values, indices = probabilities.topk(min(topk, len(probabilities)))
        return [Guess(i, self.labels[i], p) for i, p in zip(indices.tolist(), values.tolist())]


def labels_of(record: Checkpoint | None, num_classes: int) -> Sequence[str]:
    """The class names of a checkpoint in the order of its logits; 'class 7' where nobody has named them."""
    if record and record.classes:
        return record.classes
    if record and record.dataset == VISTAS:
        return vistas().names
    if record and record.dataset == "imagenet-1k" and num_classes == 1000:
        info = timm.data.ImageNetInfo("imagenet-1k")
        return [info.index_to_description(i) for i in range(num_classes)]
    return [f"class {i}" for i in range(num_classes)]

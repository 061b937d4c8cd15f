"""Classify images: a network, its preprocessing, and the names of its classes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import timm.data
import torch
from PIL import Image

from ..checkpoints.catalogue import find
from ..checkpoints.fetch import package_file
from ..datasets.images import open_rgb
from ..models.pretrained import Pretrained, load_pretrained

DATA = Path(__file__).parent.parent / "data"
# A network and samples for it, which the package `demo` brings; and those that are bundled.
PHOTOS = ("efficientnet_lite0_iabn.in1k", DATA / "photos")
DIGITS = ("test_resnet_iabn.mnist", DATA / "samples")


def default_model() -> tuple[str, Path]:
    """The network that serves where none is named, and a folder of samples for it.

    It is EfficientNet-Lite0 if its weights are installed, else the bundled network, which reads digits.
    """
    return PHOTOS if package_file(find(PHOTOS[0])) else DIGITS


@dataclass(frozen=True)
class Prediction:
    """One class of the network with its probability, 0 to 1."""

    index: int
    label: str
    probability: float


class Classifier:
    """A network with its preprocessing and its class names.

    Args:
        name: of the network, see `load_pretrained`; by default that of `default_model`.
        checkpoint: a file to load instead of the published weights.
        device: where to run.
        network: one that is loaded already, instead of `name`.

    Raises:
        UnknownNameError: no such network, or it does not classify.
        CheckpointError: its weights cannot be fetched, verified or loaded.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        checkpoint: str | None = None,
        device: str | torch.device = "cpu",
        network: Pretrained | None = None,
    ) -> None:
        network = network or load_pretrained(name or default_model()[0], checkpoint=checkpoint, task="classification")
        self.name, self.labels = network.name, network.labels
        self.device = torch.device(device)
        self.model = network.model.to(self.device).eval()
        self.transform = timm.data.create_transform(**timm.data.resolve_model_data_config(self.model))

    def classify(self, image: str | os.PathLike[str] | Image.Image, topk: int = 5) -> list[Prediction]:
        """The `topk` most probable classes of one image, most probable first.

        Args:
            image: a file, or a picture in RGB.

        Raises:
            ImageError: the file is missing or not an image.
        """
        picture = image if isinstance(image, Image.Image) else open_rgb(image)
        batch = self.transform(picture).unsqueeze(0).to(self.device)
        with torch.inference_mode():
            probabilities = self.model(batch).float().softmax(1)[0]
        values, indices = probabilities.topk(min(topk, len(probabilities)))
        return [Prediction(i, self.labels[i], p) for i, p in zip(indices.tolist(), values.tolist())]

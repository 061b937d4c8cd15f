"""Classify images: a network, its preprocessing, and the names of its classes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import timm.data
import torch

from ..datasets.images import open_rgb
from ..models.pretrained import load_pretrained

DEFAULT_MODEL = "test_resnet_iabn.mnist"
SAMPLES = Path(__file__).parent.parent / "data" / "samples"


@dataclass(frozen=True)
class Prediction:
    """One class of the network with its probability, 0 to 1."""

    index: int
    label: str
    probability: float


class Classifier:
    """A network with its preprocessing and its class names.

    Args:
        name: of the network, see `load_pretrained`.
        checkpoint: a file to load instead of the published weights.
        device: where to run.

    Raises:
        UnknownNameError: no such network, or it does not classify.
        CheckpointError: its weights cannot be fetched, verified or loaded.
    """

    def __init__(
        self, name: str = DEFAULT_MODEL, *, checkpoint: str | None = None, device: str | torch.device = "cpu"
    ) -> None:
        network = load_pretrained(name, checkpoint=checkpoint, task="classification")
        self.name, self.labels = network.name, network.labels
        self.device = torch.device(device)
        self.model = network.model.to(self.device).eval()
        self.transform = timm.data.create_transform(**timm.data.resolve_model_data_config(self.model))

    def classify(self, path: str | os.PathLike[str], topk: int = 5) -> list[Prediction]:
        """The `topk` most probable classes of one image file, most probable first.

        Raises:
            ImageError: the file is missing or not an image.
        """
        image = self.transform(open_rgb(path)).unsqueeze(0).to(self.device)
        with torch.inference_mode():
            probabilities = self.model(image).float().softmax(1)[0]
        values, indices = probabilities.topk(min(topk, len(probabilities)))
        return [Prediction(i, self.labels[i], p) for i, p in zip(indices.tolist(), values.tolist())]

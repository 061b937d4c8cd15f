"""The bundled network scores what the catalogue says, on the very digits that it was scored on."""

import numpy as np
import timm.data
import torch
from PIL import Image

import iabn_hub
from iabn_hub.checkpoints import fetch_checkpoint, find
from iabn_hub.training.loop import evaluate

from .paths import DATA

RECORD = find("test_resnet_iabn.mnist")


def held_out_digits():
    """The 1,000 digits of the sheet, 28 × 28 pixels, 40 in a row, 100 of each class in order."""
    sheet = np.asarray(Image.open(DATA / "mnist_held_out.png"))
    digits = sheet.reshape(25, 28, 40, 28).swapaxes(1, 2).reshape(-1, 28, 28)
    return [(Image.fromarray(digit).convert("RGB"), index // 100) for index, digit in enumerate(digits)]


def test_accuracy_is_the_listed_one():
    network = iabn_hub.create_model(RECORD.name, pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    digits = held_out_digits()
    images = torch.stack([transform(image) for image, _ in digits])
    labels = torch.tensor([label for _, label in digits])
    score = evaluate(network, zip(images.split(100), labels.split(100)), torch.device("cpu"))
    listed = RECORD.results[0]
    assert (score.images, listed.images) == (1000, 1000)
    assert abs(score.top1 - listed.top1) <= 0.1
    assert score.top1 >= 97


def test_file_is_small_and_verified():
    assert fetch_checkpoint(RECORD).stat().st_size <= 3_000_000

"""Every recipe's network starts: two steps on small synthetic images, as the recipe says but for the sizes."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from iabn_hub.datasets.folders import Location
from iabn_hub.datasets.transforms import Normalize
from iabn_hub.recipes import RECIPES, read_recipe
from iabn_hub.training.network import build_network
from iabn_hub.training.snapshots import Snapshots
from iabn_hub.training.task import make_task
from iabn_hub.training.trainer import Run, Trainer
from iabn_hub.world import World

CROP = 32
SMALL = (
    f"input.crop_train={CROP}", "input.scale_val=-1", f"input.crop_val={CROP}", "optimizer.batch_size=4",
    "network.classes=2", "training.repeats=1",
)  # fmt: skip


class Numbers:
    """A journal that keeps nothing but what the steps tell of their loss."""

    def __init__(self):
        self.losses = []

    def progress(self, images, epoch, loss):
        self.losses.append(loss)

    def scalars(self, values, step):
        pass


def grain(seed):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (24, 48, 3)).astype(np.uint8))


def in_two_classes(root):
    """Scenes whose left half is one class and whose right half the other."""
    label = Image.fromarray(np.repeat([[0, 1]], 24, axis=0).repeat(24, axis=1).astype(np.uint8))
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (root / part / kind).mkdir(parents=True)
            for number in range(8):
                (label if kind == "labels" else grain(number)).save(root / part / kind / f"{number}.png")
    return root


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.json")), ids=lambda path: path.stem)
def test_two_steps(path, pictures, tmp_path):
    # The wide body under a segmentation head, 136 million parameters, differs in its size alone.
    small = ("network.arch=test_resnet_deeplab3", "training.amp=off") if "deeplab3" in path.stem else ()
    recipe = read_recipe(path, (*SMALL, *small))
    world = World(torch.device("cpu"))
    root = pictures(train=4) if recipe.task == "classification" else in_two_classes(tmp_path / "scenes")
    task = make_task(recipe, Location(str(root)), world)
    loader = task.train_loader(tmp_path, 0)
    torch.manual_seed(0)
    network = build_network(recipe)
    first = next(network.parameters())
    before = first.detach().clone()
    images = recipe.input
    run = Run(
        recipe=recipe, task=task, world=world, network=network, config={}, loader=loader,
        normalize=Normalize(images.mean, images.std, images.lighting_train), validate=None,
        snapshots=Snapshots(tmp_path, 1), snapshot_minutes=1e9, stop_requested=lambda: False,
        on_skipped=lambda reasons: None,
    )  # fmt: skip
    trainer = Trainer(run)
    journal = Numbers()
    trainer.train_epoch(network, journal)
    assert trainer.step == loader.steps == 2
    assert all(math.isfinite(loss) for loss in journal.losses)
    assert len(journal.losses) == 2
    assert trainer.sums["images"] == 8
    assert not first.equal(before)

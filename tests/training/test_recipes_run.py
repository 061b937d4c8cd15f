"""Every recipe's network starts: two steps on small synthetic images, as the recipe says but for the sizes."""

import math

import pytest
import torch

from iabn_hub.processes import Processes
from iabn_hub.training.data import Location, TrainLoader, open_split
from iabn_hub.training.loop import Trainer
from iabn_hub.training.network import build_network
from iabn_hub.training.recipe import read_recipe
from iabn_hub.training.snapshots import Snapshots
from iabn_hub.training.transforms import Normalize, train_transform

from ..paths import TOOLS

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


@pytest.mark.parametrize("path", sorted((TOOLS / "recipes").glob("*.json")), ids=lambda path: path.stem)
def test_two_steps(path, pictures, tmp_path):
    recipe = read_recipe(path, SMALL)
    alone = Processes(torch.device("cpu"))
    source = open_split(Location(str(pictures(train=4))), "train", True)
    loader = TrainLoader(source, train_transform(recipe), 4, 1, 1, 0, 0, alone)
    torch.manual_seed(0)
    network = build_network(recipe)
    before = network.conv1.weight.detach().clone()
    trainer = Trainer(
        recipe, network, loader, Normalize(recipe.input, recipe.input.lighting_train), None, alone,
        Snapshots(tmp_path, 1), 1e9, lambda: False, lambda broken: None,
    )  # fmt: skip
    journal = Numbers()
    trainer.train_epoch(network, journal)
    assert trainer.step == loader.steps == 2
    assert all(math.isfinite(loss) for loss in journal.losses)
    assert len(journal.losses) == 2
    assert trainer.sums["images"] == 8
    assert not network.conv1.weight.equal(before)

"""Small pictures that any network learns at once, and the commands as functions."""

import json

import numpy as np
import pytest
from PIL import Image

from iabn_hub.training import command, validate

from ..paths import TOOLS

RECIPES = TOOLS / "recipes"
TINY = {
    "network": {
        "arch": "test_resnet",
        "activation": "leaky_relu",
        "bn_mode": "inplace",
        "weight_init": "kaiming_normal",
    },
    "optimizer": {
        "batch_size": 8,
        "learning_rate": 0.01,
        "nesterov": True,
        "clip": 0,
        "schedule": {"type": "cosine", "mode": "step", "epochs": 6},
    },
    "input": {"crop_train": 32, "scale_val": 32, "crop_val": 32, "color_jitter_train": True, "lighting_train": True},
    "training": {"min_scale": 0.5},
}


@pytest.fixture
def pictures(tmp_path):
    """Dark and bright pictures, with grain, so that all batches have similar statistics."""

    def make(root=tmp_path / "data", train=20, val=5, classes=("bright", "dark")):
        random = np.random.RandomState(0)
        for part, count in (("train", train), ("val", val)):
            for number, name in enumerate(classes):
                folder = root / part / name
                folder.mkdir(parents=True)
                for i in range(count):
                    grain = random.randint(-30, 31, (40, 40, 3))
                    light = 220 - 190 * number // (len(classes) - 1)
                    Image.fromarray((light + grain).clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        return root

    return make


@pytest.fixture
def recipe_file(tmp_path):
    """Write the tiny recipe, with other values in its sections."""

    def write(**changes):
        content = {name: {**section, **changes.get(name, {})} for name, section in TINY.items()}
        path = tmp_path / "tiny.json"
        path.write_text(json.dumps(content))
        return path

    return write


@pytest.fixture
def train(tmp_path, recipe_file):
    """Run tools/train.py on the tiny recipe in this process; returns its exit code."""

    def run(data, *more, out=tmp_path / "run", recipe=None):
        return command.main(
            RECIPES, [str(recipe or recipe_file()), str(data), "--out", str(out), "--workers", "0", *more]
        )

    return run


@pytest.fixture
def measure(capsys):
    """Run tools/validate.py in this process; returns its exit code and what it says as JSON, or its complaint."""

    def run(model, data, *more):
        capsys.readouterr()
        code = validate.main([str(model), str(data), "--workers", "0", "--json", *more])
        said = capsys.readouterr()
        return code, json.loads(said.out) if said.out else said.err

    return run

"""The tools run from a checkout, write whole results, and refuse what cannot work."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import iabn_hub

from .paths import ROOT


@pytest.fixture
def data(tmp_path):
    """Dark and bright pictures, with grain, so that all batches have similar statistics: easy for any network."""
    random = np.random.RandomState(0)
    for part, count in (("train", 16), ("val", 4)):
        for name, light in (("bright", 220), ("dark", 30)):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                grain = random.randint(-30, 31, (40, 40))
                Image.fromarray((light + grain).clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "data"


def train(data, out, *more):
    command = [sys.executable, str(ROOT / "tools" / "train.py"), "test_resnet_iabn", str(data), "--out", str(out)]
    command += ["--img-size", "32", "--epochs", "10", "--batch-size", "8", "--workers", "0", *more]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)


def test_training_learns_and_its_weights_load(data, tmp_path):
    outcome = train(data, tmp_path / "run")
    assert outcome.returncode == 0, outcome.stderr
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert report["classes"] == ["bright", "dark"]
    assert report["result"]["top1"] == 100
    assert report["result"]["images"] == 8
    assert len(report["epochs"]) == 10
    network = iabn_hub.create_model("test_resnet_iabn", num_classes=2, checkpoint=tmp_path / "run")
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(value.equal(saved[name]) for name, value in network.state_dict().items())
    again = train(data, tmp_path / "run")
    assert again.returncode == 1
    assert "exists already" in again.stderr


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (("--crop-pct", "2"), 2, "--crop-pct is 2.0: it must be 0.1 to 1"),
        (("--device", "toaster"), 1, "toaster"),
        (("--batch-size", "64"), 1, "fewer images than one batch of 64"),
    ],
)
def test_impossible_arguments_are_sentences(data, tmp_path, more, code, says):
    outcome = train(data, tmp_path / "run", *more)
    assert outcome.returncode == code
    assert says in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_different_classes_are_named(data, tmp_path):
    (data / "val" / "bright").rename(data / "val" / "brigth")
    outcome = train(data, tmp_path / "run")
    assert outcome.returncode == 1
    assert "different classes: bright, brigth" in outcome.stderr


def test_benchmark_measures_every_contender_in_one_run():
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "layer", "--json", "--no-compile"]
    done = subprocess.run([*command, "--rounds", "3", "--warmup", "1"], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert len(result["cases"]) == 16
    for case in result["cases"]:
        assert {"BatchNorm2d + LeakyReLU", "iABN", "iABN (reference)"} <= case["contenders"].keys()
        assert case["contenders"]["BatchNorm2d + LeakyReLU"]["times_faster"] == 1
        assert all(share > 0 for share in case["share_of_copy"].values())

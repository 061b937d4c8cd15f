"""Segmentation networks learn generated shapes, resume exactly, and their metrics are those of a plain loop."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import iabn_hub
from iabn_hub.cli import main
from iabn_hub.datasets.samples import Batch
from iabn_hub.evaluation import evaluate
from iabn_hub.segmentation.metrics import SegmentationMetrics
from iabn_hub.segmentation.palette import palette_of
from iabn_hub.world import World

from ..paths import ROOT, TOOLS
from .test_processes import start

RECIPE = "test_resnet_deeplab3_iabn.shapes"
SMALL = ("--batch-size", "4", "--set", "input.crop_train=64", "--set", "segmentation.long_side_val=0", "--workers", "0")


def shapes(root, **options):
    spec = importlib.util.spec_from_file_location("shapes_dataset", TOOLS / "shapes_dataset.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write(root, **options)
    return root


def train(data, out, *more):
    return main(["train", RECIPE, str(data), "--out", str(out), *more])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return shapes(tmp_path_factory.mktemp("scenes") / "small", train=12, val=3, side=64)


@pytest.mark.slow
def test_a_tiny_network_learns_the_shapes(tmp_path, measure, capsys):
    data, out = shapes(tmp_path / "shapes"), tmp_path / "run"
    assert train(data, out, "--epochs", "3") == 0
    report = json.loads((out / "metrics.json").read_text())
    assert report["result"]["miou"] > 90
    assert len(report["result"]["iou"]) == 4
    assert np.mean(report["result"]["iou"]) == pytest.approx(report["result"]["miou"])
    assert report["classes"] == ["background", "disc", "square", "triangle"]
    board = EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    assert board.Tags()["images"] == [f"validation/{number}" for number in range(4)]
    assert [point.step for point in board.Images("validation/0")] == [25, 50, 75]
    assert (board.Images("validation/0")[0].width, board.Images("validation/0")[0].height) == (3 * 160, 160)
    assert "mIoU, %" not in (out / "report.html").read_text()  # in the curves, which are a picture
    page = tmp_path / "page.html"
    code, found = measure(out, data, "--report", str(page))
    assert code == 0
    assert found["miou"] == pytest.approx(report["result"]["miou"])
    assert {row["label"]: row["iou"] for row in found["per_class"]} == dict(
        zip(report["classes"], map(pytest.approx, report["result"]["iou"]))
    )
    assert page.read_text().count("<img") == 4
    capsys.readouterr()
    photo = data / "val" / "images" / "000.png"
    line = ["segment", str(photo), str(tmp_path / "out"), "--model", str(out), "--json"]
    assert main([*line, "--output", "raw,palette"]) == 0
    shown = json.loads(capsys.readouterr().out)["images"][0]
    assert set(shown["classes"]) <= set(report["classes"])
    assert train(data, out, "--epochs", "3", "--resume", "auto") == 0  # there is nothing to do but the files
    assert json.loads((out / "metrics.json").read_text())["result"] == report["result"]
    guess = np.asarray(Image.open(shown["outputs"]["raw"]))
    assert (guess == np.asarray(Image.open(data / "val" / "labels" / "000.png"))).mean() > 0.95


def test_a_run_that_stopped_goes_on_exactly(scenes, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(scenes, whole, *SMALL, "--epochs", "2", "--set", "input.color_jitter_train=true") == 0
    same = (*SMALL, "--set", "input.color_jitter_train=true")
    assert train(scenes, parts, *same, "--epochs", "2", "--snapshot-minutes", "0", "--keep", "9") == 0
    for name in ("model.safetensors", "config.json", "metrics.json", "report.html"):
        (parts / name).unlink()
    snapshot = parts / "snapshots" / "step-00000004.pt"  # in the middle of the second epoch
    assert train(scenes, parts, *same[:-3], "2", *same[-2:], "--epochs", "2", "--resume", str(snapshot)) == 0
    first, second = (load_file(out / "model.safetensors") for out in (whole, parts))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.slow
def test_two_processes_count_exactly(scenes, tmp_path, measure):
    out = tmp_path / "run"
    line = (ROOT / "tools" / "train_segmentation.py", RECIPE, scenes, "--out", out, *SMALL, "--epochs", 1)
    process = start(*line, "--set", "network.bn_mode=sync")
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 0, said
    assert "(iabn_sync) on 2 × cpu: 12 images" in said
    report = json.loads((out / "metrics.json").read_text())
    _, alone = measure(out, scenes)
    assert alone["images"] == 3  # one process had two of them, the other one
    assert report["result"]["miou"] == pytest.approx(alone["miou"], rel=1e-3)
    assert report["result"]["pixel_accuracy"] == pytest.approx(alone["pixel_accuracy"], rel=1e-3)


def test_the_backbone_is_initialised_from_a_classifier(scenes, tmp_path, capsys):
    out = tmp_path / "run"
    rate = ("--set", "optimizer.learning_rate=1e-9", "--set", "optimizer.weight_decay=0")
    assert train(scenes, out, *SMALL, *rate, "--epochs", "1", "--pretrained", "test_resnet_iabn.mnist") == 0
    assert "initial weights of the backbone: test_resnet_iabn.mnist" in capsys.readouterr().out
    begun = iabn_hub.create_model("test_resnet_iabn.mnist", pretrained=True).conv1.weight
    assert load_file(out / "model.safetensors")["backbone.conv1.weight"].allclose(begun, atol=1e-6)
    again = tmp_path / "again"
    assert train(scenes, again, *SMALL, "--epochs", "1", "--pretrained", str(out)) == 0
    assert f"initial weights: {out}" in capsys.readouterr().out


class Guesses(torch.nn.Module):
    """A network that says what the image's red channel holds."""

    num_classes = 5

    def forward(self, images):
        return torch.nn.functional.one_hot(images[:, 0].long(), 5).movedim(-1, 1).float()


def test_the_score_is_that_of_a_plain_loop():
    random = np.random.RandomState(0)
    truths = random.randint(0, 4, (3, 1, 8, 8)).astype(np.uint8)  # the last class is nowhere
    truths[random.rand(*truths.shape) < 0.2] = 255
    images = random.randint(0, 4, (3, 1, 3, 8, 8)).astype(np.uint8)
    batches = [
        Batch(torch.from_numpy(i), torch.from_numpy(t), torch.zeros(1, dtype=torch.long), ())
        for i, t in zip(images, truths)
    ]
    device = torch.device("cpu")
    score = evaluate(Guesses(), batches, torch.nn.Identity(), World(device), SegmentationMetrics(5, device))
    guesses, counted = images[:, :, 0], truths != 255
    expected = []
    for c in range(4):
        both = ((guesses == c) & (truths == c) & counted).sum()
        either = (((guesses == c) | (truths == c)) & counted).sum()
        expected.append(100 * both / either)
    assert score.iou[:4].tolist() == pytest.approx(expected, rel=1e-12)
    assert score.iou[4].isnan()
    assert score.miou == pytest.approx(np.mean(expected), rel=1e-12)
    assert score.pixel_accuracy == pytest.approx(100 * ((guesses == truths) & counted).sum() / counted.sum(), rel=1e-12)
    assert score.pictures()[0].shape == (8, 24, 3)
    assert tuple(score.pictures()[0][0, 8]) == (
        (0, 0, 0) if truths[0, 0, 0, 0] == 255 else palette_of(5).colors[truths[0, 0, 0, 0]]
    )


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--set", "training.mixup=0.2"), "training.mixup is 0.2: that is for classification only"),
        (("--set", "training.min_scale=0.5"), "set segmentation.min_scale"),
        (("--set", "segmentation.min_scale=3"), "segmentation.min_scale is 3.0, more than segmentation.max_scale, 1.6"),
        (("--set", "optimizer.schedule.params.power=0"), "power is 0.0: must be above 0"),
        (("--set", "network.arch=test_resnet"), "is a classifier"),
    ],
)
def test_what_cannot_work_is_said_before_it_begins(scenes, tmp_path, capsys, more, says):
    assert train(scenes, tmp_path / "run", *more) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_broken_scene_is_named_and_replaced(scenes, tmp_path, capsys):
    data = shapes(tmp_path / "shapes", train=5, val=2, side=64)
    (data / "train" / "images" / "001.png").write_bytes(b"nothing")
    Image.new("L", (64, 64), 77).save(data / "val" / "labels" / "001.png")
    assert train(data, tmp_path / "run", *SMALL, "--epochs", "2", "--max-broken", "0") == 1
    assert "1 images cannot be read, 0 are tolerated (--max-broken)" in capsys.readouterr().err
    assert train(data, tmp_path / "run", *SMALL, "--epochs", "3", "--max-broken", "2") == 0
    said = capsys.readouterr().out
    assert "images/001.png: is not an image" in said
    assert "labels/001.png: has the number 77, which is none of the 4 classes" in said


def test_validation_says_what_does_not_fit(scenes, measure, tmp_path):
    assert train(scenes, tmp_path / "run", *SMALL, "--epochs", "1") == 0
    run = tmp_path / "run"
    assert "--ten-crop is for classification" in measure(run, scenes, "--ten-crop")[1]
    found = measure(run, scenes, "--check")[1]
    assert found["check"]["passed"]
    assert found["data"]["files"] == 2 * found["images"]  # with their labels
    assert "MODEL must be a name from 'iabn-hub list'" in measure(run / "model.safetensors", scenes, "--check")[1]
    assert "none/val is not a folder" in measure(run, tmp_path / "none")[1]
    other = shapes(tmp_path / "other", train=1, val=1, side=64)
    (other / "classes.json").write_text('["a", "b", "c", "d", "e"]')
    code, said = measure(run, other)
    assert code == 1
    assert f"{other} has 5 classes, {run} has 4" in said
    (other / "classes.json").write_text('["disc", "background", "square", "triangle"]')
    assert f"{run} has background, disc" in measure(run, other)[1]
    (other / "classes.json").unlink()
    Image.new("L", (64, 64), 255).save(other / "val" / "labels" / "000.png")
    assert "no pixel is scored" in measure(run, other)[1]
    _, once = measure(run, scenes)
    _, often = measure(run, scenes, "--scales", "1,1.5", "--flip", "--tile", "64")
    assert often["protocol"]["scales"] == [1.0, 1.5]
    assert often["miou"] != once["miou"]

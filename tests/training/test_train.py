"""Training learns, survives being killed, says what is wrong before it begins, and leaves weights that load."""

import csv
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import iabn_hub
from iabn_hub.checkpoints.weights import read_snapshot
from iabn_hub.cli import main
from iabn_hub.recipes.metrics import read_metrics
from iabn_hub.training.snapshots import Snapshots
from iabn_hub.training.trainer import Trainer

from ..paths import ROOT


def weights(out):
    return load_file(out / "model.safetensors")


def same_weights(a, b):
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def test_a_run_learns_and_leaves_what_it_should(train, pictures, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(pictures(), "--epochs", "10") == 0
    said = capsys.readouterr().out
    assert "test_resnet_iabn (iabn) on 1 × cpu: 40 images, 2 classes (the recipe: 1000); 10 epochs of 5 steps" in said
    assert (out / "train.log").read_text().count("epoch ") == 10
    report = json.loads((out / "metrics.json").read_text())
    assert report["classes"] == ["bright", "dark"]
    assert report["result"]["top1"] == 100
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(5, 51, 5))
    assert all(float(row["images_per_second"]) > 0 and 0 < float(row["waited"]) < 100 for row in rows)
    assert (out / "report.html").read_text().count("<img") == 2  # curves, confusion matrix
    assert json.loads((out / "recipe.json").read_text())["network"]["classes"] == 2
    board = EventAccumulator(str(out / "tensorboard"))
    board.Reload()
    assert [point.step for point in board.Scalars("epoch/val_top1")] == list(range(5, 51, 5))
    assert {"epoch/loss", "epoch/top1", "epoch/learning_rate", "epoch/images_per_second", "epoch/peak_memory"} <= set(
        board.Tags()["scalars"]
    )
    network = iabn_hub.create_model(f"local-dir:{out}", pretrained=True)
    assert all(value.equal(weights(out)[name]) for name, value in network.state_dict().items())


def test_an_earlier_run_is_not_overwritten_unasked(train, pictures, tmp_path, capsys):
    data = pictures()
    assert train(data, "--epochs", "1") == 0
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert train(data, "--epochs", "1", "--seed", "1") == 1
    assert "already holds a run: continue it with --resume auto, or pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    assert train(data, "--epochs", "1", "--seed", "1", "--overwrite") == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != before


def as_process(recipe, data, out, *more):
    line = [sys.executable, str(ROOT / "tools" / "train.py"), str(recipe), str(data), "--out", str(out)]
    return subprocess.Popen([*line, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_killed_and_resumed_it_ends_with_the_same_weights(train, recipe_file, pictures, tmp_path, capsys, workers):
    """Killed in the middle of an epoch, with an average of the weights that must go on as well."""
    data = pictures(train=40)
    recipe = recipe_file(training={"ema_decay": 0.9, "mixup": 0.2}, optimizer={"clip": 1.0})
    assert train(data, recipe=recipe, out=tmp_path / "whole") == 0
    out = tmp_path / "killed"
    more = ("--workers", workers, "--snapshot-minutes", "0", "--resume", "auto")
    process = as_process(recipe, data, out, *more)
    while process.poll() is None and not (out / "snapshots" / "step-00000013.pt").exists():
        time.sleep(0.001)
    assert process.poll() is None, process.communicate()[0]
    process.kill()
    process.communicate()
    assert not (out / "model.safetensors").exists()
    assert train(data, *more, recipe=recipe, out=out) == 0
    said = capsys.readouterr().out
    assert "resuming from" in said
    assert "step-00000010" not in said.partition("resuming from")[2]
    assert same_weights(tmp_path / "whole", out)
    rows = [[row["epoch"], row["loss"], row["val_loss"]] for row in csv.DictReader((out / "metrics.csv").open())]
    whole = csv.DictReader((tmp_path / "whole" / "metrics.csv").open())
    assert rows == [[row["epoch"], row["loss"], row["val_loss"]] for row in whole]


def test_going_back_to_an_earlier_snapshot(train, pictures, tmp_path, capsys):
    data, out = pictures(), tmp_path / "run"
    assert train(data, "--epochs", "4", "--keep", "3") == 0
    assert train(data, "--epochs", "2", "--resume", str(out / "snapshots" / "step-00000010.pt")) == 0
    assert train(data, "--epochs", "4", "--resume", str(out / "snapshots" / "step-00000010.pt")) == 0
    assert [path.name for path in Snapshots(out / "snapshots", 1).all()] == ["step-00000015.pt", "step-00000020.pt"]
    capsys.readouterr()
    assert train(data, "--resume", str(out / "snapshots" / "step-00000015.pt"), out=tmp_path / "other") == 0
    assert train(data, "--resume", str(out / "snapshots" / "step-00000015.pt"), out=tmp_path / "other") == 1
    assert "other already holds a run: choose another --out" in capsys.readouterr().err


def test_a_mistake_with_overwrite_costs_nothing(train, pictures, tmp_path):
    out = tmp_path / "run"
    assert train(pictures(), "--epochs", "1") == 0
    there = sorted(path.name for path in out.rglob("*") if path.is_file())
    assert train(tmp_path / "no such data", "--overwrite") == 1
    assert sorted(path.name for path in out.rglob("*") if path.is_file()) == there


def test_more_images_than_before_are_noticed(train, pictures, tmp_path, capsys):
    data = pictures()
    assert train(data, "--epochs", "1") == 0
    for i in range(8):
        (data / "train" / "dark" / f"more{i}.png").write_bytes((data / "train" / "dark" / "0.png").read_bytes())
    assert train(data, "--epochs", "2", "--resume", "auto") == 1
    assert "an epoch had 5 steps and now has 6, since the number of images has changed" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_a_snapshot(train, recipe_file, pictures, tmp_path, monkeypatch, capsys, number):
    data = pictures()
    assert train(data, out=tmp_path / "whole") == 0
    steps = itertools.count(1)
    step = Trainer._step

    def signalled(self, *arguments):
        if next(steps) == 7:
            os.kill(os.getpid(), number)
            if number == signal.SIGTERM:  # as from a cluster and from torchrun
                os.kill(os.getpid(), number)
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", signalled)
    assert train(data) == 128 + number
    assert "stopped at step 8 with a snapshot; continue with --resume auto" in capsys.readouterr().out
    assert [path.name for path in sorted((tmp_path / "run" / "snapshots").glob("step-*"))][-1] == "step-00000008.pt"
    assert train(data, "--resume", "auto") == 0
    assert same_weights(tmp_path / "whole", tmp_path / "run")


def test_going_on_with_another_rate_is_said_and_with_another_network_refused(train, pictures, tmp_path, capsys):
    data = pictures()
    assert train(data, "--epochs", "1") == 0
    capsys.readouterr()
    changed = ("--resume", "auto", "--epochs", "2", "--set", "optimizer.learning_rate=0.002")
    changed += ("--set", "training.decay_norms=false", "--set", "optimizer.classifier_lr=0.02")
    assert train(data, *changed) == 0
    said = capsys.readouterr().out
    assert "changed since the snapshot: optimizer.learning_rate from 0.01 to 0.002" in said
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert float(rows[1]["learning_rate"]) < 0.001
    assert train(data, "--resume", "auto", "--set", "network.activation=elu") == 2
    assert "Cannot resume: network.activation changed from 'leaky_relu' to 'elu'" in capsys.readouterr().err
    assert train(data, "--resume", "auto", "--batch-size", "16") == 2
    assert "Cannot resume: optimizer.batch_size changed from 8 to 16" in capsys.readouterr().err


def test_divergence_names_the_step_and_the_snapshot(train, pictures, tmp_path, capsys):
    data = pictures()
    assert train(data, "--epochs", "1") == 0
    capsys.readouterr()
    assert train(data, "--resume", "auto", "--epochs", "9", "--set", "optimizer.learning_rate=1000") == 1
    said = capsys.readouterr().err
    assert re.search(r"the loss is (nan|inf) at step \d+ \(|the weights are no longer finite after step \d+ \(", said)
    assert f"The last good snapshot is {tmp_path}/run/snapshots/step-00000" in said
    assert "--set optimizer.learning_rate=" in said
    for path in (tmp_path / "run" / "snapshots").glob("*.pt"):
        assert all(value.isfinite().all() for value in read_snapshot(path)["model"].values())


def test_broken_images_are_tolerated_up_to_a_limit(train, pictures, tmp_path, capsys):
    data = pictures()
    for i in range(2):
        (data / "train" / "dark" / f"{i}.png").write_bytes(b"nothing")
    assert train(data, "--epochs", "1", "--max-broken", "1") == 1
    assert "2 images cannot be read, 1 are tolerated (--max-broken); the last one: " in capsys.readouterr().err
    assert train(data, "--epochs", "2", "--overwrite") == 0
    said = capsys.readouterr().out
    assert said.count("skipped: ") == 2
    assert "2 images could not be read; train.log names them" in said
    assert read_metrics(tmp_path / "run" / "metrics.json").skipped == 2


def test_the_default_limit_of_broken_images(train, pictures, tmp_path, capsys):
    """Ten in a small data set."""
    data = pictures()
    for i in range(11):
        (data / "train" / "dark" / f"{i}.png").write_bytes(b"nothing")
    assert train(data, "--epochs", "2") == 1
    assert "11 images cannot be read, 10 are tolerated (--max-broken)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (("--batch-size", "64"), 1, "fewer than one batch of 64"),
        (("--batch-size", "9", "--accumulation-steps", "2"), 2, "is not divisible by 1 ranks × 2 accumulation steps"),
        (("--batch-size", "8", "--accumulation-steps", "8"), 2, "leaves 1 images for each of 1 ranks × 8"),
        (("--batch-size", "5", "--set", "training.mixup=1"), 2, "mixup and cutmix need an even number"),
        (("--device", "meta"), 2, "device 'meta' cannot be used: choose cpu or cuda"),
        (("--device", "toaster"), 2, "device 'toaster' cannot be used"),
        (("--set", "optimizer.rate=1"), 2, "unknown key 'rate' in optimizer"),
        (("--model", "resnet50"), 2, "--model is 'resnet50', not a name such as resnet50_iabn"),
        (("--model", "resnet51_iabn"), 2, "network.arch is 'resnet51', which is not an architecture; did you mean"),
        (("--pretrained", "none.pth"), 2, "no checkpoint is called 'none.pth'"),
        (("--resume", "none.pt"), 1, "none.pt: there is no such file"),
        (("--keep", str(10**12)), 1, "bytes are free, the snapshots need"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_the_first_step(train, pictures, tmp_path, capsys, more, code, says):
    assert train(pictures(), *more) == code
    said = capsys.readouterr()
    assert says in said.err
    assert said.out == ""
    assert not (tmp_path / "run").exists()


def test_wrong_usage_is_explained(capsys):
    for arguments, says in (
        (["tiny"], "name the folder of the images"),
        (["tiny", "x", "--workers", "-1"], "Invalid value for '--workers': -1 is not in the range x>=0"),
        (["tiny", "x", "--resume", "auto", "--overwrite"], "--resume continues a run"),
        (["nothing", "x"], "there is no such file or recipe; there are densenet264_iabn.lr_256_in1k"),
    ):
        assert main(["train", *arguments]) == 2
        assert says in capsys.readouterr().err
    assert main(["train", "list"]) == 0
    assert "resnet50_iabn.modern" in capsys.readouterr().out


def test_options_of_the_first_release_are_accepted_with_a_warning(train, pictures, capsys):
    assert train(pictures(), "--epochs", "1", "--minutes=0", "--accumulate", "2") == 0
    said = capsys.readouterr()
    assert "--minutes is now called --snapshot-minutes" in said.err
    assert "--accumulate is now called --accumulation-steps" in said.err


def test_json_holds_the_metrics_alone(train, pictures, tmp_path, capsys):
    assert train(pictures(), "--epochs", "1", "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "epoch 1/1" in said.err


def test_accumulated_passes_see_the_same_images(train, pictures, tmp_path):
    """With frozen statistics they would give the same weights; with batch statistics they come close."""
    data = pictures()
    losses = {}
    for passes in ("1", "2"):
        out = tmp_path / passes
        assert train(data, "--epochs", "3", "--batch-size", "16", "--accumulation-steps", passes, out=out) == 0
        report = json.loads((out / "metrics.json").read_text())
        losses[passes] = report["epochs"][0]["loss"]
        assert report["epochs"][-1]["step"] == 6
    assert losses["1"] == pytest.approx(losses["2"], rel=0.25)


@pytest.mark.parametrize(
    "more",
    [
        ("--amp", "bf16", "--channels-last"),
        ("--amp", "fp16"),
        ("--set", "network.bn_mode=standard", "--set", "network.activation=relu"),
        ("--set", "training.label_smoothing=0.1", "--set", "training.mixup=0.2", "--set", "training.cutmix=1"),
        ("--set", "training.repeats=2", "--set", "training.augment=trivial", "--set", "training.erase=0.1"),
        ("--set", "optimizer.type=Adam", "--set", "optimizer.nesterov=false", "--set", "optimizer.learning_rate=0.001"),
    ],
    ids=["bf16", "fp16", "standard", "mixed", "augmented", "adam"],
)
def test_every_way_of_training_goes_on_exactly(train, pictures, tmp_path, more):
    data = pictures()
    assert train(data, "--epochs", "3", *more, out=tmp_path / "whole") == 0
    losses = [row["loss"] for row in json.loads((tmp_path / "whole" / "metrics.json").read_text())["epochs"]]
    assert len(losses) == 3
    assert all(0 < loss < 10 for loss in losses)
    snapshot = sorted((tmp_path / "whole" / "snapshots").glob("step-*"))[0]
    assert snapshot.name == "step-00000010.pt"
    assert train(data, "--epochs", "3", *more, "--resume", str(snapshot), out=tmp_path / "again") == 0
    assert same_weights(tmp_path / "whole", tmp_path / "again")


def test_fine_tuning_begins_with_the_weights_of_an_earlier_run(train, pictures, tmp_path, capsys):
    assert train(pictures(), "--epochs", "8") == 0
    other = pictures(tmp_path / "other", classes=("black", "grey", "white"))
    capsys.readouterr()
    out = tmp_path / "tuned"
    fine = ("--epochs", "1", "--set", "optimizer.learning_rate=1e-9", "--set", "optimizer.weight_decay=0")
    assert train(other, *fine, "--pretrained", str(tmp_path / "run"), out=out) == 0
    said = capsys.readouterr().out
    assert f"initial weights: {tmp_path}/run" in said
    assert "the classifier is new: the weights have 2 classes, the network 3" in said
    before, after = weights(tmp_path / "run"), weights(out)
    assert torch.allclose(before["conv1.weight"], after["conv1.weight"], atol=1e-7)
    assert after["fc.weight"].shape[0] == 3


def test_published_weights_begin_a_run(train, pictures, capsys):
    assert train(pictures(), "--epochs", "1", "--pretrained") == 0
    assert "initial weights: test_resnet_iabn.mnist" in capsys.readouterr().out

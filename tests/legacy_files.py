"""Checkpoint files as the reference implementation wrote them, small enough to make in a test."""

import hashlib
import json
import re

import torch

import iabn_hub
from iabn_hub.checkpoints import Checkpoint

MODEL = "test_resnet_iabn"
CLASSES = 7


def a_small_network(**options):
    """The test network with random weights and lived-in statistics."""
    torch.manual_seed(0)
    network = iabn_hub.create_model(MODEL, num_classes=CLASSES, **options).eval()
    for name, value in network.state_dict().items():
        if name.endswith(("running_mean", "running_var", "bias", "bn1.weight", "bn2.weight")):
            value.copy_(torch.rand_like(value) + 0.5)
    return network


def legacy_name(name):
    """The name that the reference implementation gave to one of our ResNet parameters."""
    match = re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", name)
    if match:
        layer, block, rest = match.groups()
        rest = rest.replace("downsample.0.", "proj_conv.").replace("downsample.1.", "proj_bn.")
        inside = "" if rest.startswith("proj") else "convs."
        return f"mod{int(layer) + 1}.block{int(block) + 1}.{inside}{rest}"
    return f"classifier.{name}" if name.startswith("fc.") else f"mod1.{name}"


def save_legacy(path, network, **changes):
    """A training snapshot as published: data-parallel names, old file format, no batch counts, other things beside."""
    state = {
        f"module.{legacy_name(name)}": value
        for name, value in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    state.update(changes)
    snapshot = {
        "epoch": 89,
        "arch": MODEL,
        "state_dict": state,
        "best_prec1": 78.08,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(snapshot, path, _use_new_zipfile_serialization=False)
    return path


def flip_a_byte(path):
    """Damage one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def a_record(path, **fields):
    """A catalogue record for a legacy file of the small network."""
    values = {"model": MODEL, "tag": "legacy", "md5": md5(path), "num_classes": CLASSES, "dataset": "test"}
    return Checkpoint(**(values | fields))


def write_catalogue(path, *records):
    """A catalogue file with these records, as an organisation would add it."""
    fields = ("model", "tag", "md5", "num_classes", "dataset", "google_drive_id", "hub", "layout", "classes", "options")
    listed = [{k: r.to_dict()[k] for k in fields if r.to_dict()[k] is not None} for r in records]
    path.write_text(json.dumps({"checkpoints": listed}))
    return path

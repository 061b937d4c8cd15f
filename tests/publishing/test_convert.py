"""Files of weights go from one layout to the other and back without a change in their values."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import iabn_hub
from iabn_hub.checkpoints.errors import CheckpointError
from iabn_hub.checkpoints.legacy import to_current, to_legacy
from iabn_hub.cli import main

from ..legacy_files import CLASSES, a_small_network, save_legacy
from ..models.test_published_logits import RECORDED


@pytest.mark.parametrize("name", RECORDED)
def test_legacy_names_of_every_architecture_come_back(name):
    names = dict.fromkeys(RECORDED[name]["keys"])
    assert to_legacy(to_current(names)).keys() == names.keys()


def test_names_that_are_not_ours_are_refused():
    with pytest.raises(CheckpointError, match=r"no conv1\.weight"):
        to_legacy({"features.0.weight": 1})
    with pytest.raises(CheckpointError, match=r"stem\.weight: the earlier package has no such name"):
        to_legacy({"conv1.weight": 1, "stem.weight": 2})


@pytest.fixture
def run(capsys):
    def call(*line):
        code = main(["convert", *map(str, line), "--json"])
        said = capsys.readouterr()
        return code, json.loads(said.out) if code == 0 else said.err

    return call


def test_there_and_back(run, tmp_path):
    network = a_small_network()
    legacy = save_legacy(tmp_path / "legacy.pth.tar", network)
    code, report = run(legacy, tmp_path / "ours.safetensors", "--arch", "test_resnet_iabn")
    assert (code, report["from"], report["to"]) == (0, "legacy", "iabn_hub")
    assert report["renamed"]["module.mod1.conv1.weight"] == "conv1.weight"
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata()["arch"] == "test_resnet_iabn"
    ours = load_file(tmp_path / "ours.safetensors")
    assert all(ours[name].equal(network.state_dict()[name]) for name in ours)
    loaded = iabn_hub.create_model("test_resnet_iabn", checkpoint=tmp_path / "ours.safetensors", num_classes=CLASSES)
    assert loaded.fc.weight.equal(network.fc.weight)
    code, report = run(tmp_path / "ours.safetensors", tmp_path / "back.pth.tar")
    assert (code, report["from"], report["to"]) == (0, "iabn_hub", "legacy")
    back = torch.load(tmp_path / "back.pth.tar", weights_only=True)["state_dict"]
    before = torch.load(legacy, weights_only=True)["state_dict"]
    assert {f"module.{name}" for name in back} == before.keys()
    assert all(value.equal(before[f"module.{name}"]) for name, value in back.items())


def test_a_segmentation_network_has_three_parts(run, tmp_path):
    network = iabn_hub.create_model("test_resnet_deeplab3_iabn", num_classes=3)
    torch.save(network.state_dict(), tmp_path / "ours.pt")
    assert run(tmp_path / "ours.pt", tmp_path / "parts.pth.tar")[0] == 0
    parts = torch.load(tmp_path / "parts.pth.tar", weights_only=True)["state_dict"]
    assert parts.keys() == {"body", "head", "cls"}
    assert run(tmp_path / "parts.pth.tar", tmp_path / "ours.safetensors")[0] == 0
    ours = load_file(tmp_path / "ours.safetensors")
    assert ours.keys() == network.state_dict().keys()
    assert all(ours[name].equal(value) for name, value in network.state_dict().items())


def test_what_cannot_be_converted_is_said_and_nothing_is_written(run, tmp_path):
    legacy = save_legacy(tmp_path / "legacy.pth.tar", a_small_network())
    code, said = run(legacy, tmp_path / "out.safetensors", "--arch", "resnet50_iabn")
    assert code == 1
    assert "these weights do not belong to this network" in said
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    code, said = run(tmp_path / "broken.pth", tmp_path / "out.safetensors")
    assert code == 1
    assert "broken.pth: is not a file of weights" in said
    assert not (tmp_path / "out.safetensors").exists()
    for line, says in (((legacy, "x.onnx"), "its suffix must be one of"), ((legacy, legacy), "exists already")):
        code, said = run(*line)
        assert code == 2
        assert says in said


def test_weights_for_standard_batchnorm(run, tmp_path):
    network = a_small_network()
    with torch.no_grad():
        network.bn1.weight.mul_(-1)
    given = save_legacy(tmp_path / "legacy.pth.tar", network)
    out = tmp_path / "batchnorm.safetensors"
    code, report = run(given, out, "--arch", "test_resnet_iabn", "--norm-layer", "abn")
    assert (code, report["to"]) == (0, "iabn_hub")
    options = {"norm_layer": "abn", "num_classes": CLASSES}
    standard = iabn_hub.create_model("test_resnet_iabn", checkpoint=out, **options).eval()
    assert torch.equal(standard.bn1.weight, network.bn1.weight.abs() + network.bn1.eps)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(standard(x), network.eval()(x), rtol=1e-5, atol=1e-5)

"""iabn-hub memory: what a network keeps, for any name of timm or torchvision."""

import json
import sys

import pytest

from iabn_hub.cli import main


@pytest.mark.parametrize(
    ("name", "package"),
    [("smp.Unet", "segmentation_models_pytorch"), ("nnunet.PlainConvUNet", "dynamic_network_architectures"),
     ("monai.SegResNet", "monai")],
)  # fmt: skip
def test_a_library_that_is_not_installed(name, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["memory", name]) == 2
    assert f"pip install {package.replace('_', '-')}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["test_efficientnet", "torchvision.shufflenet_v2_x0_5", "test_resnet_iabn"])
def test_table_and_json_agree(name, capsys):
    line = ["memory", name, "--batch", "2", "--size", "64"]
    assert main([*line, "--all"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert main([*line, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], report["batch_size"], report["size"], report["dtype"]) == (name, 2, 64, "float32")
    assert 0 < report["kept"]["after"] <= report["kept"]["before"]
    assert f"{report['kept']['before'] / 1e6:.2f} to" in text
    assert sum(layer["kept"]["before"] for layer in report["layers"]) == report["kept"]["before"]
    if name == "test_resnet_iabn":
        assert "in place already" in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["resnet5"], 2, "did you mean resnet50"),
        (["torchvision.resnet51"], 2, "did you mean torchvision.resnet50"),
        (["nothing_like_it_at_all"], 2, "names outside of timm begin with torchvision., smp."),
        (["vgg11", "--size", "5"], 1, r"vgg11: a training step on images of (4, 3, 5, 5) fails: Given input size"),
        (["resnet18", "--batch", "0"], 2, "--batch"),
    ],
    ids=str,
)
def test_errors(arguments, code, message, capsys):
    assert main(["memory", *arguments]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["test_efficientnet", "torchvision.shufflenet_v2_x0_5", "test_resnet_iabn"])
def test_every_tensor_is_explained(name, capsys):
    line = ["memory", name, "--batch", "2", "--size", "64"]
    assert main([*line, "--json"]) == 0
    before = json.loads(capsys.readouterr().out)["kept"]["before"]
    assert main([*line, "--explain", "--json"]) == 0
    tensors = json.loads(capsys.readouterr().out)["tensors"]
    assert sum(t["bytes"] for t in tensors) == before
    assert all(t["bytes"] and t["kept_by"] and t["kept_by"] != ["?"] for t in tensors)
    assert any("Convolution.input" in t["kept_by"] for t in tensors)
    assert main([*line, "--explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1].split() == [str(len(tensors)), "tensors", "in", "all", f"{before / 1e6:.2f}"]

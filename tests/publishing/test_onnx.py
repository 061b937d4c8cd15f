"""ONNX files beside the weights: what onnxruntime computes, the same bytes each time, and what is refused."""

import json
import sys

import numpy
import onnx
import onnxruntime
import pytest
import torch

import iabn_hub
from iabn_hub.cli import main
from iabn_hub.models.pretrained import load_pretrained
from iabn_hub.publishing import onnx as module

from ..paths import ROOT

NAME = "test_resnet_iabn.mnist"
SAMPLES = str(ROOT / "iabn_hub" / "data" / "samples")


def export(folder, *more):
    return main(["export", NAME, "--to-dir", str(folder), "--json", *more])


def logits(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    assert export(folder, "--int8", SAMPLES) == 0
    return folder / NAME


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_logits_of_any_batch(exported, batch):
    images = torch.randn(batch, 3, 64, 64)
    with torch.no_grad():
        expected = iabn_hub.create_model("test_resnet_iabn", pretrained=True).eval()(images)
    found = logits(exported / "model.onnx", images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    quantised = logits(exported / "model.int8.onnx", images)
    assert quantised.shape == expected.shape
    assert quantised.ne(found).any()


def test_the_images_that_calibrate_keep_their_class(exported):
    network = load_pretrained(NAME)
    batches = module.calibration_images(network, SAMPLES)
    assert sum(map(len, batches)) == 6
    for batch in batches:
        exact, found = (logits(exported / name, batch) for name in ("model.onnx", "model.int8.onnx"))
        assert exact.argmax(1).equal(found.argmax(1))


def test_weights_are_a_quarter_and_operators_standard(exported):
    sizes = {name: (exported / name).stat().st_size for name in ("model.onnx", "model.int8.onnx")}
    assert sizes["model.int8.onnx"] < 0.35 * sizes["model.onnx"]
    for name in sizes:
        model = onnx.load(exported / name)
        assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
        assert not model.functions


def test_the_same_bytes_each_time_and_no_paths(exported, tmp_path):
    assert export(tmp_path, "--int8", SAMPLES) == 0
    for path in sorted(exported.iterdir()):
        assert (tmp_path / NAME / path.name).read_bytes() == path.read_bytes(), path.name
    for name in ("model.onnx", "model.int8.onnx"):
        content = (exported / name).read_bytes()
        assert b"iabn_hub/" not in content
        assert str(tmp_path).encode() not in content
        assert b"site-packages" not in content


def test_provenance_card_and_json(exported, tmp_path, capsys):
    files = json.loads((exported / "provenance.json").read_text())["files"]
    assert {"model.onnx", "model.int8.onnx"} <= set(files)
    provenance = json.loads((exported / "provenance.json").read_text())
    assert provenance["command"].startswith(f"iabn-hub export {NAME} --int8 ")
    assert "onnxruntime" in provenance["versions"]
    assert "onnxruntime" in (exported / "README.md").read_text()
    capsys.readouterr()
    assert export(tmp_path, "--onnx") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert set(row["onnx"]) == {"model.onnx"}
    assert row["onnx"]["model.onnx"]["difference"] <= 1e-4
    assert "int8" not in (tmp_path / NAME / "README.md").read_text()


def test_what_differs_too_much_is_not_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "TOLERANCE", 0.0)
    assert export(tmp_path, "--onnx") == 1
    assert "in onnxruntime the logits of model.onnx differ by" in capsys.readouterr().err
    assert not list((tmp_path / NAME).glob("model*"))
    monkeypatch.undo()
    assert export(tmp_path, "--onnx") == 0  # what failed left nothing in the way


def test_what_an_earlier_export_wrote_does_not_stay_beside_other_weights(tmp_path):
    assert export(tmp_path, "--int8", SAMPLES) == 0
    (tmp_path / NAME / "model.int8.onnx").write_bytes(b"of the user now")
    assert export(tmp_path) == 0
    assert not (tmp_path / NAME / "model.onnx").exists()
    assert (tmp_path / NAME / "model.int8.onnx").read_bytes() == b"of the user now"


def test_ranges_that_do_not_fit_the_network_are_refused(exported):
    """Images a thousand times too bright: the ranges of activations leave the others a single step."""
    images = [torch.cat([torch.full((1, 3, 64, 64), 1e6), torch.randn(7, 3, 64, 64)])]
    with pytest.raises(module.CheckpointError, match="mean cosine of"):
        module.int8_of((exported / "model.onnx").read_bytes(), images)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package(tmp_path, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert export(tmp_path, "--onnx") == 1
    assert "pip install 'iabn-hub[onnx]'" in capsys.readouterr().err


def test_no_images_to_calibrate_with(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    assert export(tmp_path, "--int8", str(tmp_path / "images")) == 1
    assert "image" in capsys.readouterr().err


def test_numbers_are_those_of_the_evaluation(exported):
    """What the card states is how the images were prepared."""
    card = (exported / "README.md").read_text()
    config = json.loads((exported / "config.json").read_text())["pretrained_cfg"]
    assert ", ".join(f"{value:.6g}" for value in config["mean"]) in card
    assert numpy.isclose(config["input_size"], (3, 64, 64)).all()

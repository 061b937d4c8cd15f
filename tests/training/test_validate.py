"""Validation measures what the catalogue says, whatever names the network, and says what it cannot do."""

import json
import shlex
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.datasets import ImageFolder

import iabn_hub
from iabn_hub.checkpoints import fetch_checkpoint, find
from iabn_hub.cli import main
from iabn_hub.datasets.digest import digest_of
from iabn_hub.datasets.samples import Samples

from ..paths import DATA


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The 1,000 held-out digits as an image folder; the sheet has 28 × 28 pixels each, 40 in a row, 100 a class."""
    root = tmp_path_factory.mktemp("digits")
    sheet = np.asarray(Image.open(DATA / "mnist_held_out.png"))
    for number, digit in enumerate(sheet.reshape(25, 28, 40, 28).swapaxes(1, 2).reshape(-1, 28, 28)):
        folder = root / "val" / str(number // 100)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digit).save(folder / f"{number:04d}.png")
    return root


def test_the_bundled_network_passes_its_check(measure, digits):
    code, found = measure("test_resnet_iabn.mnist", digits, "--check")
    listed = find("test_resnet_iabn.mnist").result("64")
    assert (code, found["images"]) == (0, 1000)
    assert (found["top1"], found["top5"]) == (pytest.approx(listed.top1), pytest.approx(listed.top5))
    assert found["check"]["passed"]
    assert found["top1"] >= 97
    assert fetch_checkpoint(find("test_resnet_iabn.mnist")).stat().st_size <= 3_000_000
    assert [row["images"] for row in found["per_class"]] == [100] * 10
    assert sum(row["top1"] for row in found["per_class"]) / 10 == pytest.approx(found["top1"])


def test_a_figure_that_is_not_reached_fails_the_check(measure, digits):
    (digits / "val" / "3" / "0300.png").rename(digits / "val" / "5" / "0300.png")
    try:
        code, found = measure("test_resnet_iabn.mnist", digits, "--check", "--tolerance", "0.05")
    finally:
        (digits / "val" / "5" / "0300.png").rename(digits / "val" / "3" / "0300.png")
    assert code == 1
    assert not found["check"]["passed"]
    assert found["check"]["difference"]["top1"] == pytest.approx(-0.1)


def test_the_same_weights_by_every_name(measure, pictures, train, tmp_path, digits):
    data = pictures()
    assert train(data, "--epochs", "3") == 0
    out = tmp_path / "run"
    names = [out, out / "model.safetensors", out / "snapshots" / "step-00000015.pt"]
    found = [measure(name, data)[1] for name in names]
    assert len({(f["images"], f["top1"], f["loss"]) for f in found}) == 1
    report = json.loads((out / "metrics.json").read_text())
    assert found[0]["loss"] == pytest.approx(report["result"]["loss"], rel=1e-6)
    (out / "config.json").unlink()
    assert measure(out, data)[0] == 0  # the best snapshot


def test_the_figures_of_a_run_are_measured_again(measure, pictures, train, tmp_path):
    data, out = pictures(), tmp_path / "run"
    assert train(data, "--epochs", "2") == 0
    code, found = measure(out, data, "--check")
    assert (code, found["check"]["passed"], found["check"]["difference"]["top1"]) == (0, True, 0)
    metrics = json.loads((out / "metrics.json").read_text())
    metrics["result"]["top1"] += 1.0
    (out / "metrics.json").write_text(json.dumps(metrics))
    code, found = measure(out, data, "--check")
    assert (code, found["check"]["passed"]) == (1, False)
    assert found["check"]["difference"]["top1"] == pytest.approx(-1)


def test_a_figure_is_of_these_files(measure, pictures, train, tmp_path, capsys):
    data, out = pictures(), tmp_path / "run"
    assert train(data, "--epochs", "1") == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["ranks"] == 1
    assert metrics["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert metrics["command"].startswith("iabn-hub train ")
    code, found = measure(out, data, "--check")
    assert (code, found["data"]) == (0, metrics["data"])
    assert shlex.split(found["command"])[:3] == ["iabn-hub", "validate", str(out)]
    # Anyone can compute the digest again.
    lines = "find val -type f | LC_ALL=C sort | xargs sha256sum | sha256sum"
    told = subprocess.run(["bash", "-c", lines], cwd=data, capture_output=True, text=True, check=True).stdout
    assert told.split()[0] == found["data"]["sha256"]
    # Other pixels, with the same class and so the same accuracy.
    changed = sorted((data / "val").rglob("*.png"))[0]
    Image.open(changed).rotate(180).save(changed)
    code, found = measure(out, data, "--check", "--tolerance", "100")
    assert (code, found["check"]["passed"]) == (1, False)
    assert main(["validate", str(out), str(data), "--workers", "0", "--check", "--tolerance", "100"]) == 1
    assert "other images or labels" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["a file with another name", "a file in another class", "one file less"])
def test_whatever_changes_what_is_measured_changes_the_digest(tmp_path, how):
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        (tmp_path / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "val" / name)

    def digest():
        return digest_of(Samples(ImageFolder(tmp_path / "val"), None), str(tmp_path))

    before = digest()
    assert before["files"] == 3
    place = tmp_path / "val" / "a" / "2.png"
    if how == "one file less":
        place.unlink()
    else:
        place.rename(tmp_path / "val" / ("a/4.png" if "name" in how else "b/2.png"))
    assert digest()["sha256"] != before["sha256"]


def test_an_unreadable_file_does_not_stop_the_digest(tmp_path):
    (tmp_path / "val" / "a").mkdir(parents=True)
    (tmp_path / "val" / "a" / "1.png").symlink_to("nowhere")
    samples = Samples(ImageFolder(tmp_path / "val"), None)
    assert digest_of(samples, str(tmp_path))["files"] == 1
    assert digest_of(object(), str(tmp_path)) is None


def test_a_file_in_the_folder_of_a_run_is_the_one_that_is_measured(measure, pictures, train, recipe_file, tmp_path):
    data, out = pictures(), tmp_path / "run"
    recipe = recipe_file(network={"activation": "elu"}, training={"signed_scale": True})
    assert train(data, "--epochs", "1", recipe=recipe) == 0
    other = load_file(out / "model.safetensors")
    other = {name: -value if name.endswith("bn1.weight") else value for name, value in other.items()}
    save_file(other, out / "other.safetensors")
    _, named = measure(out / "other.safetensors", data, "--arch", "test_resnet_iabn")
    (out / "other.safetensors").replace(out / "model.safetensors")
    _, replaced = measure(out, data)
    assert named["loss"] == replaced["loss"]


def test_names_are_shown_as_they_are(measure, pictures, train, tmp_path):
    data = pictures(classes=("<b>bright", "dark"))
    assert train(data) == 0  # to the end: the images that are moved below must be errors
    for number, path in enumerate(list((data / "val" / "dark").iterdir())):
        path.rename(data / "val" / "<b>bright" / f"<i>{number}.png")
    (data / "val" / "<b>bright" / "0.png").rename(data / "val" / "dark" / "0.png")
    page = tmp_path / "new folder" / "page.html"
    assert measure(tmp_path / "run", data, "--report", str(page))[0] == 0
    assert "<i>" not in page.read_text()
    assert "<b>" not in page.read_text()
    assert "&lt;i&gt;" in page.read_text()


def test_a_legacy_file_needs_its_architecture(measure, digits, tmp_path):
    network = iabn_hub.create_model("test_resnet_iabn.mnist", pretrained=True)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "x.pth.tar")
    code, said = measure(tmp_path / "x.pth.tar", digits)
    assert code == 1
    assert "does not state its architecture: pass --arch" in said
    code, found = measure(tmp_path / "x.pth.tar", digits, "--arch", "test_resnet_iabn")
    assert (code, found["images"]) == (0, 1000)
    assert found["top1"] == find("test_resnet_iabn.mnist").result("64").top1


def test_ten_crops_and_other_norms(measure, digits):
    crops = ("--crop", "56", "--resize", "64")
    _, one = measure("test_resnet_iabn.mnist", digits, *crops)
    _, ten = measure("test_resnet_iabn.mnist", digits, *crops, "--ten-crop")
    assert ten["protocol"] == {"resize": 64, "crop": 56, "ten_crop": True}
    assert ten["top1"] != one["top1"]
    _, standard = measure("test_resnet_iabn.mnist", digits, *crops, "--norm-layer", "abn")
    assert standard["changes"] == ["normalisation: in-place ABN becomes standard BatchNorm, with the same scales"]
    assert standard["top1"] == one["top1"]
    assert standard["loss"] == pytest.approx(one["loss"], rel=1e-4)
    _, back = measure("test_resnet_iabn.mnist", digits, *crops, "--norm-layer", "iabn")
    assert (back["changes"], back["loss"]) == ([], one["loss"])
    _, other = measure("test_resnet_iabn.mnist", digits, *crops, "--activation", "elu", "--activation-param", "1")
    assert "activation: leaky_relu(0.01) becomes elu(1) in 9 layers" in other["changes"][0]
    assert other["loss"] > one["loss"]


def test_the_report_shows_mistakes(measure, digits, tmp_path):
    page = tmp_path / "page.html"
    _, found = measure("test_resnet_iabn.mnist", digits, "--report", str(page))
    text = page.read_text()
    assert text.count("<figure>") == round(1000 - 10 * found["top1"])
    assert text.count("<img") == text.count("<figure>")
    assert "Worst classes" in text


def test_broken_images_are_named_and_left_out(measure, pictures, train, tmp_path):
    data = pictures()
    assert train(data, "--epochs", "1") == 0
    (data / "val" / "dark" / "2.png").write_bytes(b"nothing")
    code, found = measure(tmp_path / "run", data)
    assert (code, found["images"]) == (0, 9)
    assert [reason.partition(": ")[0] for reason in found["skipped"]] == [str(data / "val" / "dark" / "2.png")]


def test_text_for_people(measure, digits, capsys):
    assert main(["validate", "test_resnet_iabn.mnist", str(digits), "--workers", "0", "--check"]) == 0
    said = capsys.readouterr().out
    assert "on 1,000 images (centre crop of 64 from 64)" in said
    assert "check passed: published top1 " in said


@pytest.mark.parametrize(
    ("model", "more", "code", "says"),
    [
        ("test_resnet_iabn.mnst", (), 2, "no checkpoint is called 'test_resnet_iabn.mnst'; did you mean"),
        ("test_resnet_iabn.mnist", ("--check", "--crop", "48"), 1, "no figure of test_resnet_iabn.mnist for this"),
        ("test_resnet_iabn.mnist", ("--crop", "64", "--resize", "32"), 2, "--resize 32 is less than --crop 64"),
        ("test_resnet_iabn.mnist", ("--split", "test"), 1, "test is not a folder"),
        (".", (), 1, "is not the folder of a run"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said(measure, digits, tmp_path, monkeypatch, model, more, code, says):
    monkeypatch.chdir(tmp_path)
    found, said = measure(model, digits, *more)
    assert found == code
    assert says in said


def test_data_with_other_classes_is_refused(measure, pictures, train, tmp_path):
    data = pictures()
    code, said = measure("test_resnet_iabn.mnist", data)
    assert code == 1
    assert f"{data} has 2 classes, test_resnet_iabn.mnist has 10" in said
    assert train(data, "--epochs", "1") == 0
    other = pictures(tmp_path / "other", classes=("black", "white"))
    code, said = measure(tmp_path / "run", other)
    assert code == 1
    assert "has the classes black, white" in said

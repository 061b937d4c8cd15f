"""The catalogue holds the published facts, and refuses bad records by file, record and field."""

import json

import pytest

from iabn_hub.checkpoints import CatalogueError, UnknownNameError, find, read_catalogue, records
from iabn_hub.models import ARCHITECTURES, create_model

GOOD = {"model": "resnet18_iabn", "tag": "ours", "md5": "0" * 32}

# md5, top-1 and top-5 at 224: the table of the publication.
PUBLISHED = {
    "resnext101_abn.lr_256_in1k": ("448438885986d14db5e870b95f814f91", 77.04, 93.50),
    "resnext101_iabn.lr_512_in1k": ("3b7a221cbc076410eb12c8dd361b7e4e", 78.08, 93.79),
    "resnext152_iabn.lr_256_in1k": ("2c8d572587961ed74611d534c5b2e9ce", 78.28, 94.04),
    "wider_resnet38_iabn.lr_256_in1k": ("1c085ab70b789cc1d6c1594f7a761007", 79.72, 94.78),
    "resnext101_iabn.sync_lr_256_in1k": ("0a85a21847b15e5a242e17bf3b753849", 77.70, 93.78),
    "densenet264_iabn.lr_256_in1k": ("0b413d67b725619441d0646d663865bf", 78.57, 94.17),
    "resnet50_iabn.sync_lr_512_in1k": ("2522ca639f7fdfd7c0089ba1f5f6c2e8", 75.53, 92.59),
    "resnet34_iabn.sync_lr_512_in1k": ("61515c1484911c3cc753d405131e1dda", 73.27, 91.34),
    "resnet101_iabn.sync_lr_512_in1k": ("1552ae0f3d610108df702135f56bd27b", 77.07, 93.45),
}


def a_catalogue(tmp_path, *records, name="more.json"):
    path = tmp_path / name
    path.write_text(json.dumps({"checkpoints": list(records)}))
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_are_listed(name):
    record = find(name)
    result = record.result("224")
    assert (record.md5, result.top1, result.top5) == PUBLISHED[name]
    assert record.google_drive_id
    assert record.result("224_10crop").top1 > result.top1
    assert "ImageNet" in record.license


def test_segmentation_checkpoint_is_listed():
    record = find("wider_resnet38_deeplab3_iabn.vistas")
    assert (record.md5, record.task, record.num_classes) == ("913f78486a34aa1577a7cd295e8a33bb", "segmentation", 65)
    assert record.results[0].miou == 53.42
    assert record.license == "CC BY-NC-SA 4.0"


@pytest.mark.parametrize("name", [n for n, r in records().items() if r.model in ARCHITECTURES])
def test_parameter_counts_are_those_of_the_networks(name):
    record = find(name)
    network = create_model(record.model, num_classes=record.num_classes, device="meta")
    assert sum(p.numel() for p in network.parameters()) == record.parameters


def test_model_without_tag_is_its_first_checkpoint():
    assert find("resnext101_iabn").tag == "lr_512_in1k"


@pytest.mark.parametrize("name", ["resnext101_iabn.lr_521_in1k", "resnxt101_iabn"])
def test_mistyped_name_gets_near_names(name):
    with pytest.raises(UnknownNameError, match=r"did you mean .*resnext101_iabn"):
        find(name)


def test_added_files_come_after_ours(tmp_path, monkeypatch):
    first = a_catalogue(tmp_path, GOOD, name="a.json")
    second = a_catalogue(tmp_path, GOOD | {"model": "resnet50_iabn"}, name="b.json")
    monkeypatch.setenv("IABN_HUB_CATALOGUE", f"{first}:{second}")
    assert find("resnet18_iabn").tag == "ours"
    assert find("resnet50_iabn").tag == "sync_lr_512_in1k"
    assert find("resnet50_iabn.ours").catalogue == str(second)


def test_name_taken_twice_is_refused(tmp_path, monkeypatch):
    path = a_catalogue(tmp_path, GOOD | {"model": "resnet50_iabn", "tag": "sync_lr_512_in1k"})
    monkeypatch.setenv("IABN_HUB_CATALOGUE", str(path))
    with pytest.raises(CatalogueError, match=r"more\.json: resnet50_iabn\.sync_lr_512_in1k is already listed in"):
        records()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"md5": "xyz"}, "md5 is 'xyz', not 32 lowercase hexadecimal digits"),
        ({"md5": None}, "md5 is None: must be a valid string"),
        ({"sha256": "0" * 63}, "sha256 is '000000"),
        ({"hub": {"repo": "a/b", "md5": "0" * 32, "sha256": "G" * 64}}, "hub.sha256 is 'GGGG"),
        ({"modle": "x"}, "unknown key 'modle'; did you mean 'model'"),
        ({"task": "detection"}, "task is 'detection': must be 'classification' or 'segmentation'"),
        ({"layout": "onnx"}, "layout is 'onnx': must be 'legacy', 'iabn_hub' or 'efficientnet_pytorch'"),
        ({"model": "../evil"}, r"model is '\.\./evil', not an identifier"),
        ({"tag": "a/b"}, "tag is 'a/b', not a word"),
        ({"num_classes": "10"}, "num_classes is '10': must be a valid integer"),
        ({"num_classes": 3, "classes": ["a", "b"]}, "2 classes are named, but num_classes is 3"),
        ({"input": {"std": [0, 1, 1]}}, "std must be positive"),
        ({"input": {"size": [3, 224]}}, "missing field input.size.2"),
        ({"results": [{"protocol": "224", "dataset": "x", "top1": 770.4}]}, "figures are percentages"),
        ({"results": [{"protocol": "224", "dataset": "x"}]}, "a result needs top1, top5 or miou"),
        ({"results": {"top1": 3}}, "results is .*: must be a valid "),
        ({"hub": {"repo": "no-slash", "md5": "0" * 32}}, "hub.repo is 'no-slash', not ORG/NAME"),
        ({"hub": {"repo": "a/b"}}, "missing field hub.md5"),
        ({"input": {"size": 3}}, "input.size is 3: must be a valid "),
        ({"input": {"size": [3, 100000, 100000]}}, "sides must be 32 to 4096 pixels"),
        ({"input": {"mean": ["x", 0, 0]}}, "input.mean.0 is .x.: must be a valid number"),
        ({"input": {"interpolation": "foo"}}, "interpolation is 'foo': must be 'bilinear'"),
        ({"options": {"num_classes": 3}}, "options must not hold num_classes"),
    ],
)
def test_bad_record_is_refused_by_file_record_and_field(tmp_path, change, says):
    path = a_catalogue(tmp_path, GOOD | change)
    with pytest.raises(CatalogueError, match=rf"more\.json: checkpoints\[0\].*: .*{says}"):
        read_catalogue(path)


def test_missing_field_is_named(tmp_path):
    with pytest.raises(
        CatalogueError, match=r"more\.json: checkpoints\[0\] \(resnet18_iabn.None\): missing field tag, md5"
    ):
        read_catalogue(a_catalogue(tmp_path, {"model": "resnet18_iabn"}))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "expected an object with a list"),
        ('{"checkpoints": [], "citations": null}', "'citations' must be an object of texts"),
    ],
    ids=["cut", "deep", "list", "citations"],
)
def test_file_that_is_no_catalogue_is_refused(tmp_path, text, says):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(CatalogueError, match=rf"bad\.json: {says}"):
        read_catalogue(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(CatalogueError, match=r"gone\.json: cannot be read .*IABN_HUB_CATALOGUE"):
        read_catalogue(tmp_path / "gone.json")

"""torch.hub, timm and Python give the same network, bit for bit, each in a process of its own."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.hub
from PIL import Image
from timm.data import create_transform

from iabn_hub.checkpoints import records
from iabn_hub.models import MODELS

from .legacy_files import a_record, a_small_network, flip_a_byte, md5, save_legacy, write_catalogue
from .paths import ROOT


def run(*arguments, **environment):
    """A command of the package in a fresh process; its exit code and both outputs."""
    return subprocess.run(
        [sys.executable, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | environment,
    )


@pytest.fixture
def clone(tmp_path):
    """What a checkout holds and nothing that was built or installed."""
    folder = tmp_path / "clone"
    for name in ("iabn_hub", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "hubconf.py", folder)
    return folder


@pytest.fixture
def organisation(tmp_path):
    """A legacy checkpoint in a mirror folder, and the catalogue that lists it."""
    options = {"activation": "elu", "activation_param": 0.7}
    network = a_small_network(**options)
    record = a_record(save_legacy(tmp_path / "mirror" / "test_resnet_iabn.legacy.pth.tar", network), options=options)
    listing = write_catalogue(tmp_path / "organisation.json", record)
    environment = {"IABN_HUB_CATALOGUE": str(listing), "IABN_HUB_MIRROR": (tmp_path / "mirror").as_uri()}
    return network, record, environment


DOORS = """
import hashlib, json, sys, torch
name, clone = sys.argv[1:]
image = torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64)

def digest(network):
    with torch.inference_mode():
        return hashlib.sha256(network.eval()(image).numpy().tobytes()).hexdigest()

model, tag = name.split(".")
found = {"hub": digest(torch.hub.load(clone, model, source="local", tag=tag))}
found["hub, as downloaded"] = digest(torch.hub.load("owner/name:main", model, tag=tag, trust_repo=True))
import iabn_hub, timm
found["from"] = iabn_hub.__file__
found["timm"] = digest(timm.create_model(name, pretrained=True))
found["python"] = digest(iabn_hub.create_model(name, pretrained=True))
json.dump(found, sys.stdout)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet_iabn.mnist", "test_resnet_iabn.legacy"])
def test_all_doors_give_equal_bits(name, clone, organisation, tmp_path):
    shutil.copytree(clone, tmp_path / "torch" / "hub" / "owner_name_main")
    outcome = run("-c", DOORS, name, str(clone), **organisation[2])
    assert outcome.returncode == 0, outcome.stderr
    found = json.loads(outcome.stdout)
    assert found.pop("from").startswith(str(clone))
    assert len(set(found.values())) == 1, found


def test_hub_lists_and_explains_every_model(clone, tmp_path):
    shutil.copytree(clone, tmp_path / "torch" / "hub" / "owner_name_main")
    assert sorted(torch.hub.list("owner/name:main", trust_repo=True)) == sorted(MODELS)
    for model in MODELS:
        text = torch.hub.help("owner/name:main", model, trust_repo=True)
        tags = [r.tag for r in records().values() if r.model == model]
        assert all(tag in text for tag in tags), text


def test_hub_loads_every_model(clone):
    for model in MODELS:
        network = torch.hub.load(str(clone), model, source="local", pretrained=False, device="meta", num_classes=3)
        assert network.num_classes == 3


@pytest.mark.slow
def test_classify_fetches_from_a_mirror_and_refuses_a_flipped_byte(organisation, tmp_path):
    network, record, environment = organisation
    Image.effect_noise((90, 70), 80).save(tmp_path / "photo.png")
    command = ("-m", "iabn_hub", "classify", str(tmp_path / "photo.png"), "--model", record.name, "--json")

    outcome = run(*command, **environment)
    assert outcome.returncode == 0, outcome.stderr
    answer = json.loads(outcome.stdout)
    cached = tmp_path / "cache" / record.filename
    assert md5(cached) == record.md5
    copy = shutil.copy(cached, tmp_path / "copy.pth.tar")
    by_file = run(*command, "--checkpoint", str(copy), **environment)
    assert json.loads(by_file.stdout)["images"] == answer["images"], "a file of the caller's needs the same options"
    transform = create_transform((3, 224, 224), crop_pct=0.875, interpolation="bilinear")
    with torch.inference_mode():
        logits = network(transform(Image.open(tmp_path / "photo.png").convert("RGB")).unsqueeze(0))
    probabilities, classes = logits.softmax(1)[0].topk(5)
    predictions = answer["images"][0]["predictions"]
    assert [p["label"] for p in predictions] == [f"class {i}" for i in classes.tolist()]
    assert [p["probability"] for p in predictions] == pytest.approx(probabilities.tolist(), rel=1e-4)

    mirrored = tmp_path / "mirror" / record.filename
    flip_a_byte(mirrored)
    cached.unlink()
    refused = run(*command, **environment)
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert "Traceback" not in refused.stderr
    assert record.md5 in refused.stderr
    assert md5(mirrored) in refused.stderr
    assert not cached.exists()


@pytest.mark.parametrize(
    ("model", "md5", "code", "says"),
    [
        ("resnet50_iabn", "x", 1, "organisation.json: checkpoints[0] (resnet50_iabn.a): md5 is 'x', not 32"),
        ("resnet51_iabn", "0" * 32, 0, "there is no architecture 'resnet51_iabn'; did you mean resnet"),
    ],
    ids=["bad_digest", "unknown_architecture"],
)
def test_broken_catalogue_is_a_sentence(tmp_path, model, md5, code, says):
    listing = tmp_path / "organisation.json"
    listing.write_text(json.dumps({"checkpoints": [{"model": model, "tag": "a", "md5": md5}]}))
    outcome = run("-m", "iabn_hub", "list", IABN_HUB_CATALOGUE=str(listing))
    assert outcome.returncode == code
    assert "Traceback" not in outcome.stderr
    assert says in outcome.stderr


def test_import_touches_no_network_and_no_compiler():
    script = (
        "import socket, subprocess, timm\n"
        "def refuse(*a, **k): raise AssertionError('not at import')\n"
        "socket.socket.connect = subprocess.Popen.__init__ = refuse\n"
        "import iabn_hub\n"
        "assert 'test_resnet_iabn.mnist' in timm.list_pretrained('*iabn*')"
    )
    outcome = run("-c", script)
    assert outcome.returncode == 0, outcome.stderr

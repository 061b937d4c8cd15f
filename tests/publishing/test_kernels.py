"""Kernels from a repository, if that is asked for: pinned to a commit, and signed by a publisher who is listed."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from iabn_hub import InPlaceABN
from iabn_hub.layers.backends import building, loading
from iabn_hub.signing import Publisher, SignatureError, sign, verify

from ..paths import TOOLS

COMMIT = "a" * 40
STANDALONE = """
import sys
sys.modules["iabn_hub"] = None  # as where it is not installed
import kernels, torch
loaded = kernels.get_kernel("me/iabn", revision="a" * 40, backend="cpu", trust_remote_code=["me/iabn"])
x = torch.randn(4, 3, 5, 5)
mean, var = loaded.ops.statistics(x)
assert torch.allclose(mean, x.mean((0, 2, 3)), atol=1e-6)
assert torch.allclose(var, x.var((0, 2, 3), unbiased=False), atol=1e-6)
"""


@pytest.fixture
def variant(tmp_path, monkeypatch, keys):
    """A variant of a repository with the library that was built here for the tests, signed as release 3."""
    InPlaceABN(3)(torch.randn(2, 3, 4))
    status = loading.use_native("cpu")
    assert status.library is not None, status.reason
    monkeypatch.syspath_prepend(str(TOOLS))
    build_kernels = importlib.import_module("build_kernels")
    part = tmp_path / "iabn" / "build" / build_kernels.variant("cpu")
    part.mkdir(parents=True)
    shutil.copy(status.library, part / "iabn_cpu.so")
    build_kernels.complete(part, "cpu", [])
    sign(part, os.listdir(part), "me/iabn", 3, keys / "ours.pem")
    return part


@pytest.fixture
def doctor(variant, keys, tmp_path):
    """What 'iabn-hub doctor' finds with these kernels and this list of publishers."""

    def run(publishers):
        listed = tmp_path / "publishers.json"
        listed.write_text(json.dumps(publishers))
        environment = {
            **os.environ, "IABN_HUB_KERNELS": f"me/iabn@{variant.parent.parent}", "IABN_HUB_PUBLISHERS": str(listed),
        }  # fmt: skip
        line = [sys.executable, "-m", "iabn_hub", "doctor", "--json"]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    return run


def test_the_layer_uses_what_a_listed_publisher_signed(doctor, variant, keys):
    facts, _ = doctor({"me/iabn": {"key": str(keys / "ours.pub"), "minimum": 3}})
    found = facts["devices"]["cpu"]
    assert found["backend"] == "native"
    copied = Path(found["library"])  # which nobody else can change
    assert copied.read_bytes() == (variant / "iabn_cpu.abi3.so").read_bytes()
    assert copied.parent.parent == loading.cache_folder()
    assert found["reason"] == f"from the Hub, me/iabn@{variant.parent.parent}"
    assert facts["publishers"] == [f"me/iabn (key {keys / 'ours.pub'}, from release 3)"]


def flip(variant):
    library = variant / "iabn_cpu.abi3.so"
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)


WRONG = {
    "a flipped byte": (flip, {}, "the files are not those that were signed"),
    "an added file": (lambda v: (v / "more.py").touch(), {}, "the files are not those that were signed"),
    "a missing file": (lambda v: (v / "_ops.py").unlink(), {}, "the files are not those that were signed"),
    "no signature": (lambda v: (v / "model.sig").unlink(), {}, "is not signed: there is no model.sig"),
    "a damaged signature": (lambda v: (v / "model.sig").write_text("{"), {}, "the signature cannot be checked"),
    "another key": (lambda v: None, {"key": "other.pub"}, "the signature is not one of the key"),
    "an older release": (lambda v: None, {"minimum": 4}, "is release 3 of me/iabn; the oldest that is taken is 4"),
    "no such key": (lambda v: None, {"key": "none.pub"}, "is missing"),
}


@pytest.fixture
def refused(variant, tmp_path, monkeypatch):
    """Why these kernels are not loaded with this list of publishers."""

    def run(publishers):
        listed = tmp_path / "publishers.json"
        listed.write_text(json.dumps(publishers))
        monkeypatch.setenv("IABN_HUB_PUBLISHERS", str(listed))
        monkeypatch.setattr(loading, "_load", lambda path: pytest.fail(f"{path} was loaded"))
        with pytest.raises(building.BuildError) as e:
            loading._from_hub("me/iabn", str(variant.parent.parent), "cpu")
        return str(e.value)

    return run


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_as_signed_is_not_loaded(refused, variant, keys, name):
    spoil, changes, reason = WRONG[name]
    spoil(variant)
    publisher = {"key": "ours.pub", "minimum": 3, **changes}
    assert reason in refused({"me/iabn": {**publisher, "key": str(keys / publisher["key"])}})


def test_links_as_in_the_cache_of_the_hub_are_followed(doctor, variant, keys, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in list(variant.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    facts, _ = doctor({"me/iabn": {"key": str(keys / "ours.pub")}})
    assert facts["devices"]["cpu"]["reason"].startswith("from the Hub")


def test_a_list_that_others_can_write_is_refused(refused, keys, tmp_path):
    (tmp_path / "publishers.json").touch()
    (tmp_path / "publishers.json").chmod(0o666)
    assert "can be written by other users" in refused({"me/iabn": {"key": str(keys / "ours.pub")}})


@pytest.mark.parametrize(
    "listed",
    [
        {}, {"me/other": {"key": "ours.pub"}}, {"me/iabn": {}}, {"me/iabn": {"key": "ours.pub", "minimun": 3}},
        {"me/iabn": {"key": "ours.pub", "minimum": True}}, {"me/iabn": {"key": None}}, ["me/iabn"],
    ],
    ids=str,
)  # fmt: skip
def test_a_publisher_who_is_not_listed_is_refused(refused, listed):
    reason = refused(listed)
    assert "is not among the publishers" in reason or "should be" in reason


def test_the_name_is_part_of_what_is_signed(variant, keys):
    publisher = Publisher(keys / "ours.pub")
    assert verify(variant, "me/iabn", publisher) == 3
    with pytest.raises(SignatureError, match="is signed as 'me/iabn', not as 'me/other'"):
        verify(variant, "me/other", publisher)


def test_signing_again_changes_nothing(variant, keys):
    before = (variant / "model.sig").read_bytes()
    sign(variant, os.listdir(variant), "me/iabn", 3, keys / "ours.pem")
    assert (variant / "model.sig").read_bytes() == before
    sign(variant, os.listdir(variant), "me/iabn", 4, keys / "ours.pem")
    assert verify(variant, "me/iabn", Publisher(keys / "ours.pub", 4)) == 4


def test_the_operators_need_no_package(variant):
    environment = {**os.environ, "LOCAL_KERNELS": f"me/iabn={variant.parent.parent}"}
    done = subprocess.run(
        [sys.executable, "-c", STANDALONE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["me/iabn", "me/iabn@main", "iabn@" + COMMIT])
def test_what_is_not_pinned_is_refused(name):
    with pytest.raises(building.BuildError, match="all 40 digits of a commit"):
        loading._published_place(name)


@pytest.mark.parametrize("place", [COMMIT, "the folder"])
def test_what_cannot_be_loaded_leaves_the_other_sources(tmp_path, monkeypatch, caplog, keys, place):
    monkeypatch.setattr(loading, "_status", {})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place = str(tmp_path) if place == "the folder" else place
    (tmp_path / "publishers.json").write_text(json.dumps({"me/nothing": {"key": str(keys / "ours.pub")}}))
    monkeypatch.setenv("IABN_HUB_PUBLISHERS", str(tmp_path / "publishers.json"))
    monkeypatch.setenv("IABN_HUB_KERNELS", f"me/nothing@{place}")
    assert loading.use_native("cpu").backend == "native"
    assert f"IABN_HUB_KERNELS: me/nothing@{place} cannot be loaded" in caplog.text

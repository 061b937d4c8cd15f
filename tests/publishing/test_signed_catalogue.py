"""A signed catalogue: read only if a listed publisher has signed it as it is; it vouches for the weights by SHA-256."""

import hashlib
import json
import shutil

import pytest

from iabn_hub.checkpoints import CatalogueError, ChecksumError, fetch_checkpoint, find
from iabn_hub.checkpoints.catalogue import ENVIRONMENT, records
from iabn_hub.checkpoints.fetch import verified_file
from iabn_hub.cli import main
from iabn_hub.signing import VARIABLE, sign

from ..legacy_files import CLASSES, MODEL, a_small_network, flip_a_byte, md5, save_legacy

NAME = "my-org/catalogue"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_legacy(tmp_path_factory.mktemp("weights") / f"{MODEL}.legacy.pth.tar", a_small_network())


@pytest.fixture
def listed(weights):
    """The record of the weights, as JSON."""
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    return {"model": MODEL, "tag": "legacy", "md5": md5(weights), "sha256": sha256, "num_classes": CLASSES}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "catalogue"


@pytest.fixture
def publish(tmp_path, keys, monkeypatch, folder, listed, weights, capsys):
    """Write and sign the catalogue, and trust its publisher from a release on."""

    def run(record=listed, key="ours", trusted="ours", minimum=2, release=2, name=NAME):
        folder.mkdir(exist_ok=True)
        (folder / "catalogue.json").write_text(json.dumps({"checkpoints": [record]}))
        (folder / "about.txt").write_text("whose weights these are\n")
        line = ["sign", str(folder), "--key", str(keys / f"{key}.pem"), "--as", name, "--release", str(release)]
        assert main([*line, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["checkpoints"] == [f"{MODEL}.legacy"]
        publishers = tmp_path / "publishers.json"
        publishers.write_text(json.dumps({NAME: {"key": str(keys / f"{trusted}.pub"), "minimum": minimum}}))
        monkeypatch.setenv(VARIABLE, str(publishers))
        monkeypatch.setenv(ENVIRONMENT, str(folder))
        monkeypatch.setenv("IABN_HUB_MIRROR", weights.parent.as_uri())

    return run


def test_its_checkpoints_are_fetched_and_verified(publish, folder, weights):
    publish()
    record = find(f"{MODEL}.legacy")
    assert record.catalogue == str(folder / "catalogue.json")
    assert fetch_checkpoint(record).read_bytes() == weights.read_bytes()


def test_signing_again_changes_nothing(publish, folder):
    publish()
    before = (folder / "model.sig").read_bytes()
    publish()
    assert (folder / "model.sig").read_bytes() == before


def replayed(folder):
    """The list of another release, with the signature of this one."""
    signed = json.loads((folder / "release.json").read_text())
    (folder / "release.json").write_text(json.dumps(signed | {"release": 9}))


def endless(folder):
    (folder / "catalogue.json").unlink()
    (folder / "catalogue.json").symlink_to("/dev/zero")


def replaced_by_a_file(folder):
    """Of a folder that must be signed, a file that need not be."""
    content = (folder / "catalogue.json").read_bytes()
    shutil.rmtree(folder)
    folder.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: flip_a_byte(folder / "catalogue.json"), "not those that were signed"),
        (replayed, "not those that were signed"),
        (lambda folder: (folder / "model.sig").unlink(), "is not signed: there is no file model.sig"),
        (lambda folder: (folder / "release.json").unlink(), "there is no file release.json"),
        (endless, "there is no file catalogue.json"),
        (lambda folder: flip_a_byte(folder / "model.sig"), "signature"),
        (shutil.rmtree, "is neither a file NAME.json nor a signed folder"),
        (replaced_by_a_file, "is neither a file NAME.json nor a signed folder"),
    ],
    ids=[
        "flipped byte",
        "replayed",
        "unsigned",
        "no release",
        "endless",
        "damaged signature",
        "gone",
        "a file in its place",
    ],
)
def test_what_was_changed_is_refused_before_use(publish, folder, change, says):
    publish()
    change(folder)
    with pytest.raises(CatalogueError, match=says):
        records()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"key": "other"}, "is not one of the key"),
        ({"name": "your-org/catalogue"}, "is signed as 'your-org/catalogue', which is not among the publishers"),
        ({"minimum": 3}, "is release 2 of my-org/catalogue; the oldest that is taken is 3"),
    ],
    ids=["another key", "another name", "an older release"],
)
def test_who_signed_it_matters(publish, how, says):
    publish(**how)
    with pytest.raises(CatalogueError, match=says):
        records()


@pytest.mark.parametrize("where", ["record", "hub"])
def test_md5_alone_is_no_proof_of_origin(publish, listed, folder, keys, capsys, where):
    plain = {name: value for name, value in listed.items() if name != "sha256"}
    hub = {"repo": "my-org/weights", "md5": listed["md5"]}
    record = plain if where == "record" else listed | {"hub": hub}
    publish()
    (folder / "catalogue.json").write_text(json.dumps({"checkpoints": [record]}))
    sign(folder, ["catalogue.json"], NAME, 2, keys / "ours.pem")  # as another tool may
    with pytest.raises(CatalogueError, match="states the sha256 of each file"):
        records()
    assert main(["sign", str(folder), "--key", str(keys / "ours.pem"), "--as", NAME]) == 1
    assert "states the sha256 of each file" in capsys.readouterr().err


def test_another_file_with_the_same_md5_is_refused(publish, listed, tmp_path, weights, monkeypatch, capsys):
    """As if somebody had made two files with one md5: the SHA-256 that is stated is another's."""
    publish(listed | {"sha256": "0" * 64})
    record = find(f"{MODEL}.legacy")
    with pytest.raises(ChecksumError, match="the right md5, but SHA-256"):
        fetch_checkpoint(record)
    cached = tmp_path / "cache" / record.filename
    cached.parent.mkdir(exist_ok=True)
    monkeypatch.setenv("IABN_HUB_CACHE", str(cached.parent))
    shutil.copy(weights, cached)
    for _ in range(2):
        assert main(["verify", record.name, "--json"]) == 1
        (row,) = json.loads(capsys.readouterr().out)
        assert (row["status"], row["expected_sha256"]) == ("wrong", "0" * 64)
        assert row["md5"] == row["expected_md5"] == listed["md5"]
        assert row["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    with pytest.raises(ChecksumError, match="the right md5, but SHA-256"):
        fetch_checkpoint(record)
    assert not cached.exists()


def test_a_note_of_the_md5_is_none_of_the_sha256(publish, listed, weights, tmp_path, monkeypatch):
    """A file in the cache that was noted when nothing but its md5 was stated."""
    cached = tmp_path / "cache" / f"{MODEL}.legacy.pth.tar"
    cached.parent.mkdir()
    shutil.copy(weights, cached)
    stat = cached.stat()
    cached.with_name(f"{cached.name}.md5").write_text(f"{listed['md5']} {stat.st_size} {stat.st_mtime_ns}\n")
    monkeypatch.setenv("IABN_HUB_CACHE", str(cached.parent))
    publish(listed | {"sha256": "0" * 64})
    assert verified_file(find(f"{MODEL}.legacy")) is None


def test_a_folder_without_a_catalogue(tmp_path, keys, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["sign", str(tmp_path / "empty"), "--key", str(keys / "ours.pem"), "--as", NAME]) == 1
    assert "catalogue.json" in capsys.readouterr().err
    assert not list((tmp_path / "empty").iterdir())


def test_a_key_that_is_none(tmp_path, keys, capsys):
    (tmp_path / "catalogue.json").write_text('{"checkpoints": []}')
    assert main(["sign", str(tmp_path), "--key", str(keys / "ours.pub"), "--as", NAME]) == 1
    assert "is not a private key" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["catalogue.json"]


def test_a_catalogue_behind_a_link(publish, folder, tmp_path, weights, keys):
    """A relative link, as the Hub's cache makes them."""
    publish()
    (folder / "catalogue.json").rename(tmp_path / "blob")
    (folder / "catalogue.json").symlink_to("../blob")
    (folder / "model.sig").unlink()
    assert main(["sign", str(folder), "--key", str(keys / "ours.pem"), "--as", NAME, "--release", "2"]) == 0
    assert find(f"{MODEL}.legacy").md5 == md5(weights)

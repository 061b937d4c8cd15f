"""A mirror has verified files under the names that are looked for, and is checked by 'iabn-hub verify --mirror'."""

import json

import pytest

from iabn_hub.checkpoints import catalogue, fetch_checkpoint
from iabn_hub.cli import main

from ..legacy_files import a_record, a_small_network, flip_a_byte, save_legacy, write_catalogue


@pytest.fixture
def records(tmp_path, monkeypatch):
    """Two legacy files in a first mirror, and one that is nowhere; each in the catalogue."""
    network = a_small_network()
    listed = []
    for tag in ("one", "two", "lost"):
        path = save_legacy(tmp_path / "first" / f"test_resnet_iabn.{tag}.pth.tar", network, note=tag)
        listed.append(a_record(path, tag=tag))
    (tmp_path / "first" / "test_resnet_iabn.lost.pth.tar").unlink()
    monkeypatch.setenv(catalogue.ENVIRONMENT, str(write_catalogue(tmp_path / "own.json", *listed)))
    monkeypatch.setenv("IABN_HUB_MIRROR", (tmp_path / "first").as_uri())
    return listed


@pytest.fixture
def build(tmp_path, capsys):
    def run(*names):
        code = main(["mirror", str(tmp_path / "mirror"), *names, "--json"])
        return code, {row["name"]: row for row in json.loads(capsys.readouterr().out)}

    return run


def verify(folder, capsys):
    capsys.readouterr()
    code = main(["verify", "--mirror", str(folder), "--json"])
    return code, {row["name"]: row["status"] for row in json.loads(capsys.readouterr().out)}


def test_a_mirror_is_built_goes_on_and_serves(records, build, tmp_path, capsys, monkeypatch):
    names = [record.name for record in records]
    code, rows = build(*names)
    assert code == 1
    assert "could not be fetched" in rows["test_resnet_iabn.lost"]["error"]
    folder = tmp_path / "mirror"
    assert {path.name for path in folder.iterdir()} == {records[0].filename, records[1].filename, "index.json"}
    assert verify(folder, capsys) == (0, dict.fromkeys(names[:2], "ok"))
    written = (folder / records[0].filename).stat().st_mtime_ns
    monkeypatch.setenv("IABN_HUB_OFFLINE", "1")  # what is there is not fetched again
    assert build(names[0])[0] == 0
    assert (folder / records[0].filename).stat().st_mtime_ns == written
    assert set(verify(folder, capsys)[1]) == set(names[:2])  # the index has what earlier commands put there
    monkeypatch.delenv("IABN_HUB_OFFLINE")
    monkeypatch.setenv("IABN_HUB_MIRROR", folder.as_uri())
    monkeypatch.setenv("IABN_HUB_CACHE", str(tmp_path / "cold"))
    assert fetch_checkpoint(records[1]).read_bytes() == (folder / records[1].filename).read_bytes()


def test_damage_is_found_and_mended(records, build, tmp_path, capsys):
    build("test_resnet_iabn.one", "test_resnet_iabn.two")
    folder = tmp_path / "mirror"
    flip_a_byte(folder / records[0].filename)
    (folder / records[1].filename).unlink()
    assert verify(folder, capsys) == (1, {"test_resnet_iabn.one": "wrong", "test_resnet_iabn.two": "missing"})
    assert build("test_resnet_iabn.one", "test_resnet_iabn.two")[0] == 0
    assert verify(folder, capsys)[0] == 0


def test_the_bundled_network_needs_no_mirror(build):
    code, rows = build("test_resnet_iabn.mnist")
    assert code == 0
    assert "which no mirror needs to hold" in rows["test_resnet_iabn.mnist"]["skipped"]


def test_a_folder_without_an_index_is_no_mirror(tmp_path, capsys):
    assert main(["verify", "--mirror", str(tmp_path)]) == 1
    assert "index.json: is not the index of a mirror" in capsys.readouterr().err
    (tmp_path / "index.json").write_text('{"checkpoints": [{"name": "x", "file": "../secret", "md5": "0"}]}')
    assert verify(tmp_path, capsys) == (1, {"x": "missing"})  # nothing outside the folder is read


def test_the_file_of_the_hub_can_be_mirrored(records, build, tmp_path, monkeypatch):
    kept = tmp_path / "first" / "test_resnet_iabn.lost.hub.safetensors"
    (tmp_path / "first" / "test_resnet_iabn.one.pth.tar").rename(kept)
    content = json.loads((tmp_path / "own.json").read_text())
    content["checkpoints"][2]["hub"] = {"repo": "me/lost", "md5": records[0].md5}
    (tmp_path / "own.json").write_text(json.dumps(content))
    catalogue._read_all.cache_clear()
    code, rows = build("test_resnet_iabn.lost")
    catalogue._read_all.cache_clear()
    assert (code, rows["test_resnet_iabn.lost"]["file"]) == (0, "test_resnet_iabn.lost.hub.safetensors")

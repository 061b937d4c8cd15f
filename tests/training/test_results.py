"""What a complete run leaves: its last and its best weights, a report, and networks that any command can take."""

import json

import pytest
from safetensors.torch import load_file

import iabn_hub
from iabn_hub.checkpoints.weights import read_snapshot
from iabn_hub.cli import main
from iabn_hub.cli.train import _with_changes
from iabn_hub.recipes import RecipeError, find_recipe
from iabn_hub.recipes.metrics import read_metrics


def weights(out):
    return load_file(out / "model.safetensors")


def test_one_command_for_every_start(train, pictures, tmp_path, capsys):
    """--pretrained counts where there is no snapshot, also after a run is complete."""
    command = ("--epochs", "2", "--pretrained", "test_resnet_iabn.mnist", "--resume", "auto")
    data = pictures()
    assert train(data, *command) == 0
    assert "initial weights: test_resnet_iabn.mnist" in capsys.readouterr().out
    before = weights(tmp_path / "run")
    metrics = (tmp_path / "run" / "metrics.json").read_bytes()
    assert train(data, *command) == 0
    assert "the run is complete; nothing is left to do" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.json").read_bytes() == metrics
    (tmp_path / "run" / "model.safetensors").unlink()
    assert train(data, *command) == 0
    said = capsys.readouterr().out
    assert "resuming from " in said
    assert "initial weights: " not in said
    assert all(value.equal(before[name]) for name, value in weights(tmp_path / "run").items())
    assert read_metrics(tmp_path / "run" / "metrics.json").initial_weights == "test_resnet_iabn.mnist"


@pytest.mark.parametrize("only", [False, True])
def test_the_best_epoch_is_exported(train, pictures, tmp_path, only):
    """Of equal epochs, the first is the best."""
    assert train(pictures(), "--epochs", "8", *(("--best",) if only else ())) == 0
    out = tmp_path / "run"
    metrics = read_metrics(out / "metrics.json")
    best = read_snapshot(out / "snapshots" / "best.pt")
    assert best["rows"][-1]["epoch"] == metrics.best["epoch"] < 8
    file = "model.safetensors" if only else "best.safetensors"
    assert all(value.equal(best["model"][name]) for name, value in load_file(out / file).items())
    assert (out / "best.safetensors").exists() is not only
    assert metrics.result == (metrics.best if only else metrics.result | {"epoch": 8})
    assert metrics.best["top1"] == max(row["val_top1"] for row in metrics.epochs)
    network = iabn_hub.create_model(str(out / "snapshots" / "best.pt"))
    assert all(value.equal(best["model"][name]) for name, value in network.state_dict().items())


def test_a_longer_run_leaves_no_old_best(train, pictures, tmp_path):
    data = pictures()
    assert train(data, "--epochs", "2") == 0
    seconds = read_metrics(tmp_path / "run" / "metrics.json").seconds
    assert train(data, "--epochs", "3", "--resume", "auto", "--best") == 0
    assert not (tmp_path / "run" / "best.safetensors").exists()
    metrics = read_metrics(tmp_path / "run" / "metrics.json")
    assert metrics.seconds > seconds
    assert metrics.recipe["optimizer"]["schedule"]["epochs"] == 3


def test_a_folder_does_not_hide_a_published_checkpoint(train, pictures, tmp_path, monkeypatch):
    assert train(pictures(), "--epochs", "1", out=tmp_path / "test_resnet_iabn.mnist") == 0
    monkeypatch.chdir(tmp_path)
    assert iabn_hub.create_model("test_resnet_iabn.mnist", pretrained=True).num_classes == 10
    assert iabn_hub.create_model("./test_resnet_iabn.mnist").num_classes == 2


def test_networks_of_a_run(train, pictures, tmp_path, capsys):
    """`create_model` and `classify` take a run that is complete, one that is not, and a snapshot."""
    assert train(pictures(), "--epochs", "2", "--set", "training.ema_decay=0.5") == 0
    out = tmp_path / "run"
    image = str(next((tmp_path / "data" / "val" / "dark").glob("*.png")))
    for place in (out, out / "snapshots" / "best.pt"):
        network = iabn_hub.create_model(str(place))
        assert network.num_classes == 2
        capsys.readouterr()
        assert main(["classify", image, "--model", str(place), "--json"]) == 0
        labels = {each["label"] for each in json.loads(capsys.readouterr().out)["images"][0]["predictions"]}
        assert labels == {"bright", "dark"}
    network = iabn_hub.create_model(str(out))
    assert all(value.equal(weights(out)[name]) for name, value in network.state_dict().items())
    assert iabn_hub.create_model(str(out), num_classes=5).fc.weight.shape[0] == 5
    (out / "config.json").unlink()
    best = read_snapshot(out / "snapshots" / "best.pt")
    network = iabn_hub.create_model(str(out))
    assert all(value.equal(best["ema"][name]) for name, value in network.state_dict().items())


def test_names_that_pictures_and_pages_must_escape(train, pictures, tmp_path, capsys):
    """Classes with signs of mathematics, markup and other scripts; files whose names are not UTF-8."""
    data = pictures(classes=("$5_to_$9", "<b>犬</b>"))
    for split in ("train", "val"):
        for path in list((data / split).rglob("*.png")):
            path.rename(path.with_name(f"\udce9{path.name}"))
    # One image of each class lies in the folder of the other, so that there are errors to show.
    folders = [data / "val" / name for name in ("$5_to_$9", "<b>犬</b>")]
    for here, there in (folders, folders[::-1]):
        next(here.glob("*0.png")).rename(there / "wrong.png")
    assert train(data, "--epochs", "6") == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<b>犬" not in page
    assert "Most confident errors" in page
    assert (tmp_path / "run" / "confusion.png").stat().st_size > 1000
    assert "Glyph" not in capsys.readouterr().err


def test_model_changes_the_norms_too():
    def recipe(name, *changes):
        given = dict.fromkeys(("epochs", "batch_size", "accumulation_steps", "amp", "channels_last", "compile", "seed"))
        return _with_changes(find_recipe("finetune"), {**given, "model": name, "changes": changes})

    plain = recipe(None)
    assert (plain.model, plain.model_options()) == ("efficientnet_lite0_iabn", {"num_classes": 1000})
    resnet = recipe("resnet50_iabn")
    assert (resnet.model, resnet.norm_layer, resnet.network.activation) == ("resnet50_iabn", "iabn", "leaky_relu")
    assert resnet.input.mean == (0.485, 0.456, 0.406)
    assert recipe("resnext101_abn").model == "resnext101_abn"
    assert recipe("resnet50_iabn", "network.activation=elu").network.activation == "elu"
    with pytest.raises(RecipeError, match="there is only efficientnet_lite0_iabn"):
        recipe("efficientnet_lite0_abn")

"""What the first version wrote and accepted still works: snapshots, configurations, names of options."""

import json

import pytest
import torch

from iabn_hub.checkpoints.errors import CheckpointError
from iabn_hub.cli import main
from iabn_hub.models.pretrained import load_pretrained

from .test_train_segmentation import SMALL, shapes
from .test_train_segmentation import train as train_segmentation

OLD_NAMES = {
    "correct": "right", "correct_top5": "right_of_five", "pixel_accuracy": "accuracy",
    "val_pixel_accuracy": "val_accuracy", "long_side": "longest", "ignore_index": "ignore",
    "accumulation_steps": "accumulate", "class_balanced": "uniform", "long_side_val": "longest_val",
}  # fmt: skip


def with_old_names(value):
    if isinstance(value, dict):
        renamed = {OLD_NAMES.get(name, name): with_old_names(each) for name, each in value.items()}
        return {name.replace("backbone.", "body."): each for name, each in renamed.items()}
    return [with_old_names(each) for each in value] if isinstance(value, list) else value


def as_the_first_version_wrote_it(out):
    for path in (out / "snapshots").glob("*.pt"):
        state = torch.load(path, weights_only=True)
        state.pop("config", None)  # best.pt may be the same file
        state |= {name: with_old_names(dict(state[name])) for name in ("model", "sums", "recipe")}
        state["rows"] = with_old_names(state["rows"])
        torch.save(state, path)
    for name in ("config.json", "recipe.json"):
        path = out / name
        path.write_text(json.dumps(with_old_names(json.loads(path.read_text()))))


def test_a_classification_run_goes_on_and_is_validated(train, pictures, tmp_path, capsys):
    data, out = pictures(), tmp_path / "run"
    assert train(data, "--epochs", "1") == 0
    as_the_first_version_wrote_it(out)
    assert main(["validate", str(out / "snapshots" / "best.pt"), str(data)]) == 0
    assert train(data, "--epochs", "2", "--resume", "auto") == 0
    assert "epoch 2/2" in capsys.readouterr().out


def test_a_segmentation_run_goes_on_and_keeps_its_sizes(tmp_path, capsys):
    data, out = shapes(tmp_path / "data", train=8, val=2, side=64), tmp_path / "run"
    sizes = ("--set", "segmentation.long_side_val=48", "--set", "segmentation.ignore_index=7")
    assert train_segmentation(data, out, *SMALL, *sizes, "--epochs", "1") == 0
    as_the_first_version_wrote_it(out)
    for name in (out, out / "snapshots" / "best.pt"):
        evaluation = load_pretrained(str(name)).evaluation
        assert (evaluation.long_side, evaluation.ignore_index) == (48, 7)
    capsys.readouterr()
    assert train_segmentation(data, out, *SMALL, *sizes, "--epochs", "2", "--resume", "auto") == 0
    assert "epoch 2/2" in capsys.readouterr().out


def test_a_snapshot_that_nothing_describes_names_the_way_out(train, pictures, tmp_path):
    out = tmp_path / "run"
    assert train(pictures(), "--epochs", "1") == 0
    as_the_first_version_wrote_it(out)
    (out / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"best\.pt: was written by an earlier version.*--resume auto"):
        load_pretrained(str(out / "snapshots" / "best.pt"))


@pytest.mark.parametrize(
    "change",
    [{"architecture": "nope"}, {"model_args": {"foo": 1}}, {"model_args": {"activation": "gelu"}}, {"num_classes": "x"},
     {"architecture": None}, {"model_args": []}, None],
)  # fmt: skip
def test_a_configuration_that_describes_no_network_is_a_sentence(train, pictures, tmp_path, capsys, change):
    out = tmp_path / "run"
    assert train(pictures(), "--epochs", "1") == 0
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps([] if change is None else config | change))
    capsys.readouterr()
    assert main(["validate", str(out), str(tmp_path / "data" / "val")]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert "describe a network" in said[-1] or "config.json" in said[-1]
    assert not any("Traceback" in line for line in said)


def test_an_option_is_renamed_only_where_its_command_has_the_new_one(capsys):
    assert main(["benchmark", "layer", "--scale", "0"]) == 2
    assert "--resize" not in capsys.readouterr().err
    assert main(["validate", "test_resnet_iabn.mnist", "nowhere", "--scale", "8"]) != 0
    assert "--scale is now called --resize" in capsys.readouterr().err
    assert main(["benchmark", "memory", "--networks", "nope"]) != 0
    assert "--networks is no longer needed" in capsys.readouterr().err

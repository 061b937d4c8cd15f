"""The benchmarks measure their contenders in one run, and print JSON."""

import json

from iabn_hub.benchmarks import layer
from iabn_hub.cli import main


def test_the_layer_and_every_contender_are_measured_in_one_run(monkeypatch, capsys):
    monkeypatch.setattr(layer, "SHAPES", ((2, 8, 14, 14), (2, 16, 7, 7)))
    assert main(["benchmark", "layer", "--json", "--no-compile", "--rounds", "2", "--warmup", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["cases"]) == 8  # two shapes, two dtypes, two layouts
    for case in result["cases"]:
        assert {"BatchNorm2d + LeakyReLU", "iABN", "iABN (reference)"} <= case["contenders"].keys()
        assert case["contenders"]["BatchNorm2d + LeakyReLU"]["times_faster"] == 1
        assert all(share > 0 for share in case["share_of_copy"].values())
    assert result["host"]["ratio"] > 0


def test_memory_of_a_network_is_halved(capsys):
    assert main(["benchmark", "memory", "resnet18_iabn", "--batch-size", "1", "--no-compile", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["bytes"]["resnet18_iabn"]
    assert 0.4 < found["in place"] / found["standard"] < 0.6


def test_the_training_loop_is_measured_beside_a_bare_one(recipe_file, pictures, capsys):
    line = ["benchmark", "training", str(recipe_file()), str(pictures()), "--steps", "2", "--rounds", "2"]
    assert main([*line, "--workers", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 2
    assert found["loop_to_bare"] > 0

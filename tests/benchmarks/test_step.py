"""Memory and time of a training step: every way in one run, its plot, and the largest batch that fits."""

import json

import pytest
import torch

from iabn_hub.benchmarks import step
from iabn_hub.cli import main

LINE = ["benchmark", "step", "test_resnet_iabn", "--batch-size", "2", "--size", "64", "--rounds", "1"]


def test_every_way_in_eager_mode(capsys, tmp_path):
    assert main([*LINE, "--no-compile", "--json", "--plot", str(tmp_path), "--fit", "2e7"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["batch_size"], found["size"], found["layout"], found["limit"]) == (2, 64, "channels_last", 2e7)
    rows = found["networks"]["test_resnet_iabn"]
    assert list(rows) == [way.name for way in step.WAYS if way.budget is None]
    assert all(row["gradient_cosine"] > 0.999 for row in rows.values())
    assert all(0 < row["kept"] <= row["peak"] for row in rows.values())
    assert rows["standard"]["kept_ratio"] == rows["standard"]["step_ratio"] == 1
    assert rows["in place"]["kept_ratio"] < 0.6
    assert rows["in place, checkpointing"]["kept"] < rows["in place"]["kept"]
    assert rows["in place"]["largest_batch"] > rows["standard"]["largest_batch"] > 0
    assert (tmp_path / "test_resnet_iabn.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "test_resnet_iabn.svg").read_text()


def test_a_compiled_way_and_the_text(capsys):
    assert main([*LINE, "--way", "in place, compiled, budget 0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    (row,) = [line for line in lines if line.startswith("  in place, compiled, budget 0.5") and "–" in line]
    assert float(row.split()[5]) < 0.4


def test_a_network_of_a_library(capsys):
    line = ["benchmark", "step", "test_efficientnet", "--batch-size", "2", "--size", "64", "--rounds", "1", "--json"]
    assert main([*line, "--no-compile", "--nchw", "--dtype", "bfloat16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["dtype"], found["layout"]) == ("bfloat16", "NCHW")
    assert list(found["networks"]["test_efficientnet"]) == [
        "standard", "checkpointing", "converted", "converted, checkpointing",
    ]  # fmt: skip
    assert found["networks"]["test_efficientnet"]["converted"]["kept_ratio"] < 0.7


def test_volumes_and_several_outputs(monkeypatch):
    class Volumes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv3d(1, 8, 3, padding=1), torch.nn.InstanceNorm3d(8, affine=True)

        def forward(self, x):
            y = torch.nn.functional.leaky_relu(self.norm(self.conv(x)))
            return [y, y.square()]

    monkeypatch.setattr(step, "create_from_library", lambda name: (Volumes(), (1, 8, 16, 16)))
    rows = step.measure_network("volumes", step.StepOptions(batch_size=2, compile=False, rounds=1), lambda text: None)
    assert rows["standard"]["images"] == [2, 1, 8, 16, 16]
    assert set(rows["checkpointing"]) == {"why"}
    assert rows["converted"]["kept_ratio"] < 0.7
    assert rows["converted"]["gradient_cosine"] == pytest.approx(1, abs=1e-6)


def test_bytes_are_those_that_live():
    """Of a network whose bytes are known: two squares keep their inputs; the peak has their gradients as well."""
    options = step.StepOptions(batch_size=1, size=64, compile=False)
    x = torch.randn(1, 3, 64, 64)
    network = torch.nn.Conv2d(3, 8, 1)

    def squares(images):
        return network(images).square().square().mean()

    contender = step.Contender(step.WAYS[0], network, (3, 64, 64), squares)
    contender.train(x)
    found = step._memory(contender, x)
    output = 4 * 8 * 64 * 64
    assert 2 * output <= found["kept"] < 2.1 * output
    assert 4 * output <= found["peak"] < 7.1 * output  # the gradient of a square has temporary tensors
    assert options.dtype == "float32"


def test_a_budget_is_set_while_a_contender_runs():
    before = torch._functorch.config.activation_memory_budget
    way = step.Way("compiled", budget=0.25)
    contender = step.Contender(way, torch.nn.Identity(), (1, 2, 2), lambda images: images.sum())
    with contender.context():
        assert torch._functorch.config.activation_memory_budget == 0.25
    assert torch._functorch.config.activation_memory_budget == before


@pytest.mark.parametrize(
    ("more", "says"),
    [(["--way", "sideways"], "choose one of 'standard'"), (["--fit", "5"], "--fit"), (["--rounds", "0"], "--rounds")],
    ids=str,
)
def test_wrong_usage(more, says, capsys):
    assert main([*LINE, *more]) == 2
    assert says in capsys.readouterr().err


def test_an_unknown_network(capsys):
    assert main(["benchmark", "step", "resnet5"]) == 2
    assert "did you mean" in capsys.readouterr().err

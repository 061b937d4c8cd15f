"""The layer reproduces what the reference implementation computed, tensor by tensor."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import iabn_hub

from ..paths import DATA

CASES = json.loads((DATA / "layer.json").read_text())
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture
def recorded(device):
    return load_file(DATA / "layer.safetensors", device)


def single_precision(value):
    """The reference implementation takes eps and the activation's parameter as C floats."""
    return float(np.float32(value))


@pytest.mark.parametrize("inplace", [True, False], ids=["in_place", "new_tensor"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_outputs_gradients_and_statistics_match(case, inplace, recorded):
    given = {name: recorded.get(f"{case['name']}.{name}") for name in ("x", "grad_y", "weight", "bias")}
    running_mean, running_var = (recorded[f"{case['name']}.running_{s}_in"].clone() for s in ("mean", "var"))
    leaves = {n: t.clone().requires_grad_() for n, t in given.items() if t is not None and n != "grad_y"}
    y = iabn_hub.inplace_abn(
        leaves["x"] * 1,
        leaves.get("weight"),
        leaves.get("bias"),
        running_mean,
        running_var,
        case["training"],
        case["momentum"],
        single_precision(case["eps"]),
        case["activation"],
        single_precision(case["activation_param"]),
        inplace=inplace,
    )
    computed_y = y.detach().clone()
    y.backward(given["grad_y"])
    computed = {"y": computed_y, "running_mean": running_mean, "running_var": running_var}
    computed |= {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
    assert computed.keys() >= {"y", "grad_x", "running_mean", "running_var"}
    for name, value in computed.items():
        expected = recorded[f"{case['name']}.{name}"]
        error = (value - expected).abs().max() / expected.abs().max()
        assert error <= TOLERANCE[expected.dtype], f"{name}: relative error {error:.1e}"

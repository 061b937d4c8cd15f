"""Every published architecture computes what the reference implementation computed, from weights in its layout."""

import json
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import iabn_hub
from iabn_hub.models.state_dict import fit

from ..paths import DATA

RECORDED = json.loads((DATA / "architectures.json").read_text())
CASES = {
    ("resnext101_abn" if name == "resnext101_stdbn" else f"{name}_iabn"): name for name in RECORDED if name != "vistas"
}


def a_legacy_tensor(key, shape):
    """The weight that the recorded logits were computed with; it follows from the key's name."""
    r = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith("running_var"):
        r = 0.5 + abs(r)
    elif key.endswith(("running_mean", "bias")):
        r = 0.1 * r
    elif len(shape) == 4:
        r = r * np.sqrt(1.5 / np.prod(shape[1:]))
    elif len(shape) == 2:
        r = r / np.sqrt(shape[1])
    elif key.endswith("num_batches_tracked"):
        return torch.tensor(7)
    else:
        r = 0.7 + 0.3 * r
    return torch.from_numpy(np.asarray(r, dtype=np.float32))


def a_legacy_state_dict(name):
    return {key: a_legacy_tensor(key, shape) for key, shape in RECORDED[name]["keys"].items()}


@pytest.mark.parametrize("model", CASES)
def test_logits_match_the_reference_implementation(model):
    network = iabn_hub.create_model(model).eval()
    network.load_state_dict(fit(a_legacy_state_dict(CASES[model]), network))
    recorded = load_file(DATA / "architectures.safetensors")
    with torch.inference_mode():
        logits = network(recorded["image"])
    expected = recorded[f"{CASES[model]}.logits"]
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("model", CASES)
def test_parameter_count_is_the_published_one(model):
    network = iabn_hub.create_model(model, device="meta")
    assert sum(p.numel() for p in network.parameters()) == RECORDED[CASES[model]]["parameters"]

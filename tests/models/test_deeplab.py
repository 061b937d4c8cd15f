"""DeepLabV3 computes what the reference implementation computed, and works with any backbone."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import iabn_hub
from iabn_hub.layers import InPlaceABN
from iabn_hub.models.iabn_deeplab import DeepLabV3, DeepLabV3Head
from iabn_hub.models.state_dict import fit

from ..paths import DATA
from .test_published_logits import RECORDED, a_legacy_state_dict

NAME = "wider_resnet38_deeplab3_iabn"


def norm(channels, inplace=True):
    return InPlaceABN(channels, inplace=inplace)


def test_logits_match_the_reference_implementation():
    network = iabn_hub.create_model(NAME).eval()
    parts = {"body": {}, "head": {}, "cls": {}}  # as the published file holds them
    for name, value in a_legacy_state_dict("vistas").items():
        part, _, inner = name.partition(".")
        parts[part][inner] = value
    network.load_state_dict(fit(parts, network))
    recorded = load_file(DATA / "architectures.safetensors")
    with torch.inference_mode():
        logits = network(recorded["image"][:1])
    expected = recorded["vistas.logits"]
    assert logits.shape == expected.shape == (1, 65, 12, 12)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_parameter_count_is_the_published_one():
    network = iabn_hub.create_model(NAME, device="meta")
    assert sum(p.numel() for p in network.parameters()) == RECORDED["vistas"]["parameters"]


@pytest.mark.parametrize("size", [(3, 3), (4, 6), (5, 2), (84, 84)])
@pytest.mark.parametrize("shape", [(7, 9), (1, 5)])
def test_the_window_of_a_pixel_is_averaged(size, shape):
    head = DeepLabV3Head(2, norm, pooling=size).eval()
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    height, width = (min(a, b) for a, b in zip(size, shape))
    values = x.numpy()
    means = np.empty((2, 3, shape[0] - height + 1, shape[1] - width + 1))
    for i in range(means.shape[2]):
        for j in range(means.shape[3]):
            means[:, :, i, j] = values[:, :, i : i + height, j : j + width].mean((2, 3))
    top, left = (height - 1) // 2, (width - 1) // 2
    rows = np.arange(shape[0]).clip(top, top + means.shape[2] - 1) - top
    columns = np.arange(shape[1]).clip(left, left + means.shape[3] - 1) - left
    assert np.allclose(head._context(x).numpy(), means[:, :, rows][:, :, :, columns])
    head.train()
    assert torch.allclose(head._context(x), x.mean((2, 3), keepdim=True))


def test_with_any_backbone_every_parameter_learns():
    backbone = iabn_hub.create_model("test_resnet_iabn", features_only=True, output_stride=8, out_indices=(1, 4))
    network = DeepLabV3(backbone, 96, 5, norm).train()
    logits = network(torch.randn(2, 3, 64, 48))
    assert logits.shape == (2, 5, 8, 6)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())
    network.reset_classifier(2)
    assert network.eval()(torch.randn(1, 3, 33, 65)).shape == (1, 2, 5, 9)


def test_options_reach_every_part():
    options = {"in_chans": 1, "norm_layer": "abn", "activation": "relu", "device": "meta"}
    network = iabn_hub.create_model(NAME, num_classes=3, **options)
    assert network.backbone.conv1.in_channels == 1
    assert {type(m).__name__ for m in network.modules() if "ABN" in type(m).__name__} == {"ABN"}
    network.set_grad_checkpointing()
    assert network.backbone.grad_checkpointing


def test_the_segmentation_network_does_not_classify():
    assert NAME in iabn_hub.list_models()
    assert f"{NAME}.vistas" in iabn_hub.list_models(pretrained=True)

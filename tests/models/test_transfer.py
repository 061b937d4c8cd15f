"""The same weights in networks with other norms compute the same; what they compute differently is said."""

import pytest
import torch

import iabn_hub
from iabn_hub.checkpoints.errors import CheckpointError
from iabn_hub.layers import ABN
from iabn_hub.models.transfer import transfer

NORMS = {
    "standard": {"norm_layer": "abn"},
    "in-place": {"norm_layer": "iabn"},
    "signed": {"norm_layer": "iabn", "signed_scale": True},
}


def network(norm, name="test_resnet_iabn", **options):
    torch.manual_seed(1)
    model = iabn_hub.create_model(name, num_classes=10, **NORMS[norm], **options).eval()
    for layer in model.modules():
        if isinstance(layer, ABN):
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.normal_(layer.bias)
            torch.nn.init.normal_(layer.running_mean)
            torch.nn.init.uniform_(layer.running_var, 0.5, 2)
    return model


@pytest.mark.parametrize("there", NORMS)
@pytest.mark.parametrize("here", NORMS)
def test_other_norms_compute_the_same(here, there):
    source, target = network(here).double(), network(there).double()
    torch.nn.init.normal_(target.fc.weight)
    changes = transfer(source, target)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(target(images), source(images), rtol=1e-9)
    assert bool(changes) == (here != there)


def test_negative_scales_go_where_they_can():
    source = network("standard")
    torch.nn.init.constant_(source.layer2[0].bn1.weight, -0.7)
    target = network("signed")
    transfer(source, target)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(target(images), source(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"layer2.0.bn1 has 48 negative scales, .*signed_scale=true"):
        transfer(source, network("in-place"))


def test_changes_are_sentences():
    source = network("standard", activation="relu")
    changes = transfer(source, network("in-place", activation="leaky_relu"))
    assert changes == [
        "normalisation: standard BatchNorm becomes in-place ABN, with the same scales",
        "activation: relu becomes leaky_relu(0.01) in 9 layers, so the figures will be others",
    ]


def test_a_classifier_for_other_classes_stays():
    source, target = network("in-place"), iabn_hub.create_model("test_resnet_iabn", num_classes=3)
    before = target.fc.weight.detach().clone()
    assert transfer(source, target) == ["the classifier is new: the weights have 10 classes, the network 3"]
    assert target.fc.weight.equal(before)
    assert target.conv1.weight.equal(source.conv1.weight)


def test_another_architecture_is_refused():
    with pytest.raises(CheckpointError, match="weights of another architecture: bn1"):
        transfer(network("in-place"), network("in-place", "resnet18_iabn"))

"""The options and the interface of the networks, beyond timm's own tests."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

import iabn_hub
from iabn_hub import ABN, InPlaceABN, InPlaceABNSync
from iabn_hub.checkpoints import UnknownNameError

FAMILIES = ["resnet18_iabn", "resnet50_iabn", "resnext50_iabn", "densenet121_iabn", "wider_resnet16_a2_iabn"]


def kept_for_backward(network, x):
    """Bytes of the distinct storages, parameters aside, that a training step keeps."""
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = {}

    def note(t):
        if t.untyped_storage().data_ptr() not in parameters:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        network.train()(x)
    return sum(kept.values())


# What a standard BatchNorm followed by leaky ReLU keeps, less these shares, is the most that is kept.
SAVED = {"resnet50_iabn": 0.44, "resnet18_iabn": 0.42, "resnext50_iabn": 0.46, "densenet121_iabn": 0.46}


@pytest.mark.parametrize("model", SAVED)
def test_half_of_the_memory_is_saved(model):
    x = torch.randn(2, 3, 64, 64)
    in_place = kept_for_backward(iabn_hub.create_model(model, num_classes=10), x)
    standard = kept_for_backward(iabn_hub.create_model(model, num_classes=10, norm_layer="abn"), x)
    assert in_place <= (1 - SAVED[model]) * standard


@pytest.mark.parametrize(("name", "kind"), [("iabn", InPlaceABN), ("iabn_sync", InPlaceABNSync), ("abn", ABN)])
@pytest.mark.parametrize("model", FAMILIES)
def test_norm_layer_is_a_choice(model, name, kind):
    network = iabn_hub.create_model(
        model, norm_layer=name, activation="elu", activation_param=0.8, num_classes=3, device="meta"
    )
    norms = [m for m in network.modules() if isinstance(m, ABN)]
    assert {type(m) for m in norms} == {kind}
    assert {m.activation for m in norms} <= {"elu", "identity"}
    assert {m.activation_param for m in norms} == {0.8}


def test_relu_needs_the_standard_layer():
    assert iabn_hub.create_model("resnet18_iabn", norm_layer="abn", activation="relu", device="meta")
    with pytest.raises(ValueError, match="cannot be inverted"):
        iabn_hub.create_model("resnet18_iabn", activation="relu", device="meta")


def test_unknown_norm_layer_is_refused():
    with pytest.raises(ValueError, match="unknown norm_layer 'bn': choose one of iabn, iabn_sync, abn"):
        iabn_hub.create_model("resnet18_iabn", norm_layer="bn", device="meta")


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("model", [*FAMILIES, "wider_resnet16_iabn"])
def test_output_stride_is_what_the_last_map_has(model, stride):
    network = iabn_hub.create_model(model, features_only=True, output_stride=stride, device="meta")
    maps = network(torch.empty(1, 3, 64, 96, device="meta"))
    for feature, channels, reduction in zip(maps, network.feature_info.channels(), network.feature_info.reduction()):
        assert feature.shape == (1, channels, 64 // reduction, 96 // reduction)
    assert network.feature_info.reduction()[-1] == stride


def test_impossible_output_stride_is_refused():
    with pytest.raises(ValueError, match="output_stride is 12: choose one of 4, 8, 16, 32"):
        iabn_hub.create_model("resnet18_iabn", output_stride=12, device="meta")


def test_dilated_segmentation_body_follows_the_publication():
    network = iabn_hub.create_model("wider_resnet38_a2_iabn", output_stride=8, device="meta")
    dilations = [network.get_submodule(f"layer{i}.0.conv2").dilation[0] for i in range(1, 7)]
    assert dilations == [1, 1, 1, 2, 4, 4]
    drops = [getattr(network.get_submodule(f"layer{i}.0.dropout"), "p", 0) for i in range(1, 7)]
    assert drops == [0, 0, 0, 0, 0.3, 0.5]


@pytest.mark.parametrize("model", ["resnext50_iabn", "densenet121_iabn"])
def test_stem_is_3x3_unless_asked_otherwise(model):
    assert iabn_hub.create_model(model, device="meta").conv1.kernel_size == (3, 3)
    plain = iabn_hub.create_model(model, input_3x3=False, device="meta")
    assert plain.conv1.kernel_size == (7, 7)
    assert plain(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 1000)


@pytest.mark.parametrize("model", FAMILIES)
def test_later_layers_leave_feature_maps_alone(model):
    network = iabn_hub.create_model(model, num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        _, together = network.forward_intermediates(x)
        for index, tap in enumerate(together):
            alone = network.forward_intermediates(x, indices=[index], stop_early=True, intermediates_only=True)
            assert torch.equal(tap, alone[0])


@pytest.mark.parametrize("model", FAMILIES)
def test_checkpointing_gives_the_same_gradients(model):
    network = iabn_hub.create_model(model, num_classes=3).double().train()
    network.apply(lambda m: setattr(m, "p", 0.0) if isinstance(m, nn.Dropout2d) else None)
    recomputing = copy.deepcopy(network)
    recomputing.set_grad_checkpointing()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for each in (network, recomputing):
        each(x).square().sum().backward()
    for (name, ours), theirs in zip(network.named_parameters(), recomputing.parameters()):
        torch.testing.assert_close(theirs.grad, ours.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_torchvision_weights_fit_the_resnets():
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.resnet18(num_classes=5).eval()
    for name, value in theirs.state_dict().items():
        if "bn" in name and name.endswith("weight"):
            value.uniform_(-1, 1)
    ours = iabn_hub.create_model("resnet18_iabn", num_classes=5, signed_scale=True).eval()
    ours.load_state_dict(theirs.state_dict())
    for module in theirs.modules():
        if isinstance(module, nn.ReLU):
            module.forward = lambda x: nn.functional.leaky_relu(x, 0.01)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)


def test_unknown_option_is_a_type_error():
    with pytest.raises(TypeError, match="not_an_option"):
        iabn_hub.create_model("resnet18_iabn", not_an_option=1)


@pytest.mark.parametrize("name", ["resnet50_iabm", "resnet50_iabn.sync_lr_521_in1k"])
def test_mistyped_model_gets_near_names(name):
    with pytest.raises(UnknownNameError, match=r"did you mean .*resnet50_iabn"):
        iabn_hub.create_model(name)


def test_a_broken_catalogue_does_not_stop_a_network_without_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("IABN_HUB_CATALOGUE", str(tmp_path / "none.json"))
    assert iabn_hub.create_model("resnet18_iabn", device="meta").num_classes == 1000


def test_listing_with_weights_has_tags():
    names = iabn_hub.list_models(pretrained=True)
    assert "resnext101_iabn.lr_512_in1k" in names
    assert "resnet18_iabn" in iabn_hub.list_models()


@pytest.mark.parametrize("name", ["test_resnet_iabn", "resnext50_iabn", "wider_resnet16_iabn", "densenet121_iabn"])
def test_children_are_registered_in_the_order_they_run(name):
    torch.manual_seed(0)
    network = iabn_hub.create_model(name, num_classes=3).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = network.forward_features(images.clone())
        found = torch.nn.Sequential(*list(network.children())[:-2])(images)
    torch.testing.assert_close(found, expected)


def test_children_in_order_serve_torchvisions_getter():
    network = iabn_hub.create_model("test_resnet_iabn", num_classes=0).eval()
    getter = IntermediateLayerGetter(network, {"layer1": "a", "layer4": "b"})
    with torch.no_grad():
        maps = getter(torch.randn(1, 3, 64, 64))
    assert [tuple(maps[key].shape[1:]) for key in "ab"] == [(24, 16, 16), (96, 2, 2)]

"""What other code does to the layer is computed as in BatchNorm, or refused by name; never wrong in silence."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from iabn_hub import ABN, InPlaceABN, InPlaceABNSync, convert_local, convert_sync

LAYERS = [ABN, InPlaceABN, InPlaceABNSync]


@pytest.mark.parametrize("cls", [InPlaceABN, InPlaceABNSync])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("joined", [True, False], ids=["joined", "alone"])
def test_a_second_derivative_is_refused_at_once(cls, training, joined):
    layer, conv = cls(3).train(training), nn.Conv2d(2, 3, 3)
    images = torch.randn(3, 2, 6, 6, requires_grad=True)
    shortcut = torch.randn(3, 3, 4, 4, requires_grad=True) if joined else None
    y = layer(conv(images), shortcut)
    with pytest.raises(RuntimeError, match=r"has no second derivative, which create_graph=True .* use ABN"):
        torch.autograd.grad(y.sum(), images, create_graph=True)
    y = layer(conv(images), shortcut)
    assert torch.autograd.grad(y.square().sum(), images)[0].isfinite().all()


def test_standard_abn_has_a_second_derivative():
    layer, x = ABN(2, activation="elu").double(), torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x * 1), (x,))


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_stand_still_while_tracking_is_off(cls, momentum):
    ours, theirs = cls(3, momentum=momentum, activation="identity"), nn.BatchNorm1d(3, momentum=momentum)
    for training, tracking in ((True, True), (True, False), (False, False), (True, True), (False, True)):
        x = torch.randn(4, 3, 5) * 2 + 1
        results = []
        for layer in (ours, theirs):
            layer.train(training)
            layer.track_running_stats = tracking
            results.append(layer(x.clone()))
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
        for (name, a), (_, b) in zip(ours.named_buffers(), theirs.named_buffers()):
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


VIEWS = {
    "chunk": lambda x: x.chunk(2, 1)[0],
    "split": lambda x: x.split([4, 4], 1)[1],
    "unbind": lambda x: x.view(2, 2, 4, *x.shape[2:]).unbind(1)[0],
    "view of a chunk": lambda x: x.chunk(2, 1)[0][:, :, 1:],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_view_that_autograd_protects_is_not_overwritten(view, training):
    layer = InPlaceABN(4).train(training)
    twin = copy.deepcopy(layer)
    twin.inplace = False
    leaf = torch.randn(2, 8, 6, 6, requires_grad=True)
    whole = leaf * 1
    before = whole.detach().clone()
    y = layer(VIEWS[view](whole))
    assert torch.equal(whole, before)
    expected = twin(VIEWS[view](leaf * 1))
    torch.testing.assert_close(y, expected)
    gradient = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, leaf, gradient)[0] for out in (y, expected))
    torch.testing.assert_close(ours, theirs)
    assert int(layer.num_batches_tracked) == int(training)


def test_a_view_without_gradients_is_overwritten_as_ever():
    layer = InPlaceABN(4)
    with torch.no_grad():
        whole = torch.randn(2, 8, 6, 6)
        left = whole.chunk(2, 1)[0]
        assert layer(left) is left


def test_a_full_backward_hook_on_the_producer_sees_its_gradient():
    conv, layer, seen = nn.Conv2d(2, 4, 3), InPlaceABN(4), []
    conv.register_full_backward_hook(lambda module, grads_in, grads_out: seen.append(grads_out[0]))
    layer(conv(torch.randn(2, 2, 6, 6, requires_grad=True))).sum().backward()
    assert seen[0].shape == (2, 4, 4, 4)


class Doubled(InPlaceABN):
    """A layer of somebody's own."""

    def forward(self, x, residual=None):
        return 2 * super().forward(x, residual)


def parametrised():
    layer = InPlaceABN(4)
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    return layer


def a_layer_within_a_layer():
    layer = InPlaceABN(4)
    layer.inner = InPlaceABN(2)
    return layer


@pytest.mark.parametrize(
    "make", [lambda: Doubled(4), parametrised, a_layer_within_a_layer], ids=["subclass", "parametrised", "nested"]
)
def test_layers_of_other_classes_are_synchronised_and_back(make):
    layer = make()
    x = torch.randn(3, 4, 5)
    expected = layer(x.clone())
    there = convert_sync(nn.Sequential(layer))
    assert isinstance(there[0], InPlaceABNSync)
    assert isinstance(there[0], parametrize.type_before_parametrizations(layer))
    assert all(isinstance(each, InPlaceABNSync) for each in there.modules() if isinstance(each, InPlaceABN))
    torch.testing.assert_close(there(x.clone()), expected)
    back = convert_local(there)
    assert type(back[0]).__name__ == type(layer).__name__
    assert not any(isinstance(each, InPlaceABNSync) for each in back.modules())
    torch.testing.assert_close(back(x.clone()), expected)


def test_a_synchronised_subclass_is_pickled_and_copied(tmp_path):
    there = convert_sync(nn.Sequential(Doubled(4)))
    torch.save(there, tmp_path / "whole.pt")
    x = torch.randn(3, 4, 5)
    for again in (torch.load(tmp_path / "whole.pt", weights_only=False), copy.deepcopy(there)):
        assert type(again[0]) is type(there[0])
        torch.testing.assert_close(again(x.clone()), copy.deepcopy(there)(x.clone()))


def test_parametrisations_come_and_go_around_a_conversion():
    there = convert_sync(nn.Sequential(parametrised()))
    weight = there[0].weight
    parametrize.remove_parametrizations(there[0], "weight")
    assert type(there[0]) is InPlaceABNSync
    torch.testing.assert_close(there[0].weight, weight)
    for cls in (InPlaceABN, Doubled):
        layer = convert_sync(cls(4))
        parametrize.register_parametrization(layer, "weight", nn.Softplus())
        back = convert_local(layer)
        assert not isinstance(back, InPlaceABNSync)
        x = torch.randn(3, 4, 5)
        torch.testing.assert_close(back(x.clone()), layer(x.clone()))


def test_a_shared_layer_stays_shared():
    layer = InPlaceABN(4)
    network = convert_sync(nn.ModuleDict({"a": layer, "b": nn.Sequential(layer), "again": layer}))
    assert network["a"] is network["b"][0] is network["again"]
    assert isinstance(network["a"], InPlaceABNSync)


def test_a_synchronised_class_of_ones_own_is_not_converted_in_silence(caplog):
    class Mine(InPlaceABNSync):
        pass

    network = convert_local(nn.Sequential(Mine(4)))
    assert isinstance(network[0], Mine)
    assert "Mine is a synchronised class of its own" in caplog.text


OVERWRITERS = {
    "relu": nn.ReLU(inplace=True),
    "dropout": nn.Dropout(0.5, inplace=True),
    "another layer": InPlaceABN(4, activation="identity"),
}


@pytest.mark.parametrize("name", OVERWRITERS)
def test_an_overwritten_output_is_explained(name):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), InPlaceABN(4), OVERWRITERS[name])
    y = network(torch.randn(2, 3, 8, 8))
    with pytest.raises(RuntimeError, match="the output of an InPlaceABN, .* was overwritten: use inplace=False"):  # noqa: RUF043
        y.sum().backward()


@pytest.mark.parametrize("which", ["weight", "bias", "residual"])
def test_another_tensor_that_was_overwritten_is_not_called_the_output(which):
    layer, residual = InPlaceABN(4), torch.randn(2, 4, 3, requires_grad=True) * 1
    y = layer(torch.randn(2, 4, 3), residual)
    with torch.no_grad():
        {"residual": residual, **dict(layer.named_parameters())}[which].add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: \[.*FloatTensor"):
        y.sum().backward()

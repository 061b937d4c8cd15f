"""Networks of in-place layers become networks of BatchNorm that compute the same, and that every exporter knows."""

import copy
import io

import onnxruntime
import pytest
import torch
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx
from torch.fx.experimental.optimization import fuse

import iabn_hub
from iabn_hub.conversion import NormAct

# One of each family.
FAMILIES = ["resnet18_iabn", "resnext50_iabn", "wider_resnet16_iabn", "densenet121_iabn", "test_resnet_deeplab3_iabn"]


def network(name, **options):
    """Randomly initialised, with statistics and scales as after training, negative ones included."""
    torch.manual_seed(0)
    model = iabn_hub.create_model(name, num_classes=5, **options)
    for layer in model.modules():
        if isinstance(layer, iabn_hub.ABN):
            nn.init.uniform_(layer.weight, -1.5, 1.5)
            nn.init.normal_(layer.bias)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.normal_(layer.running_mean)
    return model


def assert_same(a, b, tolerance=1e-4):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("options", [{}, {"signed_scale": True, "activation": "elu"}, {"norm_layer": "abn"}], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_same_function(name, options):
    model = network(name, **options).double()
    standard = iabn_hub.to_batchnorm(model)
    assert not any(isinstance(m, iabn_hub.ABN) for m in standard.modules())
    assert any(isinstance(m, iabn_hub.ABN) for m in model.modules())
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    for mode in (True, False):
        with torch.no_grad():
            assert_same(standard.train(mode)(x), model.train(mode)(x), 1e-9)
    ours = [b for n, b in model.named_buffers() if n.endswith("running_var")]
    theirs = [b for n, b in standard.named_buffers() if n.endswith("running_var")]
    for a, b in zip(theirs, ours):
        assert_same(a, b, 1e-9)


@pytest.mark.parametrize("name", ["test_resnet_iabn", "wider_resnet16_iabn"])
def test_exporters_and_folding(name):
    model, x = network(name).eval(), torch.randn(2, 3, 32, 32)
    standard = iabn_hub.to_batchnorm(model)
    expected = model(x).detach()
    for exporter in (False, True):
        content = io.BytesIO()
        torch.onnx.export(standard, (x,), content, input_names=["x"], dynamo=exporter)
        session = onnxruntime.InferenceSession(content.getvalue(), providers=["CPUExecutionProvider"])
        assert_same(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), expected)
    assert_same(torch.export.export(standard, (x,)).module()(x), expected)
    assert_same(torch.jit.script(standard)(x), expected)
    assert_same(torch.jit.trace(standard, x)(x), expected)
    folded = fuse(standard)
    assert_same(folded(x), expected)
    count = [sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) for net in (standard, folded)]
    assert count[1] <= count[0] / 2  # in pre-activation networks, a norm stands before a convolution


def test_quantisation():
    model, x = network("test_resnet_iabn").eval(), torch.randn(8, 3, 32, 32)
    prepared = quantize_fx.prepare_fx(iabn_hub.to_batchnorm(model), get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    quantised = quantize_fx.convert_fx(prepared)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in quantised.modules())
    assert_same(quantised(x), model(x), 0.2)


class Mixed(nn.Module):
    """Norms behind convolutions of every dimension and a linear layer, one before all of them, one used twice."""

    def __init__(self):
        super().__init__()
        norm = iabn_hub.InPlaceABN
        self.first, self.conv1, self.after1 = norm(3), nn.Conv1d(3, 4, 3), norm(4, inplace=False)
        self.conv2, self.after2 = nn.Conv2d(4, 4, 1), norm(4, affine=False)
        self.conv3, self.after3 = nn.Conv3d(4, 4, 1), iabn_hub.InPlaceABNSync(4, activation="identity")
        self.linear, self.after = nn.Linear(4, 4), iabn_hub.ABN(4, activation="relu", track_running_stats=False)
        self.again = self.after1

    def forward(self, x):
        x = self.again(self.after1(self.conv1(self.first(x))))
        x = self.after2(self.conv2(x[..., None]))
        x = self.after3(self.conv3(x[..., None]))
        return self.after(self.linear(x.mean((2, 3, 4))), x.amax((2, 3, 4)))


def test_any_network():
    model = Mixed().to(torch.float64)
    model.after3.requires_grad_(False)
    seen = []
    model.after2.register_forward_hook(lambda *_: seen.append(1))
    standard = iabn_hub.to_batchnorm(model)
    x = torch.randn(6, 3, 9, dtype=torch.float64)
    assert_same(standard(x.clone()), model(x.clone()), 1e-9)
    assert len(seen) == 2
    assert standard.again is standard.after1
    norms = [type(getattr(standard, name).norm) for name in ("first", "after1", "after2", "after3", "after")]
    assert norms == [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.BatchNorm1d]
    assert not standard.after3.norm.weight.requires_grad
    assert standard.eval().after1.norm.weight.requires_grad


def test_the_layer_itself_and_frozen_statistics():
    layer = iabn_hub.InPlaceABN(4)
    layer.freeze_running_stats()
    standard = iabn_hub.to_batchnorm(layer)
    assert isinstance(standard, NormAct)
    x = torch.randn(2, 4, 5, 5)
    assert_same(standard(x.clone()), layer(x.clone()), 1e-6)


def test_instance_and_group_norm():
    model = nn.Sequential(
        iabn_hub.InPlaceInstanceNorm(4, affine=True), iabn_hub.InPlaceGroupNorm(2, 4, activation="elu")
    )
    standard = iabn_hub.to_batchnorm(model)
    x = torch.randn(2, 4, 5, 5)
    assert_same(standard(x.clone()), model(x.clone()), 1e-5)
    assert [type(m) for m in standard.modules()][2:] == [nn.GroupNorm, nn.LeakyReLU, NormAct, nn.GroupNorm, nn.ELU]


def test_a_converted_network_loses_its_conversion():
    model = network("test_resnet_iabn")
    iabn_hub.convert(model)
    standard = iabn_hub.to_batchnorm(model)
    assert not standard._forward_pre_hooks
    assert model._forward_pre_hooks
    iabn_hub.convert(copy.deepcopy(standard))

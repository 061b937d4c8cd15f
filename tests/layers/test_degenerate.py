"""Scales near zero: the layer keeps what the output does not tell, and gradients are those of BatchNorm."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import iabn_hub
from iabn_hub import InPlaceABN, InPlaceABNSync, inplace_abn
from iabn_hub.layers.degenerate import RENEWAL, unrecoverable_channels

from .test_layer import bytes_kept


def cosine(a, b):
    a, b = a.double().flatten(), b.double().flatten()
    return (a @ b / (a.norm() * b.norm())).item()


def layer_of(scales, bias=0.3, cls=InPlaceABN, **options):
    layer = cls(len(scales), signed_scale=True, **options)
    layer.weight.data = torch.tensor(scales)
    nn.init.constant_(layer.bias, bias)
    return layer


@pytest.mark.parametrize("keep", [True, [1], [0, 2, 3]])
@pytest.mark.parametrize("joined", [True, False], ids=["joined", "alone"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("inplace", [True, False])
def test_gradcheck_with_kept_channels(keep, joined, training, inplace):
    x, residual = (torch.randn(3, 4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.tensor([1.0, 0.5, -0.3, 2.0], dtype=torch.float64)
    weight[1 if keep is True else keep[0]] = 0.0
    weight.requires_grad_()
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    mean, var = torch.zeros(4, dtype=torch.float64), torch.full((4,), 1.5, dtype=torch.float64)
    keep = keep if keep is True else torch.tensor(keep)

    def layer(x, weight, bias, residual):
        return inplace_abn(
            x * 1, weight, bias, mean.clone(), var.clone(), training, 0.1, 1e-5, "elu", 1.0,
            residual=residual if joined else None, inplace=inplace, signed_scale=True, keep_input=keep,
        )  # fmt: skip

    assert torch.autograd.gradcheck(layer, (x, weight, bias, residual if joined else None))


@settings(max_examples=40, deadline=None)
@given(
    scales=st.lists(st.sampled_from([0.0, 1e-8, -1e-8, 1e-4, -1e-3, 1e-2, 0.3, -1.0, 2.0]), min_size=1, max_size=6),
    bias=st.sampled_from([0.0, 0.3, -3.0]),
    joined=st.booleans(),
    cls=st.sampled_from([InPlaceABN, InPlaceABNSync]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 1 << 30),
)
def test_gradients_are_those_of_batchnorm_whatever_the_scales(scales, bias, joined, cls, dtype, seed):
    torch.manual_seed(seed)
    layer = layer_of(scales, bias, cls)
    channels = len(scales)
    x = torch.randn(8, channels, 12, 12).to(dtype)
    shortcut = torch.randn(8, channels, 12, 12).to(dtype) if joined else None
    dy = torch.randn(8, channels, 12, 12).to(dtype)

    def gradients(run, *leaves):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        y = run(*leaves)
        return torch.autograd.grad(y, leaves, dy.to(y.dtype))

    leaf = x.clone().requires_grad_()
    y = layer(leaf * 1, shortcut)
    dx, d_weight, d_bias = torch.autograd.grad(y, [leaf, layer.weight, layer.bias], dy)

    def exact(x, weight, bias):
        z = F.batch_norm(x, None, None, weight, bias, True)
        # The sign that the stored output has decides the slope, as in the layer.
        return torch.where(y > 0, 1.0, 0.01).double() * (z if shortcut is None else z + shortcut.double())

    wanted = gradients(exact, x.double(), layer.weight.double(), layer.bias.double())
    for channel, scale in enumerate(scales):
        if scale:
            assert cosine(dx[:, channel], wanted[0][:, channel]) > 0.999
        else:
            assert not dx[:, channel].any()
    size = wanted[1].abs().clamp(min=(8 * 144) ** 0.5)
    assert ((d_weight - wanted[1]) / size).abs().max() < 0.05
    assert ((d_bias - wanted[2]) / size).abs().max() < 0.05


def test_only_channels_that_tell_nothing_are_kept():
    scales = torch.tensor([1.0, 0.02, 1e-3, -1e-3, 0.0, 1e-7])
    bias = torch.full((6,), 0.5)
    find = lambda dtype, residual=None: unrecoverable_channels(scales, bias, residual, dtype, 1e-5, True)  # noqa: E731
    assert find(torch.bfloat16).tolist() == [2, 3, 4, 5]
    assert find(torch.float16).tolist() == [2, 3, 4, 5]
    assert find(torch.float32).tolist() == [4, 5]
    assert find(torch.bfloat16, torch.randn(2, 6, 4, 4) * 10).tolist() == [1, 2, 3, 4, 5]
    assert unrecoverable_channels(torch.ones(6), bias, None, torch.bfloat16, 1e-5, True) is None
    assert unrecoverable_channels(scales, bias, torch.randn(0, 6, 4, 4), torch.float64, 1e-5, False) is None


@pytest.mark.parametrize("keep_input", ["auto", True, False])
def test_bytes_kept_grow_by_the_kept_channels_alone(keep_input):
    x, bias = torch.randn(4, 8, 16, 16, requires_grad=True), 0.5
    layer = layer_of([1.0] * 6 + [0.0, -1e-8], bias, keep_input=keep_input)
    of_the_output, _ = bytes_kept(lambda: layer_of([1.0] * 8, bias, keep_input=False)(x * 1))
    kept, _ = bytes_kept(lambda: layer(x * 1))
    channels = {"auto": 2, True: 8, False: 0}[keep_input]
    assert 0 <= kept - of_the_output - channels * 4 * 16 * 16 * 4 < 200


def test_the_layer_looks_again_after_updates_and_after_loading():
    layer = layer_of([1.0, 1.0])
    x = torch.randn(2, 2, 4, 4)
    layer(x.clone())
    assert layer._kept_channels is False
    with torch.no_grad():
        layer.weight[0] = 0.0
    layer(x.clone())
    assert layer._kept_channels is False, "not at every step"
    for _ in range(RENEWAL):
        with torch.no_grad():
            layer.weight.mul_(1)
    layer(x.clone())
    assert layer._kept_channels.tolist() == [0]
    layer.load_state_dict(layer_of([1.0, 0.0]).state_dict())
    layer(x.clone())
    assert layer._kept_channels.tolist() == [1]
    layer.double()(x.double())
    assert layer._kept_channels.tolist() == [1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_layer_decides_the_same_when_it_runs_again(reentrant):
    part = nn.Sequential(nn.Conv2d(2, 3, 1), layer_of([0.0, 1.0, 1.0]))
    x, weights = torch.randn(4, 2, 6, 6, requires_grad=True), torch.randn(4, 3, 6, 6)
    optimizer = torch.optim.SGD(part.parameters(), 0.1)
    for _ in range(RENEWAL + 2):
        optimizer.zero_grad()
        y = checkpoint(part, x, use_reentrant=reentrant)
        (y * weights).mean().backward()
        optimizer.step()
    assert part[1]._kept_channels is False, "the scale has grown"


def test_misuse_is_a_sentence():
    with pytest.raises(ValueError, match="keep_input is 'never': choose True, False or 'auto'"):
        InPlaceABN(4, keep_input="never")
    with pytest.raises(ValueError, match="inplace is 'never': choose True, False or 'always'"):
        InPlaceABN(4, inplace="never")


@pytest.mark.parametrize("scale", [0.0, 1e-3])
def test_a_zero_initialised_resnet_in_bf16_has_the_gradients_of_batchnorm(scale):
    images = torch.randn(8, 3, 96, 96, generator=torch.Generator().manual_seed(2))

    def gradients(norm, dtype, **options):
        torch.manual_seed(0)
        net = iabn_hub.create_model("resnet18_iabn", norm_layer=norm, num_classes=10, **options)
        generator = torch.Generator().manual_seed(1)
        for name, p in net.named_parameters():
            with torch.no_grad():
                if p.ndim > 1:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
                elif ".bn2." in name:
                    p.fill_(scale if name.endswith("weight") else 0.0)
                else:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.1 + float(name.endswith("weight")))
        for module in net.modules():
            module.to(dtype if isinstance(module, (nn.Conv2d, nn.Linear)) or dtype == torch.float64 else torch.float32)
        F.cross_entropy(net(images.to(dtype)).double(), torch.arange(8)).backward()
        return {name: p.grad for name, p in net.named_parameters()}

    exact = gradients("abn", torch.float64)
    standard = gradients("abn", torch.bfloat16)
    ours = gradients("iabn", torch.bfloat16, signed_scale=True)
    for name, wanted in exact.items():
        if wanted.any():
            assert cosine(ours[name], wanted) > cosine(standard[name], wanted) - 0.01, name

"""Pooling that does not keep its input: the same bits as torch's, and fewer of them kept."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import iabn_hub
from iabn_hub.layers.pooling import AvgPool2d, MaxPool2d


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(3, 40), st.integers(3, 40)),
    kernel=st.integers(1, 15),
    stride=st.integers(1, 16),
    ceil_mode=st.booleans(),
    padded=st.booleans(),
    channels_last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 1 << 30),
)
def test_results_and_gradients_are_those_of_torch(shape, kernel, stride, ceil_mode, padded, channels_last, dtype, seed):
    torch.manual_seed(seed)
    padding = kernel // 2 if padded else 0
    if min(shape[2:]) + 2 * padding < kernel:
        return
    form = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(shape).relu().to(dtype).contiguous(memory_format=form)  # many values are equal
    if seed % 5 == 0:
        x[0, 0, 1, 1] = float("nan")
    results = []
    pools = (MaxPool2d, nn.MaxPool2d) if seed % 2 else (AvgPool2d, nn.AvgPool2d)
    for pool in pools:
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = pool(kernel, stride, padding, ceil_mode=ceil_mode)(leaf)
        torch.manual_seed(seed)
        y.backward(torch.randn_like(y))
        results.append((y.detach(), leaf.grad))
    for ours, theirs in zip(*results):
        assert ours.is_contiguous(memory_format=form) == theirs.is_contiguous(memory_format=form)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_a_byte_of_each_output_is_kept():
    kept = []
    x = torch.randn(2, 3, 20, 20, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = MaxPool2d(3, 2, 1)(x)
    assert [t.dtype for t in kept] == [torch.uint8]
    assert kept[0].numel() == y.numel()


def test_the_average_keeps_nothing():
    kept = []
    x = torch.randn(2, 3, 20, 20, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        AvgPool2d(2)(x).sum()
    assert not kept


@pytest.mark.parametrize("pool", [MaxPool2d(3, 2, 1), AvgPool2d((3, 2), 2, (1, 0))])
def test_derivatives(pool):
    x = torch.randn(1, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pool, x)
    assert torch.autograd.gradgradcheck(pool, x)


@pytest.mark.parametrize("options", [{"kernel_size": 17}, {"kernel_size": 3, "dilation": 2}, {"kernel_size": (3, 2)}])
def test_what_does_not_fit_is_left_to_torch(options):
    x = torch.randn(1, 2, 30, 30, requires_grad=True)
    assert torch.equal(MaxPool2d(**options)(x), nn.MaxPool2d(**options)(x))


class Calls(nn.Module):
    def __init__(self, function, options):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, x):
        return self.function(x, **self.options)


def assert_the_same_when_converted(network):
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    plain = network(x)
    (expected,) = torch.autograd.grad(plain.square().sum(), x)
    iabn_hub.convert(network)
    found = network(x)
    assert torch.equal(found, plain)
    assert torch.equal(torch.autograd.grad(found.square().sum(), x)[0], expected)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": np.int64(2)}, {"kernel_size": torch.tensor(2)}, {"kernel_size": [3], "stride": []},
        {"kernel_size": (2,), "padding": [1, 1]}, {"kernel_size": 3, "stride": (2, 1)},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d"])
def test_whatever_torch_reads_as_a_window(name, options):
    assert_the_same_when_converted(Calls(getattr(F, name), options))


@pytest.mark.parametrize("call", [
    lambda x: F.max_pool2d(input=x, kernel_size=2, stride=1),
    lambda x: F.max_pool2d(x, 3, 2, 1, 1, True),
    lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    lambda x: F.max_pool2d(x[0], 2),
    lambda x: F.avg_pool2d(input=x, kernel_size=2),
    lambda x: F.avg_pool2d(x, 3, 2, 1, True, False, 5),
    lambda x: F.avg_pool2d(x[0], 2),
])  # fmt: skip
def test_ways_to_call_them_in_a_converted_network(call):
    assert_the_same_when_converted(Calls(call, {}))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (3, 2), "stride": 2, "padding": (1, 0), "count_include_pad": False},
        {"kernel_size": 3, "divisor_override": 4},
        {"kernel_size": (2, 2), "ceil_mode": True},
    ],
)
def test_options_of_the_average(options):
    x = torch.randn(2, 3, 9, 11, requires_grad=True)
    ours, theirs = AvgPool2d(**options)(x), nn.AvgPool2d(**options)(x)
    dy = torch.randn_like(ours)
    assert torch.equal(ours, theirs)
    assert torch.equal(*(torch.autograd.grad(y, x, dy)[0] for y in (ours, theirs)))


@pytest.mark.parametrize("kind", ["MaxPool2d", "AvgPool2d"])
def test_compilers_tracers_and_transforms(kind):
    pool, x = {"MaxPool2d": MaxPool2d, "AvgPool2d": AvgPool2d}[kind](3, 2, 1), torch.randn(2, 3, 9, 9)
    x.requires_grad_()
    expected = getattr(nn, kind)(3, 2, 1)(x)
    assert torch.equal(torch.jit.script(pool)(x), expected)
    assert torch.equal(torch.fx.symbolic_trace(pool)(x), expected)
    assert torch.equal(torch.vmap(pool)(x[None])[0], expected)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    assert torch.equal(torch.func.grad(lambda v: pool(v).sum())(x.detach()), gradient)

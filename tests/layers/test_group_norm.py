"""In-place instance and group norm compute what torch's layers compute, and keep only their output."""

import contextlib
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from iabn_hub import InPlaceGroupNorm, InPlaceInstanceNorm, inplace_group_norm, use_backend

from .test_layer import LAYOUTS, bytes_kept, in_layout

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.004}


def standard(x, groups, weight, bias, residual, activation, param):
    """In float64 from torch's own functions."""
    y = F.group_norm(x, groups, weight, bias)
    y = y if residual is None else y + residual
    return {"leaky_relu": F.leaky_relu, "elu": F.elu, "identity": lambda y, _: y}[activation](y, param)


@settings(max_examples=120, deadline=None)
@given(
    count=st.integers(1, 3),
    groups=st.integers(1, 5),
    of_group=st.integers(1, 4),
    size=st.lists(st.integers(2, 7), min_size=1, max_size=3),
    layouts=st.tuples(*[st.sampled_from([*LAYOUTS, "channels_last_3d"])] * 3),
    dtype=st.sampled_from(list(TOLERANCE)),
    activation=st.sampled_from([("leaky_relu", 0.01), ("leaky_relu", 0.3), ("elu", 1.0), ("identity", 0.0)]),
    flags=st.tuples(*[st.booleans()] * 3),
    backend=st.sampled_from([contextlib.nullcontext, lambda: use_backend("reference")]),
    seed=st.integers(0, 1 << 30),
)
def test_agrees_with_torch(count, groups, of_group, size, layouts, dtype, activation, flags, backend, seed):
    torch.manual_seed(seed)
    affine, joined, inplace = flags
    channels = groups * of_group
    shape = (count, channels, *size)

    def tensor(layout):
        t = torch.randn(shape, dtype=torch.float64).to(dtype)
        if layout == "channels_last_3d":
            return t.contiguous(memory_format=torch.channels_last_3d) if len(size) == 3 else t
        return in_layout(t, layout)

    x, residual, dy = map(tensor, layouts)
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    weight = ((torch.rand(channels) + 0.5) * torch.randn(channels).sign()).to(vectors) if affine else None
    bias = torch.randn(channels, dtype=vectors) if affine else None
    leaves = [t.requires_grad_() if t is not None else None for t in (x, weight, bias, residual if joined else None)]
    with backend():
        y = inplace_group_norm(
            leaves[0] * 1, groups, *leaves[1:3], 1e-5, *activation, residual=leaves[3], inplace=inplace
        )
        found = torch.autograd.grad(y, [t for t in leaves if t is not None], dy)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    z = standard(exact[0], groups, *exact[1:], *activation)
    wanted = torch.autograd.grad(z, [t for t in exact if t is not None], dy.double())
    # What is recovered of x̂ is the difference of the output and the residual, and 1/σ of a group scales its rounding.
    inverse = (x.detach().double().reshape(count, groups, -1).var(-1, correction=0) + 1e-5).rsqrt().max()
    amplified = inverse.clamp(min=1) * (1 + residual.double().abs().max() if joined else 1)
    for ours, theirs in zip((y, *found), (z, *wanted)):
        size_of = (theirs.abs().max() + dy.double().abs().sum().sqrt()) * amplified
        assert (ours.double() - theirs).abs().max() <= TOLERANCE[dtype] * size_of


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(groups, layout):
    x, residual = (in_layout(torch.randn(2, 4, 2, 3, dtype=torch.float64), layout).requires_grad_() for _ in range(2))
    weight = torch.tensor([1.0, -0.5, 0.3, -2.0], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def layer(x, weight, bias, residual):
        return inplace_group_norm(x * 1, groups, weight, bias, 1e-5, "elu", 1.0, residual=residual)

    assert torch.autograd.gradcheck(layer, (x, weight, bias, residual))


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(
    "norm", [InPlaceInstanceNorm(4, affine=True), InPlaceGroupNorm(2, 4)], ids=["instance", "group"]
)
def test_only_the_output_is_kept(norm, form):
    x = torch.randn(2, 4, 5, 6, 7).contiguous(memory_format=form).requires_grad_()
    before = x * 1
    address = before.data_ptr()
    kept, y = bytes_kept(lambda: norm(before))
    assert kept <= y.untyped_storage().nbytes() + 6 * 8 * 4  # and vectors
    y = norm(before)
    assert y.data_ptr() == address
    assert y.is_contiguous(memory_format=form)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_weights_of_torch_fit(dimensions, affine):
    theirs = getattr(nn, f"InstanceNorm{dimensions}d")(4, affine=affine)
    ours = InPlaceInstanceNorm(4, affine=affine, activation="identity")
    if affine:
        nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, *[5] * dimensions)
    torch.testing.assert_close(ours(x.clone()), theirs(x))
    assert torch.equal(ours.eval()(x), ours(x))
    group = nn.GroupNorm(2, 4, affine=affine)
    in_place = InPlaceGroupNorm(2, 4, affine=affine, activation="identity")
    in_place.load_state_dict(group.state_dict())
    torch.testing.assert_close(in_place(x.clone()), group(x))


def test_a_scale_of_zero_keeps_the_input():
    layer = InPlaceGroupNorm(2, 4, activation="leaky_relu").double()
    with torch.no_grad():
        layer.weight[1] = 0.0
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    results = []
    for run in (layer, lambda t: F.leaky_relu(F.group_norm(t, 2, layer.weight, layer.bias), 0.01)):
        leaf = x.clone().requires_grad_()
        y = run(leaf * 1)
        results.append((y, *torch.autograd.grad(y.square().sum(), [leaf, layer.weight, layer.bias])))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_compiled_exported_traced_and_copied():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), InPlaceGroupNorm(2, 4), nn.Conv2d(4, 4, 3), InPlaceInstanceNorm(4))
    x = torch.randn(2, 3, 9, 9)
    y = network(x)
    for other in (
        torch.compile(network, backend="aot_eager", fullgraph=True),
        torch.export.export(network, (x,)).module(),
        torch.jit.trace(network, x),
        torch.fx.symbolic_trace(network),
        copy.deepcopy(network),
        lambda x: torch.func.functional_call(network, dict(network.named_parameters()), (x,)),
        torch.func.vmap(lambda one: network(one[None])[0]),
    ):
        torch.testing.assert_close(other(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: InPlaceGroupNorm(3, 4), ValueError, "num_channels is 4: it must be a multiple of num_groups, 3"),
        (lambda: InPlaceInstanceNorm(4, activation="relu"), ValueError, "cannot be inverted"),
        (lambda: InPlaceInstanceNorm(4)(torch.randn(2, 4, 1)), ValueError, "one value per group"),
        (lambda: InPlaceGroupNorm(2, 4)(torch.randn(2, 6, 3)), ValueError, "has 6 channels"),
        (lambda: InPlaceGroupNorm(2, 4)(torch.randn(2, 5, 3)), ValueError, "a multiple of 2"),
        (lambda: InPlaceGroupNorm(2, 4)(torch.ones(2, 4, 3, dtype=torch.int64)), TypeError, "floating dtype"),
        (lambda: InPlaceGroupNorm(2, 4)(torch.randn(2, 4, 3), torch.randn(2, 4, 2)), ValueError, "must be equal"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_an_empty_batch():
    y = InPlaceInstanceNorm(4, affine=True)(torch.randn(0, 4, 3, requires_grad=True) * 1)
    y.sum().backward()
    assert y.shape == (0, 4, 3)

"""The native kernels compute what the reference kernels compute, on any tensor and any number of threads."""

import functools
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from iabn_hub.layers import ops, reference
from iabn_hub.layers.activations import ELU, gradient, invert
from iabn_hub.layers.backends import building, loading

from .test_layer import LAYOUTS, in_layout


@pytest.fixture(autouse=True)
def native(device):
    if os.environ.get("IABN_HUB_BACKEND") == "reference":
        pytest.skip("IABN_HUB_BACKEND=reference: there is nothing to compare with")
    try:
        building.compiler()
        if device == "cuda":
            building.cuda_home()
    except building.BuildError as e:
        pytest.skip(f"nothing to build the native kernels with: {e}")
    status = loading.use_native(device)
    assert status.backend == "native", status.reason


# Error allowed, relative to the largest value: rounding in the stored dtype, and of sums in float32.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SCALES = [0.0, 1e-3, 0.5, 1.0, 3.0, -0.7, -2.0]


def assert_same(ours, theirs, tolerance, sizes=None):
    """Equal but for `tolerance` times a size per channel: that of the terms, where the values themselves cancel."""
    ours, theirs = ((v,) if isinstance(v, torch.Tensor) else v for v in (ours, theirs))
    for i, (a, b) in enumerate(zip(ours, theirs)):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        error = (a.double() - b.double()).abs()
        size = b.double().abs().max() if sizes is None else sizes[i] if isinstance(sizes, tuple) else sizes
        if error.dim() > 1 and size.dim() == 1:
            size = size.view(1, -1, *[1] * (error.dim() - 2))
        assert (error <= tolerance * size).all(), f"result {i}: {(error / size).max():.1e} of the size of its terms"


def per_channel(values):
    return values.double().abs().transpose(0, 1).flatten(1)


def unstable_inverse(y, activation, param):
    """By how much the inverse of the activation amplifies the relative rounding of its argument, like y."""
    if activation != ELU:
        return torch.zeros_like(y, dtype=torch.float64)
    t = (y.double() / param).clamp(min=-1)
    smallest = torch.finfo(torch.float64 if y.dtype == torch.float64 else torch.float32).eps
    return torch.where(y < 0, -t / (1 + t).clamp(min=smallest), 0)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.one_of(
        st.tuples(st.integers(2, 70), st.integers(1, 40)),
        st.tuples(st.integers(1, 5), st.integers(1, 70), st.integers(2, 70)),
        st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 9), st.integers(2, 9)),
        st.tuples(st.integers(1, 2), st.sampled_from([16, 64, 520]), st.integers(3, 40), st.just(1)),
        st.tuples(st.just(1), st.integers(1, 3), st.just(90), st.just(90)),
        st.tuples(st.integers(1, 2), st.integers(1, 20), st.integers(1, 3), st.integers(2, 3), st.integers(1, 3)),
    ),
    dtype=st.sampled_from(list(TOLERANCE)),
    layouts=st.tuples(*[st.sampled_from([*LAYOUTS, "expanded"])] * 3),
    activation=st.sampled_from([(0, 0.01), (1, 0.01), (1, 0.3), (2, 1.0), (2, 0.3)]),
    flags=st.tuples(*[st.booleans()] * 3),
    distribution=st.sampled_from([(0.0, 1.0), (100.0, 1.0), (0.0, 1e-3), (-3.0, 1e3)]),
    seed=st.integers(0, 1 << 30),
)
def test_every_operator_agrees_with_the_reference(shape, dtype, layouts, activation, flags, distribution, seed):
    torch.manual_seed(seed)
    affine, joined, signed = flags
    mean, std = distribution
    x, residual, dy = (
        torch.randn(shape[:2] + (1,) * (len(shape) - 2)).to(dtype).expand(shape)
        if layout == "expanded" and k > 0
        else in_layout((torch.randn(shape, dtype=torch.float64) * s + m).to(dtype), layout)
        for k, (layout, m, s) in enumerate(zip(layouts, (mean, 0, 0), (std, 1, 1)))
    )
    weight = torch.tensor(SCALES)[torch.randint(len(SCALES), shape[1:2])] if affine else None
    bias = torch.randn(shape[1]) if affine else None
    options = (weight, bias, residual if joined else None, 1e-5, *activation, signed)
    tolerance = TOLERANCE[dtype]
    loose = max(tolerance, 1e-12 if dtype == torch.float64 else 2e-6)

    statistics = reference.statistics(x)
    mean, var = (v.double() for v in statistics)
    scale = per_channel(x).amax(1)
    assert_same(ops.statistics(x), statistics, 10 * loose, sizes=(scale, var + 1e-6 * mean.square()))
    y = reference.normalize(x, *statistics, *options)
    assert_same(ops.normalize(x, *statistics, *options), y, tolerance)
    overwritten = in_layout(x, "contiguous" if layouts[0] == "expanded" else layouts[0])
    ops.normalize_(overwritten, *statistics, *options)
    assert torch.equal(overwritten, ops.normalize(x, *statistics, *options))
    *_, fused_mean, fused_var = ops.batch_normalize(x, *options)
    assert_same((fused_mean, fused_var), statistics, 10 * loose, sizes=(scale, var + 1e-6 * mean.square()))
    exact = reference.batch_normalize(x.double(), *(v.double() if torch.is_tensor(v) else v for v in options))[0]
    size = exact.abs().max()
    if x.is_cuda:  # where the mean is stored in float32 between two kernels
        size = size + (mean.abs() / (var + 1e-5).sqrt()).max()
    assert_same(ops.batch_normalize(x, *options)[0], exact.to(dtype), 10 * loose, sizes=size)

    dz = per_channel(gradient(y, dy, *activation))
    gamma = torch.ones(shape[1]) if weight is None else reference.effective_scale(weight, 1e-5, signed).abs()
    divisor = gamma.clamp(min=1e-5)
    # x̂ is the difference of these, over γ: what it may be off by goes with their size, not with its own.
    terms = per_channel(invert(y, *activation, torch.finfo(dtype).eps)).amax(1)
    terms = (terms + (bias.abs() if affine else 0) + (per_channel(residual).amax(1) if joined else 0)) / divisor
    # The inverse of a nearly saturated ELU, log1p(t) with t near −1, amplifies the rounding of t by |t| / (1 + t).
    unstable = unstable_inverse(y, *activation) / divisor.view(1, -1, *[1] * (y.dim() - 2))
    summed = (dz.sum(1), dz.sum(1) * terms + (dz * per_channel(unstable)).sum(1))
    sums = reference.gradient_sums(y, dy, *options)
    assert_same(ops.gradient_sums(y, dy, *options), sums, loose, sizes=summed)
    means = tuple(s / (y.numel() // shape[1]) for s in sums)
    scale = gamma / (var + 1e-5).sqrt()
    size = (scale * dz.amax(1) * (1 + terms.square())).view(1, -1, *[1] * (y.dim() - 2))
    size = size + (scale * means[1].double().abs()).view(size.shape) * unstable
    arguments = (y, dy, statistics[1], *means, True, *options)
    assert_same(
        ops.input_gradient(*arguments), reference.input_gradient(*arguments), tolerance, sizes=(size, dz.amax(1))
    )
    arguments = (y, dy, statistics[1], None, None, False, *options)
    assert_same(ops.input_gradient(*arguments)[0], reference.input_gradient(*arguments)[0], tolerance)


@pytest.mark.parametrize("shape", [(3, 1, 200, 200), (4, 64, 40, 40), (2, 2, 300, 300), (40000, 24)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_threads_change_rounding_only(shape, layout):
    x, dy = (in_layout(torch.randn(shape), layout) for _ in range(2))
    options = (torch.randn(shape[1]), torch.randn(shape[1]), None, 1e-5, 1, 0.01, True)
    usual = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            y, mean, var = ops.batch_normalize(x, *options)
            results.append((y, mean, var, *ops.batch_gradient(y, dy, var, True, *options)))
    finally:
        torch.set_num_threads(usual)
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2]))
    for one, two in zip(results[0], results[1]):
        assert_same(one, two, 1e-5, sizes=one.double().abs().max() + 1)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float64), None], ids=str)
def test_fused_backward_is_both_passes(signed, dtypes):
    x, dy, residual = (torch.randn(4, 24, 9, 9) for _ in range(3))
    weight = bias = None
    if dtypes:
        weight, bias = (torch.randn(24).to(dtype) for dtype in dtypes)
        weight[0] = 0
    options = (weight, bias, residual, 1e-5, 1, 0.01, signed)
    y, _, var = ops.batch_normalize(x, *options)
    sum_dz, sum_dz_xhat = ops.gradient_sums(y, dy, *options)
    apart = ops.input_gradient(y, dy, var, sum_dz / (4 * 81), sum_dz_xhat / (4 * 81), True, *options)
    dx, dz, d_weight, d_bias = ops.batch_gradient(y, dy, var, True, *options)
    assert_same((dx, dz), apart, 1e-6)
    sign = -1.0 if dtypes and not signed else 1.0
    sign = 1.0 if weight is None else torch.where(weight < 0, sign, 1.0).double()
    for ours, like, exact in ((d_weight, weight, sum_dz_xhat.double() * sign), (d_bias, bias, sum_dz.double())):
        assert ours.dtype == (torch.float32 if like is None else like.dtype)
        assert_same(ours, exact.to(ours.dtype), 1e-6 if ours.dtype != torch.bfloat16 else 8e-3)


@pytest.mark.parametrize("far", [0, 1, 2], ids=["rows", "channels", "columns"])
def test_strides_beyond_32_bits(device, far):
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("the GPU has less than 10 GiB of free memory")
    # Few elements that lie far apart in memory, most of which is never touched.
    strides = [12, 4, 1]
    strides[far] = 2**31 + 11
    memory = torch.empty(2 * (2**31 + 11) + 64, dtype=torch.bfloat16)
    x = memory.as_strided((3, 3, 3), strides).copy_(torch.randn(3, 3, 3))
    dy = torch.randn(3, 3, 3).to(x.dtype)
    options = (torch.rand(3) + 0.5, torch.randn(3), None, 1e-5, 1, 0.01, False)
    expected, _, var = reference.batch_normalize(x.contiguous(), *options)
    ops.batch_normalize_(x, *options)
    assert_same(x.contiguous(), expected, 8e-3)
    assert_same(
        ops.batch_gradient(x, dy, var, False, *options)[2:], reference.batch_gradient(x, dy, var, False, *options)[2:],
        2e-6,
    )  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    shape=st.one_of(
        st.tuples(st.integers(2, 70), st.integers(1, 40)),
        st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 9), st.integers(2, 9)),
        st.tuples(st.just(1), st.integers(1, 3), st.just(90), st.just(90)),
        st.tuples(st.integers(1, 2), st.integers(1, 20), st.integers(1, 3), st.integers(2, 3), st.integers(1, 3)),
    ),
    dtype=st.sampled_from(list(TOLERANCE)),
    layouts=st.tuples(*[st.sampled_from([*LAYOUTS, "expanded"])] * 2),
    activation=st.sampled_from([(0, 0.01), (1, 0.0), (1, 0.3), (2, 0.7), (3, 0.0), (4, 0.0), (5, 0.0)]),
    flags=st.tuples(*[st.booleans()] * 2),
    distribution=st.sampled_from([(0.0, 1.0), (10.0, 1.0), (0.0, 1e-3), (-3.0, 1e3)]),
    seed=st.integers(0, 1 << 30),
)
def test_gradient_from_input(shape, dtype, layouts, activation, flags, distribution, seed):
    """Against autograd through torch's own functions in float64."""
    torch.manual_seed(seed)
    affine, centred = flags
    mean, std = distribution
    x = in_layout((torch.randn(shape, dtype=torch.float64) * std + mean).to(dtype), layouts[0])
    weight = torch.tensor(SCALES)[torch.randint(len(SCALES), shape[1:2])] if affine else None
    bias = torch.randn(shape[1]) if affine else None
    found = reference.statistics(x)
    x64, w64, b64 = (
        t.double().clone(memory_format=torch.contiguous_format).requires_grad_()
        for t in (
            x,
            torch.ones(shape[1]) if weight is None else weight,
            torch.zeros(shape[1]) if bias is None else bias,
        )
    )
    given = (None, None) if centred else tuple(v.double() for v in found)
    z = F.batch_norm(x64, *given, w64, b64, centred)
    loose = 1e-12 if dtype == torch.float64 else 2e-6 * (1 + abs(mean) / std)
    dy = torch.randn(shape[:2] + (1,) * (len(shape) - 2)).to(dtype).expand(shape)
    # Near a kink of the activation, rounding decides which slope holds: nothing flows back there.
    unsure = [(z.detach() - kink).abs() < 10 * loose for kink in KINKS.get(activation[0], ())]
    if layouts[1] != "expanded" or any(near.any() for near in unsure):
        dy = in_layout(functools.reduce(lambda t, near: t.masked_fill(near, 0), unsure, dy.clone()), layouts[1])
    # All contiguous: the backward pass of torch 2.14's batch_norm permutes some strided gradients.
    FUNCTIONS[activation[0]](z, activation[1]).backward(dy.double().clone(memory_format=torch.contiguous_format))
    xhat = F.batch_norm(x64.detach(), *given, None, None, centred)
    dz, xhat = 1.2 * per_channel(dy), per_channel(xhat)
    of_dx = (w64 / (found[1].double() + 1e-5).sqrt()).abs() * (
        dz.amax(1) + dz.mean(1) + xhat.amax(1) * (dz * xhat).mean(1)
    )
    floor = 1e-4 if dtype == torch.float16 else 1e-30  # the smallest number of float16 is 6e-8
    for kernels in (ops, reference):
        dx, sum_dz, sum_dz_xhat = kernels.gradient_from_input(x, dy, *found, weight, bias, 1e-5, *activation, centred)
        assert (dx.dtype, dx.stride()) == (x.dtype, torch.empty_like(x).stride())
        for ours, theirs, tolerance, sizes in (
            (dx, x64.grad, TOLERANCE[dtype] + 10 * loose, of_dx),
            (sum_dz, b64.grad, 10 * loose, dz.sum(1)),
            (sum_dz_xhat, w64.grad, 10 * loose, (dz * xhat).sum(1)),
        ):
            ours, theirs = (t.double().clone(memory_format=torch.contiguous_format) for t in (ours, theirs))
            assert_same(ours, theirs, tolerance, sizes=sizes + floor)


KINKS = {1: (0,), 2: (0,), 4: (-3, 3), 5: (0, 6)}
FUNCTIONS = {
    0: lambda z, _: z, 1: F.leaky_relu, 2: F.elu, 3: lambda z, _: F.silu(z), 4: lambda z, _: F.hardswish(z),
    5: lambda z, _: F.relu6(z),
}  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(
    running=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    batch=st.sampled_from([torch.float32, torch.float64]),
    channels=st.integers(0, 70),
    momentum=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    correction=st.sampled_from([1.0, 2.0, 1.0001]),
    step=st.sampled_from([1, 3]),
    seed=st.integers(0, 1 << 30),
)
def test_update_statistics(running, batch, channels, momentum, correction, step, seed):
    torch.manual_seed(seed)
    mean, var = torch.randn(channels, dtype=batch), torch.rand(channels, dtype=batch)
    before = [torch.randn(step * channels).to(running)[::step] for _ in range(2)]
    after = [v.clone() if step == 1 else torch.empty(step * channels, dtype=running)[::step].copy_(v) for v in before]
    ops.update_statistics_(*after, mean, var, momentum, correction)
    shares = (mean.double(), var.double() * correction)
    for ours, old, share in zip(after, before, shares):
        expected = share if momentum == 1 else old.double() * (1 - momentum) + share * momentum
        torch.testing.assert_close(ours.double(), expected, rtol=TOLERANCE[running], atol=TOLERANCE[running])

"""What the layer promises beyond the recorded cases: gradients, memory, layouts, dtypes, modes and errors."""

import copy
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from iabn_hub import ABN, InPlaceABN, InPlaceABNSync, inplace_abn, inplace_abn_sync
from iabn_hub.layers import ops, reference
from iabn_hub.layers.activations import ELU, IDENTITY, INVERTIBLE, LEAKY_RELU, SILU

ACTIVATIONS = [("leaky_relu", 0.01), ("leaky_relu", 0.3), ("elu", 1.0), ("elu", 0.5), ("identity", 0.01)]
LAYOUTS = ["contiguous", "channels_last", "sliced", "transposed"]


def in_layout(x, layout):
    """The same values with other strides, always as a new tensor."""
    if layout == "channels_last" and x.dim() == 4:
        return x.clone(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "transposed":
        return x.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)
    return x.clone()


def oracle(x, weight, bias, mean, var, residual, activation, param, signed, eps=1e-5):
    """The layer in float64 from standard operators; autograd gives its gradients."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    x = x.double()
    if mean is None:
        dims = [0, *range(2, x.dim())]
        mean, var = x.mean(dims), x.var(dims, correction=0)
    z = (x - mean.double().view(shape)) / (var.double().view(shape) + eps).sqrt()
    if weight is not None:
        w = weight.double()
        z = z * (w if signed else w.abs() + eps).view(shape) + bias.double().view(shape)
    if residual is not None:
        z = z + residual.double()
    if activation == "leaky_relu":
        return F.leaky_relu(z, param)
    return F.elu(z, param) if activation == "elu" else z


def bytes_kept(function):
    """Bytes of distinct storages that `function` keeps for its backward pass, and its result."""
    kept = {}

    def note(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        result = function()
    return sum(kept.values()), result


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("activation", "param"), ACTIVATIONS)
def test_gradcheck(activation, param, training, joined, signed):
    x, residual = (torch.randn(3, 4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.tensor([1.0, -0.5, 0.3, -2.0], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    mean, var = torch.zeros(4, dtype=torch.float64), torch.full((4,), 1.5, dtype=torch.float64)

    def layer(x, weight, bias, residual):
        return inplace_abn(
            x * 1, weight, bias, mean.clone(), var.clone(), training, 0.1, 1e-5, activation, param,
            residual=residual if joined else None, signed_scale=signed,
        )  # fmt: skip

    assert torch.autograd.gradcheck(layer, (x, weight, bias, residual if joined else None))


SCALES = [0.0, 1e-3, 0.5, 1.0, 3.0, -1e-3, -0.7, -2.0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.one_of(
        st.tuples(st.integers(12, 40), st.integers(1, 5)),
        st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(12, 17)),
        st.tuples(st.integers(1, 3), st.integers(1, 17), st.integers(3, 5), st.integers(4, 6)),
        st.tuples(st.integers(1, 3), st.integers(1, 40), st.sampled_from([12, 25]), st.just(1)),
        st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(2, 3), st.integers(2, 3), st.integers(3, 4)),
    ),
    layout=st.sampled_from(LAYOUTS),
    activation=st.sampled_from(ACTIVATIONS),
    flags=st.tuples(*[st.booleans()] * 5),
    distribution=st.sampled_from([(0.0, 1.0), (0.0, 1e-2), (0.0, 1e3), (-30.0, 1.0), (1.0, 1e3)]),
    seed=st.integers(0, 1 << 30),
    data=st.data(),
)
def test_float32_agrees_with_a_float64_oracle(shape, layout, activation, flags, distribution, seed, data):
    torch.manual_seed(seed)
    mean, std = distribution
    affine, joined, inplace, training, signed = flags
    x = torch.randn(shape) * std + mean
    channels = shape[1]
    weight = torch.tensor(data.draw(st.lists(st.sampled_from(SCALES), min_size=channels, max_size=channels)))
    # What is known of x̂ is ulp(y)/γ: small scales are for the forward pass, not for a gradient in float32.
    weight = torch.where(weight.abs() < 0.1, torch.where(weight < 0, -0.1, 0.1), weight)
    params = [weight.requires_grad_(), torch.randn(channels).requires_grad_()] if affine else [None, None]
    running = torch.randn(channels) * std, torch.rand(channels) * std**2 + 1e-3
    residual = torch.randn(shape) if joined else None
    leaves = {"x": x, "residual": residual, "weight": params[0], "bias": params[1]}

    def run(function, dtype):
        copies = {k: v.detach().to(dtype).requires_grad_() for k, v in leaves.items() if v is not None}
        return copies, function(copies)

    ours, y = run(
        lambda t: inplace_abn(
            in_layout(t["x"], layout), t.get("weight"), t.get("bias"), *(r.clone() for r in running), training,
            0.1, 1e-5, *activation, residual=t.get("residual"), inplace=inplace, signed_scale=signed,
        ),
        torch.float32,
    )  # fmt: skip
    theirs, expected = run(
        lambda t: oracle(
            t["x"], t.get("weight"), t.get("bias"), *((None, None) if training else running), t.get("residual"),
            *activation, signed,
        ),
        torch.float64,
    )  # fmt: skip
    conditioning = 1 + abs(mean) / std  # how far x - mean loses digits
    torch.testing.assert_close(
        y.double(), expected, rtol=1e-5, atol=2e-6 * conditioning * float(1 + expected.detach().abs().max())
    )
    dy = torch.randn(shape, dtype=torch.float64)
    y.backward(dy.float())
    expected.backward(dy)
    for name, leaf in ours.items():
        reference = theirs[name].grad
        size = float(reference.abs().max()) + (1e-2 / std if name == "x" else 0)
        torch.testing.assert_close(
            leaf.grad.double(),
            reference,
            rtol=0,
            atol=2e-4 * conditioning * size + 1e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_has_dtype_and_strides_of_the_input(dtype, layout):
    layer = InPlaceABN(6, inplace=False)
    x = in_layout(torch.randn(2, 6, 4, 4).to(dtype), layout)
    y = layer(x)
    assert y.dtype == dtype
    assert y.stride() == torch.empty_like(x).stride()
    expected = oracle(x, layer.weight, layer.bias, None, None, None, "leaky_relu", 0.01, False)
    torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", [InPlaceABN, InPlaceABNSync], ids=["iabn", "sync"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_is_overwritten(kind, layout):
    x = in_layout(torch.randn(2, 5, 3, 4), layout)
    before = x.clone()
    y = kind(5)(x)
    assert y.data_ptr() == x.data_ptr()
    assert not torch.equal(x, before)


def test_input_survives_when_not_in_place():
    x = torch.randn(2, 5, 3, 3)
    before = x.clone()
    InPlaceABN(5, inplace=False)(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("inplace", [True, False], ids=["in_place", "new_tensor"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_only_the_output_is_kept(inplace, mode):
    layer = getattr(InPlaceABN(8, inplace=inplace), mode)()
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    kept, y = bytes_kept(lambda: layer(x * 1))
    activation = y.untyped_storage().nbytes()
    assert activation <= kept <= activation + 5 * 8 * 8


def test_residual_is_kept_by_reference():
    layer, residual = InPlaceABN(8), torch.randn(4, 8, 16, 16)
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        layer(x * 1, residual)
    assert residual.data_ptr() in saved


@pytest.mark.parametrize("joined", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_backward_allocates_one_activation(mode, joined, monkeypatch):
    monkeypatch.setattr(reference, "SLAB_BYTES", 1 << 16)
    layer = getattr(InPlaceABN(64), mode)()
    x = torch.randn(4, 64, 32, 32, requires_grad=True)
    y = layer(x + 0, torch.randn_like(x) if joined else None)
    dy = torch.randn_like(y)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        torch.autograd.grad(y, x, dy)
    changes = [(e.start_ns(), e.nbytes()) for e in profile.kineto_results.events() if e.name() == "[memory]"]
    in_use = list(itertools.accumulate(size for _, size in sorted(changes)))
    assert y.nbytes <= max(in_use) < y.nbytes + 6 * reference.SLAB_BYTES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.1, 1.2])  # some are rounded up when they are stored
def test_saturated_elu_has_finite_gradients(alpha, dtype):
    x = torch.tensor([[-40.0], [-35.0], [0.5], [2.0]], dtype=dtype, requires_grad=True)
    y = inplace_abn(
        x * 1, torch.full((1,), 30.0), torch.zeros(1), torch.zeros(1), torch.ones(1), True, activation="elu",
        activation_param=alpha,
    )  # fmt: skip
    assert y.detach().min() == torch.tensor(-alpha).to(dtype)
    y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("activation", "param"), [("leaky_relu", 0.3), ("elu", 1.0), ("identity", 0.01)])
@pytest.mark.parametrize("learned", ["weight", "bias", "residual"])
def test_frozen_input_leaves_the_other_gradients(learned, activation, param):
    x, residual, dy = (torch.randn(4, 3, 5, dtype=torch.float64) for _ in range(3))
    weight, bias = (torch.randn(3, dtype=torch.float64) for _ in range(2))
    leaf = {"weight": weight, "bias": bias, "residual": residual}[learned].requires_grad_()
    y = inplace_abn(x.clone(), weight, bias, None, None, True, 0.1, 1e-5, activation, param, residual=residual)
    (ours,) = torch.autograd.grad(y, leaf, dy)
    expected = oracle(x, weight, bias, None, None, residual, activation, param, False)
    (theirs,) = torch.autograd.grad(expected, leaf, dy)
    torch.testing.assert_close(ours, theirs)


def test_zero_scale_has_a_gradient():
    weight = torch.zeros(3, requires_grad=True)
    x = torch.randn(8, 3)
    y = inplace_abn(x.double(), weight, torch.zeros(3), None, None)
    y.backward(torch.randn(8, 3).double())
    assert weight.grad.abs().min() > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_show(value):
    x = torch.randn(4, 3, 5)
    x[1, 2, 3] = value
    y = InPlaceABN(3)(x)
    assert y[:, 2].isnan().any()
    assert y[:, :2].isfinite().all()


@pytest.mark.parametrize("mean", [1e4, 1e6])
def test_variance_survives_a_large_mean(mean):
    x = (torch.randn(8, 3, 32, 32, dtype=torch.float64) + mean).float()
    found_mean, found_var = ops.statistics(x)
    torch.testing.assert_close(found_var.double(), x.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(found_mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", [nn.BatchNorm2d, None], ids=["track", "average"])
def test_running_statistics_follow_batchnorm(make):
    momentum = 0.1 if make else None
    ours, theirs = InPlaceABN(4, momentum=momentum), nn.BatchNorm2d(4, momentum=momentum)
    for _ in range(3):
        x = torch.randn(5, 4, 6, 6) * 3 + 1
        ours(x.clone())
        theirs(x)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-6)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 3


def test_without_running_statistics_eval_uses_the_batch():
    layer = InPlaceABN(4, track_running_stats=False).eval()
    x = torch.randn(5, 4, 6, 6) * 3 + 1
    expected = oracle(x, layer.weight, layer.bias, None, None, None, "leaky_relu", 0.01, False)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_state_dict_of_an_affineless_layer_has_no_weight():
    assert set(InPlaceABN(4, affine=False).state_dict()) == {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_empty_batch_gives_an_empty_output_and_zero_gradients(mode):
    layer = getattr(InPlaceABN(4), mode)()
    x = torch.empty(0, 4, 6, 6, requires_grad=True)
    y = layer(x * 1)
    y.sum().backward()
    assert y.shape == x.shape
    assert layer.weight.grad.eq(0).all()
    assert torch.equal(layer.running_var, torch.ones(4))


@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1, 1)], ids=str)
@pytest.mark.parametrize("kind", [InPlaceABN, ABN], ids=["iabn", "abn"])
def test_one_value_per_channel_is_refused_by_shape(kind, shape):
    with pytest.raises(ValueError, match=str(list(shape))[1:-1].replace("(", r"\(")):
        kind(4)(torch.randn(shape))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: InPlaceABN(4, activation="relu"), "cannot be inverted.*leaky_relu.*ABN"),
        (lambda: InPlaceABN(4, activation="gelu"), "unknown activation 'gelu': choose one of identity, "),
        (lambda: ABN(4, activation="gelu"), "unknown activation 'gelu'.*relu"),
        (lambda: InPlaceABN(4, activation_param=-0.1), "negative slope of leaky_relu must be positive"),
        (lambda: InPlaceABN(4, activation="none"), "'none' is called 'identity'"),
        (lambda: ABN(4, activation="none"), "'none' is called 'identity'"),
        (lambda: InPlaceABN(4)(torch.randn(2, 5, 3, 3)), r"4,.*\(2, 5, 3, 3\) has 5 channels"),
        (lambda: InPlaceABN(4)(torch.randn(4)), r"got shape \(4,\)"),
        (lambda: InPlaceABN(4)(torch.randn(2, 4, 3), torch.randn(2, 4, 1)), r"residual has shape \(2, 4, 1\)"),
        (lambda: inplace_abn(torch.randn(2, 4), None, None, None, None, False), "eval mode needs running_mean"),
    ],
)  # fmt: skip
def test_misuse_is_a_sentence(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_abn_takes_what_the_in_place_layer_takes():
    layer = ABN(4)
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), oracle(x, None, None, None, None, None, "leaky_relu", 0.01, False))
    assert layer.running_mean.dtype == torch.float32
    torch.testing.assert_close(layer.running_mean.double(), 0.1 * x.mean((0, 2)), rtol=1e-5, atol=1e-7)
    assert layer(torch.randn(3, 4, 5).bfloat16(), torch.randn(3, 4, 5)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="they must be equal"):
        layer(torch.randn(2, 4, 3), torch.randn(5, 4, 3))


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"floating dtype, got torch\.int64"):
        InPlaceABN(4)(torch.ones(2, 4, dtype=torch.int64))


@pytest.mark.parametrize(("activation", "param"), [*ACTIVATIONS, ("relu", 0.01)])
def test_abn_is_batchnorm_and_activation(activation, param):
    layer = ABN(4, activation=activation, activation_param=param)
    layer.weight.data = torch.tensor([1.0, -2.0, 0.5, 0.0])
    x, residual = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    z = F.batch_norm(x, None, None, layer.weight, layer.bias, True) + residual
    functions = {"relu": F.relu, "identity": lambda z: z}
    functions |= {"leaky_relu": lambda z: F.leaky_relu(z, param), "elu": lambda z: F.elu(z, param)}
    torch.testing.assert_close(layer(x, residual), functions[activation](z))


def test_standard_weights_load_unchanged_with_a_signed_scale():
    theirs = nn.BatchNorm2d(6)
    theirs.weight.data = torch.tensor([1.0, -1.0, 0.2, -0.3, 2.0, 0.7])
    ours = InPlaceABN(6, signed_scale=True, activation="identity")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 6, 5, 5)
    torch.testing.assert_close(ours(x.clone()), theirs(x), rtol=1e-4, atol=1e-4)


def test_old_state_dict_without_batch_count_loads():
    old = {k: v for k, v in InPlaceABN(4).state_dict().items() if k != "num_batches_tracked"}
    layer = InPlaceABN(4)
    layer.load_state_dict(old)
    assert layer.num_batches_tracked == 0


def test_autocast_keeps_parameters_in_float32():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), InPlaceABN(8), nn.Conv2d(8, 8, 3), InPlaceABN(8, activation="elu"))
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y = network(torch.randn(2, 3, 12, 12))
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert network[1].weight.grad.dtype == torch.float32
    assert network[1].running_mean.abs().max() > 0


def test_residual_of_another_dtype_gets_its_own_gradient():
    residual = torch.randn(2, 4, 3, 3, requires_grad=True)
    x = torch.randn(2, 4, 3, 3, dtype=torch.bfloat16)
    InPlaceABN(4)(x, residual).float().sum().backward()
    assert residual.grad.dtype == torch.float32


def test_sync_layer_alone_is_the_plain_layer():
    x, weight, bias = torch.randn(3, 4, 5, 5), torch.randn(4), torch.randn(4)
    assert torch.equal(
        inplace_abn_sync(x.clone(), weight, bias, None, None), inplace_abn(x.clone(), weight, bias, None, None)
    )


def test_layers_copy_and_move():
    layer = InPlaceABNSync(4, activation="elu", activation_param=0.7)
    x = torch.randn(3, 4, 5)
    assert torch.equal(copy.deepcopy(layer)(x.clone()), layer(x.clone()))
    assert layer.to("meta")(torch.empty(3, 4, 5, device="meta")).device.type == "meta"


OPTIONS = {
    "identity": (1e-5, IDENTITY, 0.01, False),
    "leaky_relu": (1e-5, LEAKY_RELU, 0.01, True),
    "elu": (1e-5, ELU, 1.0, False),
}


@pytest.mark.parametrize("activation", INVERTIBLE)
@pytest.mark.parametrize("bare", [False, True], ids=["affine_joined", "bare"])
def test_operators_keep_their_contracts(activation, bare):
    x, dy = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    mean, var = ops.statistics(x)
    extras = (None, None, None) if bare else (torch.randn(4), torch.randn(4), torch.randn(3, 4, 5, 6))
    recover = (*extras, *OPTIONS[activation])
    y = ops.normalize(x, mean, var, *recover)
    calls = [
        (ops.statistics, (x,)),
        (ops.normalize, (x, mean, var, *recover)),
        (ops.normalize_, (x.clone(), mean, var, *recover)),
        (ops.batch_normalize, (x, *recover)),
        (ops.batch_normalize_, (x.clone(), *recover)),
        (ops.batch_normalize, (x, *recover, mean.clone(), var.clone(), torch.tensor(3), 0.1)),
        (ops.batch_normalize_, (x.clone(), *recover, mean.clone(), var.clone(), torch.tensor(3), 0.1)),
        (ops.batch_gradient, (y, dy, var, True, *recover)),
        (ops.gradient_sums, (y, dy, *recover)),
        (ops.input_gradient, (y, dy, var, mean, mean, True, *recover)),
        (ops.input_gradient, (y, dy, var, None, None, False, *recover)),
        (ops.gradient_from_input, (x, dy, mean, var, *extras[:2], 1e-5, SILU, 0.0, True)),
        (ops.update_statistics_, (mean.clone(), var.clone(), mean, var, 0.1, 1.5)),
    ]
    for operator, arguments in calls:
        outcome = torch.library.opcheck(operator.default, arguments)
        assert set(outcome.values()) == {"SUCCESS"}


class _Small(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), InPlaceABN(8, **options)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), InPlaceABN(8, **options)

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(x), x)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"inplace": False, "activation": "elu"}], ids=str)
def test_compiled_network_keeps_no_more_and_computes_the_same(options):
    eager = _Small(**options)
    compiled_from = copy.deepcopy(eager)
    compiled = torch.compile(compiled_from, fullgraph=True)
    x = torch.randn(2, 3, 16, 16)
    kept, y = bytes_kept(lambda: eager(x))
    compiled_kept, compiled_y = bytes_kept(lambda: compiled(x))
    assert compiled_kept <= kept
    torch.testing.assert_close(compiled_y, y, rtol=1e-4, atol=1e-4)
    y.square().mean().backward()
    compiled_y.square().mean().backward()
    for (name, ours), theirs in zip(eager.named_parameters(), compiled_from.parameters()):
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for (name, ours), theirs in zip(eager.named_buffers(), compiled_from.buffers()):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_compiled_network_takes_any_batch_and_mode():
    eager = _Small()
    compiled_from = copy.deepcopy(eager)
    compiled = torch.compile(compiled_from, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for mode in (True, False):
        eager.train(mode)
        compiled.train(mode)
        for batch in (2, 3, 5, 7):
            x = torch.randn(batch, 3, 16, 16)
            torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2, "one graph per mode serves every batch"
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert compiled(torch.randn(4, 3, 16, 16)).dtype == torch.bfloat16

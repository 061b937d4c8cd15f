"""Whatever a network does, a converted one computes the same gradients, or raises the same error."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import iabn_hub

from .networks import assert_equal, conv_norm, gradients, images


class Block(nn.Module):
    """A convolution, a norm, and a function of it that may overwrite, keep and reuse."""

    def __init__(self, function, norm=None):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), norm or nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 4, 3)
        self.function = function

    def forward(self, x):
        return self.function(self, self.conv(x))


def input_overwritten(m, x):
    y = m.last(F.relu(m.norm(x)))
    x.mul_(2)
    return y


def mask_of_itself(m, x):
    z = F.silu(m.norm(x))
    return m.last(z.masked_fill_(z < 0.1, 0.0))


def view_overwritten(m, x):
    z = F.hardswish(m.norm(x))
    z[:, :2].zero_()
    return m.last(z)


def used_then_overwritten(m, x):
    y = m.norm(x)
    return (y.exp().mean() * m.last(F.relu_(y * 1))) + m.last(F.relu_(y))


def norm_used_twice(m, x):
    y = m.norm(x)
    return m.last(F.relu(y)) * y.mean()


def chunks(m, x):
    a, b = F.silu(m.norm(x)).chunk(2, 1)
    return m.last(torch.cat((a * b, F.relu(b)), 1))


def product_with_itself(m, x):
    y = m.norm(x)
    return m.last(y * y.sigmoid() * (y + 3))


def written_into_a_slice(m, x):
    z = torch.zeros_like(x)
    z[:, :2] = F.relu(m.norm(x))[:, :2]
    return m.last(z)


HOSTILE = {
    "the norm's input is used elsewhere": lambda m, x: m.last(F.relu(m.norm(x)) * x),
    "the norm's input is activated in place": lambda m, x: m.last(F.relu_(m.norm(x)) + F.relu_(x)),
    "the norm's input is overwritten": input_overwritten,
    "the result is overwritten": lambda m, x: m.last(F.leaky_relu(m.norm(x), 0.1).add_(1)),
    "the result is overwritten by its mask": mask_of_itself,
    "a view of the result is overwritten": view_overwritten,
    "the norm's output is used, then overwritten": used_then_overwritten,
    "the norm's output is used twice": norm_used_twice,
    "chunks": chunks,
    "transposed": lambda m, x: m.last(F.relu(m.norm(x).transpose(2, 3))),
    "detached": lambda m, x: m.last(F.relu(m.norm(x)) + m.norm(x).detach()),
    "without gradients in between": lambda m, x: m.last(F.relu(m.norm(x)) * scale(m, x)),
    "two norms": lambda m, x: m.last(F.relu(m.norm(F.relu(m.norm(x))))),
    "products with itself": product_with_itself,
    "another dtype in between": lambda m, x: m.last(F.relu(m.norm(x)).float().double()),
    "written into a slice": written_into_a_slice,
    "empty": lambda m, x: m.last(F.relu(m.norm(x)))[:0],
}


def scale(module, x):
    with torch.no_grad():
        return F.relu(module.norm(x)).amax((2, 3), keepdim=True)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("method", ["auto", "recompute", "invert"])
def test_whatever_a_network_does(name, method):
    assert_same_gradients_or_error(HOSTILE[name], method)


def assert_same_gradients_or_error(function, method):
    results = []
    for convert in (False, True):
        torch.manual_seed(0)
        model = Block(function).double()
        model.norm.weight.data.uniform_(-1, 1)
        if convert:
            iabn_hub.convert(model, method=method)
        try:
            results.append([*gradients(model, images()), *model.buffers()])
        except RuntimeError as e:
            results.append(str(e).split(":")[0])
    if isinstance(results[0], str):
        assert isinstance(results[1], str)
        assert results[1] == results[0]
    else:
        assert_equal(*results[::-1])


NORMS = {
    "a parametrised norm": lambda: nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(4), dim=None),
    "a norm of its own class": lambda: type(
        "MyNorm", (nn.BatchNorm2d,), {"forward": lambda s, x: torch.addcmul(own(s.bias), x, own(s.weight))}
    )(4),
    "cumulative average": lambda: nn.BatchNorm2d(4, momentum=None),
    "no statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "no affine": lambda: nn.BatchNorm2d(4, affine=False),
    "weight 0": lambda: zeroed(nn.BatchNorm2d(4)),
    "instance norm with statistics": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "instance norm": lambda: nn.InstanceNorm2d(4, affine=True),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "layer norm": lambda: nn.LayerNorm((30, 30)),
    "in place": lambda: iabn_hub.InPlaceABN(4, inplace=False),
    "local response norm": lambda: nn.LocalResponseNorm(2),
    "scripted": lambda: torch.jit.script(nn.BatchNorm2d(4)),
}


def own(vector):
    return vector.view(1, -1, 1, 1)


def zeroed(norm):
    nn.init.zeros_(norm.weight)
    return norm


@pytest.mark.parametrize("act", [F.relu, lambda x: F.leaky_relu(x, 0.1), F.relu6, F.mish, lambda x: F.elu(x, 0.5)])
@pytest.mark.parametrize("name", NORMS)
def test_whatever_norm_a_network_has(name, act):
    results = []
    for convert in (False, True):
        torch.manual_seed(0)
        model = Block(lambda m, x: m.last(act(m.norm(x))), NORMS[name]()).double()
        if convert:
            report = iabn_hub.convert(model, images())
        torch.manual_seed(1)
        results.append([*gradients(model, images()), *model.buffers()])
    assert_equal(*results[::-1])
    for layer in report.norms:
        assert layer.action in ("recompute", "invert", "leave")
        assert layer.reason or layer.action != "leave"


def test_shared_buffers_and_modules():
    """Two norms with the same statistics and weights: what is kept of them are copies."""
    results = []
    for convert in (False, True):
        torch.manual_seed(0)
        first, second = conv_norm(3, 3, nn.ReLU()).double(), conv_norm(3, 3, nn.LeakyReLU(0.1)).double()
        second[1] = first[1]
        model = nn.Sequential(first, second, first)
        if convert:
            iabn_hub.convert(model, images())
        torch.manual_seed(1)
        results.append([*gradients(model, images()), *model.buffers()])
    assert_equal(*results[::-1])


def test_weights_changed_before_the_backward_pass():
    """torch refuses that for a norm; a converted one, which holds a copy, gives the gradient of its forward pass."""
    model = Block(lambda m, x: m.last(F.relu(m.norm(x)))).double()
    expected = gradients(copy.deepcopy(model), x := images())[1:]
    iabn_hub.convert(model)
    y = model(x.clone().requires_grad_())
    with torch.no_grad():
        model.norm.weight.mul_(2)
    found = torch.autograd.grad((y.sin() * y).sum(), [p for p in model.parameters()])
    assert_equal(found, expected[1:])


# ---- faults of earlier versions --------------------------------------------------------------------------------------


def overwritten_between(m, x):
    y = m.norm(x)
    x.mul_(2)
    return m.last(F.relu(y))


def data_overwritten(m, x):
    y = F.silu(m.norm(x))
    y.data[:, 0] = 0
    return m.last(y)


def source_overwritten_before_use(m, x):
    b = torch.cat([m.norm(x), x], 1)
    x.mul_(2)
    return m.last(b[:, 2:6])


def source_of_two(m, x):
    a, b = m.last(F.interpolate(x, scale_factor=2.0)), m.last(torch.cat([x, x], 1)[:, 1:5])
    x.mul_(2)
    return a.mean() * b


def source_of_inverted(m, x):
    z = F.leaky_relu(m.norm(x), 0.1)
    y = m.last(torch.cat([z, z], 1)[:, 2:6])
    z.add_(1)
    return y


def source_in_a_list(m, x):
    y = m.last(torch.cat([x, x], 1)[:, 1:5])
    torch._foreach_mul_([x], 2.0)
    return y


def complex_conjugates(m, x):
    z = m.norm(x) * torch.tensor(1 + 2j)
    w = z.conj()
    return m.last((w * w).real)


def doubling(m, x):
    for _ in range(40):
        x = x + x * 0.05
    return m.last(x)


def sparse_product(m, x):
    adjacency = torch.eye(x.shape[-1], dtype=x.dtype).to_sparse()
    rows = m.norm(x).transpose(0, 3).flatten(1)
    y = torch.sparse.mm(adjacency, rows).view(x.size(3), x.size(1), x.size(2), x.size(0)).transpose(0, 3)
    return m.last(F.relu(y))


def made_in_inference_mode(m, x):
    with torch.inference_mode():
        mask = torch.ones_like(x) * 0.5
    return m.last(m.norm(x) + mask)


LIBRARY = torch.library.Library("tests_of_conversion", "DEF")
LIBRARY.define("mul(Tensor a, Tensor b) -> Tensor")
LIBRARY.impl("mul", lambda a, b: a * b * 3 + 1, "CompositeImplicitAutograd")

FAULTS = {
    "overwritten between norm and activation": overwritten_between,
    "overwritten by .data": data_overwritten,
    "a source is overwritten before the result is used": source_overwritten_before_use,
    "a source of two results is overwritten": source_of_two,
    "a source of an inverted layer is overwritten": source_of_inverted,
    "a source is overwritten within a list": source_in_a_list,
    "functions of other libraries by torch's names": lambda m, x: m.last(
        torch.ops.tests_of_conversion.mul(m.norm(x), m.norm(x))
    ),
    "aten::elu": lambda m, x: m.last(torch.ops.aten.elu(m.norm(x), 1.0, 1.5, 0.5)),
    "complex conjugates": complex_conjugates,
    "sums that double": doubling,
    "sparse matrices": sparse_product,
    "concatenated along an axis": lambda m, x: m.last(torch.cat([m.norm(x), x], axis=1)[:, 1:5]),
    "transposed, and viewed after the norm": lambda m, x: m.last(m.norm(x.transpose(2, 3)).view(x.shape)),
    "made in inference mode": made_in_inference_mode,
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("method", ["auto", "recompute", "invert"])
def test_what_was_wrong_once(name, method):
    assert_same_gradients_or_error(FAULTS[name], method)


def test_a_graph_that_was_detached_is_freed():
    """The second loss needs what the first graph computed, not that graph."""

    class Marker:
        pass

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, marker):
            ctx.marker = marker
            return x.view_as(x)

        @staticmethod
        def backward(ctx, dy):
            return dy, None

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

        def forward(self, x):
            marker = Marker()
            self.marker = weakref.ref(marker)
            features = Marked.apply(self.first(x).relu(), marker) + self.second(x)
            shifted = features.detach() + self.last.weight.sum()
            return self.last(features), self.last(shifted)

    network = Two().double()
    iabn_hub.convert(network)
    y, z = network(torch.randn(2, 4, 8, 8, dtype=torch.float64))
    assert network.marker() is not None
    del y
    assert network.marker() is None
    z.sum().backward()


@pytest.mark.parametrize("act", [F.relu, F.silu, lambda y: F.leaky_relu(y, 0.1)])
def test_gradients_of_the_norms_output(act):
    """Grad-CAM, hooks that are registered after the activation, retained gradients."""

    def run(convert):
        torch.manual_seed(0)
        model = Block(lambda m, x: m.last(act(m.norm(x)))).double()
        if convert:
            iabn_hub.convert(model)
        outputs = []
        model.norm.register_forward_hook(lambda _, __, y: outputs.append(y))
        x = images().requires_grad_()
        z = model(x)
        (y,) = outputs
        y.retain_grad()
        y.register_hook(lambda g: g * 2)
        (of_y,) = torch.autograd.grad(z.sin().sum(), y, retain_graph=True)
        z.sin().sum().backward()
        return [of_y, y.grad, x.grad, *(p.grad for p in model.parameters())]

    assert_equal(run(True), run(False))


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.zeros(3), torch.ones(3), torch.ones(4), torch.zeros(4), True),
        (torch.zeros(4), torch.ones(4), torch.ones(1), torch.zeros(1), True),
        (None, None, torch.ones(4), torch.zeros(4), False),
        (torch.zeros(4), None, torch.ones(4), torch.zeros(4), True),
    ],
    ids=["statistics of 3", "weight of 1", "eval without statistics", "no variance"],
)
def test_wrong_arguments_raise_the_error_of_torch(arguments):
    def message(convert):
        model = Block(lambda m, x: F.batch_norm(x, *arguments))
        if convert:
            iabn_hub.convert(model)
        with pytest.raises((RuntimeError, ValueError, TypeError)) as found:
            model(torch.randn(2, 3, 5, 5))
        return str(found.value)

    assert message(True) == message(False)


def test_scales_that_changed_after_the_first_step():
    """A weight that is set to 0 later: the output does not tell the input any more."""
    results = []
    for convert in (False, True):
        torch.manual_seed(0)
        model = Block(lambda m, x: m.last(F.leaky_relu(m.norm(x), 0.1))).double()
        if convert:
            iabn_hub.convert(model)
        gradients(model, images())
        nn.init.zeros_(model.norm.weight)
        nn.init.ones_(model.norm.bias)
        torch.manual_seed(1)
        results.append(gradients(model, images()))
    assert_equal(*results[::-1])


@pytest.mark.parametrize("scale", [1.0, 10.0, 30.0])
def test_saturated_elu(scale):
    results = []
    for convert in (False, True):
        torch.manual_seed(0)
        model = Block(lambda m, x: m.last(F.elu(m.norm(x)))).double()
        nn.init.constant_(model.norm.weight, scale)
        if convert:
            iabn_hub.convert(model)
        torch.manual_seed(1)
        results.append(gradients(model, images()))
    assert_equal(*results[::-1])


def test_measuring_changes_nothing():
    """Not with optimizers that step in the backward pass, nor a sample that requires a gradient."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    stepped = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: stepped.append(p.data.mul_(2)))
    before = [p.detach().clone() for p in model.parameters()]
    sample = torch.randn(2, 3, 9, 9, requires_grad=True)
    iabn_hub.convert(model, sample)
    assert not stepped
    assert sample.grad is None
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    model(sample).sum().backward()
    assert stepped


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)), "lazy modules: run it once"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).requires_grad_(False),
            "no output of the network requires",
        ),
    ],
    ids=["lazy", "frozen"],
)
def test_samples_that_cannot_be_measured(model, words):
    with pytest.raises(ValueError, match=words):
        iabn_hub.convert(model, torch.randn(2, 3, 9, 9))

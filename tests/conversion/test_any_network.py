"""Whatever a network does, a converted one computes the same gradients, or raises the same error."""

import copy

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
    """Equal gradients, or the error that the network gave before."""
    results = []
    for convert in (False, True):
        torch.manual_seed(0)
        model = Block(HOSTILE[name]).double()
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

"""A converted network computes and learns what it did before, and keeps less."""

import copy
import io
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import iabn_hub
from iabn_hub.conversion.measure import measure

from .networks import KINDS, conv_norm, make

# Share of the bytes that remains, at most. GroupNorm, LayerNorm and GELU are recomputed, which saves less.
RATIOS = {
    "resnet": 0.65, "densenet": 0.45, "mobilenet": 0.55, "efficientnet": 0.5, "convnext": 0.95, "yolo": 0.45,
    "unet3d": 0.65, "group_norm": 0.75, "sequence": 0.75, "unknown": 0.65,
}  # fmt: skip


def images(count=4, dtype=torch.float64):
    return torch.randn(count, 3, 32, 32, dtype=dtype)


def train(model, steps=3):
    """Weights, statistics and momentum after a few steps; the data are the same at each call."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    for _ in range(steps):
        x, labels = images(), torch.randint(5, (4,))
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return [*model.state_dict().values(), *(s["momentum_buffer"] for s in optimizer.state.values())]


def gradients(model, x, loss=lambda y: (y.sin() * y).sum()):
    """The outputs, and the gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(loss(y), [x, *(p for p in model.parameters() if p.requires_grad)])]


def assert_equal(ours, theirs, tolerance=1e-9):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if a.numel():
            assert (a.double() - b.double()).abs().max() <= tolerance * max(1, b.double().abs().max())


@pytest.mark.parametrize("method", ["auto", "recompute", "invert"])
@pytest.mark.parametrize("kind", KINDS)
def test_trains_to_the_same_weights(kind, method):
    plain, converted = make(kind), make(kind)
    report = iabn_hub.convert(converted, images(), method=method)
    assert_equal(train(converted), train(plain))
    assert converted.state_dict().keys() == plain.state_dict().keys()
    if method != "invert":
        assert report.kept.ratio < RATIOS[kind]


@pytest.mark.parametrize("kind", ["resnet", "yolo", "unet3d"])
def test_layouts_and_modes(kind):
    for mode in (nn.Module.train, nn.Module.eval):
        for form in (torch.contiguous_format, torch.channels_last):
            plain, converted = (mode(make(kind)) for _ in range(2))
            iabn_hub.convert(converted)
            x = images().contiguous(memory_format=form)
            ours, theirs = gradients(converted, x), gradients(plain, x)
            assert_equal(ours, theirs)
            with torch.no_grad():
                assert_equal([converted(x)], [plain(x)])


def test_report():
    model = make("resnet", torch.float32)
    state = copy.deepcopy(model.state_dict())
    x = images(dtype=torch.float32)
    random = torch.get_rng_state()
    report = iabn_hub.convert(model, x)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values()))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert [layer.name for layer in report.norms] == norms
    assert report.count("recompute") == len(norms)
    assert report.kept.before == sum(layer.kept.before for layer in report.layers)
    assert report.kept.after == sum(layer.kept.after for layer in report.layers)
    assert report.peak.after < report.peak.before
    assert report.to_json()["kept"] == {"before": report.kept.before, "after": report.kept.after}
    lines = str(report).splitlines()
    assert f"norms: {len(norms)} recomputed" in lines
    assert any(line.startswith("layer1.0.bn1 ") and line.endswith("recompute") for line in lines)
    assert max(map(len, lines)) <= 80


def test_measured_bytes_are_those_of_autograd():
    """What the report calls kept is what saved-tensor hooks of the caller count."""
    model = make("resnet", torch.float32)
    x = images(dtype=torch.float32)
    kept = {}

    def note(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = model(x)
    for t in [*model.parameters(), *model.buffers(), x]:
        kept.pop(t.untyped_storage().data_ptr(), None)
    assert sum(measure(model, x).kept.values()) == sum(kept.values())
    del y


def test_samples_of_several_arguments():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = conv_norm(3, 8, nn.ReLU())

        def forward(self, a, b):
            return {"sum": self.body(a) + self.body(b), "size": a.size(0)}

    a, b = images(dtype=torch.float32), images(dtype=torch.float32)
    as_tuple = iabn_hub.convert(Two(), (a, b))
    as_dict = iabn_hub.convert(Two(), {"b": b, "a": a})
    assert as_tuple.kept == as_dict.kept


def test_restore():
    model, x = make("yolo", torch.float32), images(dtype=torch.float32)
    before = measure(model, x)
    called = []
    model.register_forward_hook(lambda *_: called.append(1))
    report = iabn_hub.convert(model, x)
    assert report.kept.before == sum(before.kept.values())
    assert iabn_hub.restore(model) is model
    assert measure(model, x).kept == before.kept
    assert called
    assert len(model._forward_hooks) == 1
    assert not model._forward_pre_hooks


def test_converting_again_replaces_the_conversion():
    model, x = make("resnet", torch.float32), images(dtype=torch.float32)
    first = iabn_hub.convert(model, x, method="invert")
    second = iabn_hub.convert(model, x)
    assert second.kept.before == first.kept.before
    assert len(model._forward_pre_hooks) == 1


def test_leaky_relu_in_place_of_relu():
    model, x = make("resnet"), images()
    relus = sum(type(m) is nn.ReLU for m in model.modules())
    plain = gradients(model.eval(), x)
    report = iabn_hub.convert(model, x, activation="leaky_relu")
    outputs = gradients(model, x)
    assert sum(type(m) is nn.LeakyReLU for m in model.modules()) == relus
    assert report.output_change == pytest.approx(float((outputs[0] - plain[0]).norm() / plain[0].norm()), rel=1e-6)
    assert report.count("invert") > 0
    assert "ReLU became leaky ReLU" in str(report)
    iabn_hub.restore(model)
    assert_equal(gradients(model, x), plain, 0)


@pytest.mark.parametrize("options", [{"method": "fast"}, {"activation": "gelu"}], ids=str)
def test_unknown_values_are_refused_before_anything_changes(options):
    model = make("resnet", torch.float32)
    with pytest.raises(ValueError, match=r"fast|gelu"):
        iabn_hub.convert(model, **options)
    assert not model._forward_pre_hooks


# ---- around the network ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["resnet", "yolo", "unet3d"])
def test_autocast(kind):
    results = []
    for convert in (False, True):
        model, x = make(kind, torch.float32), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
        if convert:
            iabn_hub.convert(model)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.float().sum().backward()
        # Not of vectors: behind a convolution whose bias a norm cancels they are rounding errors.
        results.append([y.detach().float(), *(p.grad for p in model.parameters() if p.dim() > 1)])
    for a, b in zip(*results):
        assert float((a - b).norm()) <= 0.1 * float(b.norm())


def test_accumulated_gradients_and_retained_graphs():
    plain, converted = make("resnet"), make("resnet")
    iabn_hub.convert(converted)
    for model in (plain, converted):
        torch.manual_seed(2)
        for _ in range(2):
            loss = model(images()).square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
    assert_equal([p.grad for p in converted.parameters()], [p.grad for p in plain.parameters()])


def test_two_graphs_at_once():
    """The loss of two forward passes, as in contrastive training."""
    results = []
    for convert in (False, True):
        model = make("unet3d")
        if convert:
            iabn_hub.convert(model)
        torch.manual_seed(2)
        a, b = model(images()), model(images())
        results.append(torch.autograd.grad((a * b.detach()).sum() + (a - b).square().sum(), list(model.parameters())))
    assert_equal(*results)


@pytest.mark.parametrize("kind", ["resnet", "unet3d", "sequence"])
def test_second_derivatives(kind):
    results = []
    for convert in (False, True):
        model = make(kind)
        if convert:
            iabn_hub.convert(model)
        torch.manual_seed(2)
        x = images().requires_grad_()
        (dx,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
        penalty = (dx.flatten(1).norm(dim=1) - 1).square().sum()
        results.append(torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True))
    given = [i for i, g in enumerate(results[0]) if g is not None]
    assert len(given) > 5
    assert_equal([results[1][i] for i in given], [results[0][i] for i in given])


def test_checkpointing_around_and_within():
    class Checkpointed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.first, self.rest = model[0], model[1:]

        def forward(self, x):
            return self.rest(checkpoint(self.first, x, use_reentrant=False))

    plain = gradients(make("yolo"), x := images())
    within = Checkpointed(make("yolo"))
    report = iabn_hub.convert(within, x)
    assert_equal(gradients(within, x), plain)
    reasons = {layer.reason for layer in report.norms if layer.action == "leave"}
    assert reasons == {"within activation checkpointing, or other hooks on saved tensors"}
    around = make("yolo")
    iabn_hub.convert(around)
    assert_equal(gradients(lambda_module(around, lambda m, x: checkpoint(m, x, use_reentrant=False)), x), plain)


def lambda_module(model, function):
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return function(self.inner, x)

    return Called()


def test_copies_pickles_and_averages():
    model = make("resnet")
    iabn_hub.convert(model)
    x = images()
    plain = gradients(make("resnet"), x)
    assert_equal(gradients(copy.deepcopy(model), x), plain)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert_equal(gradients(torch.load(buffer, weights_only=False), x), plain)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(model)
    average.update_parameters(model)
    assert_equal([average(x)], [average.module(x)])
    unconverted = make("resnet")
    unconverted.load_state_dict(model.state_dict())
    model.load_state_dict(unconverted.state_dict())


def test_compiled_without_a_break():
    model, x = make("resnet", torch.float32), images(dtype=torch.float32)
    iabn_hub.convert(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal(gradients(compiled, x), gradients(make("resnet", torch.float32), x), 1e-4)


def test_transforms_tracers_and_exporters_see_the_network():
    model, x = make("resnet", torch.float32).eval(), images(dtype=torch.float32)
    iabn_hub.convert(model)
    expected = model(x).detach()
    assert_equal([torch.jit.trace(model, x)(x)], [expected], 1e-5)
    assert_equal([torch.export.export(model, (x,)).module()(x)], [expected], 1e-5)
    assert_equal([torch.fx.symbolic_trace(model)(x)], [expected], 1e-5)
    state = dict(model.named_parameters())
    per_sample = torch.func.vmap(lambda one: torch.func.functional_call(model, state, (one[None],)))(x)
    assert_equal([per_sample.squeeze(1)], [expected], 1e-5)


def test_threads_do_not_mix():
    """As DataParallel runs replicas."""
    model, x = make("resnet").eval(), images()
    expected = gradients(model, x)
    iabn_hub.convert(model)
    results, threads = {}, []
    for i in range(4):
        threads.append(threading.Thread(target=lambda i=i: results.update({i: gradients(model, x)})))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert_equal(results[i], expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_forward_pass_leaves_nothing_behind(error):
    model, x = make("yolo"), images()
    expected = gradients(make("yolo"), x)
    iabn_hub.convert(model)

    def stop(*_):
        raise error("stopped")

    handle = model[1].register_forward_hook(stop)
    with pytest.raises(error):
        model(x)
    handle.remove()
    assert_equal(gradients(model, x), expected)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(len(kept), t), lambda t: t):
        (x.requires_grad_() * 2).exp()
    assert kept  # hooks of others are on top again
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_frozen_parts():
    """Norms in eval mode, and parameters without gradients, as in fine-tuning a detector."""
    results = []
    for convert in (False, True):
        model = make("resnet")
        if convert:
            iabn_hub.convert(model)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval().requires_grad_(False)
        model.conv1.requires_grad_(False)
        results.append(gradients(model, images().fill_(0.3)))
    assert_equal(*results)


# ---- what a network may do -------------------------------------------------------------------------------------------


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

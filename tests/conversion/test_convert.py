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

from .networks import KINDS, assert_equal, conv_norm, gradients, images, make

# Share of the bytes that remains, at most. GroupNorm, LayerNorm and GELU are recomputed, which saves less.
RATIOS = {
    "resnet": 0.59, "densenet": 0.4, "mobilenet": 0.55, "efficientnet": 0.5, "convnext": 0.95, "yolo": 0.45,
    "unet3d": 0.65, "group_norm": 0.75, "sequence": 0.75, "unknown": 0.65, "preactivation": 0.52,
}  # fmt: skip


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


@pytest.mark.parametrize("method", ["auto", "recompute", "invert"])
@pytest.mark.parametrize("kind", KINDS)
def test_trains_to_the_same_weights(kind, method):
    plain, converted = make(kind), make(kind)
    report = iabn_hub.convert(converted, images(), method=method)
    assert_equal(train(converted), train(plain))
    assert converted.state_dict().keys() == plain.state_dict().keys()
    if method != "invert":
        assert report.kept.ratio < RATIOS[kind]


@pytest.mark.parametrize("kind", ["resnet", "yolo", "unet3d", "preactivation"])
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

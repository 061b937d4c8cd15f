"""Tools that look for BatchNorm find the layers; tracers, exporters and transforms go through them."""

import copy
import io

import pytest
import timm.layers
import timm.utils
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.optim.swa_utils import AveragedModel, update_bn
from torchvision.models.feature_extraction import create_feature_extractor

import iabn_hub
from iabn_hub import ABN, InPlaceABN, InPlaceABNSync

LAYERS = [ABN, InPlaceABN, InPlaceABNSync]
IN_PLACE = [InPlaceABN, InPlaceABNSync]


class Small(nn.Module):
    """A stem, and a block with a shortcut that the second layer takes in."""

    def __init__(self, norm, **options):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), norm(4, **options)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), norm(4, activation="elu", **options)
        for layer in (self.norm1, self.norm2):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = self.norm1(self.conv1(x))
        return self.norm2(self.conv2(x), x)


def buffers(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


# ---- tools that look for BatchNorm


@pytest.mark.parametrize("cls", LAYERS)
def test_update_bn_renews_the_statistics(cls):
    average = AveragedModel(Small(cls))
    batches = [torch.randn(4, 3, 8, 8) + 3 for _ in range(3)]
    update_bn(batches, average)
    x = torch.cat([average.module.conv1(batch) for batch in batches])
    torch.testing.assert_close(average.module.norm1.running_mean, x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert average.module.norm1.momentum == 0.1
    assert average.module.norm1.num_batches_tracked == 3


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("freeze", [lambda net: timm.utils.freeze(net, ["norm1"]), timm.layers.freeze_batch_norm_2d])
def test_timm_freezes_running_statistics_and_gives_them_back(cls, freeze):
    net = Small(cls)
    freeze(net)
    net.train()
    before = buffers(net.norm1)
    x = torch.randn(2, 3, 8, 8)
    frozen = net.norm1(net.conv1(x))
    torch.testing.assert_close(frozen, copy.deepcopy(net.norm1).eval()(net.conv1(x)))
    net(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.norm1.named_buffers())
    timm.utils.unfreeze(net)
    net.train()
    net(x)
    assert not torch.equal(net.norm1.running_mean, before["running_mean"])
    assert all(p.requires_grad for p in net.parameters())


CONVERTERS = {"torch": nn.SyncBatchNorm.convert_sync_batchnorm, "timm": timm.layers.convert_sync_batchnorm}


@pytest.mark.parametrize("name", CONVERTERS)
@pytest.mark.parametrize("cls", IN_PLACE)
def test_converters_to_synchronised_batchnorm_keep_the_activation(name, cls):
    net = nn.Sequential(Small(cls), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = net[0](x)
    converted = CONVERTERS[name](net)
    assert type(converted[0].norm1) is InPlaceABNSync
    assert type(converted[1]) is nn.SyncBatchNorm
    torch.testing.assert_close(converted[0](x), expected)
    assert type(CONVERTERS[name](cls(3))) is InPlaceABNSync


@pytest.mark.parametrize("convert", [*CONVERTERS.values(), timm.layers.convert_splitbn_model])
def test_what_cannot_be_converted_is_refused(convert):
    with pytest.raises(TypeError, match=r"no (synchronised|split) form"):
        convert(nn.Sequential(ABN(3)))


def test_batchnorm_itself_is_converted_as_ever():
    for convert in CONVERTERS.values():
        assert type(convert(nn.Sequential(nn.BatchNorm2d(3)))[0]) is nn.SyncBatchNorm
    assert isinstance(timm.layers.convert_splitbn_model(nn.Sequential(nn.BatchNorm2d(3)))[0], nn.BatchNorm2d)
    frozen = timm.layers.freeze_batch_norm_2d(nn.Sequential(nn.BatchNorm2d(3)))
    assert not isinstance(frozen[0], nn.BatchNorm2d)


@pytest.mark.parametrize("cls", LAYERS)
def test_a_layer_is_not_folded_into_a_convolution_in_silence(cls):
    for fuse, producer in ((fuse_conv_bn_eval, nn.Conv2d(3, 4, 3)), (fuse_linear_bn_eval, nn.Linear(3, 4))):
        with pytest.raises(TypeError, match="would drop the activation"):
            fuse(producer.eval(), cls(4).eval())
        with pytest.raises(TypeError, match="would drop the activation"):
            fuse(producer.eval(), bn=cls(4).eval())
    x = torch.randn(2, 3)
    producer, norm = nn.Linear(3, 4).eval(), nn.BatchNorm1d(4).eval()
    torch.testing.assert_close(fuse_linear_bn_eval(producer, norm)(x), norm(producer(x)))
    torch.testing.assert_close(fuse_linear_bn_eval(linear=producer, bn=norm)(x), norm(producer(x)))


@pytest.mark.parametrize("cls", LAYERS)
def test_filters_for_weight_decay_find_the_layers(cls):
    norms = [m for m in Small(cls).modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 2
    assert all(p.ndim == 1 for m in norms for p in m.parameters())


# ---- tracers and exporters


@pytest.mark.parametrize("cls", LAYERS)
def test_fx_sees_each_layer_as_one_node(cls):
    net = Small(cls)
    traced = fx.symbolic_trace(net)
    layers = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert layers == ["conv1", "norm1", "conv2", "norm2"]
    x = torch.randn(2, 3, 8, 8)
    for training in (True, False):
        twin = copy.deepcopy(net).train(training)
        traced.train(training)
        torch.testing.assert_close(traced(x), twin(x))
        torch.testing.assert_close(traced.norm1.running_var, twin.norm1.running_var)
        net.load_state_dict(twin.state_dict())


@pytest.mark.parametrize("cls", LAYERS)
def test_torchvision_cuts_a_network_at_any_node(cls):
    net = Small(cls).eval()
    found = create_feature_extractor(net, {"norm1": "first", "conv2": "second"})(x := torch.randn(2, 3, 8, 8))
    torch.testing.assert_close(found["first"], net.norm1(net.conv1(x)))
    torch.testing.assert_close(found["second"], net.conv2(found["first"]))


@pytest.mark.parametrize("architecture", ["test_resnet_iabn", "resnext50_iabn", "densenet121_iabn"])
def test_fx_traces_the_architectures(architecture):
    net = iabn_hub.create_model(architecture).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(fx.symbolic_trace(net)(x), net(x))


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("signed", [True, False])
def test_jit_trace_takes_other_batches(cls, gradients, signed):
    net = Small(cls, **({} if cls is ABN else {"signed_scale": signed})).eval()
    net.norm1.weight.data[0] = -0.7
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(net, torch.randn(2, 3, 8, 8))
        x = torch.randn(5, 3, 8, 8)
        torch.testing.assert_close(traced(x), net(x))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        torch.testing.assert_close(torch.jit.load(file)(x), net(x))


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_export_gives_standard_operators(cls, strict, gradients):
    net = Small(cls).eval()
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(net, (torch.randn(2, 3, 8, 8),), strict=strict)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(program.module()(x), net(x))
    assert not any("iabn_hub" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_compiled_network_stays_one_graph(cls, context, training):
    torch.compiler.reset()
    net = Small(cls).train(training)
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8, 8)
    with context():
        torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(buffers(net), buffers(twin))


# ---- transforms


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("inplace", [True, False])
def test_torch_func_computes_what_autograd_does(cls, inplace):
    net = Small(cls, **({} if cls is ABN else {"inplace": inplace})).double().eval()
    x, t = (torch.randn(5, 3, 6, 6, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(vmap(copy.deepcopy(net))(x[:, None])[:, 0], copy.deepcopy(net)(x))  # never run before
    weights, rest = dict(net.named_parameters()), dict(net.named_buffers())

    def loss(weights, x):
        return functional_call(net, (weights, rest), (x,)).square().sum()

    ours = grad(loss)(weights, x)
    theirs = torch.autograd.grad(loss(weights, x), list(weights.values()))
    torch.testing.assert_close(list(ours.values()), list(theirs))

    each = vmap(grad(lambda w, x: loss(w, x[None])), in_dims=(None, 0))(weights, x)
    torch.testing.assert_close([g.sum(0) for g in each.values()], list(theirs))
    torch.testing.assert_close(vmap(net)(x[:, None])[:, 0], net(x))

    y, tangent = jvp(net, (x,), (t,))
    step = 1e-6
    torch.testing.assert_close(tangent, (net(x + step * t) - net(x - step * t)) / (2 * step), rtol=1e-5, atol=1e-6)
    _, pull = vjp(net, x)
    torch.testing.assert_close((pull(torch.ones_like(y))[0] * t).sum(), tangent.sum())


@pytest.mark.parametrize("cls", LAYERS)
def test_forward_mode_and_second_order_transforms(cls):
    layer = cls(2, activation="elu").double().eval()
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones(3, 2, dtype=torch.float64))
        tangent = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
    torch.testing.assert_close(tangent, torch.autograd.grad(layer(x * 1).sum(), x)[0])
    second = hessian(lambda v: layer(v[None]).square().sum())(x.detach()[0])
    assert second.diagonal().abs().max() > 0


# ---- inputs that must not be overwritten


@pytest.mark.parametrize("cls", IN_PLACE)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("joined", [True, False])
def test_a_checkpointed_part_may_begin_with_the_layer(cls, reentrant, joined):
    conv, layer, last = nn.Conv2d(3, 4, 3), cls(4), nn.Conv2d(4, 4, 3)
    images = torch.randn(2, 3, 8, 8)
    shortcut = torch.randn(2, 4, 6, 6, requires_grad=True) if joined else None

    def part(x):
        return last(layer(x, shortcut))

    part(conv(images)).square().sum().backward()
    expected = conv.weight.grad.clone()
    conv.weight.grad = None
    torch.utils.checkpoint.checkpoint(part, conv(images), use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(conv.weight.grad, expected)


@pytest.mark.parametrize("cls", IN_PLACE)
@pytest.mark.parametrize("kind", ["leaf", "view of a leaf", "inference tensor", "expanded", "the residual itself"])
def test_an_input_that_must_stay_is_left_alone(cls, kind, caplog):
    layer, twin = cls(4), cls(4, inplace=False)
    x = torch.randn(2, 4, 3)
    if kind == "leaf":
        x.requires_grad_()
    elif kind == "view of a leaf":
        x = torch.randn(8, 3, requires_grad=True).view(2, 4, 3)
    elif kind == "inference tensor":
        with torch.inference_mode():
            x = torch.randn(2, 4, 3)
    elif kind == "expanded":
        x = torch.randn(2, 1, 3).expand(2, 4, 3)
    residual = x[:] if kind == "the residual itself" else None
    before = x.detach().clone()
    torch.testing.assert_close(layer(x, residual), twin(x, residual))
    assert torch.equal(x, before)


@pytest.mark.parametrize("cls", IN_PLACE)
def test_a_feature_evaluated_without_gradients_keeps_its_graph(cls):
    conv, layer = nn.Conv2d(3, 4, 3), cls(4)
    feature = conv(torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        layer(feature)
    torch.testing.assert_close(
        torch.autograd.grad(feature.square().sum(), conv.bias)[0], 2 * feature.detach().sum((0, 2, 3))
    )


@pytest.mark.parametrize("cls", IN_PLACE)
def test_version_counter_shows_an_overwritten_input(cls):
    layer, x = cls(4), torch.randn(2, 4, 3)
    with torch.no_grad():
        assert layer(x) is x
    assert x._version > 0


@pytest.mark.parametrize("cls", IN_PLACE)
@pytest.mark.parametrize(("inplace", "overwrites"), [(True, False), (False, False), ("always", True)])
def test_eval_mode_overwrites_on_demand_alone(cls, inplace, overwrites):
    layer, x = cls(4, inplace=inplace).eval(), torch.randn(2, 4, 3)
    with torch.no_grad():
        assert (layer(x) is x) == overwrites


@pytest.mark.parametrize(
    "architecture", ["test_resnet_iabn", "resnext50_iabn", "densenet121_iabn", "wider_resnet16_iabn"]
)
def test_hooks_on_convolutions_see_their_outputs_in_eval_mode(architecture):
    net = iabn_hub.create_model(architecture, num_classes=2).eval()
    seen = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, i, y: seen.append((y, y.detach().clone())))
    net(torch.randn(1, 3, 64, 64))
    assert len(seen) > 5
    changed = sum(not torch.equal(kept, copied) for kept, copied in seen)
    assert changed == 0


@pytest.mark.parametrize("architecture", ["test_resnet_iabn", "resnext50_iabn", "wider_resnet16_a2_iabn"])
@pytest.mark.parametrize("norm_layer", ["iabn", "abn"])
def test_full_backward_hooks_go_on_any_module(architecture, norm_layer):
    net = iabn_hub.create_model(architecture, num_classes=2, norm_layer=norm_layer).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.manual_seed(0)  # of the dropout
    net(x).square().mean().backward()
    expected = [p.grad for p in net.parameters()]
    net.zero_grad()
    seen = set()
    for name, module in net.named_modules():
        module.register_full_backward_hook(lambda module, given, result, name=name: seen.add(name))
    torch.manual_seed(0)
    net(x.requires_grad_()).square().mean().backward()
    assert seen == {name for name, _ in net.named_modules()}
    torch.testing.assert_close([p.grad for p in net.parameters()], expected)


# ---- a slope of 0


@pytest.mark.parametrize("cls", IN_PLACE)
@pytest.mark.parametrize(("activation", "function"), [("leaky_relu", torch.relu), ("elu", torch.relu)])
def test_a_slope_of_zero_serves_inference_and_is_refused_in_training(cls, activation, function):
    layer = cls(4, activation=activation, activation_param=0.0).eval()
    linear = cls(4, activation="identity").eval()
    x = torch.randn(2, 4, 3)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), function(linear(x)))
    for training in (True, False):
        layer.train(training)
        before = x.clone()
        with pytest.raises(ValueError, match=r"cannot be inverted.*use activation_param=0\.01.*or ABN"):
            layer(x)
        assert torch.equal(x, before)
        assert layer.num_batches_tracked == 0


def test_names_of_the_earlier_package_get_a_sentence():
    with pytest.raises(TypeError, match=r"slope=0\.1 is called activation_param=0\.1"):
        InPlaceABN(4, slope=0.1)
    with pytest.raises(ValueError, match="'none' is called 'identity'"):
        InPlaceABNSync(4, activation="none")


@pytest.mark.parametrize("cls", LAYERS)
def test_shapes_are_known_without_data(cls):
    with torch.device("meta"):
        assert Small(cls)(torch.randn(2, 3, 8, 8)).shape == (2, 4, 8, 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = Small(cls)
        net(torch.randn(2, 3, 8, 8)).sum().backward()
        assert net.norm1.weight.grad.shape == (4,)

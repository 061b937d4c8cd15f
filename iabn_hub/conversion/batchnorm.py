"""`to_batchnorm`: the same network with standard BatchNorm layers, for tools that know no others."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from ..layers import ABN, InPlaceABN, InPlaceGroupNorm
from ..layers.reference import effective_scale
from .convert import restore

_LAYERS = (ABN, InPlaceGroupNorm)
_CONVOLUTIONS = (nn.modules.conv._ConvNd, nn.Linear)
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


class NormAct(nn.Module):
    """A norm, a residual sum if there is one, and an activation: standard modules that tools recognise.

    Attributes:
        norm: `BatchNorm1d`, `BatchNorm2d` or `BatchNorm3d`, or `GroupNorm` for instance and group norms.
        act: `LeakyReLU`, `ELU`, `ReLU` or `Identity`.
    """

    def __init__(self, norm: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.act = act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(norm(x) [+ residual]), (N, C, *) like x and residual."""
        y: Tensor = self.norm(x)
        if residual is not None:
            y = y + residual
        z: Tensor = self.act(y)
        return z


def to_batchnorm(model: nn.Module) -> nn.Module:
    """Replace every `InPlaceABN`, `InPlaceABNSync` and `ABN` by a BatchNorm and its activation.

    `InPlaceInstanceNorm` and `InPlaceGroupNorm` become `nn.GroupNorm` and their activation.

    The network computes the same up to rounding, in training and eval mode. Use it before export to ONNX or
    TorchScript, quantisation, folding of norms into convolutions, or for a tool that knows only standard layers.

    Args:
        model: any network; it is copied, not changed. A conversion by `convert` is not part of the copy.

    Returns:
        The copy, with the same dtypes, devices, mode and `requires_grad`. In place of a layer stands a module with the
        children `norm` and `act`, so that `bn1.weight` is now `bn1.norm.weight`. Its weight is the scale of the layer:
        `|weight| + eps`, or `weight` with `signed_scale`. The dimension of a norm is that of the convolution before it
        (behind a linear layer 1). Statistics of `InPlaceABNSync` become those of one process;
        `nn.SyncBatchNorm.convert_sync_batchnorm` synchronises them.

    Example:
        >>> import torch, iabn_hub
        >>> model = iabn_hub.create_model("test_resnet_iabn").eval()
        >>> standard = iabn_hub.to_batchnorm(model)
        >>> x = torch.randn(2, 3, 32, 32)
        >>> torch.allclose(standard(x), model(x), atol=1e-5)
        True
    """
    model = restore(copy.deepcopy(model))
    replaced: dict[int, NormAct] = {}
    dimensions = _dimensions(model)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if isinstance(child, _LAYERS):
                if id(child) not in replaced:
                    replaced[id(child)] = _standard(child, dimensions[id(child)])
                module._modules[name] = replaced[id(child)]
    return _standard(model, 2) if isinstance(model, _LAYERS) else model


def _dimensions(model: nn.Module) -> dict[int, int]:
    """Spatial dimensions of each layer's input, by id: those of the last convolution before it, else of the next."""
    found: dict[int, int] = {}
    waiting: list[int] = []
    last: int | None = None
    for module in model.modules():
        if isinstance(module, _CONVOLUTIONS):
            last = 0 if isinstance(module, nn.Linear) else len(module.kernel_size)
            found.update((layer, last) for layer in waiting)
            waiting.clear()
        elif isinstance(module, _LAYERS):
            if last is None:
                waiting.append(id(module))
            else:
                found[id(module)] = last
    return found | dict.fromkeys(waiting, 2)


def _standard(layer: Any, dimensions: int) -> NormAct:
    norm = _group_norm(layer) if isinstance(layer, InPlaceGroupNorm) else _batch_norm(layer, dimensions)
    module = NormAct(norm, _activation(layer)).train(layer.training)
    for name in _HOOKS:
        setattr(module, name, getattr(layer, name))
    return module


def _group_norm(layer: InPlaceGroupNorm) -> Any:
    norm: Any = nn.GroupNorm(layer.num_groups, layer.num_channels, layer.eps, layer.affine)
    norm.weight, norm.bias = layer.weight, layer.bias
    return norm


def _batch_norm(layer: ABN, dimensions: int) -> nn.Module:
    kind = {3: nn.BatchNorm3d, 2: nn.BatchNorm2d}.get(dimensions, nn.BatchNorm1d)
    norm = kind(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    for name, value in (*layer._parameters.items(), *layer._buffers.items()):
        setattr(norm, name, value)
    weight = layer.weight
    if isinstance(layer, InPlaceABN) and weight is not None and not layer.signed_scale:
        scale = effective_scale(weight.detach(), layer.eps, signed_scale=False)
        norm.weight = nn.Parameter(scale, requires_grad=weight.requires_grad)
    return norm


def _activation(layer: Any) -> nn.Module:
    if layer.activation == "leaky_relu":
        return nn.LeakyReLU(layer.activation_param)
    if layer.activation == "elu":
        return nn.ELU(layer.activation_param)
    return nn.ReLU() if layer.activation == "relu" else nn.Identity()

"""The layers as modules: ABN, InPlaceABN and InPlaceABNSync, with the argument names of inplace_abn."""

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .activations import ACTIVATIONS, invertible_activation
from .distributed import Peers
from .functional import inplace_abn, inplace_abn_sync
from .reference import effective_scale

_logger = logging.getLogger(__name__)


class ABN(nn.Module):
    """A standard BatchNorm followed by its activation, in one module: `y = act(BN(x) [+ residual])`.

    The scale is `weight` itself, as in `torch.nn.BatchNorm2d`. Use it for checkpoints trained with standard
    BatchNorm, for 'relu', and as the baseline of a comparison; it keeps its input for the backward pass.

    Args:
        num_features: channels C of the (N, C) or (N, C, *) input.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics; None for their plain average so far.
        affine: learn `weight` and `bias`, both (C,).
        track_running_stats: keep running statistics; without them every mode uses the batch.
        activation: 'relu', 'leaky_relu', 'elu' or 'identity'.
        activation_param: negative slope of leaky_relu, alpha of elu.

    Raises:
        ValueError: unknown activation; at call time, one value per channel in training.
    """

    _version = 2  # 2: num_batches_tracked
    num_batches_tracked: Optional[Tensor]
    running_mean: Optional[Tensor]
    running_var: Optional[Tensor]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Optional[float] = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str = "leaky_relu",
        activation_param: float = 0.01,
        *,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.activation = activation
        self.activation_param = activation_param
        self._check_activation()
        where: Dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_features, **where)) if affine else None
        self.bias = nn.Parameter(torch.empty(num_features, **where)) if affine else None
        if track_running_stats:
            self.register_buffer("running_mean", torch.empty(num_features, **where))
            self.register_buffer("running_var", torch.empty(num_features, **where))
            self.register_buffer("num_batches_tracked", torch.empty((), dtype=torch.long, device=device))
        else:
            self.running_mean = self.running_var = self.num_batches_tracked = None
        self.reset_parameters()

    def _check_activation(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}: choose one of {', '.join(ACTIVATIONS)}")

    @torch.jit.unused
    def reset_running_stats(self) -> None:
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    @torch.jit.unused
    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        """act(BN(x) [+ residual]) as a new tensor; x and residual (N, C, *) of one shape."""
        return self._standard(x, residual, self.weight)

    def _standard(self, x: Tensor, residual: Optional[Tensor], scale: Optional[Tensor]) -> Tensor:
        """The layer from standard operators alone; also what TorchScript compiles of the in-place layers."""
        momentum: Optional[float] = self.momentum
        tracked = self.num_batches_tracked
        if self.training and self.track_running_stats and tracked is not None:
            tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(tracked.item())
        mean, var = self.running_mean, self.running_var
        if self.training and not self.track_running_stats:  # it may be switched off for a while
            mean = var = None
        bias: Optional[Tensor] = self.bias
        if x.dtype == torch.float64:  # the operator wants one dtype then
            mean = mean.double() if mean is not None else None
            var = var.double() if var is not None else None
            scale = scale.double() if scale is not None else None
            bias = bias.double() if bias is not None else None
        training = self.training or mean is None
        y = F.batch_norm(x, mean, var, scale, bias, training, 0.0 if momentum is None else momentum, self.eps)
        if self.training and mean is not None and var is not None:
            self._set_running_stats(mean, var)
        if residual is not None:
            if residual.shape != x.shape:
                raise ValueError(f"residual has shape {residual.shape}, the input {x.shape}: they must be equal")
            y = y + residual.to(y.dtype)
        if self.activation == "relu":
            return F.relu(y, inplace=True)
        if self.activation == "leaky_relu":
            return F.leaky_relu(y, self.activation_param, inplace=True)
        if self.activation == "elu":
            return F.elu(y, self.activation_param, inplace=True)
        return y

    def _set_running_stats(self, mean: Tensor, var: Tensor) -> None:
        running_mean, running_var = self.running_mean, self.running_var
        if running_mean is not None and running_var is not None and running_mean.dtype != mean.dtype:
            running_mean.copy_(mean)
            running_var.copy_(var)

    @torch.jit.unused
    def _load_from_state_dict(
        self,
        state_dict: Dict[str, Any],
        prefix: str,
        local_metadata: Dict[str, Any],
        strict: bool,
        missing_keys: List[str],
        unexpected_keys: List[str],
        error_msgs: List[str],
    ) -> None:
        key = prefix + "num_batches_tracked"
        if self.num_batches_tracked is not None and (local_metadata.get("version") or 1) < 2 and key not in state_dict:
            state_dict[key] = torch.zeros((), dtype=torch.long)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        parameter = f"[{self.activation_param}]" if self.activation in ("leaky_relu", "elu") else ""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"activation={self.activation}{parameter}"
        )


class InPlaceABN(ABN):
    """BatchNorm and activation in place, keeping only the output for the backward pass.

    See `iabn_hub.inplace_abn` for what is computed, kept and overwritten. Differs from `ABN` in its scale,
    `|weight| + eps` (the published checkpoints need it), and in refusing 'relu', which has no inverse.

    Args:
        signed_scale: the scale is `sign(weight)·(|weight| + eps)`: weights of a standard BatchNorm load unchanged.
        inplace: False leaves the input alone and writes a new tensor; what is kept stays the same.
        num_features, eps, momentum, affine, track_running_stats, activation, activation_param: as in `ABN`.

    Example:
        >>> import torch, iabn_hub
        >>> conv = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
        >>> norm = iabn_hub.InPlaceABN(8, activation="elu", activation_param=1.0)
        >>> norm(conv(torch.randn(2, 3, 16, 16))).shape
        torch.Size([2, 8, 16, 16])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Optional[float] = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str = "leaky_relu",
        activation_param: float = 0.01,
        *,
        signed_scale: bool = False,
        inplace: bool = True,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, activation, activation_param,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.signed_scale = signed_scale
        self.inplace = inplace

    def _check_activation(self) -> None:
        invertible_activation(self.activation, self.activation_param)

    def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        """act(γ·x̂ + β [+ residual]), (N, C, *) like x and residual; x is overwritten if `self.inplace`."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._standard(x, residual, self._scale())
        return self._in_place(x, residual)

    def _scale(self) -> Optional[Tensor]:
        weight = self.weight
        if weight is None:
            return None
        return effective_scale(weight, self.eps, self.signed_scale)

    @torch.jit.unused
    def _in_place(self, x: Tensor, residual: Optional[Tensor]) -> Tensor:
        return inplace_abn(x, residual=residual, **self._arguments())

    @torch.jit.unused
    def _arguments(self) -> Any:
        """The functions' arguments from this layer's state, one batch further if in training."""
        momentum: Any = self.momentum
        tracking = self.training and self.track_running_stats  # which may be switched off for a while
        if tracking and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 0.0 if self.num_batches_tracked is None else 1 / self.num_batches_tracked
        names = ("weight", "bias", "eps", "activation", "activation_param", "inplace", "signed_scale")
        uses_running = tracking or not self.training
        return {name: getattr(self, name) for name in names} | {
            "running_mean": self.running_mean if uses_running else None,
            "running_var": self.running_var if uses_running else None,
            "training": self.training or self.running_mean is None,
            "momentum": momentum,
        }

    def extra_repr(self) -> str:
        extra = (", signed_scale=True" if self.signed_scale else "") + ("" if self.inplace else ", inplace=False")
        return super().extra_repr() + extra


class InPlaceABNSync(InPlaceABN):
    """InPlaceABN with batch statistics over a process group; without one it is InPlaceABN.

    Args:
        group: a `torch.distributed` group, or None for the default one. The rest as in `InPlaceABN`.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Optional[float] = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str = "leaky_relu",
        activation_param: float = 0.01,
        group: Any = None,
        *,
        signed_scale: bool = False,
        inplace: bool = True,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, activation, activation_param,
            signed_scale=signed_scale, inplace=inplace, device=device, dtype=dtype,
        )  # fmt: skip
        self.set_group(group)

    @torch.jit.unused
    def set_group(self, group: Any) -> None:
        """Synchronise over `group` from now on; not between a forward pass and its backward pass."""
        self.group = group
        self._compared = False  # with the other processes: what must be alike for the exchange

    @torch.jit.unused
    def _in_place(self, x: Tensor, residual: Optional[Tensor]) -> Tensor:
        if self.training and not self._compared and not torch.compiler.is_compiling():
            peers = Peers.of(self.group)
            if peers.count > 1:
                peers.check_alike(x)
            self._compared = peers.count > 1
        return inplace_abn_sync(x, residual=residual, group=self.group, **self._arguments())

    @torch.jit.unused
    def __deepcopy__(self, memo: Any) -> "InPlaceABNSync":
        memo[id(self.group)] = self.group  # a group cannot be copied, and is the same for the copy
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


def convert_sync(module: nn.Module, group: Any = None) -> nn.Module:
    """Replace every InPlaceABN within `module` by an InPlaceABNSync over `group`, with the same parameters.

    Layers of a subclass, and parametrised ones, become a subclass of both.

    Returns:
        `module`, changed in place, or the new layer if `module` itself is one.

    Example:
        >>> import torch, iabn_hub
        >>> iabn_hub.convert_sync(torch.nn.Sequential(iabn_hub.InPlaceABN(4)))
        Sequential(
          (0): InPlaceABNSync(4, eps=1e-05, momentum=0.1, affine=True, activation=leaky_relu[0.01])
        )
    """
    return _replaced(module, lambda layer: _to_sync(layer, group), {})


def convert_local(module: nn.Module) -> nn.Module:
    """The way back: replace every InPlaceABNSync within `module` by an InPlaceABN, with the same parameters."""
    return _replaced(module, _to_local, {})


def _replaced(module: nn.Module, convert: Callable[[nn.Module], nn.Module], done: Dict[int, nn.Module]) -> nn.Module:
    """`module` with every layer within it converted; a layer that occurs in several places stays one layer."""
    if id(module) not in done:
        done[id(module)] = convert(module)
        if done[id(module)] is module:
            for name, child in module.named_children():
                setattr(module, name, _replaced(child, convert, done))
    return done[id(module)]


def _to_sync(layer: nn.Module, group: Any) -> nn.Module:
    if not isinstance(layer, InPlaceABN) or isinstance(layer, InPlaceABNSync):
        return layer
    original: Any = type(layer)
    cls = _sync_class(original)
    converted: Any = cls.__new__(cls)
    converted.__dict__.update(layer.__dict__)
    converted.set_group(group)
    return converted


def _to_local(layer: nn.Module) -> nn.Module:
    if not isinstance(layer, InPlaceABNSync):
        return layer
    cls = InPlaceABN if type(layer) is InPlaceABNSync else getattr(type(layer), "local_class", None)
    if cls is None:
        _logger.warning("%s is a synchronised class of its own and stays as it is", type(layer).__name__)
        return layer
    converted: Any = cls.__new__(cls)
    converted.__dict__.update(layer.__dict__)
    del converted.group, converted._compared
    return converted


@functools.cache
def _sync_class(cls: type[Any]) -> Any:
    """The synchronised form of InPlaceABN, or of a subclass, such as the class of a parametrised layer."""
    if cls is InPlaceABN:
        return InPlaceABNSync
    return type(f"{cls.__name__}Sync", (cls, InPlaceABNSync), {"local_class": cls})

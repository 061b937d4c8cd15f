"""The layers as modules: ABN, InPlaceABN and InPlaceABNSync, with the argument names of inplace_abn."""

import copy
from typing import Any, Optional, Tuple, Union

import torch
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import Self

from .activations import ACTIVATIONS, activation_number, check_activation
from .degenerate import RENEWAL, can_look, unrecoverable_channels
from .distributed import ALONE, Peers
from .functional import forward
from .reference import effective_scale
from .standard import batch_norm_act


class ABN(_BatchNorm):
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

    # A _BatchNorm, so that tools that look for one find it: update_bn and precise BN renew its statistics, optimizers
    # spare its parameters weight decay, FSDP keeps it in float32. `compatibility` takes care of those that replace it.

    _running_stats_frozen: bool = False

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
        slope: None = None,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        if slope is not None:
            raise TypeError(f"slope={slope} is called activation_param={slope}")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.activation = activation
        self.activation_param = activation_param
        self._check_activation()

    def _check_activation(self) -> None:
        check_activation(self.activation, ACTIVATIONS)

    @torch.jit.unused
    def freeze_running_stats(self, frozen: bool = True) -> None:
        """Normalise with the running statistics, and leave them alone, in training as well; False ends that."""
        self._running_stats_frozen = frozen
        self.training = self.training and not frozen

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self._running_stats_frozen)

    def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        """act(BN(x) [+ residual]) as a new tensor; x and residual (N, C, *) of one shape."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            if isinstance(x, fx.Proxy):
                return self._traced(x, residual)
            self._check_shapes(x, residual)
        return self._standard(x, residual, self.weight)

    @torch.jit.unused
    def _traced(self, x: Tensor, residual: Optional[Tensor]) -> Tensor:
        """A node of its own in a graph of torch.fx, like the layers of torch.nn."""
        tracer: Any = x.tracer  # type: ignore[attr-defined]
        arguments = (x,) if residual is None else (x, residual)
        node: Any = tracer.create_proxy("call_module", tracer.path_of_module(self), arguments, {})
        return node

    @torch.jit.unused
    def _check_shapes(self, x: Tensor, residual: Optional[Tensor]) -> None:
        if residual is not None and not torch._C._get_tracing_state() and residual.shape != x.shape:
            raise ValueError(f"residual has shape {residual.shape}, the input {x.shape}: they must be equal")

    def _standard(self, x: Tensor, residual: Optional[Tensor], scale: Optional[Tensor]) -> Tensor:
        """The layer from standard operators alone; also what TorchScript compiles of the in-place layers."""
        momentum: Optional[float] = self.momentum
        tracked = self.num_batches_tracked
        if momentum is None:
            momentum = 1.0 / (float(tracked.item()) + 1.0) if self.training and tracked is not None else 0.0
        mean, var = self._statistics_in_use()
        y = batch_norm_act(
            x, scale, self.bias, mean, var, self.training or mean is None, momentum, self.eps, self.activation,
            self.activation_param, residual,
        )  # fmt: skip
        return self._counted(y)

    def _statistics_in_use(self) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        """The running statistics, unless their tracking is switched off in training."""
        if self.training and not self.track_running_stats:
            return None, None
        return self.running_mean, self.running_var

    def _counted(self, y: Tensor) -> Tensor:
        """Count the batch that became y, which is not done before: a refused one must not count."""
        tracked = self.num_batches_tracked
        if self.training and self.track_running_stats and tracked is not None:
            tracked.add_(1)
        return y

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
        signed_scale: the scale is `weight` itself, as in `inplace_abn`: weights of a standard BatchNorm load unchanged.
        inplace: overwrite the input in training; False writes a new tensor, and what is kept stays the same. In eval
            mode True writes a new tensor as well, so that hooks see what a convolution returned; 'always' does not.
        keep_input: keep the input of channels whose scale is too near 0 to recover x̂ from the output: 'auto' looks at
            the first batch, and again every hundred updates of the weight; True keeps it all, False none of it.
        num_features, eps, momentum, affine, track_running_stats, activation, activation_param: as in `ABN`.

    Example:
        >>> import torch, iabn_hub
        >>> conv = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
        >>> norm = iabn_hub.InPlaceABN(8, activation="elu", activation_param=1.0)
        >>> norm(conv(torch.randn(2, 3, 16, 16))).shape
        torch.Size([2, 8, 16, 16])
    """

    keep_input: Union[bool, str] = "auto"
    _kept_channels: Any = False
    _looked_at: Any = (0, None, None)

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
        inplace: Union[bool, str] = True,
        keep_input: Union[bool, str] = "auto",
        slope: None = None,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, activation, activation_param,
            slope=slope, device=device, dtype=dtype,
        )  # fmt: skip
        if inplace not in (True, False, "always"):
            raise ValueError(f"inplace is {inplace!r}: choose True, False or 'always'")
        if keep_input not in (True, False, "auto"):
            raise ValueError(f"keep_input is {keep_input!r}: choose True, False or 'auto'")
        self.signed_scale = signed_scale
        self.inplace = inplace
        self.keep_input = keep_input

    def _check_activation(self) -> None:
        activation_number(self.activation, self.activation_param, invertible=False)

    def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        """act(γ·x̂ + β [+ residual]), (N, C, *) like x and residual; x is overwritten if `inplace`, in training."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._standard(x, residual, self._scale())
        if isinstance(x, fx.Proxy):
            return self._traced(x, residual)
        return self._in_place(x, residual)

    def _scale(self) -> Optional[Tensor]:
        weight = self.weight
        if weight is None:
            return None
        return effective_scale(weight, self.eps, self.signed_scale)

    @torch.jit.unused
    def _in_place(self, x: Tensor, residual: Optional[Tensor]) -> Tensor:
        return self._normalised(x, residual, ALONE)

    @torch.jit.unused
    def _normalised(self, x: Tensor, residual: Optional[Tensor], peers: Peers) -> Tensor:
        """The layer on this state, which training renews."""
        training = self.training
        momentum: Any = self.momentum
        tracked = self.num_batches_tracked
        if momentum is None:
            momentum = 0.0 if tracked is None else 1 / (tracked + 1)
        mean, var = self._statistics_in_use()
        inplace, weight, bias = self.inplace, self.weight, self.bias
        keep: Any = self.keep_input
        if keep == "auto":
            keep = self._channels_to_keep(x, residual, weight, bias)
        return forward(
            x, weight, bias, mean, var, training or mean is None, momentum, self.eps, self.activation,
            self.activation_param, residual, inplace == "always" or (bool(inplace) and training), self.signed_scale,
            keep, peers, tracked if training and self.track_running_stats else None,
        )  # fmt: skip

    @torch.jit.unused
    def _channels_to_keep(
        self, x: Tensor, residual: Optional[Tensor], weight: Optional[Tensor], bias: Optional[Tensor]
    ) -> Any:
        """Indices of the channels whose input must be kept, or False, as of the last look at the data."""
        if weight is None or bias is None or not torch.is_grad_enabled() or not weight.requires_grad:
            return False
        if torch.compiler.is_compiling() or weight.is_inference():
            return self._kept_channels
        # Tied to the weight's version: a checkpointed part must decide the same when it runs again.
        version, dtype, device = self._looked_at
        if version <= weight._version < version + RENEWAL and dtype == x.dtype and device == x.device:
            return self._kept_channels
        if can_look(x):
            found = unrecoverable_channels(weight, bias, residual, x.dtype, self.eps, self.signed_scale)
            self._kept_channels = False if found is None else found
            self._looked_at = (weight._version, x.dtype, x.device)
        return self._kept_channels

    @torch.jit.unused
    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._looked_at = (0, None, None)

    def extra_repr(self) -> str:
        signed = ", signed_scale=True" if self.signed_scale else ""
        inplace = "" if self.inplace is True else f", inplace={self.inplace}"
        return super().extra_repr() + signed + inplace


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
        inplace: Union[bool, str] = True,
        keep_input: Union[bool, str] = "auto",
        slope: None = None,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, activation, activation_param,
            signed_scale=signed_scale, inplace=inplace, keep_input=keep_input, slope=slope, device=device, dtype=dtype,
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
        peers = Peers.of(self.group) if self.training or self.running_mean is None else ALONE
        return self._normalised(x, residual, peers)

    @torch.jit.unused
    def __deepcopy__(self, memo: Any) -> "InPlaceABNSync":
        memo[id(self.group)] = self.group  # a group cannot be copied, and is the same for the copy
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

"""What every architecture shares: stages, taps, head, and the norm layers they are built from."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import ABN, InPlaceABN, InPlaceABNSync
from ..layers.pooling import MaxPool2d

NORM_LAYERS = {"iabn": InPlaceABN, "iabn_sync": InPlaceABNSync, "abn": ABN}
NormFactory = Callable[..., nn.Module]


def norm_factory(
    norm_layer: Union[str, NormFactory] = "iabn",
    activation: str = "leaky_relu",
    activation_param: float = 0.01,
    signed_scale: bool = False,
    device: Any = None,
    dtype: Optional[torch.dtype] = None,
) -> NormFactory:
    """A function `norm(channels, activation=…, inplace=…)` that makes one layer of the chosen kind.

    Args:
        norm_layer: 'iabn', 'iabn_sync', 'abn', or a class with the arguments of `InPlaceABN`.
        activation, activation_param: of every layer, unless a call says otherwise.
        signed_scale: the in-place layers' option of that name; 'abn' always has a signed scale.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(norm_layer, str) and norm_layer not in NORM_LAYERS:
        raise ValueError(f"unknown norm_layer {norm_layer!r}: choose one of {', '.join(NORM_LAYERS)}, or pass a class")
    cls = NORM_LAYERS[norm_layer] if isinstance(norm_layer, str) else norm_layer
    only_in_place = {"signed_scale": True} if signed_scale and cls is not ABN else {}

    def norm(channels: int, activation: str = activation, inplace: bool = True) -> nn.Module:
        options: Dict[str, Any] = dict(only_in_place, activation=activation, activation_param=activation_param)
        if not inplace and cls is not ABN:
            options["inplace"] = False
        return cls(channels, **options, device=device, dtype=dtype)

    return norm


def stage_strides(strides: Tuple[int, ...], stem_stride: int, output_stride: int) -> List[Tuple[int, int, int]]:
    """(stride, dilation, reduction) of each stage when strides past `output_stride` turn into dilation.

    All convolutions of a dilated stage are dilated, its first block included, as the published networks have it.
    """
    total = stem_stride
    for stride in strides:
        total *= stride
    choices = [2**i for i in range(stem_stride.bit_length() - 1, total.bit_length())]
    if output_stride not in choices:
        raise ValueError(f"output_stride is {output_stride}: choose one of {', '.join(map(str, choices))}")
    plan = []
    reduction, dilation = stem_stride, 1
    for stride in strides:
        if reduction >= output_stride:
            dilation *= stride
            stride = 1
        reduction *= stride
        plan.append((stride, dilation, reduction))
    return plan


class Network(nn.Module):
    """A stem, numbered stages `layer1`…, a last norm and a classifier, with timm's interface.

    A family fills in `forward_stem` and the attributes `layer1`…, then calls `finish`. `maxpool` stands between them.
    """

    stages: int = 4

    def __init__(self, num_classes: int, in_chans: int, global_pool: str, drop_rate: float) -> None:
        super().__init__()
        if num_classes > 0 and not global_pool:
            raise ValueError("a classifier needs global pooling: pass global_pool='avg', or num_classes=0")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.feature_info: List[Dict[str, Any]] = []
        self.maxpool: nn.Module = MaxPool2d(3, stride=2, padding=1)
        self._first_pool = global_pool

    def finish(self, num_features: int, norm: nn.Module, activation: str, activation_param: float, where: Any) -> None:
        """Close the network with its last norm and head, and initialise the weights."""
        self.norm = norm
        self.num_features = self.head_hidden_size = num_features
        self._make_head(self.num_classes, self._first_pool, **where)
        self._order_children()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                slope = activation_param if activation == "leaky_relu" else 0.0
                nn.init.kaiming_normal_(module.weight, slope, mode="fan_out", nonlinearity="leaky_relu")

    def _order_children(self) -> None:
        """Register the pooling behind the stem, where it runs: tools cut networks by the order of their children."""
        names = [name for name in self._modules if name != "maxpool"]
        names.insert(names.index("layer1"), "maxpool")
        modules = {name: self._modules[name] for name in names}
        self._modules.clear()
        self._modules.update(modules)

    def _make_head(self, num_classes: int, global_pool: str, device: Any = None, dtype: Any = None) -> None:
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        pooled = self.num_features * self.global_pool.feat_mult()
        self.head_hidden_size = pooled
        self.fc = nn.Linear(pooled, num_classes, device=device, dtype=dtype) if num_classes > 0 else nn.Identity()

    def forward_stem(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to the last feature map, (N, num_features, H / output_stride, W / output_stride)."""
        x = self.maxpool(self.forward_stem(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            for name in self._layer_names():
                x = checkpoint_seq(getattr(self, name), x)
        else:
            x = self.forward_stages(x)
        return self.norm(x)

    def forward_stages(self, x: Tensor) -> Tensor:
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # type: ignore[operator]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last feature map to logits (N, num_classes), or to pooled features with `pre_logits`."""
        x = self.global_pool(x)
        if self.drop_rate > 0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W), normalised as `pretrained_cfg` says, to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def _layer_names(self) -> List[str]:
        return [f"layer{i}" for i in range(1, self.stages + 1)]

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Feature maps of the stem (index 0) and of the stages (1, 2, …), as timm defines them.

        No layer overwrites a map that is handed out here: the next one to touch it writes a new tensor.

        Args:
            indices: which maps; an int takes the last n, None all.
            norm: apply the last norm to the last map.
            stop_early: do not compute past the last map asked for.
            intermediates_only: return the list alone, not (last features, list).
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}: only 'NCHW' exists here")
        wanted, last = feature_take_indices(self.stages + 1, indices)
        taps = []
        x = self.forward_stem(x)
        if 0 in wanted:
            taps.append(x)
        x = self.maxpool(x)
        names = self._layer_names()
        for index, name in enumerate(names[:last] if stop_early else names, start=1):
            layer = getattr(self, name)
            x = checkpoint_seq(layer, x) if self.grad_checkpointing else layer(x)
            if index in wanted:
                taps.append(self.norm(x) if norm and index == self.stages else x)
        if intermediates_only:
            return taps
        return (x if stop_early and last < self.stages else self.norm(x)), taps

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        """Drop what lies behind the last feature map of `indices`; returns the indices kept."""
        wanted, last = feature_take_indices(self.stages + 1, indices)
        cut = last < self.stages
        for name in self._layer_names()[last:]:
            setattr(self, name, nn.Sequential())
        if last == 0:
            self.maxpool = nn.Identity()
        if prune_norm or cut:
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or cut:
            self.reset_classifier(0, "")
        return list(wanted)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """A new head for `num_classes` (0: none); the pooling stays unless `global_pool` names another."""
        like = next(self.parameters())
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self._make_head(num_classes, pool, device=like.device, dtype=like.dtype)
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping what is inside it."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """timm's parameter groups: the stem, then one group a stage (`coarse`) or a block."""
        blocks: List[Any] = [] if coarse else [(r"^layer(\d+)(?:\.block)?\.(\d+)", None)]
        blocks += [(r"^layer(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^(?:conv|bn)\d", "blocks": blocks}


def named_sequence(blocks: List[nn.Module], **first: nn.Module) -> nn.Sequential:
    """A Sequential of `first`, under their names, then of `blocks` as '0', '1' and so on."""
    named = OrderedDict(first)
    named.update((str(i), block) for i, block in enumerate(blocks))
    return nn.Sequential(named)

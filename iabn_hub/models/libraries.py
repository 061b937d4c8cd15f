"""Networks of other libraries by name, and what they would keep after `convert`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import timm
import torch
from torch import nn

from ..checkpoints.errors import UnknownNameError
from ..conversion import convert
from ..conversion.explain import KeptTensor, kept_tensors
from ..conversion.report import Report

T = TypeVar("T")


def create_from_library(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """The network of that name, randomly initialised, and the size (channels, *spatial) of its images.

    A name of timm, or one that begins with the library: torchvision.resnet50, smp.Unet (segmentation_models_pytorch),
    nnunet.ResidualEncoderUNet (dynamic_network_architectures), monai.DynUNet. The last two are for volumes.

    Raises:
        UnknownNameError: the library has no such network, or is not installed; suggests what is spelt alike.
    """
    library, _, short = name.partition(".")
    if short and library in _LIBRARIES:
        names, create, package = _LIBRARIES[library]
        try:
            known = list(names())
            if short in known:
                return create(short)
        except ImportError as e:
            raise UnknownNameError(f"{name} needs another package: pip install {package}") from e
        raise _unknown(name, [f"{library}.{each}" for each in known])
    if not timm.is_model(name):
        raise _unknown(name, timm.list_models())
    model = timm.create_model(name)
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    return model, config.get("input_size", (3, 224, 224))


def images_of(shape: tuple[int, ...], batch: int, size: int | None = None) -> tuple[int, ...]:
    """The shape of a batch of such images, all sides `size` if that is given."""
    return batch, shape[0], *(size or side for side in shape[1:])


def _torchvision_names() -> list[str]:
    import torchvision  # noqa: PLC0415 - an extra

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _torchvision(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    import torchvision  # noqa: PLC0415

    extra = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    side = 299 if name == "inception_v3" else 224
    return torchvision.models.get_model(name, weights=None, **extra), (3, side, side)


def _smp(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    import segmentation_models_pytorch as smp  # noqa: PLC0415

    encoder = "resnet34" if name == "Unet" else "resnet50"
    return getattr(smp, name)(encoder, encoder_weights=None), (3, 224, 224)


def _nnunet(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """As nnU-Net's planner makes it for patches of 64³ of one channel and three classes."""
    from dynamic_network_architectures.architectures import unet  # noqa: PLC0415

    stages = 5
    options: dict[str, Any] = {
        "input_channels": 1, "n_stages": stages, "features_per_stage": [32, 64, 128, 256, 320], "conv_op": nn.Conv3d,
        "kernel_sizes": [[3] * 3] * stages, "strides": [[1] * 3] + [[2] * 3] * (stages - 1), "num_classes": 3,
        "n_conv_per_stage_decoder": [2 if name == "PlainConvUNet" else 1] * (stages - 1), "conv_bias": True,
        "norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True}, "deep_supervision": True,
    }  # fmt: skip
    blocks = {"n_conv_per_stage": [2] * stages} if name == "PlainConvUNet" else {"n_blocks_per_stage": [1, 3, 4, 6, 6]}
    return getattr(unet, name)(**options, **blocks), (1, 64, 64, 64)


def _monai(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    from monai.networks import nets  # noqa: PLC0415

    if name == "SegResNet":
        return nets.SegResNet(3, 16, 1, 3), (1, 64, 64, 64)
    kernels = {"kernel_size": [3] * 5, "strides": [1, 2, 2, 2, 2], "upsample_kernel_size": [2] * 4}
    return nets.DynUNet(3, 1, 3, **kernels, res_block=True), (1, 64, 64, 64)


_Create = Callable[[str], tuple[nn.Module, tuple[int, ...]]]
# By prefix: the names, how to create one, and the package to install.
_LIBRARIES: dict[str, tuple[Callable[[], Sequence[str]], _Create, str]] = {
    "torchvision": (_torchvision_names, _torchvision, "'iabn-hub[train]'"),
    "smp": (lambda: ("Unet", "DeepLabV3Plus"), _smp, "segmentation-models-pytorch"),
    "nnunet": (lambda: ("PlainConvUNet", "ResidualEncoderUNet"), _nnunet, "dynamic-network-architectures"),
    "monai": (lambda: ("DynUNet", "SegResNet"), _monai, "monai"),
}


def measure_conversion(name: str, network: nn.Module, shape: tuple[int, ...], method: str = "auto") -> Report:
    """Convert a network, and measure training steps on random images of this shape before and after.

    Args:
        name: for messages.

    Raises:
        ValueError: a training step on such images fails.
    """
    return _on_images(name, network, shape, lambda sample: convert(network.train(), sample, method=method))


def explain_memory(name: str, network: nn.Module, shape: tuple[int, ...]) -> list[KeptTensor]:
    """The tensors that a training step on random images of this shape keeps; errors as of `measure_conversion`."""
    return _on_images(name, network, shape, lambda sample: kept_tensors(network.train(), sample))


def _on_images(name: str, network: nn.Module, shape: tuple[int, ...], run: Callable[[torch.Tensor], T]) -> T:
    try:
        return run(torch.randn(shape, device=next(network.parameters()).device))
    except (RuntimeError, TypeError, IndexError, AttributeError) as e:
        raise ValueError(
            f"{name}: a training step on images of {tuple(shape)} fails: {(str(e).splitlines() or [''])[0]}"
        ) from e


def _unknown(name: str, names: list[str]) -> UnknownNameError:
    near = difflib.get_close_matches(name, names, 3)
    prefixes = ", ".join(f"{library}." for library in _LIBRARIES)
    hint = f"; did you mean {', '.join(near)}?" if near else f"; names outside of timm begin with {prefixes}"
    return UnknownNameError(f"no network is called {name!r}{hint}")

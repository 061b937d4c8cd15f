"""Networks of timm and torchvision by name, and what they would keep after `convert`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, TypeVar

import timm
import torch
from torch import nn

from ..checkpoints.errors import UnknownNameError
from ..conversion import convert
from ..conversion.explain import KeptTensor, kept_tensors
from ..conversion.report import Report

T = TypeVar("T")
TORCHVISION = "torchvision."


def create_from_library(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """The network of that name, randomly initialised, and the size (channels, height, width) of its images.

    Raises:
        UnknownNameError: neither timm nor torchvision has it; suggests what is spelt alike.
    """
    if name.startswith(TORCHVISION):
        try:
            import torchvision  # noqa: PLC0415 - an extra
        except ImportError as e:
            raise UnknownNameError(f"{name} needs torchvision: pip install 'iabn-hub[train]'") from e
        names = torchvision.models.list_models(module=torchvision.models)
        short = name.removeprefix(TORCHVISION)
        if short not in names:
            raise _unknown(name, [TORCHVISION + each for each in names])
        extra = {"aux_logits": False, "init_weights": True} if short in ("googlenet", "inception_v3") else {}
        side = 299 if short == "inception_v3" else 224
        return torchvision.models.get_model(short, weights=None, **extra), (3, side, side)
    if not timm.is_model(name):
        raise _unknown(name, timm.list_models())
    model = timm.create_model(name)
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    return model, config.get("input_size", (3, 224, 224))


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
    hint = f"; did you mean {', '.join(near)}?" if near else "; names of torchvision begin with 'torchvision.'"
    return UnknownNameError(f"no network is called {name!r}{hint}")

"""`convert`: let a network keep less for its backward pass, without a change of what it computes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from .measure import Sample, measure, outputs_of, relative_change
from .recording import METHODS, Recording, RecoverableScales
from .report import Report, make_report

SLOPE = 0.01  # of the leaky ReLU that replaces a ReLU on request


def convert(
    model: nn.Module, sample: Sample | None = None, *, method: str = "auto", activation: str | None = None
) -> Report:
    """Let a network keep less for its backward pass: about half where it consists of convolutions, norms, activations.

    The function, the parameters, the buffers and the names in the state dict stay as they are. A tensor that autograd
    would keep, and that can be computed again at little cost (the output of a norm, an activation, a sum, a
    concatenation), is dropped, and computed again when the backward pass asks for it. No module is replaced, so that
    optimizers, checkpoints, hooks and DistributedDataParallel fit as before. The network runs as it did under
    `no_grad`, in `torch.compile` (which plans memory itself), for tracers, exporters and transforms, and inside
    `torch.utils.checkpoint`, `save_on_cpu` and other hooks on saved tensors.

    Args:
        model: any network; changed in place. `restore` reverts it. Converting it again replaces the first conversion.
        sample: an input to measure with: a tensor, a tuple of arguments, or a dict of keyword arguments. The network
            runs a few training steps on a copy of it; its parameters, buffers and gradients and the random state are as
            before afterwards.
        method: 'auto' recomputes, or inverts a leaky ReLU behind a norm in float32 and float64: the backward pass
            recovers the norm's input from the output, up to rounding, which is faster. 'recompute' never inverts.
            'invert' does nothing else, for ELU too and in any dtype.
        activation: 'leaky_relu' replaces the ReLU modules by leaky ReLU with slope 0.01. This changes the function; the
            report states by how much the outputs change for the sample.

    Returns:
        A `Report`: each norm and what is done with it, or why not; with a sample, the bytes that each layer keeps, and
        the peak of a training step, before and after.

    Raises:
        ValueError: unknown method or activation; no output of the network requires a gradient for the sample; the
            network has lazy modules that did not run yet.

    Example:
        >>> import torch, iabn_hub
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3)
        ... )
        >>> report = iabn_hub.convert(model, torch.randn(4, 3, 32, 32))
        >>> round(report.kept.ratio, 2), report.count("recompute")
        (0.5, 1)
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: choose one of {', '.join(METHODS)}")
    if activation not in (None, "leaky_relu"):
        raise ValueError(f"activation is {activation!r}: choose 'leaky_relu', or None to keep the network's own")
    model = restore(model)
    before = None if sample is None else measure(model, sample)
    outputs = outputs_of(model, sample) if activation and sample is not None else None
    if activation:
        _replace_activations(model, nn.ReLU, nn.LeakyReLU)
    hooks = _Hooks(method)
    if not isinstance(model, torch.jit.ScriptModule):
        model.register_forward_pre_hook(hooks.enter)
        model.register_forward_hook(hooks.leave, always_call=True)
    after = None if sample is None else measure(model, sample, hooks)
    change = None
    if outputs is not None and sample is not None:
        change = relative_change(outputs, outputs_of(model, sample))
    return make_report(model, method, before, after, change)


def restore(model: nn.Module) -> nn.Module:
    """Undo `convert`; returns the model. One that is not converted stays as it is."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    for registered in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in registered.items() if isinstance(getattr(hook, "__self__", None), _Hooks)]:
            del registered[key]
            model._forward_hooks_always_called.pop(key, None)
    _replace_activations(model, nn.LeakyReLU, nn.ReLU)
    return model


class _Hooks:
    """The hooks of a converted network; they survive copying and pickling."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.scales = RecoverableScales()
        self.observer: Any = None
        self.recordings: dict[int, list[Recording | None]] = {}  # by thread

    def enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        running = self.recordings.setdefault(threading.get_ident(), [])
        if running and running[-1] is not None and running[-1].is_on_top():
            # Left behind by a KeyboardInterrupt, which no hook sees; or the network calls itself, and the rest of the
            # outer call is not recorded.
            running.pop().__exit__(None, None, None)  # type: ignore[union-attr]
        recording = None if _steps_aside() else Recording(self.method, self.scales, self.observer)
        running.append(recording)
        if recording is not None:
            recording.__enter__()

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        running = self.recordings.get(threading.get_ident())
        recording = running.pop() if running else None
        if recording is not None:
            recording.__exit__(None, None, None)

    def __deepcopy__(self, memo: Any) -> _Hooks:
        return _Hooks(self.method)

    def __reduce__(self) -> Any:
        return _Hooks, (self.method,)


def _steps_aside() -> bool:
    """Whether there is no backward pass, or somebody else decides what is kept for it."""
    return (
        not torch.is_grad_enabled()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or not torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # a checkpoint, save_on_cpu
    )


def _replace_activations(model: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    """ReLU modules become leaky ReLU, or these ReLU again."""
    for parent, name, child in list(_children(model)):
        if type(child) is not old or (old is nn.LeakyReLU and not hasattr(child, "_was_relu")):
            continue
        created = new.__new__(new)
        created.__dict__.update(child.__dict__)  # mode and hooks
        if new is nn.LeakyReLU:
            created.negative_slope, created._was_relu = SLOPE, True  # type: ignore[assignment]
        else:
            del created.negative_slope, created._was_relu
        parent._modules[name] = created


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                yield parent, name, child

"""Measure what a network keeps for its backward pass, by layer, and the peak of a training step."""

from __future__ import annotations

import contextlib
import itertools
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._pytree import tree_leaves, tree_map

from .recompute import Kept, Slot, bytes_of, storage_of

Sample = Tensor | tuple[Any, ...] | Mapping[str, Any]


@dataclass
class Measurement:
    """Of one training step.

    Attributes:
        kept: bytes kept for the backward pass, by the path of the module that keeps them first.
        peak: most bytes alive at once, beyond what was there before; parameters' gradients are there before.
        actions: what was done with a norm and why, by path.
        ran: paths of the modules that were called.
    """

    kept: dict[str, int] = field(default_factory=dict)
    peak: int = 0
    actions: dict[str, tuple[str, str]] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)


class Observer:
    """Follows which module runs, and what is saved meanwhile."""

    def __init__(self, model: nn.Module) -> None:
        self.paths: dict[int, str] = {}
        for path, module in model.named_modules():
            self.paths.setdefault(id(module), path)
        self.running: list[str] = [""]
        self.saved: list[tuple[str, Any]] = []
        self.actions: dict[str, tuple[str, str]] = {}
        self.ran: set[str] = set()

    @property
    def here(self) -> str:
        """Path of the module that runs."""
        return self.running[-1]

    def keep(self, slot: Slot) -> Slot:
        self.saved.append((self.here, weakref.ref(slot)))
        return slot

    def note(self, action: str, reason: str = "", path: str | None = None) -> None:
        """What is done with the norm at `path`, or with that which runs."""
        self.actions[self.here if path is None else path] = action, reason

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        def before(module: nn.Module, _: Any) -> None:
            self.running.append(self.paths.get(id(module), self.here))
            self.ran.add(self.here)

        def after(module: nn.Module, _: Any, __: Any) -> None:
            self.running.pop()

        with (
            global_hooks.register_module_forward_pre_hook(before),
            global_hooks.register_module_forward_hook(after, always_call=True),
        ):
            yield

    def plain_hooks(self) -> Any:
        """Hooks that note what autograd saves, and save it as it is."""
        return torch.autograd.graph.saved_tensors_hooks(
            lambda t: self.keep(Slot(Kept(t))), lambda slot: slot.content.tensor
        )

    def tensors(self, outside: set[int]) -> Iterator[tuple[str, Tensor]]:
        """Path and first tensor of each storage that is still saved, without those of `outside`."""
        counted = set(outside)
        for path, reference in self.saved:
            slot = reference()
            for t in slot.tensors() if slot is not None else ():
                if storage_of(t) not in counted:
                    counted.add(storage_of(t))
                    yield path, t

    def kept(self, outside: set[int]) -> dict[str, int]:
        """Bytes of these, by path."""
        found: dict[str, int] = {}
        for path, t in self.tensors(outside):
            found[path] = found.get(path, 0) + bytes_of(t)
        return found


def measure(model: nn.Module, sample: Sample, hooks: Any = None) -> Measurement:
    """Run training steps on a copy of a sample; the network and the random state are as before afterwards.

    Args:
        hooks: those of `convert`, to be told what they do with each norm.
    """
    if any(
        isinstance(p, UninitializedParameter | UninitializedBuffer) for p in [*model.parameters(), *model.buffers()]
    ):
        raise ValueError(
            "the network has lazy modules: run it once, so that they know their shapes, and then convert it"
        )
    observer = Observer(model)
    sample = copied(sample)
    call = caller(model, sample)
    with unchanged(model), gradients_allocated(model):
        outside = storages(model, sample)
        with observer.following(), torch.enable_grad():
            if hooks is None:
                with observer.plain_hooks():
                    output = call()
            else:
                hooks.observer = observer
                try:
                    output = call()
                finally:
                    hooks.observer = None
        kept = observer.kept(outside)
        del output
        return Measurement(kept, _peak(model, lambda: _loss(call())), observer.actions, observer.ran)


def storages(model: nn.Module, sample: Sample) -> set[int]:
    """Those that are there before a step: of parameters, buffers and the sample."""
    given = [t for t in tree_leaves(sample) if isinstance(t, Tensor)]
    return {storage_of(t) for t in [*model.parameters(), *model.buffers(), *given]}


def caller(model: nn.Module, sample: Sample) -> Callable[[], Any]:
    """The model called with a tensor, a tuple of arguments, or keyword arguments."""
    if isinstance(sample, Mapping):
        return lambda: model(**sample)
    return (lambda: model(*sample)) if isinstance(sample, tuple) else (lambda: model(sample))


def copied(sample: Any) -> Any:
    """Tensors that the network may overwrite, and whose gradients are of no account."""
    return tree_map(
        lambda t: t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t, sample
    )


def outputs_of(model: nn.Module, sample: Sample) -> list[Tensor]:
    """The tensors that the network returns, in the mode it is in."""
    with unchanged(model), torch.no_grad():
        return _floating(caller(model, copied(sample))())


def relative_change(before: list[Tensor], after: list[Tensor]) -> float:
    """Norm of the difference of all outputs, as a share of their norm."""
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(before, after))
    return (difference / max(1e-300, sum(float(a.double().square().sum()) for a in before))) ** 0.5


def _floating(output: Any) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _loss(output: Any) -> Tensor:
    """Something to differentiate that depends on all outputs, and needs little memory itself."""
    outputs = [t.sum() for t in _floating(output) if t.requires_grad]
    if not outputs:
        raise ValueError("no output of the network requires a gradient, so nothing is kept for a backward pass")
    return torch.stack(outputs).sum()


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Parameters, buffers and random state are as before afterwards, and hooks on gradients do not run."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    registered = [p._post_accumulate_grad_hooks for p in model.parameters()]
    hooks = [(each, dict(each)) for each in registered if each]  # which may step an optimizer
    devices = {t.device for t in [*model.parameters(), *model.buffers()] if t.is_cuda}
    try:
        for each, _ in hooks:
            each.clear()
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        for each, content in hooks:
            each.update(content)
        with torch.no_grad():
            for buffer, copy in buffers:
                buffer.copy_(copy)


@contextlib.contextmanager
def gradients_allocated(model: nn.Module) -> Iterator[None]:
    """Zeros as gradients of the parameters, and then those of before."""
    parameters = [(p, p.grad) for p in model.parameters() if p.requires_grad]
    for p, _ in parameters:
        p.grad = torch.zeros_like(p)
    try:
        yield
    finally:
        for p, grad in parameters:
            p.grad = grad


def _peak(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Most bytes alive at once in a training step, as counted by the allocator."""
    forward().backward()  # what is allocated once is there
    if any(p.is_cuda for p in model.parameters()):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward().backward()
        return torch.cuda.max_memory_allocated() - before
    with allocations() as changes:
        forward().backward()
    return highest(changes)


@contextlib.contextmanager
def allocations() -> Iterator[list[int]]:
    """The changes of the bytes that are alive on the CPU, in order, once the context is left."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes about missing devices
    changes: list[int] = []
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=False) as profile:
        yield changes
    events = profile.profiler.kineto_results.events()
    of_memory = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    changes.extend(change for _, change in of_memory)


def highest(changes: list[int]) -> int:
    """The most bytes that are alive at once, beyond those at the start."""
    return max(itertools.accumulate(changes, initial=0))

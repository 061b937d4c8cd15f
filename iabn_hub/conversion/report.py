"""What a conversion did to each layer, and the bytes it saves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..layers import InPlaceABN, InPlaceGroupNorm
from .measure import Measurement

RECOMPUTE, INVERT, LEAVE = "recompute", "invert", "leave"


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes of a training step before and after the conversion."""

    before: int
    after: int

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before else 1.0


@dataclasses.dataclass(frozen=True)
class Layer:
    """One module of the network.

    Attributes:
        name: its path in the network.
        kind: its class.
        action: of a norm: 'recompute' (its output and what follows are computed again from its input), 'invert' (the
            backward pass works from the output of its activation), 'leave', or '' if no sample was given. Of other
            modules ''.
        reason: why it was left.
        kept: bytes that it is the first to keep, or None without a sample.
    """

    name: str
    kind: str
    action: str = ""
    reason: str = ""
    kept: Bytes | None = None

    @property
    def is_norm(self) -> bool:
        return is_norm(self.kind)


@dataclasses.dataclass(frozen=True)
class Report:
    """What `convert` did. `print` shows a table; `to_json` gives the same as a dict.

    Attributes:
        method: as given to `convert`.
        layers: the norms, and with a sample all modules that keep something.
        kept: bytes kept for the backward pass of the sample, without parameters and the sample itself, or None.
        peak: most bytes alive at once in a training step, beyond parameters and their gradients, or None.
        output_change: norm of the change of the outputs, as a share of their norm, where activations were replaced.
    """

    method: str
    layers: tuple[Layer, ...]
    kept: Bytes | None = None
    peak: Bytes | None = None
    output_change: float | None = None

    @property
    def norms(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.is_norm)

    def count(self, action: str) -> int:
        """How many norms were treated so."""
        return sum(layer.action == action for layer in self.norms)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return "\n".join(self.table())

    def table(self, smallest: float = 0.0) -> Iterator[str]:
        """The lines of a table, at most 80 columns wide.

        Args:
            smallest: leave out layers that keep less than this share of all bytes.
        """
        if self.kept is None:
            yield f"{len(self.norms)} norms found; pass a sample to measure what is done with them"
            return
        yield f"{'layer':<{_NAME}} {'class':<{_KIND}} {'before':>9} {'after':>9}  action"
        rest = Bytes(0, 0)
        for layer in self.layers:
            assert layer.kept is not None
            if max(layer.kept.before, layer.kept.after) < smallest * self.kept.before:
                rest = Bytes(rest.before + layer.kept.before, rest.after + layer.kept.after)
            else:
                yield _row(layer.name or "(the network)", layer.kind, layer.kept, layer.action)
        if rest.before or rest.after:
            yield _row(f"each below {smallest:.0%}", "", rest, "")
        yield ""
        yield from self.summary()

    def summary(self) -> Iterator[str]:
        """The totals, and why norms were left, as lines."""
        if self.kept is None or self.peak is None:
            return
        counts = [f"{self.count(action)} {text}" for action, text in _COUNTED if self.count(action)]
        yield f"norms: {', '.join(counts) or 'none found'}"
        reasons = [layer.reason for layer in self.norms if layer.action == LEAVE]
        for reason in dict.fromkeys(reasons):
            yield f"  {reasons.count(reason)} left: {reason}"
        for name, found in (("kept for the backward pass", self.kept), ("peak of a training step", self.peak)):
            yield f"{name + ':':<27} {_megabytes(found.before)} to {_megabytes(found.after)} MB ({found.ratio:.2f})"
        if self.output_change is not None:
            yield f"outputs change by {100 * self.output_change:.2g} % (ReLU became leaky ReLU)"


_COUNTED = ((RECOMPUTE, "recomputed"), (INVERT, "inverted"), (LEAVE, "left"))
_NAME, _KIND = 33, 15  # columns


def fitting(path: str, columns: int) -> str:
    """The path of a module, or as much of its end as fits."""
    return path if len(path) <= columns else "…" + path[1 - columns :]


def _row(name: str, kind: str, kept: Bytes, action: str) -> str:
    columns = f"{fitting(name, _NAME):<{_NAME}} {kind[:_KIND]:<{_KIND}}"
    return f"{columns} {_megabytes(kept.before)} {_megabytes(kept.after)}  {action}".rstrip()


def _megabytes(count: int) -> str:
    return f"{count / 1e6:9.2f}"


def is_norm(kind: str) -> bool:
    """Whether a class of this name normalises."""
    name = kind.lower()
    return ("norm" in name and "normfree" not in name) or kind in ("ABN", "InPlaceABN", "InPlaceABNSync")


def make_report(
    model: nn.Module, method: str, before: Measurement | None, after: Measurement | None, change: float | None
) -> Report:
    layers = []
    for path, module in model.named_modules():
        kind = _kind(module)
        norm = is_norm(kind) and not any(is_norm(_kind(child)) for child in module.children())
        if before is None or after is None:
            if norm:
                layers.append(Layer(path, kind))
            continue
        kept = Bytes(before.kept.get(path, 0), after.kept.get(path, 0))
        if norm:
            layers.append(Layer(path, kind, *(after.actions.get(path) or (LEAVE, _reason(path, module, after))), kept))
        elif kept.before or kept.after:
            layers.append(Layer(path, kind, kept=kept))
    if before is None or after is None:
        return Report(method, tuple(layers))
    total = Bytes(sum(before.kept.values()), sum(after.kept.values()))
    return Report(method, tuple(layers), total, Bytes(before.peak, after.peak), change)


def _kind(module: nn.Module) -> str:
    return str(getattr(module, "original_name", type(module).__name__))  # of a ScriptModule


def _reason(path: str, module: nn.Module, run: Measurement) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted: its operators cannot be followed"
    if path not in run.ran:
        return "did not run on this sample, or within a scripted module"
    if isinstance(module, InPlaceABN | InPlaceGroupNorm):
        return "in place already"
    if isinstance(module, nn.SyncBatchNorm):
        return "synchronised: its statistics come from other processes"
    return (
        "keeps nothing that could be dropped"
        if not run.kept.get(path)
        else "computed by a function that conversion does not know"
    )

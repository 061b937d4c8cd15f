"""Which tensors a network keeps for its backward pass, and which operators keep them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .measure import Observer, Sample, caller, copied, storages, unchanged
from .recompute import bytes_of, storage_of
from .report import fitting


@dataclasses.dataclass(frozen=True)
class KeptTensor:
    """A tensor that lives from the forward to the backward pass.

    Attributes:
        layer: path of the module that runs when it is kept first.
        shape, dtype: as it is kept first; others may keep views of it.
        bytes: of its memory.
        kept_by: the operators whose gradients need it, as autograd names them, each with the argument it is. '?' where
            autograd does not tell.
    """

    layer: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    kept_by: tuple[str, ...]


def kept_tensors(model: nn.Module, sample: Sample) -> list[KeptTensor]:
    """What a training step of the network keeps besides parameters, buffers and the sample, in the order of the step.

    Runs the forward pass once, as it is. The network is as before afterwards.
    """
    observer = Observer(model)
    sample = copied(sample)
    keepers: dict[int, set[str]] = {}
    with unchanged(model):
        with observer.following(), torch.enable_grad(), observer.plain_hooks():
            output = caller(model, sample)()
        for name, t in _saved(output):  # where a checkpoint computes again what it is asked for
            keepers.setdefault(storage_of(t), set()).add(name)
        return [
            KeptTensor(
                path, tuple(t.shape), str(t.dtype).removeprefix("torch."), bytes_of(t),
                tuple(sorted(keepers.get(storage_of(t), {"?"}))),
            )
            for path, t in observer.tensors(storages(model, sample))
        ]  # fmt: skip


def _saved(output: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the graph behind `output` saved, with the name of the operator and of the argument."""
    nodes = [t.grad_fn for t in tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        name = node.name().rpartition("::")[2].removesuffix("Backward0").removesuffix("Backward")
        for attribute in dir(node):
            if attribute.startswith("_saved_"):
                for t in tree_leaves(getattr(node, attribute)):
                    if isinstance(t, Tensor):
                        yield f"{name}.{attribute.removeprefix('_saved_')}", t
        for t in getattr(node, "saved_tensors", ()):
            if isinstance(t, Tensor):
                yield name, t
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)


def explanation(tensors: list[KeptTensor], smallest: float = 0.0) -> Iterator[str]:
    """The lines of a table, at most 80 columns wide; tensors below that share of all bytes in one line."""
    total = sum(t.bytes for t in tensors)
    yield _line("layer", "shape", "dtype", "MB", "kept by")
    rest = [t for t in tensors if t.bytes < smallest * total]
    for t in tensors:
        if t.bytes < smallest * total:
            continue
        yield _line(
            fitting(t.layer or "(the network)", _LAYER),
            "×".join(map(str, t.shape)),
            t.dtype,
            f"{t.bytes / 1e6:.2f}",
            t.kept_by[0],
        )
        yield from (_line("", "", "", "", other) for other in t.kept_by[1:])
    if rest:
        yield _line(
            f"{len(rest)} tensors", f"below {smallest:.0%} each", "", f"{sum(t.bytes for t in rest) / 1e6:.2f}", ""
        )
    yield _line(f"{len(tensors)} tensors", "in all", "", f"{total / 1e6:.2f}", "")


_LAYER = 20  # columns


def _line(layer: str, shape: str, dtype: str, megabytes: str, kept_by: str) -> str:
    return f"{layer:<{_LAYER}} {shape:<17} {dtype:<8} {megabytes:>7}  {kept_by}"[:80].rstrip()

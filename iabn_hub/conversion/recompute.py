"""What autograd holds in place of saved tensors: the tensor, or how it is computed again.

A tensor that several operators saved is computed once, and dropped when the last of them has had it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LONGEST_CHAIN = 100  # of recipes that are computed from each other; then a tensor is kept again
Geometry = tuple[torch.Size, tuple[int, ...], int]  # size, stride, storage offset


def geometry(t: Tensor) -> Geometry:
    return t.size(), t.stride(), int(t.storage_offset())


def storage_of(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)


class Kept:
    """A tensor that stays in memory."""

    def __init__(self, t: Tensor, free: bool = False) -> None:
        self.tensor = t
        self.version = t._version
        self.free = free  # it is so small, or so long-lived, that it does not count

    def get(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{self.tensor.dtype} {list(self.tensor.shape)} is at version {self.tensor._version}; expected version "
                f"{self.version} instead"
            )
        return self.tensor


class Recipe:
    """How a tensor is computed again: a function of other recipes and of tensors that are kept.

    Args:
        function: of the tensors behind `sources`, in order.
        of: the tensor, which is shared as long as it lives unchanged.
    """

    def __init__(self, function: Callable[..., Tensor], sources: list[View | Kept], of: Tensor) -> None:
        self.function = function
        self.sources = sources
        self.size, self.stride, _ = geometry(of)
        self.dtype, self.device = of.dtype, of.device
        self.autocast = _autocast_state(of.device.type)
        self.version = of._version
        self.alive: Any = weakref.ref(of)
        self.users = 0  # that have saved it and not yet asked for it
        self.copy: Tensor | None = None
        self.depth: int = 1 + max([source.recipe.depth for source in sources if isinstance(source, View)], default=0)
        self.is_free = False  # known to need nothing that is not kept

    def get(self) -> Tensor:
        """The tensor, with the strides it had."""
        t = self.shared()
        if t is None:
            with torch.no_grad(), torch.autocast(self.device.type, **self.autocast):
                t = self.function(*(source.get() for source in self.sources))
            if t.stride() != self.stride:
                strided = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)
                t = strided.copy_(t)
            self.alive, self.version = weakref.ref(t), t._version
        if self.users > 0:  # by the others, and by those who compute theirs from it
            self.copy = t
        return t.detach() if t.requires_grad else t

    def shared(self) -> Tensor | None:
        """The tensor, if somebody holds it as it was."""
        t = self.copy if self.copy is not None else self.alive()
        return t if t is not None and t._version == self.version else None

    def used(self) -> None:
        """One of those who saved it has it."""
        self.users -= 1
        if self.users <= 0:
            self.copy = None

    def missing(self, kept: set[int], found: dict[int, Kept] | None = None) -> dict[int, Kept] | None:
        """What would have to be kept for it, by storage; None if the chain is too long."""
        found = {} if found is None else found
        if self.depth > LONGEST_CHAIN:
            return None
        if not self.is_free:
            before = len(found)
            for source in self.sources:
                if isinstance(source, View):
                    source.recipe.missing(kept, found)
                elif not source.free and storage_of(source.tensor) not in kept:
                    found[storage_of(source.tensor)] = source
            self.is_free = len(found) == before == 0
        return found


def _autocast_state(device: str) -> dict[str, Any]:
    return {"enabled": torch.is_autocast_enabled(device), "dtype": torch.get_autocast_dtype(device)}


class View:
    """A recipe's tensor, or a view of it."""

    def __init__(self, recipe: Recipe, of: Geometry) -> None:
        self.recipe = recipe
        self.geometry = of

    @property
    def whole(self) -> bool:
        return self.geometry == (self.recipe.size, self.recipe.stride, 0)

    def get(self) -> Tensor:
        t = self.recipe.get()
        return t if self.whole else t.as_strided(*self.geometry)


class Inverse:
    """In place of the input x of a norm with an activation: its result z, from which x can be recovered.

    The first derivative is computed from z itself, a second one (create_graph=True) from x.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe  # of x, whose source is z

    def get(self) -> Tensor:
        return self.recipe.get() if torch.is_grad_enabled() else self.recipe.sources[0].get()


class Slot:
    """What autograd holds in place of a saved tensor."""

    def __init__(self, content: Kept | View | Inverse) -> None:
        self.content: Kept | View | Inverse
        self.hold(content)

    def hold(self, content: Kept | View | Inverse) -> None:
        self.content = content
        if isinstance(content, View):
            content.recipe.users += 1

    def get(self) -> Tensor:
        t = self.content.get()
        if isinstance(self.content, View):
            self.content.recipe.used()
        return t

    def tensors(self) -> list[Tensor]:
        """Those that this holds in memory."""
        found: list[Tensor] = []
        pending: list[Kept | View | Inverse] = [self.content]
        seen: set[int] = set()
        while pending:
            content = pending.pop()
            if isinstance(content, Kept):
                found.append(content.tensor)
            elif id(content.recipe) not in seen:
                seen.add(id(content.recipe))
                pending.extend(content.recipe.sources)
        return found

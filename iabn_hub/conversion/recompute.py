"""What autograd holds in place of saved tensors: the tensor, or how it is computed again.

A tensor that several operators saved is computed once, and dropped when the last of them has had it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LONGEST_CHAIN = 100  # of recipes that are computed from each other; then a tensor is kept again
SHORT_CHAIN = 3  # up to this length it is computed again as a whole
SOON = 8  # saved tensors: a recomputed tensor stays if the next to ask for it is no further away
_numbers = itertools.count(1)  # of slots, in the order in which autograd saved
Geometry = tuple[torch.Size, tuple[int, ...], int]  # size, stride, storage offset


def geometry(t: Tensor) -> Geometry:
    return t.size(), t.stride(), int(t.storage_offset())


def storage_of(t: Tensor) -> int:
    """A number that tensors in the same memory share."""
    return int(t.untyped_storage()._cdata) if t.layout == torch.strided else -id(t)


def bytes_of(t: Tensor) -> int:
    """Of the memory that a tensor is in."""
    return int(t.untyped_storage().nbytes()) if t.layout == torch.strided else t.element_size() * t._nnz()


class Kept:
    """A tensor that stays in memory."""

    def __init__(self, t: Tensor, free: bool = False) -> None:
        self.tensor = t
        self.version = 0 if t.is_inference() else t._version  # tensors of inference mode have none
        self.free = free  # it is so small, or so long-lived, that it does not count

    @property
    def is_unchanged(self) -> bool:
        return self.tensor.is_inference() or self.tensor._version == self.version

    def get(self) -> Tensor:
        if not self.is_unchanged:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{self.tensor.dtype} {list(self.tensor.shape)} is at version {self.tensor._version}; expected version "
                f"{self.version} instead. If this happens only after iabn_hub.convert, another tensor is computed from "
                "this one: overwrite a copy, or call iabn_hub.restore(model)"
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
        self.users: list[int] = []  # numbers of the slots that have it and were not yet asked for it
        self.copy: Tensor | None = None
        self.depth: int = 1 + max([source.recipe.depth for source in sources if isinstance(source, View)], default=0)

    def get(self, number: int = 0) -> Tensor:
        """The tensor, with the strides it had, for the slot of that number, which has it now."""
        if number in self.users:
            self.users.remove(number)
        t = self.shared()
        if t is None:
            t = self._compute_all(number)
        if not self.users:
            self.copy = None
        elif self._is_wanted_soon(number):
            self.copy = t
        return t.detach() if t.requires_grad else t

    def settle(self, t: Tensor) -> None:
        """Autograd keeps t, the tensor or a view of it: it is taken from there, not computed again."""
        t = t.detach()  # without its graph, which the recipe may outlive
        if geometry(t) != (self.size, self.stride, 0):
            t = t.as_strided(self.size, self.stride, 0)
        self.function, self.sources, self.depth = _same, [Kept(t)], 1

    def forget(self) -> None:
        """The tensor was overwritten in a way that its version does not show."""
        self.copy, self.alive = None, lambda: None

    def shared(self) -> Tensor | None:
        """The tensor, if somebody holds it as it was."""
        t = self.copy if self.copy is not None else self.alive()
        return t if t is not None and t._version == self.version else None

    def _is_wanted_soon(self, number: int) -> bool:
        """Whether the next slot to be asked for it, in reverse order, was made shortly before that of this number."""
        return bool(self.users) and number - max(self.users) < SOON

    def _compute_all(self, number: int) -> Tensor:
        """Compute what it is computed from, as far as nobody holds that, and then the tensor itself.

        What comes between lives until its last use; of a long chain every so manieth stays for those who ask later, so
        that the number of tensors and the work for each of them grow with the square root of the length.
        """
        pending = self._pending()
        distance = math.isqrt(len(pending) - 1) + 1 if len(pending) > SHORT_CHAIN else len(pending)
        last_use = {id(view.recipe): i for i, recipe in enumerate(pending) for view in recipe._views()}
        values: dict[int, Tensor] = {}
        for i, recipe in enumerate(pending):
            t = recipe._compute(values)
            if recipe is not self:
                values[id(recipe)] = t
                if recipe.users and ((len(pending) - 1 - i) % distance == 0 or recipe._is_wanted_soon(number)):
                    recipe.copy = t
            for view in recipe._views():
                if last_use[id(view.recipe)] == i:
                    values.pop(id(view.recipe), None)
        return t

    def _pending(self) -> list[Recipe]:
        """The recipes that have to be computed for this one, which is the last; sources before what they serve."""
        found: dict[int, Recipe] = {}
        stack: list[tuple[Recipe, bool]] = [(self, False)]
        while stack:
            recipe, complete = stack.pop()
            if complete:
                found[id(recipe)] = recipe
            elif id(recipe) not in found:
                stack.append((recipe, True))
                stack.extend((view.recipe, False) for view in recipe._views() if view.recipe.shared() is None)
        return list(found.values())

    def _views(self) -> list[View]:
        return [source for source in self.sources if isinstance(source, View)]

    def _compute(self, values: dict[int, Tensor]) -> Tensor:
        """The tensor from its sources, of which `values` has some by id."""
        given = [
            source.view_of(values[id(source.recipe)]) if isinstance(source, View) and id(source.recipe) in values
            else source.get()
            for source in self.sources
        ]  # fmt: skip
        with torch.no_grad(), self._autocast():
            t = self.function(*given)
        if t.stride() != self.stride:
            strided = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)
            t = strided.copy_(t)
        self.alive, self.version = weakref.ref(t), t._version
        return t

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """As in the forward pass; the context costs as much as a small operator where there is nothing to change."""
        kind = self.device.type
        if not self.autocast["enabled"] and not torch.is_autocast_enabled(kind):
            return contextlib.nullcontext()
        return torch.autocast(kind, **self.autocast)

    def missing(self, kept: set[int]) -> dict[int, Kept] | None:
        """What would have to be kept for it, by storage; None if that was overwritten, or the chain is too long."""
        if self.depth > LONGEST_CHAIN:
            return None
        found: dict[int, Kept] = {}
        seen: set[int] = set()
        pending: list[Recipe] = [self]
        while pending:
            recipe = pending.pop()
            if id(recipe) in seen:
                continue
            seen.add(id(recipe))
            for source in recipe.sources:
                if isinstance(source, View):
                    pending.append(source.recipe)
                elif not source.is_unchanged:
                    return None
                elif not source.free and storage_of(source.tensor) not in kept:
                    found[storage_of(source.tensor)] = source
        return found


def _same(t: Tensor) -> Tensor:
    return t


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

    def get(self, number: int = 0) -> Tensor:
        return self.view_of(self.recipe.get(number))

    def view_of(self, t: Tensor) -> Tensor:
        """The view, of the recipe's tensor."""
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
        self.number = next(_numbers)
        self.content: Kept | View | Inverse
        self.hold(content)

    def hold(self, content: Kept | View | Inverse) -> None:
        self.content = content
        if isinstance(content, View):
            content.recipe.users.append(self.number)

    def get(self) -> Tensor:
        return self.content.get(self.number) if isinstance(self.content, View) else self.content.get()

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

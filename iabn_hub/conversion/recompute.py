"""Run a network so that autograd keeps recipes of tensors instead of the tensors.

A `Recording` sees every torch function of a forward pass (`TorchFunctionMode`) and everything that autograd saves
(`saved_tensors_hooks`). It remembers how norms, pointwise functions, sums and concatenations were computed. A saved tensor
that can be computed again from what is kept anyway is dropped, and computed again when the backward pass asks for it. All
who saved it share one copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .norms import Normalisation, batch_norm
from .operators import NORMS, RECOMPUTED, overwrites, pure

LONGEST_CHAIN = 100  # of recipes that are computed from each other; then a tensor is kept again
Geometry = tuple[torch.Size, tuple[int, ...], int]  # size, stride, storage offset


def _geometry(t: Tensor) -> Geometry:
    return t.size(), t.stride(), int(t.storage_offset())


class Kept:
    """A tensor that stays in memory."""

    def __init__(self, t: Tensor) -> None:
        self.tensor = t
        self.version = t._version
        self.is_parameter = t.is_leaf and t.requires_grad

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
        self.size, self.stride, _ = _geometry(of)
        self.dtype, self.device = of.dtype, of.device
        self.version = of._version
        self.alive: Any = weakref.ref(of)
        self.users = 0  # that have saved it and not yet asked for it
        self.copy: Tensor | None = None
        self.depth = 1 + max((source.recipe.depth for source in sources if isinstance(source, View)), default=0)
        self.is_worth_it = False  # known to be

    def get(self) -> Tensor:
        """The tensor, with the strides it had."""
        t = self.shared()
        if t is None:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                t = self._compute()
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

    def _compute(self) -> Tensor:
        fused = _fused(self)
        return fused if fused is not None else self.function(*(source.get() for source in self.sources))

    def is_free(self, kept: set[int]) -> bool:
        """Whether everything that it is computed from is kept anyway."""
        if not self.is_worth_it and self.depth <= LONGEST_CHAIN:
            self.is_worth_it = all(
                source.recipe.is_free(kept)
                if isinstance(source, View)
                else source.is_parameter or source.tensor.untyped_storage()._cdata in kept
                for source in self.sources
            )
        return self.is_worth_it


class View:
    """A recipe's tensor, or a view of it."""

    def __init__(self, recipe: Recipe, geometry: Geometry) -> None:
        self.recipe = recipe
        self.geometry = geometry

    @property
    def whole(self) -> bool:
        return self.geometry == (self.recipe.size, self.recipe.stride, 0)

    def get(self) -> Tensor:
        t = self.recipe.get()
        return t if self.whole else t.as_strided(*self.geometry)


def _fused(recipe: Recipe) -> Tensor | None:
    """relu(norm(x)), norm(x) + y and relu(norm(x) + y) in one pass, where the steps between are not there."""
    sources = recipe.sources
    relu = recipe.function is torch.relu
    if relu:
        inner = sources[0]
        if not isinstance(inner, View) or not inner.whole or inner.recipe.shared() is not None:
            return None
        if isinstance(inner.recipe.function, Normalisation):
            return inner.recipe.function.then_relu(inner.recipe.sources[0].get())
        recipe = inner.recipe
        sources = recipe.sources
    if recipe.function is not torch.add or len(sources) != 2:
        return None
    for branch, other in (sources, sources[::-1]):
        if isinstance(branch, View) and branch.whole and isinstance(branch.recipe.function, Normalisation):
            if branch.recipe.shared() is None and branch.recipe.size == recipe.size:
                norm, x, residual = branch.recipe.function, branch.recipe.sources[0].get(), other.get()
                if residual.shape == x.shape and residual.dtype == x.dtype:
                    return norm.then_relu(x, residual) if relu else norm.then_add(x, residual)
    return None


class Slot:
    """What autograd holds in place of a saved tensor."""

    def __init__(self, content: Kept | View) -> None:
        self.content: Any = content
        self.hold(content)

    def hold(self, content: Kept | View) -> None:
        self.content = content
        if isinstance(content, View):
            content.recipe.users += 1

    def get(self) -> Tensor:
        t = self.content.get()
        if isinstance(self.content, View):
            self.content.recipe.used()
        return t


class Recording(TorchFunctionMode):
    """A forward pass whose saved tensors are dropped where they can be computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.recipes: dict[int, Recipe] = {}  # by storage, as long as the tensor lives
        self.kept: set[int] = set()  # storages that autograd holds
        self.fresh: list[tuple[Slot, int]] = []  # slots of the function that runs, and their storages
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> Recording:
        super().__enter__()
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)
        super().__exit__(*error)
        self.recipes.clear()
        self.kept.clear()
        self.fresh.clear()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not self._on_top():
            return function(*args, **kwargs)
        self.fresh.clear()
        name = getattr(function, "__name__", "")
        if function is torch.nn.functional.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if name in RECOMPUTED:
            return self._recomputed(function, name, args, kwargs)
        result = function(*args, **kwargs)
        if self.fresh and isinstance(result, Tensor):
            self._share_version(result)
        return result

    def _on_top(self) -> bool:
        """Whether no other hooks, such as those of a checkpoint, take the saved tensors."""
        top: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return top is not None and top[0] == self.hooks.pack_hook

    # ---- what autograd saves

    def _pack(self, t: Tensor) -> Slot:
        storage = t.untyped_storage()._cdata
        recipe = self._recipe_of(t, storage)
        slot = Slot(self._saved(t, storage, recipe))
        self.fresh.append((slot, storage))
        return slot

    def _saved(self, t: Tensor, storage: int, recipe: Recipe | None) -> Kept | View:
        if recipe is not None and recipe.is_free(self.kept):
            return View(recipe, _geometry(t))
        self.kept.add(storage)
        return Kept(t)

    def _recipe_of(self, t: Tensor, storage: int) -> Recipe | None:
        recipe = self.recipes.get(storage)
        return recipe if recipe is not None and recipe.version == t._version and recipe.dtype == t.dtype else None

    # ---- what is remembered

    def _source(self, t: Tensor) -> View | Kept:
        recipe = self._recipe_of(t, t.untyped_storage()._cdata)
        if recipe is not None:
            return View(recipe, _geometry(t))
        return Kept(t if t.is_leaf else t.detach())

    def _remember(self, y: Tensor, function: Callable[..., Tensor], sources: list[View | Kept]) -> None:
        """Register how y was computed, and let slots of this function that hold y hold its recipe."""
        self._share_version(y)
        whole = y.storage_offset() == 0 and y.untyped_storage().nbytes() == y.numel() * y.element_size()
        if not y.requires_grad or not whole or type(y) is not Tensor:
            return
        storage = y.untyped_storage()._cdata
        recipe = Recipe(function, sources, y)
        if storage not in self.recipes:
            weakref.finalize(y, self.recipes.pop, storage, None)
        self.recipes[storage] = recipe
        if recipe.is_free(self.kept - {storage}):
            for slot, saved in self.fresh:
                if saved == storage:
                    slot.hold(View(recipe, _geometry(slot.content.tensor)))
                    self.kept.discard(storage)

    def _share_version(self, y: Tensor) -> None:
        """Let slots that hold the result of a function notice when it is overwritten: autograd saved an alias."""
        storage = y.untyped_storage()._cdata
        for slot, saved in self.fresh:
            if saved == storage and slot.content.tensor._version != y._version:
                slot.hold(Kept(y.detach().as_strided(*_geometry(slot.content.tensor))))

    def _batch_norm(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = torch.nn.functional.batch_norm
        names = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        options = dict(zip(names, args)) | kwargs
        weight = options.get("weight")
        learns = x.requires_grad or (weight is not None and weight.requires_grad)
        per_channel = x.numel() // max(1, x.size(1)) if x.dim() > 1 else 0
        if not learns or type(x) is not Tensor or per_channel < 2 or not x.is_floating_point() or x.is_meta:
            return plain(x, *args, **kwargs)
        if (weight is None) != (options.get("bias") is None):
            return plain(x, *args, **kwargs)
        if x.dtype == torch.float64 and weight is not None and weight.dtype != x.dtype:
            return plain(x, *args, **kwargs)
        source = self._source(x)
        y, normalisation = batch_norm(x, **{"running_mean": None, "running_var": None} | options)
        self._remember(y, normalisation, [source])
        return y

    def _recomputed(self, function: Any, name: str, args: Any, kwargs: Any) -> Any:
        tensors = [t for t in _flat(args) if isinstance(t, Tensor)][: 1 if name in NORMS else None]
        again = pure(name, args, kwargs) if tensors and all(type(t) in _PLAIN for t in tensors) else None
        if again is not None and overwrites(name, args, kwargs):
            first = tensors[0]
            if self._recipe_of(first, first.untyped_storage()._cdata) is None:
                again = None  # what it is computed from is lost
        if again is None:
            result = function(*args, **kwargs)
            if self.fresh and isinstance(result, Tensor):
                self._share_version(result)
            return result
        sources = [self._source(t) for t in tensors]
        y = function(*args, **kwargs)
        if isinstance(y, Tensor):
            self._remember(y, again, sources)
        return y


_PLAIN = (Tensor, torch.nn.Parameter)


def _unpack(slot: Slot) -> Tensor:
    return slot.get()


def _flat(values: Any) -> list[Any]:
    found: list[Any] = []
    for value in values:
        found.extend(value if isinstance(value, list | tuple) else [value])
    return found

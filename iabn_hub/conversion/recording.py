"""Run a network so that autograd keeps recipes of tensors instead of the tensors.

A `Recording` sees every torch function of a forward pass (`TorchFunctionMode`) and everything that autograd saves
(`saved_tensors_hooks`). It remembers how norms, pointwise functions, sums and concatenations were computed. A saved
tensor that can be computed again from what is kept anyway is dropped, until the backward pass asks for it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..layers.activations import ELU, LEAKY_RELU
from ..layers.degenerate import RENEWAL, SMALLEST_SCALE, can_look
from ..layers.pooling import avg_pool2d, max_pool2d
from . import norms
from .norms import Activate, Normalisation
from .operators import Call, Concatenation, is_known, may_overwrite, overwrites, overwritten, read_call
from .recompute import Inverse, Kept, Recipe, Slot, View, bytes_of, geometry, storage_of

METHODS = ("auto", "recompute", "invert")
LARGEST_RATIO = 100  # of a norm's bias to its weight: what is recovered from the output loses two digits at most
_SMALL = 1 << 16  # elements of a parameter that is copied, and does not count as kept


@dataclass
class _Norm:
    """What a norm that has just run was given, as long as an activation may follow."""

    x: Tensor
    version: int  # of x
    weight: Tensor | None
    bias: Tensor | None
    node: Any  # the autograd node of its result
    slot: Slot  # that holds x for this node
    path: str | None  # of the module, while it is observed


class RecoverableScales:
    """Whether the output of a norm tells its input, by the norm's weight and bias; looked at when they have changed."""

    def __init__(self) -> None:
        self.found: Any = WeakTensorKeyDictionary()

    def hold(self, weight: Tensor | None, bias: Tensor | None, y: Tensor) -> bool:
        if weight is None or bias is None:
            return True
        versions = (weight._version, bias._version)
        if weight.is_cuda:  # to look takes time there, since the host waits for it
            versions = (versions[0] // RENEWAL, versions[1] // RENEWAL)
        known, recoverable = self.found.get(weight, (None, False))
        if known != versions:
            if not can_look(y):
                return False
            with torch.no_grad():
                size = weight.abs()
                recoverable = bool(((bias.abs() <= LARGEST_RATIO * size) & (size >= SMALLEST_SCALE)).all())
            self.found[weight] = versions, recoverable
        return bool(recoverable)


class Recording(TorchFunctionMode):
    """A forward pass whose saved tensors are dropped where they can be computed again."""

    def __init__(self, method: str, scales: RecoverableScales, observer: Any = None) -> None:
        super().__init__()
        self.method, self.scales, self.observer = method, scales, observer
        self.recipes: dict[int, Recipe] = {}  # by storage, as long as the tensor lives
        self.norms: dict[int, _Norm] = {}  # likewise
        self.kept: set[int] = set()  # storages that autograd holds
        self.extra: dict[int, list[Any]] = {}  # weak references to the recipes that are computed from a storage
        self.fresh: list[tuple[Slot, int]] = []  # slots of the function that runs, and their storages
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, Slot.get)

    def __enter__(self) -> Recording:
        super().__enter__()
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)
        super().__exit__(*error)
        for memory in (self.recipes, self.norms, self.kept, self.extra, self.fresh):
            memory.clear()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name == "__get__":  # an attribute, such as x.shape
            return function(*args, **kwargs)
        if self.extra and may_overwrite(name, args, kwargs):
            self._secure(overwritten(function, args, kwargs))
        if args and isinstance(args[0], Tensor) and overwrites(name):
            before = self.recipes.get(storage_of(args[0]))
            result = self._call(function, name, args, kwargs)
            self._forget_overwritten(args[0], before)
            return result
        return self._call(function, name, args, kwargs)

    def _call(self, function: Any, name: str, args: Any, kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or torch._C._functorch.maybe_current_level() is not None:
            return function(*args, **kwargs)
        if not self.is_on_top():
            self._observe("leave", "within activation checkpointing, or other hooks on saved tensors")
            return function(*args, **kwargs)
        self.fresh.clear()
        if function is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if function is F.instance_norm:
            return self._instance_norm(*args, **kwargs)
        if is_known(function, name):
            return self._recomputed(function, name, args, kwargs)
        pool = None if self.method == "invert" else _POOLING.get(function)
        result = None if pool is None else pool(*args, **kwargs)
        return self._share_version(function(*args, **kwargs) if result is None else result)

    def is_on_top(self) -> bool:
        """Whether no other hooks, such as those of a checkpoint, take the saved tensors."""
        top: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return top is not None and top[0] == self.hooks.pack_hook

    def _observe(self, action: str, reason: str = "", path: str | None = None) -> None:
        if self.observer is not None:
            self.observer.note(action, reason, path)

    # ---- what autograd saves

    def _pack(self, t: Tensor) -> Slot:
        storage = storage_of(t)
        recipe = self._recipe_of(t, storage)
        slot = Slot(Kept(t))
        if recipe is None or storage in self.kept or not self._replace(slot, recipe):
            self._keep(slot, storage, recipe)
        self.fresh.append((slot, storage))
        return slot if self.observer is None else self.observer.keep(slot)

    def _replace(self, slot: Slot, recipe: Recipe) -> bool:
        """Let a slot hold the recipe of its tensor if that takes less memory."""
        assert isinstance(slot.content, Kept)
        if self.method == "invert":
            return False
        t = slot.content.tensor
        missing = recipe.missing(self.kept)
        if missing is None:
            return False
        saved = bytes_of(t) - sum(bytes_of(k.tensor) for k in missing.values())
        if saved < 0 or (saved == 0 and not isinstance(recipe.function, Concatenation)):
            return False
        slot.hold(View(recipe, geometry(t)))
        self.kept.update(missing)
        return True

    def _keep(self, slot: Slot, storage: int, recipe: Recipe | None) -> None:
        """Let a slot hold its tensor, and what is computed from the tensor begin with it."""
        if recipe is not None and storage not in self.kept and self.method != "invert":
            assert isinstance(slot.content, Kept)
            recipe.settle(slot.content.tensor)
            self._watch(recipe)
        self.kept.add(storage)

    def _secure(self, tensors: Iterable[Tensor]) -> None:
        """Before a function may overwrite these: what is computed from them is computed from copies."""
        for t in tensors:
            storage = storage_of(t)
            copies: dict[Any, Kept] = {}
            for reference in self.extra.pop(storage, ()):
                recipe = reference()
                for i, source in enumerate(recipe.sources if recipe is not None else ()):
                    if isinstance(source, Kept) and storage_of(source.tensor) == storage and source.is_unchanged:
                        place = geometry(source.tensor)
                        if place not in copies:
                            copies[place] = Kept(source.tensor.detach().clone())
                        recipe.sources[i] = copies[place]

    def _forget_overwritten(self, t: Any, before: Recipe | None) -> None:
        """Without a trace in its version, `t.data.mul_(2)` overwrites t."""
        if before is not None and self.recipes.get(storage_of(t)) is before:
            before.forget()
            del self.recipes[storage_of(t)]

    def _recipe_of(self, t: Tensor, storage: int) -> Recipe | None:
        recipe = self.recipes.get(storage)
        return recipe if recipe is not None and recipe.version == t._version and recipe.dtype == t.dtype else None

    # ---- what is remembered

    def _source(self, t: Tensor) -> View | Kept:
        storage = storage_of(t)
        recipe = self._recipe_of(t, storage)
        if recipe is not None and storage not in self.kept:
            return View(recipe, geometry(t))
        if t.is_leaf and t.requires_grad and t.numel() <= _SMALL:
            return Kept(t.detach().clone(), free=True)
        return Kept(t if t.is_leaf else t.detach())

    def _remember(self, y: Tensor, function: Callable[..., Tensor], sources: list[View | Kept]) -> None:
        """Register how y was computed, and let slots of this function that hold y hold its recipe."""
        self._share_version(y)
        storage = storage_of(y)
        plain = type(y) is Tensor and y.layout == torch.strided and not y.is_complex()
        whole = plain and y.storage_offset() == 0 and bytes_of(y) == y.numel() * y.element_size()
        if not y.requires_grad or not whole:
            self.recipes.pop(storage, None)
            return
        function, sources = _in_one_pass(function, sources)
        recipe = self.recipes[storage] = Recipe(function, sources, y)
        self._watch(recipe)
        # The reference calls back when y dies: what has its storage then is another tensor.
        recipe.alive = weakref.ref(y, functools.partial(self._forget, storage, id(recipe)))
        for slot, saved in self.fresh:
            if saved == storage:
                self.kept.discard(storage)
                if not self._replace(slot, recipe):
                    self._keep(slot, storage, recipe)

    def _watch(self, recipe: Recipe) -> None:
        """Notice when something is overwritten that it is computed from."""
        for source in recipe.sources:
            if isinstance(source, Kept) and not source.free:
                self.extra.setdefault(storage_of(source.tensor), []).append(weakref.ref(recipe))

    def _forget(self, storage: int, recipe: int, _: Any) -> None:
        if id(self.recipes.get(storage)) == recipe:
            del self.recipes[storage]
            self.norms.pop(storage, None)

    def _share_version(self, y: Any) -> Any:
        """The result of a function; slots that hold it notice when it is overwritten: autograd saved an alias."""
        if not self.fresh or not isinstance(y, Tensor):
            return y
        storage = storage_of(y)
        for slot, saved in self.fresh:
            if saved == storage and isinstance(slot.content, Kept) and slot.content.tensor._version != y._version:
                slot.hold(Kept(y.detach().as_strided(*geometry(slot.content.tensor))))
        return y

    # ---- norms

    def _batch_norm(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        options = dict(zip(_BATCH_NORM, args)) | kwargs
        per_channel = x.numel() // max(1, x.size(1)) if x.dim() > 1 else 0
        reason = norms.unsupported(x, options, per_channel)
        if reason:
            self._observe("leave", reason)
            return F.batch_norm(x, *args, **kwargs)
        return self._norm(norms.dense(x), options, norms.batch_norm)

    def _instance_norm(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        options = dict(zip(_INSTANCE_NORM, args)) | kwargs
        running = options.pop("running_mean", None) is not None
        options.pop("running_var", None)
        uses_input = options.pop("use_input_stats", True)
        options.pop("momentum", None)
        per_channel = x.numel() // max(1, x.size(0) * x.size(1)) if x.dim() > 2 else 0
        reason = (
            "it has running statistics" if running or not uses_input else norms.unsupported(x, options, per_channel)
        )
        if reason:
            self._observe("leave", reason)
            return F.instance_norm(x, *args, **kwargs)
        return self._norm(norms.dense(x), options, norms.instance_norm)

    def _norm(self, x: Tensor, options: dict[str, Any], function: Any) -> Tensor:
        source = self._source(x)
        y: Tensor
        y, norm = function(x, **options)
        self._remember(y, norm, [source])
        slot = self.fresh[-1][0]
        path = None if self.observer is None else self.observer.here
        self.norms[storage_of(y)] = _Norm(
            x, x._version, options.get("weight"), options.get("bias"), y.grad_fn, slot, path
        )
        if self.method == "invert":
            self._observe("leave", "no leaky ReLU or ELU follows")
        else:
            self._observe("recompute")
        return y

    # ---- other functions

    def _recomputed(self, function: Any, name: str, args: Any, kwargs: Any) -> Any:
        if args and isinstance(args[0], Tensor) and not args[0].is_floating_point():  # such as counters of batches
            return function(*args, **kwargs)
        call = read_call(name, args, kwargs)
        if call is None or not all(type(t) in _PLAIN for t in call.tensors):
            return self._share_version(function(*args, **kwargs))
        first = call.tensors[0]
        known = self._recipe_of(first, storage_of(first))
        fused = self._activate(call, known, functools.partial(function, **kwargs), args)
        if fused is not None:
            return fused
        sources = [self._source(t) for t in call.tensors]
        if call.overwrites and not isinstance(sources[0], View):
            sources = []  # what it is computed from is lost
        y = function(*args, **kwargs)
        if isinstance(y, Tensor) and sources:
            self._remember(y, call.function, sources)
            if call.is_norm and self.method != "invert":
                self._observe("recompute")
            return y
        return self._share_version(y)

    def _activate(self, call: Call, recipe: Recipe | None, function: Any, args: Any) -> Tensor | None:
        """An activation right behind a norm: one node for both, and one pass."""
        y = call.tensors[0]
        if call.activation is None or recipe is None or not isinstance(recipe.function, Normalisation):
            return None
        norm, given = recipe.function, self.norms.get(storage_of(y))
        untouched = (
            given is not None and y.grad_fn is given.node and not y._backward_hooks and not y.retains_grad
            and given.x._version == given.version
        )  # fmt: skip
        if given is None or not untouched or not norm.is_linear or norm.joined or geometry(y)[1:] != (recipe.stride, 0):
            return None
        inverted = self._inverts(call.activation, given, y)
        both = norm.followed_by(call.activation)
        source = recipe.sources[0]
        run = functools.partial(_run, function, args[1:])
        z: Tensor = Activate.apply(given.x, given.weight, given.bias, y, both, run, inverted)
        self.norms.pop(storage_of(z), None)
        if inverted:
            self._observe("invert", path=given.path)
            self._keep_result(given, both, z)
        else:
            self._remember(z, both, [source])
        return z

    def _keep_result(self, given: _Norm, norm: Normalisation, z: Tensor) -> None:
        """Let z be kept in place of the norm's input x."""
        storage = storage_of(z)
        self.recipes.pop(storage, None)
        self.kept.discard(storage_of(given.x))
        self.kept.add(storage)
        slot = self.fresh[-1][0]
        recipe = Recipe(norm.input_of, [Kept(z.detach())], given.x)
        slot.hold(Inverse(recipe))
        given.slot.hold(View(recipe, geometry(given.x)))  # of the norm's own node, for what else uses its output
        self._watch(recipe)

    def _inverts(self, activation: tuple[int, float], given: _Norm, y: Tensor) -> bool:
        """Whether to keep the activation's output, which is read once less, instead of the norm's input."""
        number, param = activation
        if self.method == "recompute" or number not in (LEAKY_RELU, ELU) or param <= 0:
            return False
        # A saturated ELU tells less and less of its input, and bfloat16 has too few digits.
        if self.method == "auto" and (number == ELU or y.dtype not in (torch.float32, torch.float64)):
            return False
        return self.scales.hold(given.weight, given.bias, y)


_BATCH_NORM = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_INSTANCE_NORM = ("running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
_POOLING = {F.max_pool2d: max_pool2d, F.avg_pool2d: avg_pool2d}  # that keeps less
_PLAIN = (Tensor, torch.nn.Parameter)


def _run(function: Any, rest: Any, y: Tensor) -> Tensor:
    z: Tensor = function(y, *rest)
    return z


def _in_one_pass(
    function: Callable[..., Tensor], sources: list[View | Kept]
) -> tuple[Callable[..., Tensor], list[View | Kept]]:
    """norm(x) + y and relu(norm(x) + y) as one Normalisation, which reads and writes once."""
    if function is torch.add and len(sources) == 2:
        for branch, other in (sources, sources[::-1]):
            norm = _norm_of(branch)
            if norm is not None and norm.is_linear and not norm.joined and _size(other) == _size(branch):
                return norm.followed_by(joined=True), [branch.recipe.sources[0], other]  # type: ignore[union-attr]
    elif function is torch.relu:
        norm = _norm_of(sources[0])
        if norm is not None and norm.is_linear:
            return norm.followed_by((LEAKY_RELU, 0.0)), sources[0].recipe.sources  # type: ignore[union-attr]
    return function, sources


def _norm_of(source: View | Kept) -> Normalisation | None:
    whole = isinstance(source, View) and source.whole and isinstance(source.recipe.function, Normalisation)
    return source.recipe.function if whole else None  # type: ignore[union-attr, return-value]


def _size(source: View | Kept) -> tuple[Any, torch.dtype]:
    if isinstance(source, View):
        return source.geometry[0], source.recipe.dtype
    return source.tensor.size(), source.tensor.dtype

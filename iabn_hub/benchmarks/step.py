"""Memory and time of a training step of whole networks: every way to save memory, in one run.

Bytes are those of the allocator: *kept* is what is alive between the forward and the backward pass, *peak* the most
that is alive at once, both beyond parameters, their gradients and the images. Times are those of a forward and a
backward pass; each round runs the baseline and the way in turn, and the ratios are medians over the rounds.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..conversion import convert
from ..conversion.measure import allocations, gradients_allocated, highest
from ..layers.backends.loading import use_backend
from ..layers.pooling import AvgPool2d, MaxPool2d
from ..models import MODELS, create_model
from ..models.libraries import create_from_library, images_of
from .machine import describe_machine

NETWORKS = ("resnet50_iabn", "resnext101_iabn", "wider_resnet38_iabn", "densenet121_iabn", "efficientnet_b0")
BASELINE = "standard"
SMALL = 2  # of one image some networks cannot take the variance
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class StepOptions:
    """What to measure: images with sides of `size` (None: the network's own), under autocast to `dtype`."""

    batch_size: int = 4
    size: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    channels_last: bool = True
    compile: bool = True
    gradients: bool = True
    rounds: int = 7
    ways: tuple[str, ...] = ()  # only these, besides the baseline


@dataclass(frozen=True)
class Way:
    """One way to train a network.

    Attributes:
        inplace: with in-place norms, in place of standard ones and ReLU.
        converted: after `iabn_hub.convert`.
        checkpointing: each block or stage is computed again in the backward pass.
        budget: of torch.compile, its activation memory budget; None is eager mode.
        formulas: compiled code has the layer's formulas, in place of calls of its kernels.
    """

    name: str
    inplace: bool = False
    converted: bool = False
    checkpointing: bool = False
    budget: float | None = None
    formulas: bool = False


WAYS = (
    Way(BASELINE),
    Way("checkpointing", checkpointing=True),
    Way("in place", inplace=True),
    Way("in place, checkpointing", inplace=True, checkpointing=True),
    Way("converted", converted=True),
    Way("converted, checkpointing", converted=True, checkpointing=True),
    Way("compiled", budget=1.0),
    Way("compiled, budget 0.99", budget=0.99),
    Way("compiled, budget 0.5", budget=0.5),
    Way("in place, compiled", inplace=True, budget=1.0),
    Way("in place, compiled, formulas", inplace=True, budget=1.0, formulas=True),
    Way("in place, compiled, budget 0.5", inplace=True, budget=0.5),
)


@dataclass
class Contender:
    """A network that is trained one way."""

    way: Way
    network: nn.Module
    shape: tuple[int, ...]  # of an image
    step: Callable[[torch.Tensor], torch.Tensor]  # images to loss
    facts: dict[str, Any] = field(default_factory=dict)

    def train(self, images: torch.Tensor) -> None:
        with self.context():
            self.step(images).backward()

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        # Autograd's threads compile the backward pass: the budget is a global of torch's, not one of a thread.
        torch._functorch.config.activation_memory_budget = 1.0 if self.way.budget is None else self.way.budget
        try:
            with use_backend("reference") if self.way.formulas else contextlib.nullcontext():
                yield
        finally:
            torch._functorch.config.activation_memory_budget = 1.0


def measure_steps(names: Sequence[str], options: StepOptions, report: Callable[[str], None]) -> dict[str, Any]:
    """Every network every way, ready for JSON; `report` is called with the text of each."""
    results = {}
    for name in names:
        report(f"\n{name}")
        results[name] = measure_network(name, options, report)
    facts = {"batch_size": options.batch_size, "size": options.size, "dtype": options.dtype}
    layout = "channels_last" if options.channels_last else "NCHW"
    return {"machine": describe_machine(options.device), **facts, "layout": layout, "networks": results}


def measure_network(name: str, options: StepOptions, report: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """By way: bytes kept, peak, seconds of a step and its ratio to the baseline's, cosine of the gradients to float64.

    A way that fails, such as a compiler without its tools, has the reason as `why` alone.
    """
    found: dict[str, dict[str, Any]] = {}
    exact: dict[bool, torch.Tensor] = {}
    baseline: Contender | None = None
    for way in _ways_of(name, options):
        torch.manual_seed(0)
        try:
            contender = _contender(name, way, options)
            images = _images(contender, options)
            started = time.perf_counter()
            contender.train(images)
            contender.train(images)  # what is made once is made now
            if way.budget is not None:
                contender.facts["compile_s"] = time.perf_counter() - started
            contender.facts |= {"images": list(images.shape)} | _memory(contender, images)
            if options.gradients:
                if way.inplace not in exact:
                    exact[way.inplace] = _exact_gradients(name, way.inplace, options, images)
                contender.facts["gradient_cosine"] = _cosine(_gradients(contender, images), exact[way.inplace])
            baseline = baseline or contender
            # Now, since the next that is compiled discards the code of this one.
            contender.facts |= _times(baseline, contender, images, options.rounds)
        except Exception as e:
            if way.name == BASELINE:
                raise
            found[way.name] = {"why": f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"}
            report(f"  {way.name:<32} {found[way.name]['why']}"[:80])
            continue
        facts = contender.facts
        facts |= {f"{key}_ratio": facts[key] / baseline.facts[key] for key in ("kept", "peak")}
        found[way.name] = facts
        report(f"  {way.name:<32} keeps {facts['kept'] / 1e6:8.1f} MB, peak {facts['peak'] / 1e6:8.1f} MB")
    report("")
    for line in table(found):
        report(line)
    return found


def table(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The lines of a table, relative to the baseline, at most 80 columns wide."""
    yield f"  {'':<31} {'kept':>6} {'peak':>6} {'step':>6} {'spread':>12}  {'ms':>8}"
    for name, row in rows.items():
        if "why" not in row:
            spread = f"{row['step_least']:.2f}–{row['step_most']:.2f}"
            ratios = " ".join(f"{row[key]:6.2f}" for key in ("kept_ratio", "peak_ratio", "step_ratio"))
            yield f"  {name:<31} {ratios} {spread:>12}  {1e3 * row['step_s']:8.0f}"


def largest_batch(name: str, way: Way, limit: int, options: StepOptions) -> int:
    """The largest batch whose peak, with parameters, gradients and images, is at most `limit` bytes; 0: none is.

    Found by bisection, each time on a training step that is measured. It begins where the peaks of two small batches
    lead, so that no batch is tried that is much too large.
    """

    def bytes_of(batch: int) -> int:
        torch.manual_seed(0)
        contender = _contender(name, way, options)
        images = _images(contender, options, batch)
        constant = 2 * sum(p.nbytes for p in contender.network.parameters()) + images.nbytes
        contender.train(images)
        return int(_memory(contender, images)["peak"]) + constant

    small, twice = bytes_of(SMALL), bytes_of(2 * SMALL)
    if small > limit:
        return 0
    slope = max(1.0, (twice - small) / SMALL)
    low, high = SMALL, SMALL + int((limit - small) / slope * 1.1) + 1
    while bytes_of(high) <= limit:  # it grows less than it did
        low, high = high, high + max(1, high // 4)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bytes_of(middle) <= limit else (low, middle)
    return low


def add_largest_batches(
    result: dict[str, Any], limit: int, options: StepOptions, report: Callable[[str], None]
) -> None:
    """Add `largest_batch` to each way in eager mode; a compiled network would be compiled again for each batch."""
    result["limit"] = limit
    for name, rows in result["networks"].items():
        report(f"\n{name}: the largest batch in {limit / 1e9:.2f} GB")
        for way in _ways_of(name, options):
            if way.budget is None and "why" not in rows[way.name]:
                rows[way.name]["largest_batch"] = largest_batch(name, way, limit, options)
                report(f"  {way.name:<31} {rows[way.name]['largest_batch']:6}")


# ---- contenders ------------------------------------------------------------------------------------------------------


def _ways_of(name: str, options: StepOptions) -> list[Way]:
    ours = name in MODELS
    return [
        way
        for way in WAYS
        if (ours or not way.inplace)
        and (options.compile or way.budget is None)
        and (not options.ways or way.name in (BASELINE, *options.ways))
    ]


def _network(name: str, inplace: bool) -> tuple[nn.Module, tuple[int, ...]]:
    """Randomly initialised, and the shape of its images; with standard norms it has ReLU and torch's pooling."""
    if name not in MODELS:
        return create_from_library(name)
    shape = (3, 224, 224)
    if inplace:
        return create_model(name), shape
    network = create_model(name, norm_layer="abn", activation="relu")
    for module in list(network.modules()):
        for key, child in module.named_children():
            if isinstance(child, MaxPool2d):
                plain = nn.MaxPool2d(child.kernel_size, child.stride, child.padding, ceil_mode=child.ceil_mode)
                setattr(module, key, plain)
            elif isinstance(child, AvgPool2d):
                setattr(module, key, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
    return network, shape


def _contender(name: str, way: Way, options: StepOptions) -> Contender:
    network: Any
    network, shape = _network(name, way.inplace)
    network.to(options.device, memory_format=_format(shape, options)).train()
    if way.checkpointing:
        if not hasattr(network, "set_grad_checkpointing"):
            raise ValueError("the network has no checkpointing of its own")
        network.set_grad_checkpointing(True)
    if way.converted:
        convert(network)
    runs: Any = network
    if way.budget is not None:
        torch.compiler.reset()
        runs = torch.compile(network)
    dtype = DTYPES[options.dtype]

    def step(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(options.device, dtype, enabled=dtype != torch.float32):
            outputs = tree_leaves(runs(images))  # several with deep supervision
        return torch.stack([each.float().square().mean() for each in outputs]).sum()

    return Contender(way, network, shape, step)


def _images(contender: Contender, options: StepOptions, batch: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(images_of(contender.shape, batch or options.batch_size, options.size), generator=generator)
    return images.to(options.device).contiguous(memory_format=_format(contender.shape, options))


def _format(shape: tuple[int, ...], options: StepOptions) -> torch.memory_format:
    if not options.channels_last:
        return torch.contiguous_format
    return torch.channels_last if len(shape) == 3 else torch.channels_last_3d


# ---- measurements ----------------------------------------------------------------------------------------------------


def _memory(contender: Contender, images: torch.Tensor) -> dict[str, int]:
    """Bytes kept and peak of one training step."""
    if images.is_cuda:
        with gradients_allocated(contender.network), contender.context():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss = contender.step(images)
            kept = torch.cuda.memory_allocated() - before
            loss.backward()
            return {"kept": kept, "peak": torch.cuda.max_memory_allocated() - before}
    with gradients_allocated(contender.network), contender.context():
        with allocations() as forward:
            loss = contender.step(images)
        with allocations() as backward:
            loss.backward()
    kept = sum(forward)
    return {"kept": kept, "peak": max(highest(forward), kept + highest(backward))}


def _gradients(contender: Contender, images: torch.Tensor) -> torch.Tensor:
    contender.network.zero_grad(set_to_none=True)
    torch.manual_seed(2)  # of dropout
    contender.train(images)
    return torch.cat([p.grad.double().flatten() for p in contender.network.parameters() if p.grad is not None])


def _exact_gradients(name: str, inplace: bool, options: StepOptions, images: torch.Tensor) -> torch.Tensor:
    """Those of the same network in float64."""
    torch.manual_seed(0)
    plain = StepOptions(size=options.size, device=options.device, channels_last=options.channels_last)
    contender = _contender(name, Way("exact", inplace=inplace), plain)
    contender.network.double()

    def step(images: torch.Tensor) -> torch.Tensor:
        return torch.stack([t.square().mean() for t in tree_leaves(contender.network(images.double()))]).sum()

    contender.step = step
    return _gradients(contender, images)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.dot(a, b) / (a.norm() * b.norm()))


def _times(baseline: Contender, contender: Contender, images: torch.Tensor, rounds: int) -> dict[str, float]:
    """Seconds of a step, its ratio to that of the baseline, and the least and largest of these ratios."""
    pairs = [[_seconds(each, images) for each in (baseline, contender)] for _ in range(rounds + 1)][1:]
    ratios = [ours / theirs for theirs, ours in pairs] if contender is not baseline else [1.0]
    return {
        "step_s": statistics.median(ours for _, ours in pairs),
        "step_ratio": statistics.median(ratios),
        "step_least": min(ratios),
        "step_most": max(ratios),
    }


def _seconds(contender: Contender, images: torch.Tensor) -> float:
    contender.network.zero_grad(set_to_none=True)
    if images.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    contender.train(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    contender.network.zero_grad(set_to_none=True)
    return seconds


def summarised(result: dict[str, Any]) -> dict[str, Any]:
    """A copy for a file that is kept: rounded, so that a small change is a small difference."""
    rounded = copy.deepcopy(result)
    for rows in rounded["networks"].values():
        for row in rows.values():
            for key, value in row.items():
                if isinstance(value, float):
                    row[key] = round(value, 9 if key == "gradient_cosine" else 4)
    return rounded

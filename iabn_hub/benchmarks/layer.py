"""Time the layer's forward and backward pass beside what it competes with, in one run.

As in training, the layer runs on a buffer that a producer has just written; the producer's own time is subtracted. Each
round runs every contender once. Results are medians over the rounds, and medians of the rounds' ratios.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..layers import InPlaceABN, ops
from ..layers.backends.loading import use_backend, use_native
from .machine import describe_machine, seconds

SHAPES = ((16, 64, 56, 56), (16, 256, 28, 28), (16, 1024, 14, 14), (8, 64, 112, 112))
BASELINE = "BatchNorm2d + LeakyReLU"
# Over memory: forward reads twice and writes once, backward reads y and dy twice and writes dx. Fewer reach the memory
# where a channel stays in a cache or in shared memory, so that the share of the copy's bandwidth may exceed 100 %.
PASSES = 8
PASSES_OF = {"statistics": 1, "normalize_": 2, "gradient_sums": 2, "input_gradient": 3}
# Every tensor that a ResNet-50 normalises at 224 × 224: (channels, height).
RESNET50 = (
    *((64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28)),
    *((256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7)),
)


@dataclass(frozen=True)
class LayerOptions:
    """What to measure.

    Args:
        shapes: 'usual', or 'resnet50' for every tensor that it normalises, at batch 32.
        scale: multiplies the batch; None: 1, on CUDA 16, so that tensors exceed the L2 cache.
    """

    device: str = "cpu"
    compile: bool = True
    rounds: int = 15
    warmup: int = 3
    shapes: str = "usual"
    scale: int | None = None


class Produce(torch.autograd.Function):
    """Stands for the convolution: writes its output into a buffer, and takes a gradient without using it."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, source: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        buffer.copy_(source)
        return buffer.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        return None, None, None


def measure_layer(options: LayerOptions, report: Callable[[str], None]) -> dict[str, Any]:
    """All cases and their summary, ready for JSON; `report` is called with the text of each."""
    status = use_native(options.device)
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        for channels_last in (False, True):
            for shape in _shapes(options):
                cases.append(LayerCase(shape, dtype, channels_last, options).measure())
                report(_case_text(cases[-1]))
    summary = _summary(cases)
    report(
        "\n".join(
            [
                f"\ntimes as fast as {BASELINE}, forward + backward, geometric mean over the shapes",
                *(f"  {name:<52} {value:5.2f}" for name, value in summary.items()),
            ]
        )
    )
    host = measure_host(options.device)
    report(
        f"\na call on a tensor of {host['shape']}, forward + backward: {host['layer_us']:.0f} µs, "
        f"{BASELINE} {host['baseline_us']:.0f} µs: {host['ratio']:.2f} × as long"
    )
    machine = describe_machine(options.device)
    return {"backend": status.backend, "machine": machine, "cases": cases, "summary": summary, "host": host}


def measure_host(device: str, rounds: int = 30, calls: int = 100) -> dict[str, Any]:
    """What a call costs beside its computation: microseconds of a forward and a backward pass on a tiny tensor.

    On CUDA it is the time until all kernels are queued. Of the rounds the medians, and the median of their ratios.
    """
    shape = (2, 8, 4, 4)
    x, dy, leaf = (torch.randn(shape, device=device), torch.randn(shape, device=device), torch.zeros(1, device=device))
    leaf.requires_grad_()

    def microseconds(layer: nn.Module) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            layer(x + leaf).backward(dy)
        return (time.perf_counter() - started) / calls * 1e6

    layers = InPlaceABN(shape[1]).to(device), _standard(shape[1], device)
    for layer in layers:
        microseconds(layer)
    times = [[microseconds(layer) for layer in layers] for _ in range(rounds)]
    ours, standard = (statistics.median(each) for each in zip(*times))
    ratio = statistics.median(a / b for a, b in times)
    return {"shape": shape, "layer_us": ours, "baseline_us": standard, "ratio": ratio}


def _shapes(options: LayerOptions) -> list[tuple[int, ...]]:
    if options.shapes == "resnet50":
        return [(32, channels, height, height) for channels, height in RESNET50]
    scale = options.scale or (16 if options.device == "cuda" else 1)
    return [(n * scale, *rest) for n, *rest in SHAPES]


class LayerCase:
    """One kind of tensor, on which every contender and every operator is timed."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, options: LayerOptions) -> None:
        self.shape, self.dtype, self.channels_last, self.options = shape, dtype, channels_last, options
        form = torch.channels_last if channels_last else torch.contiguous_format

        def random() -> torch.Tensor:
            return torch.randn(shape, device=options.device).to(dtype).contiguous(memory_format=form)

        self.source, self.buffer, self.dy = random(), random(), random()
        self.target = torch.empty_like(self.source)
        self.leaf = torch.zeros((), device=options.device, requires_grad=True)
        torch.compiler.reset()  # else later cases meet the limit of recompilations, and run eagerly
        self.contenders = _contenders(shape[1], options.device, options.compile)
        if dtype not in (torch.float32, torch.float64):
            self.contenders.pop("inplace_abn", None)

    def measure(self) -> dict[str, Any]:
        """Medians and ratios over the rounds."""
        rounds = [self._round() for _ in range(self.options.warmup + self.options.rounds)][self.options.warmup :]
        size = self.source.nbytes
        copies, alone = [r["copy"] for r in rounds], [r["alone"] for r in rounds]
        return {
            "shape": self.shape,
            "dtype": str(self.dtype).removeprefix("torch."),
            "layout": "channels_last" if self.channels_last else "NCHW",
            "bytes": size,
            "contenders": _contender_table([r["contenders"] for r in rounds]),
            "copy_gb_per_s": 2 * size / statistics.median(copies) / 1e9,
            "operators_alone_ms": 1e3 * statistics.median(alone),
            "operators_alone_share_of_copy": statistics.median(PASSES * c / (2 * a) for a, c in zip(alone, copies)),
            "operators_alone_gb_per_s": PASSES * size / statistics.median(alone) / 1e9,
            "share_of_copy": {
                name: statistics.median(passes * r["copy"] / (2 * r["operators"][name]) for r in rounds)
                for name, passes in PASSES_OF.items()
            },
        }

    def _round(self) -> dict[str, Any]:
        """Seconds of everything, each once."""
        device = self.options.device
        produce = seconds(lambda: Produce.apply(self.leaf, self.source, self.buffer), device)
        copy = seconds(lambda: self.target.copy_(self.source), device)
        mean, var = ops.statistics(self.source)
        affine = (torch.ones_like(mean), torch.zeros_like(mean), None, 1e-5, 1, 0.01, False)
        self.buffer.copy_(self.source)
        forward = seconds(lambda: ops.batch_normalize_(self.buffer, *affine), device)
        backward = seconds(lambda: ops.batch_gradient(self.buffer, self.dy, var, False, *affine), device)
        contenders = {name: self._time(*contender, produce) for name, contender in self.contenders.items()}
        sums = torch.zeros_like(mean)
        operators: dict[str, Callable[[], object]] = {
            "statistics": lambda: ops.statistics(self.source),
            "normalize_": lambda: ops.normalize_(self.buffer, mean, var, *affine),
            "gradient_sums": lambda: ops.gradient_sums(self.source, self.dy, *affine),
            "input_gradient": lambda: ops.input_gradient(self.source, self.dy, var, sums, sums, False, *affine),
        }
        return {
            "copy": copy,
            "alone": forward + backward,
            "contenders": contenders,
            "operators": {name: seconds(run, device) for name, run in operators.items()},
        }

    def _time(self, layer: nn.Module, context: Any, produce: float) -> tuple[float, float]:
        """Seconds of forward and backward, without those of the producer."""
        made: list[torch.Tensor] = []
        device = self.options.device
        with context():
            both = seconds(lambda: made.append(layer(Produce.apply(self.leaf, self.source, self.buffer))), device)
            backward = seconds(lambda: made[0].backward(self.dy), device)
        # Where the producer happened to be slow, nothing may be left after subtracting its time.
        return max(both - produce, 1e-6), max(backward, 1e-6)


def _contenders(channels: int, device: str, with_compile: bool) -> dict[str, tuple[nn.Module, Any]]:
    """By name: a layer, and the context to run it in."""
    found: dict[str, tuple[Any, Any]] = {
        BASELINE: (_standard(channels, device), contextlib.nullcontext),
        "iABN": (InPlaceABN(channels).to(device), contextlib.nullcontext),
        "iABN (reference)": (InPlaceABN(channels).to(device), lambda: use_backend("reference")),
    }
    if with_compile:
        found[f"{BASELINE}, compiled"] = (torch.compile(_standard(channels, device)), contextlib.nullcontext)
        found["iABN, compiled"] = (torch.compile(InPlaceABN(channels).to(device)), contextlib.nullcontext)
    with contextlib.suppress(ImportError):
        import inplace_abn  # noqa: PLC0415  (few have it)

        found["inplace_abn"] = (inplace_abn.InPlaceABN(channels).to(device), contextlib.nullcontext)
    return found


def _standard(channels: int, device: str) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.LeakyReLU(0.01, inplace=True)).to(device)


def _contender_table(rounds: list[dict[str, tuple[float, float]]]) -> dict[str, dict[str, float]]:
    base = [sum(each[BASELINE]) for each in rounds]
    table = {}
    for name in rounds[0]:
        pairs = [each[name] for each in rounds]
        both = [sum(pair) for pair in pairs]
        table[name] = {
            "forward_ms": 1e3 * statistics.median(f for f, _ in pairs),
            "backward_ms": 1e3 * statistics.median(b for _, b in pairs),
            "both_ms": 1e3 * statistics.median(both),
            "times_faster": statistics.median(b / o for b, o in zip(base, both)),
        }
    return table


def _summary(cases: list[dict[str, Any]]) -> dict[str, float]:
    """Geometric means over the shapes of one dtype and layout."""
    summary = {}
    for name in cases[0]["contenders"]:
        for dtype in ("float32", "bfloat16"):
            for layout in ("NCHW", "channels_last"):
                faster = [
                    case["contenders"][name]["times_faster"]
                    for case in cases
                    if (case["dtype"], case["layout"]) == (dtype, layout) and name in case["contenders"]
                ]
                if faster:
                    summary[f"{name} | {dtype} {layout}"] = math.exp(statistics.mean(map(math.log, faster)))
    return summary


def _case_text(case: dict[str, Any]) -> str:
    each = ", ".join(f"{name} {100 * share:.0f} %" for name, share in case["share_of_copy"].items())
    lines = [
        f"\n{case['shape']} {case['dtype']} {case['layout']}, {case['bytes'] / 1e6:.1f} MB; copy "
        f"{case['copy_gb_per_s']:.1f} GB/s; operators alone {case['operators_alone_ms']:.2f} ms, "
        f"{100 * case['operators_alone_share_of_copy']:.0f} % of the copy's bandwidth over {PASSES} passes",
        f"  of the copy's bandwidth over its own passes: {each}",
    ]
    lines += [
        f"  {name:<36} forward {row['forward_ms']:7.2f}  backward {row['backward_ms']:7.2f}  "
        f"both {row['both_ms']:7.2f} ms  {row['times_faster']:5.2f} × as fast"
        for name, row in case["contenders"].items()
    ]
    return "\n".join(lines)

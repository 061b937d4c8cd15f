#!/usr/bin/env python
"""Measure the layer's speed and the networks' memory, each beside what it competes with, in one run.

    python tools/benchmark.py layer                 times, ratios, share of the copy bandwidth
    python tools/benchmark.py memory                bytes kept for the backward pass

`layer` measures as in training: on a buffer that a producer has just written, the producer's own time taken off.
Each round runs every contender once; printed are medians over the rounds, and medians of the rounds' ratios.
"""

import argparse
import contextlib
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import iabn_hub
from iabn_hub.layers import extension, functional, ops, reference

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
NETWORKS = ("resnet50_iabn", "resnext101_iabn", "densenet121_iabn", "wider_resnet38_iabn")
BUDGETS = (1.0, 0.99, 0.5)


class Produce(torch.autograd.Function):
    """Stands for the convolution: writes its output into a buffer, and takes a gradient without using it."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, source: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        buffer.copy_(source)
        return buffer.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        return None, None, None


@contextlib.contextmanager
def reference_kernels():
    """Let the layer use the reference kernels, whatever is loaded."""
    usual = functional.kernels
    functional.kernels = lambda _: reference
    try:
        yield
    finally:
        functional.kernels = usual


def seconds(function: Callable[[], object], device: str) -> float:
    """On CUDA the device's own time: it sleeps until everything is queued, so that no launch is waited for."""
    if device == "cuda":
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(5_000_000)
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def contenders(channels: int, device: str, with_compile: bool) -> dict[str, tuple[Callable[..., Any], Any]]:
    """Name to (layer, context to run it in)."""
    standard = nn.Sequential(nn.BatchNorm2d(channels), nn.LeakyReLU(0.01, inplace=True)).to(device)
    native = iabn_hub.InPlaceABN(channels).to(device)
    found = {
        BASELINE: (standard, contextlib.nullcontext),
        "iABN": (native, contextlib.nullcontext),
        "iABN (reference)": (iabn_hub.InPlaceABN(channels).to(device), reference_kernels),
    }
    if with_compile:
        compiled = nn.Sequential(nn.BatchNorm2d(channels), nn.LeakyReLU(0.01, inplace=True)).to(device)
        found[f"{BASELINE}, compiled"] = (torch.compile(compiled), contextlib.nullcontext)
        found["iABN, compiled"] = (torch.compile(iabn_hub.InPlaceABN(channels).to(device)), contextlib.nullcontext)
    with contextlib.suppress(ImportError):
        import inplace_abn

        found["inplace_abn"] = (inplace_abn.InPlaceABN(channels).to(device), contextlib.nullcontext)
    return found


def layer_case(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, arguments: Any) -> dict[str, Any]:
    """Forward and backward seconds of every contender on one kind of tensor."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    device = arguments.device
    source, buffer, dy = (torch.randn(shape, device=device).to(dtype).contiguous(memory_format=form) for _ in range(3))
    leaf = torch.zeros((), device=device, requires_grad=True)
    rounds: dict[str, list[tuple[float, float]]] = {}
    torch.compiler.reset()  # else the later cases would meet the limit of recompilations, and run eagerly
    layers = contenders(shape[1], device, not arguments.no_compile)
    if dtype not in (torch.float32, torch.float64):
        layers.pop("inplace_abn", None)
    target = torch.empty_like(source)
    copies, alone = [], []
    single: dict[str, list[float]] = {}
    mean, var = ops.statistics(source)
    affine = (torch.ones_like(mean), torch.zeros_like(mean), None, 1e-5, 1, 0.01, False)
    for round_ in range(-arguments.warmup, arguments.rounds):
        produce = seconds(lambda: Produce.apply(leaf, source, buffer), device)
        copy = seconds(lambda: target.copy_(source), device)
        buffer.copy_(source)
        one = seconds(lambda: ops.batch_normalize_(buffer, *affine), device)
        result = []
        two = seconds(lambda: result.append(ops.batch_gradient(buffer, dy, var, False, *affine)), device)
        for name, (layer, context) in layers.items():
            made = []
            with context():
                forward = seconds(lambda: made.append(layer(Produce.apply(leaf, source, buffer))), device) - produce
                backward = seconds(lambda: made[0].backward(dy), device)
            if round_ >= 0:
                rounds.setdefault(name, []).append((forward, backward))
        sums = torch.zeros_like(mean)
        operators: dict[str, Callable[[], object]] = {
            "statistics": lambda: ops.statistics(source),
            "normalize_": lambda: ops.normalize_(buffer, mean, var, *affine),
            "gradient_sums": lambda: ops.gradient_sums(source, dy, *affine),
            "input_gradient": lambda: ops.input_gradient(source, dy, var, sums, sums, False, *affine),
        }
        for name, run in operators.items():
            share = PASSES_OF[name] * source.nbytes / seconds(run, device) / (2 * source.nbytes / copy)
            if round_ >= 0:
                single.setdefault(name, []).append(share)
        if round_ >= 0:
            copies.append(copy)
            alone.append(one + two)
    size = source.nbytes
    # Where the producer happened to be slow, what is left after taking off its time may be nothing.
    rounds = {name: [(max(f, 1e-6), max(b, 1e-6)) for f, b in pairs] for name, pairs in rounds.items()}
    base = [sum(pair) for pair in rounds[BASELINE]]
    table = {}
    for name, pairs in rounds.items():
        both = [sum(pair) for pair in pairs]
        table[name] = {
            "forward_ms": 1e3 * statistics.median(f for f, _ in pairs),
            "backward_ms": 1e3 * statistics.median(b for _, b in pairs),
            "both_ms": 1e3 * statistics.median(both),
            "times_faster": statistics.median(b / o for b, o in zip(base, both)),
        }
    copy_rate = 2 * size / statistics.median(copies)
    kernel_rate = PASSES * size / statistics.median(alone)
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "layout": "channels_last" if channels_last else "NCHW",
        "bytes": size,
        "contenders": table,
        "copy_gb_per_s": copy_rate / 1e9,
        "operators_alone_ms": 1e3 * statistics.median(alone),
        "operators_alone_share_of_copy": statistics.median(
            PASSES * size / a / (2 * size / c) for a, c in zip(alone, copies)
        ),
        "operators_alone_gb_per_s": kernel_rate / 1e9,
        "share_of_copy": {name: statistics.median(shares) for name, shares in single.items()},
    }


def shapes(arguments: Any) -> list[tuple[int, ...]]:
    if arguments.shapes == "resnet50":
        return [(32, channels, height, height) for channels, height in RESNET50]
    scale = arguments.scale or (16 if arguments.device == "cuda" else 1)  # beyond the L2 cache of a GPU
    return [(n * scale, *rest) for n, *rest in SHAPES]


def layer(arguments: Any) -> dict[str, Any]:
    status = extension.use_native(arguments.device)
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        for channels_last in (False, True):
            for shape in shapes(arguments):
                case = layer_case(shape, dtype, channels_last, arguments)
                cases.append(case)
                if not arguments.json:
                    show(case)
    summary = {}
    for name in cases[0]["contenders"]:
        for dtype in ("float32", "bfloat16"):
            for layout in ("NCHW", "channels_last"):
                faster = [
                    c["contenders"][name]["times_faster"]
                    for c in cases
                    if (c["dtype"], c["layout"]) == (dtype, layout) and name in c["contenders"]
                ]
                if faster:
                    summary[f"{name} | {dtype} {layout}"] = math.exp(statistics.mean(map(math.log, faster)))
    if not arguments.json:
        print(f"\ntimes faster than {BASELINE}, forward + backward, geometric mean over the shapes")
        for name, value in summary.items():
            print(f"  {name:<52} {value:5.2f}")
    return {"backend": status.backend, "machine": machine(arguments.device), "cases": cases, "summary": summary}


def show(case: dict[str, Any]) -> None:
    print(
        f"\n{case['shape']} {case['dtype']} {case['layout']}, {case['bytes'] / 1e6:.1f} MB; copy "
        f"{case['copy_gb_per_s']:.1f} GB/s; operators alone {case['operators_alone_ms']:.2f} ms, "
        f"{100 * case['operators_alone_share_of_copy']:.0f} % of the copy's bandwidth over {PASSES} passes"
    )
    each = ", ".join(f"{name} {100 * share:.0f} %" for name, share in case["share_of_copy"].items())
    print(f"  of the copy's bandwidth over its own passes: {each}")
    for name, row in case["contenders"].items():
        print(
            f"  {name:<36} forward {row['forward_ms']:7.2f}  backward {row['backward_ms']:7.2f}  "
            f"both {row['both_ms']:7.2f} ms  {row['times_faster']:5.2f} × as fast"
        )


def machine(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def kept(network: nn.Module, step: Callable[..., Any], x: torch.Tensor) -> int:
    """Bytes of distinct storages, parameters aside, that a training step keeps; on CUDA the peak of allocation."""
    if x.is_cuda:
        step(x).sum().backward()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(x).sum().backward()
        return torch.cuda.max_memory_allocated() - before
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    found: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in parameters:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    step(x)  # compiled code is made now, without hooks
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        step(x)
    return sum(found.values())


def memory(arguments: Any) -> dict[str, Any]:
    # channels_last throughout: else Inductor keeps copies of the convolutions' weights in that layout.
    form = {"device": arguments.device, "memory_format": torch.channels_last}
    x = torch.randn(arguments.batch_size, 3, 224, 224).to(**form)
    results: dict[str, dict[str, int]] = {}
    for name in arguments.networks:
        ways: dict[str, tuple[str, float | None]] = {"standard": ("abn", None), "in place": ("iabn", None)}
        if not arguments.no_compile:
            ways |= {f"standard, compiled at {budget}": ("abn", budget) for budget in BUDGETS}
            ways["in place, compiled"] = ("iabn", 1.0)
        rows: dict[str, int] = {}
        for way, (norm_layer, budget) in ways.items():
            torch.compiler.reset()
            network = iabn_hub.create_model(name, norm_layer=norm_layer).to(**form).train()
            torch._functorch.config.activation_memory_budget = 1.0 if budget is None else budget
            rows[way] = kept(network, network if budget is None else torch.compile(network), x)
            if not arguments.json:
                saved = 100 * (1 - rows[way] / rows["standard"])
                print(f"{name:<22} {way:<28} {rows[way] / 1e6:8.1f} MB  {saved:5.1f} % saved", flush=True)
        results[name] = rows
    return {"machine": machine(arguments.device), "batch_size": arguments.batch_size, "bytes": results}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run in (("layer", layer), ("memory", memory)):
        command = commands.add_parser(name, help=(run.__doc__ or name).splitlines()[0])
        command.set_defaults(run=run)
        command.add_argument("--device", default="cpu", help="cpu or cuda")
        command.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
        command.add_argument("--no-compile", action="store_true", help="leave the compiled contenders out")
        command.add_argument("--json", action="store_true", help="print one JSON object at the end, nothing else")
        if name == "layer":
            command.add_argument("--rounds", type=int, default=15)
            command.add_argument("--warmup", type=int, default=3)
            command.add_argument("--scale", type=int, help="multiply the batch by this (default: 1; on cuda 16)")
            command.add_argument(
                "--shapes", choices=("usual", "resnet50"), default="usual", help="resnet50: at batch 32"
            )
        else:
            command.add_argument("--batch-size", type=int, default=4)
            command.add_argument("--networks", nargs="+", default=list(NETWORKS))
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    result = arguments.run(arguments)
    if arguments.json:
        print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

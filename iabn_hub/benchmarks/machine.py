"""The machine that is measured, and its clock."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable

import torch


def seconds(function: Callable[[], object], device: str) -> float:
    """Seconds of a call; on CUDA of the device, which sleeps until all kernels are queued."""
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


def describe_machine(device: str) -> str:
    """Processor or GPU, threads, and torch."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"

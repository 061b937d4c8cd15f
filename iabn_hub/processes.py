"""Who works together, and on what: one process, or those that torchrun has started, each with its device."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous


@dataclass(frozen=True)
class Processes:
    """This process among `count`, and the device that it uses."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def add(self, numbers: Tensor) -> Tensor:
        """The sum over all processes, written into `numbers`, on this process's device."""
        if self.count > 1:
            dist.all_reduce(numbers)
        return numbers

    def gather(self, value: Any) -> list[Any]:
        """What each process passes, in the order of their ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """What the first process passes."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def share_buffers(self, network: nn.Module) -> None:
        """Give every process the first one's buffers, such as running statistics of the first one's images."""
        if self.count > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, src=0)


def usable_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: there is none, or it cannot be used.
    """
    try:
        probe = torch.zeros(1, device=name)
        probe.item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"device {name!r} cannot be used: {str(e).splitlines()[0]}") from e
    return probe.device


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Mixed precision in 'bf16' or 'fp16'; nothing with 'off'."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=amp != "off")


@contextlib.contextmanager
def processes(device: str | None = None) -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did.

    Args:
        device: 'cpu', 'cuda', 'cuda:1' …; by default a GPU, that of the local rank, where there is one.

    Raises:
        ValueError: the device cannot be used.
    """
    together = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and together:
        device = f"cuda:{local_rank}"
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} cannot be used: train and validate on cpu or cuda")
    chosen = usable_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # events and kernels use the current device
    if not together:
        yield Processes(chosen)
        return
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # torchrun keeps its store when it starts the processes of a single node again, and in it the addresses of those
        # that are gone, which the first to come would take for the living.
        store, rank, count = next(rendezvous("env://"))
        attempt = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=count)
    else:
        dist.init_process_group(backend)
    yield Processes(chosen, dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()  # not after an error: it could wait for processes that are gone

"""The ranks that train or validate together, started by torchrun, and the device that each of them uses."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from .files import InUseError, exclusive


class DeviceError(ValueError):
    """A device does not exist here, or cannot be used."""


@dataclass(frozen=True)
class World:
    """This rank among `size` ranks, and its device."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_primary(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over all ranks, written into `values`, a tensor on this rank's device."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def all_gather_object(self, value: Any) -> list[Any]:
        """The value of each rank, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """The value of rank 0."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    @contextlib.contextmanager
    def exclusive(self, folder: Path) -> Iterator[None]:
        """`files.exclusive`, held by rank 0 for all ranks.

        Raises:
            InUseError, OSError: on every rank.
        """
        with contextlib.ExitStack() as stack:
            error: Exception | None = None
            if self.is_primary:
                try:
                    stack.enter_context(exclusive(folder))
                except (InUseError, OSError) as e:
                    error = e
            error = self.broadcast_object(error)
            if error is not None:
                raise error
            yield

    def broadcast_buffers(self, network: nn.Module) -> None:
        """Overwrite the buffers of every rank, such as running statistics, with those of rank 0."""
        if self.size > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, src=0)


def default_device() -> str:
    """'cuda' where there is a GPU, else 'cpu'."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def usable_device(name: str | None = None) -> torch.device:
    """The device of this name; by default `default_device`.

    Raises:
        DeviceError: there is no such device, or it cannot be used.
    """
    name = name or default_device()
    try:
        probe = torch.zeros(1, device=name)
        probe.item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise DeviceError(f"device {name!r} cannot be used: {str(e).splitlines()[0]}") from e
    return probe.device


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Mixed precision in 'bf16' or 'fp16'; nothing with 'off'."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=amp != "off")


@contextlib.contextmanager
def init_world(device: str | None = None) -> Iterator[World]:
    """Join the ranks that torchrun started, if it did.

    Args:
        device: 'cpu', 'cuda', 'cuda:1' …; by default the GPU of the local rank where there is one.

    Raises:
        DeviceError: the device cannot be used.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    device = device or default_device()
    if device == "cuda" and launched:
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise DeviceError(f"device {device!r} cannot be used: choose cpu or cuda")
    chosen = usable_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # events and kernels use the current device
    if not launched:
        yield World(chosen)
        return
    _init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    yield World(chosen, dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()  # not after an error: it could wait for ranks that are gone


def _init_process_group(backend: str) -> None:
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        dist.init_process_group(backend)
        return
    # On a single node torchrun keeps its store when it restarts the ranks, and in it the addresses of those that died,
    # to which the new ones would connect.
    store, rank, size = next(rendezvous("env://"))
    attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    prefixed = dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=prefixed, rank=rank, world_size=size)

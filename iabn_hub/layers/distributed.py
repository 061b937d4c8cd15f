"""Statistics over several processes: who takes part, and how their sums are exchanged.

A training step costs one collective forward and one backward, whatever the number of processes.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Peers:
    """The processes whose batches count as one; `count` of 1 means no exchange at all."""

    group: Any = None
    count: int = 1

    @staticmethod
    def of(group: Any) -> Peers:
        """The members of `group` (None: the default group); nobody else without a process group, or outside of it."""
        if not (dist.is_available() and dist.is_initialized()):
            if not torch.compiler.is_compiling():
                _warn_alone()
            return ALONE
        count = dist.get_world_size(group)
        return ALONE if count <= 1 else Peers(group, count)  # −1 where this process is not a member

    def merge_statistics(self, mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, biased variance and number of values per channel over all peers.

        One all_gather. Chan, Golub, LeVeque (1979), written with the distances of the means from the common
        one, so that a large mean costs no precision.

        Args:
            mean, var: (C,) of this process. count: values per channel of this process, 0 allowed.

        Returns:
            mean (C,), var (C,), count (1,), all of the dtype of `mean`.
        """
        packed = torch.cat([mean, var, mean.new_full((1,), count)])
        gathered = self._gather(packed)
        means, variances, counts = gathered.split([mean.numel(), var.numel(), 1], dim=1)
        total = counts.sum(0).clamp(min=1)
        share = counts / total
        merged = (means * share).sum(0)
        return merged, ((variances + (means - merged).square()) * share).sum(0), total

    def add(self, *vectors: Tensor) -> tuple[Tensor, ...]:
        """The sum of each (C,) vector over all peers, in one all_reduce."""
        packed = torch.stack(vectors)
        dist.all_reduce(packed, group=self.group)
        return packed.unbind(0)

    def check_alike(self, x: Tensor) -> None:
        """One all_gather of what must be the same everywhere, or the exchange would mix up channels.

        Raises:
            ValueError: on every process, if the channels or the dtypes differ; says who has what.
        """
        mine = torch.tensor([x.size(1), _DTYPES.index(x.dtype)], device=x.device)
        gathered = self._gather(mine).tolist()
        if any(other != gathered[0] for other in gathered):
            who = ", ".join(
                f"process {rank}: {channels} channels of {_DTYPES[dtype]}"
                for rank, (channels, dtype) in enumerate(gathered)
            )
            raise ValueError(f"the processes that synchronise their statistics disagree about the input ({who})")

    def _gather(self, v: Tensor) -> Tensor:
        """The vectors (V,) of all peers, (count, V)."""
        gathered = v.new_empty(self.count * v.numel())
        _all_gather(gathered, v, group=self.group)
        return gathered.view(self.count, -1)


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ALONE = Peers()
# The second is its name in older releases; some builds of torch have neither.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


@functools.cache
def _warn_alone() -> None:
    _logger.warning(
        "a synchronised layer runs without a process group and uses the statistics of this process alone; "
        "call torch.distributed.init_process_group first, or use InPlaceABN"
    )


class _Groups:
    """The groups that `active_group` has made, by member, for the process group that is the default one now."""

    world: Any = None
    by_members: dict[tuple[int, ...], Any] = {}  # noqa: RUF012  (one for the process is meant)


def active_group(active: bool) -> Any:
    """The group of all processes that pass `active=True`; to be called by every process of the default group.

    The same members get the same group again, without a new one being made.

    Returns:
        The group, which outside of it is `torch.distributed.GroupMember.NON_GROUP_MEMBER`. A layer with that group
        uses the statistics of its own process.
    """
    if _Groups.world is not dist.group.WORLD:
        _Groups.world, _Groups.by_members = dist.group.WORLD, {}
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    mine = torch.tensor([int(active)], device=device)
    flags = mine.new_empty(dist.get_world_size())
    _all_gather(flags, mine)
    members = tuple(rank for rank, flag in enumerate(flags.tolist()) if flag)
    if not members:
        return dist.GroupMember.NON_GROUP_MEMBER
    if members not in _Groups.by_members:
        _Groups.by_members[members] = dist.new_group(list(members))
    return _Groups.by_members[members]


def set_active_group(module: nn.Module, group: Any) -> None:
    """Give `group` to every layer within `module` that has a `set_group`; not between a forward and its backward."""
    for layer in module.modules():
        set_group = getattr(layer, "set_group", None)
        if set_group is not None:
            set_group(group)

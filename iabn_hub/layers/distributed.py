"""Statistics over several processes: who takes part, and how their sums are exchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Peers:
    """The processes whose batches count as one; `count` of 1 means no exchange at all."""

    group: Any = None
    count: int = 1

    @staticmethod
    def of(group: Any) -> Peers:
        """The members of `group` (None: the default group), or nobody else if there is no process group."""
        if not (dist.is_available() and dist.is_initialized()):
            return ALONE
        return Peers(group, dist.get_world_size(group))

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
        gathered = packed.new_empty(self.count, packed.numel())
        dist.all_gather(list(gathered.unbind(0)), packed, group=self.group)
        means, variances, counts = gathered.split([mean.numel(), var.numel(), 1], dim=1)
        total = counts.sum(0).clamp_(min=1)
        share = counts / total
        merged = (means * share).sum(0)
        return merged, ((variances + (means - merged).square()) * share).sum(0), total

    def add(self, *vectors: Tensor) -> tuple[Tensor, ...]:
        """The sum of each (C,) vector over all peers, in one all_reduce."""
        packed = torch.stack(vectors)
        dist.all_reduce(packed, group=self.group)
        return packed.unbind(0)


ALONE = Peers()

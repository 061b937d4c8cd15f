"""Several views of an image become one prediction, in one running buffer.

Each fusion takes probabilities (N, C, H, W) of one view after the other, and overwrites them. C is at most 256.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Fusion(Protocol):
    """What `mean`, `voting` and `max` have in common."""

    def update(self, probabilities: Tensor) -> None:
        """Take in one view, (N, C, H, W); the tensor is overwritten, or kept."""

    def output(self) -> tuple[Tensor, Tensor]:
        """The probability of the chosen class, (N, H, W), and the class, (N, H, W) uint8."""


class MeanFusion:
    """The class with the largest mean probability. Keeps one tensor of the size of the probabilities."""

    def __init__(self) -> None:
        self.mean: Tensor | None = None
        self.views = 0

    def update(self, probabilities: Tensor) -> None:
        self.views += 1
        if self.mean is None:
            self.mean = probabilities
        else:
            self.mean.lerp_(probabilities, 1 / self.views)

    def output(self) -> tuple[Tensor, Tensor]:
        assert self.mean is not None
        values, classes = self.mean.max(1)
        return values, classes.to(torch.uint8)


class VotingFusion:
    """The class that most views choose, and the mean probability of those views; of equals, the lowest class.

    Keeps a tensor of the size of the probabilities and one of their number of bytes each.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.votes: Tensor | None = None

    def update(self, probabilities: Tensor) -> None:
        values, classes = probabilities.max(1, keepdim=True)
        if self.sums is None or self.votes is None:
            self.sums = probabilities.zero_()
            self.votes = torch.zeros_like(probabilities, dtype=torch.uint8)
        self.sums.scatter_add_(1, classes, values)
        self.votes.scatter_add_(1, classes, torch.ones_like(classes, dtype=torch.uint8))

    def output(self) -> tuple[Tensor, Tensor]:
        assert self.sums is not None
        assert self.votes is not None
        classes = self.votes.argmax(1, keepdim=True)
        values = self.sums.gather(1, classes) / self.votes.gather(1, classes)
        return values[:, 0], classes[:, 0].to(torch.uint8)


class MaxFusion:
    """The class of the most confident view; of equals, the first. Stores one value and one class per pixel."""

    def __init__(self) -> None:
        self.values: Tensor | None = None
        self.classes: Tensor | None = None

    def update(self, probabilities: Tensor) -> None:
        values, classes = probabilities.max(1)
        classes = classes.to(torch.uint8)
        if self.values is None or self.classes is None:
            self.values, self.classes = values, classes
            return
        better = values > self.values
        self.values = torch.where(better, values, self.values)
        self.classes = torch.where(better, classes, self.classes)

    def output(self) -> tuple[Tensor, Tensor]:
        assert self.values is not None
        assert self.classes is not None
        return self.values, self.classes


FUSIONS: dict[str, Callable[[], Fusion]] = {"mean": MeanFusion, "voting": VotingFusion, "max": MaxFusion}


def probabilities_(logits: Tensor) -> Tensor:
    """softmax over dimension 1, written into `logits`."""
    logits -= logits.amax(1, keepdim=True)
    logits.exp_()
    logits /= logits.sum(1, keepdim=True)
    return logits

"""A converted network within DistributedDataParallel and FSDP2, on two processes."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import iabn_hub

from ..layers.test_sync import spawn
from .networks import make

WRAPPERS = ("ddp", "ddp converted", "fsdp")


def train(rank, wrapper, convert):
    """The state after three steps, each process with images of its own."""
    model = make("yolo")
    wrapped = model
    if convert and wrapper != "ddp converted":
        iabn_hub.convert(model)
    if wrapper.startswith("ddp"):
        wrapped = DistributedDataParallel(model)
    else:
        for block in model.children():
            fully_shard(block)
        fully_shard(model)
    if convert and wrapper == "ddp converted":
        iabn_hub.convert(wrapped)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    torch.manual_seed(rank)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(wrapped(torch.randn(4, 3, 32, 32, dtype=torch.float64)), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
    whole = {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in model.state_dict().items()}
    return {n: v.detach().clone() for n, v in whole.items()}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_same_weights(wrapper, tmp_path):
    results = []
    for convert in (False, True):
        folder = tmp_path / str(convert)
        folder.mkdir()
        results.append(spawn(train, 2, folder, wrapper, convert))
    for plain, converted in zip(*results):
        assert plain.keys() == converted.keys()
        for name, value in plain.items():
            torch.testing.assert_close(converted[name], value, rtol=1e-9, atol=1e-9)

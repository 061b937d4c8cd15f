"""Train the tiny network in float64, OUT: its weights. Under torchrun the processes share each batch."""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import iabn_hub

STEPS, BATCH = 4, 8


def main(out: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    together = "RANK" in os.environ
    rank, processes = 0, 1
    network = iabn_hub.create_model("test_resnet_iabn", num_classes=10).double().train()
    first = torch.cat([p.detach().flatten() for p in network.parameters()])
    model: nn.Module = network
    if together:
        dist.init_process_group("gloo")
        rank, processes = dist.get_rank(), dist.get_world_size()
        model = nn.parallel.DistributedDataParallel(iabn_hub.convert_sync(network))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True)
    channels = network.conv1.in_channels if hasattr(network, "conv1") else 3
    for _ in range(STEPS):
        images = torch.randn(BATCH, channels, 32, 32, dtype=torch.float64)
        labels = torch.randint(10, (BATCH,))
        mine = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
        optimizer.zero_grad()
        F.cross_entropy(model(images[mine]), labels[mine]).backward()
        optimizer.step()
    if rank == 0:
        last = torch.cat([p.detach().flatten() for p in network.parameters()])
        torch.save(network.state_dict(), out)
        with open(f"{out}.json", "w") as file:
            json.dump({"moved": float((last - first).abs().max())}, file)
    if together:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])

"""Use the layer in a network of your own, and count what it saves for the backward pass."""

import torch
from torch import nn

from iabn_hub import ABN, InPlaceABN


def network(norm: type[nn.Module]) -> nn.Sequential:
    """Three convolutions, each followed by a norm with a leaky ReLU."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), norm(outputs)]
    return nn.Sequential(*layers)


def saved_bytes(model: nn.Module, images: torch.Tensor) -> int:
    """Bytes of the tensors that autograd saves, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images).mean().backward()
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


images = torch.randn(4, 3, 64, 64)
for norm in (ABN, InPlaceABN):
    print(f"{norm.__name__:<12} {saved_bytes(network(norm), images) / 1e6:.1f} MB")

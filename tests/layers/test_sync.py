"""Two processes with parts of a batch compute what one process computes with all of it."""

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from iabn_hub import InPlaceABN, InPlaceABNSync

SIZES = (3, 2)  # images of each process


def a_batch():
    torch.manual_seed(0)
    return [torch.randn(sum(SIZES), 4, 5, 5, dtype=torch.float64) + 3 for _ in range(3)]


def run_layer(layer, x, residual, dy):
    x.requires_grad_()
    y = layer(x * 1, residual)
    value = y.detach().clone()
    y.backward(dy)
    return {"y": value, "dx": x.grad, "dw": layer.weight.grad, "db": layer.bias.grad, **dict(layer.named_buffers())}


def one_of_two(rank, port, folder):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    parts = [whole.split(SIZES)[rank].clone() for whole in a_batch()]
    torch.save(run_layer(InPlaceABNSync(4).double(), *parts), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_of_two, (port, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = run_layer(InPlaceABN(4).double(), *a_batch())
    for name in ("y", "dx"):
        torch.testing.assert_close(torch.cat([first[name], second[name]]), alone[name], rtol=1e-10, atol=1e-10)
    for name in ("dw", "db"):
        torch.testing.assert_close(first[name] + second[name], alone[name], rtol=1e-10, atol=1e-10)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(first[name], alone[name], rtol=1e-10, atol=1e-10)
        assert torch.equal(first[name], second[name])

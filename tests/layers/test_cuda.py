"""What only a GPU can show: streams, graphs, several devices, no waiting, memory."""

import copy

import pytest
import torch
from torch import nn

from iabn_hub import InPlaceABN

pytestmark = pytest.mark.gpu


def a_network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), InPlaceABN(16), nn.Conv2d(16, 16, 3, padding=1, bias=False),
        InPlaceABN(16, activation="elu"), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).cuda()  # fmt: skip


def step(network, x):
    network.zero_grad(set_to_none=True)
    loss = network(x).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in network.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(8, 64, 56, 56), (4, 256, 14, 14), (2, 2048, 7, 7), (2, 3, 65, 33)], ids=str)
def test_cuda_agrees_with_cpu(shape, layout, dtype):
    x, dy, r = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(3))
    layer = InPlaceABN(shape[1], signed_scale=True)
    nn.init.normal_(layer.weight, 1, 0.1)
    results = []
    for device in ("cpu", "cuda"):
        here = copy.deepcopy(layer).to(device)
        leaf, residual = (v.detach().to(device).requires_grad_() for v in (x, r))
        y = here(leaf * 1, residual)
        y.backward(dy.to(device))
        found = [y, leaf.grad, residual.grad, here.weight.grad, here.bias.grad, here.running_mean, here.running_var]
        results.append([v.detach().double().cpu() for v in found])
    tolerance = 4 * torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 1e-4
    certain = results[0][0].abs() > 1e-5  # about 0 the devices may disagree about the sign, and so about the slope
    for k in (1, 2):
        for found in results:
            found[k] = found[k] * certain
    for ours, theirs in zip(*results):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_the_current_stream_is_used():
    x = torch.randn(8, 16, 64, 64, device="cuda")
    layer = InPlaceABN(16).cuda()
    expected = layer(x.clone())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # what reads before the copy is done reads zeros
        late = torch.zeros_like(x)
        late.copy_(x)
        y = layer(late)
    side.synchronize()
    torch.testing.assert_close(y, expected)


def test_nothing_waits_for_the_device():
    network, x = a_network(), torch.randn(4, 3, 16, 16, device="cuda")
    step(network, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(network, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_can_be_captured_in_a_graph():
    network, x = a_network(), torch.randn(4, 3, 16, 16, device="cuda")
    twin = copy.deepcopy(network)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(network, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(network, x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    for ours, theirs in zip(captured, step(twin, x)):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_the_same_input_gives_the_same_bits():
    x, dy = (torch.randn(16, 32, 56, 56, device="cuda") for _ in range(2))
    layer = InPlaceABN(32, inplace=False).cuda()
    results = []
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        y = layer(leaf * 1)
        results.append([y.detach(), *torch.autograd.grad(y, (leaf, layer.weight, layer.bias), dy)])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_backward_allocates_one_activation():
    layer = InPlaceABN(64).cuda()
    leaf = torch.randn(16, 64, 56, 56, device="cuda", requires_grad=True)
    y = layer(leaf + 0)  # whose backward allocates nothing
    dy = torch.randn_like(y)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(y, leaf, dy)
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * leaf.nbytes


def test_under_autocast():
    network, x = a_network(), torch.randn(4, 3, 16, 16, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert network[1](network[0](x)).dtype == torch.bfloat16
    assert all(torch.isfinite(v).all() for v in step(network, x))


def test_a_second_device_is_addressed():
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one CUDA device")
    x = torch.randn(4, 16, 9, 9)
    layer = InPlaceABN(16)
    expected = copy.deepcopy(layer)(x.clone())
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(layer.to("cuda:1")(x.to("cuda:1")).cpu(), expected, rtol=1e-4, atol=1e-5)


def test_under_ddp():
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        network, x = a_network(), torch.randn(4, 3, 16, 16, device="cuda")
        twin = copy.deepcopy(network)
        wrapped = nn.parallel.DistributedDataParallel(network, device_ids=[0])
        for ours, theirs in zip(step(wrapped, x), step(twin, x)):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    finally:
        torch.distributed.destroy_process_group()

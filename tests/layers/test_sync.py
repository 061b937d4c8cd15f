"""Several processes with parts of a batch compute what one process computes with all of it, in one message each way."""

import contextlib
import datetime
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import iabn_hub
from iabn_hub import InPlaceABN, InPlaceABNSync, active_group, convert_local, convert_sync, set_active_group

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def spawn(scenario, processes, folder, *arguments):
    """Run `scenario(rank, *arguments)` in processes of one gloo group; what each returns, in order."""
    mp.spawn(_one, (processes, scenario, str(folder), arguments), nprocs=processes)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(processes)]


def _one(rank, processes, scenario, folder, arguments):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", processes)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=processes, timeout=datetime.timedelta(seconds=60)
    )
    result = scenario(rank, *arguments)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called within."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            self.calls[function.__name__.rpartition(".")[0].strip("_")] += 1
        return function(*args, **(kwargs or {}))


def a_batch(sizes, channels=4):
    torch.manual_seed(0)
    return [torch.randn(sum(sizes), channels, 5, 5, dtype=torch.float64) + 3 for _ in range(3)]


def run_layer(layer, x, residual, dy):
    x.requires_grad_()
    y = layer(x * 1, residual)
    value = y.detach().clone()
    y.backward(dy)
    return {"y": value, "dx": x.grad, "dw": layer.weight.grad, "db": layer.bias.grad, **dict(layer.named_buffers())}


def parts_of(rank, sizes):
    return [whole.split(sizes)[rank].clone() for whole in a_batch(sizes)]


def with_a_part(rank, sizes):
    return run_layer(InPlaceABNSync(4).double(), *parts_of(rank, sizes))


def assert_equal_to_one_process(results, whole):
    for name in ("y", "dx"):
        torch.testing.assert_close(torch.cat([r[name] for r in results]), whole[name], **EXACT)
    for name in ("dw", "db"):
        torch.testing.assert_close(sum(r[name] for r in results), whole[name], **EXACT)
    for result in results:
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(result[name], whole[name], **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(3, 2), (4, 0, 1, 2)], ids=str)
def test_several_processes_equal_one(sizes, tmp_path):
    results = spawn(with_a_part, len(sizes), tmp_path, sizes)
    assert_equal_to_one_process(results, run_layer(InPlaceABN(4).double(), *a_batch(sizes)))


def counted(rank, sizes):
    """Collectives of each kind of call; a first one, which compares the processes, is not counted."""
    layer = InPlaceABNSync(4).double()
    x, _, _ = parts_of(rank, sizes)
    found = {}

    def count(name, call):
        with Collectives() as collectives:
            call()
        found[name] = dict(collectives.calls)

    count("first forward", lambda: layer(x.clone()))
    leaf = x.clone().requires_grad_()
    kept = []
    count("forward", lambda: kept.append(layer(leaf * 1)))
    count("backward", lambda: kept[0].sum().backward())
    kept.clear()
    count("forward of a frozen producer", lambda: kept.append(layer(x.clone())))
    count("its backward", lambda: kept[0].sum().backward())
    with torch.no_grad():
        count("no_grad", lambda: layer(x.clone()))
    alone = dist.new_group([rank], use_local_synchronization=True)
    layer.set_group(alone)
    count("a group of one", lambda: layer(leaf * 1).sum().backward())
    layer.set_group(None)
    layer.eval()
    count("eval", lambda: layer(leaf * 1).sum().backward())
    return found


@pytest.mark.slow
def test_one_collective_each_way_and_none_where_none_is_needed(tmp_path):
    for found in spawn(counted, 2, tmp_path, (3, 2)):
        one_forward, one_backward = {"allgather_base": 1}, {"allreduce": 1}
        assert found == {
            "first forward": {"allgather_base": 2},
            "forward": one_forward,
            "backward": one_backward,
            "forward of a frozen producer": one_forward,
            "its backward": {},
            "no_grad": one_forward,
            "a group of one": {},
            "eval": {},
        }


def in_groups(rank, sizes):
    """Processes 0 and 2 synchronise, 1 is alone."""
    parts = parts_of(rank, sizes)
    group = active_group(rank != 1)
    with Collectives() as collectives:
        assert active_group(rank != 1) is group
    network = nn.Sequential(InPlaceABN(4)).double()
    weight = network[0].weight
    convert_sync(network)
    assert network[0].weight is weight
    set_active_group(network, group)
    result = run_layer(network[0], *parts)
    convert_local(network)
    assert type(network[0]) is InPlaceABN
    result["nobody"] = active_group(False) is dist.GroupMember.NON_GROUP_MEMBER
    result["calls"] = dict(collectives.calls)
    return result


@pytest.mark.slow
def test_a_group_of_some_processes(tmp_path):
    sizes = (3, 2, 2)
    results = spawn(in_groups, 3, tmp_path, sizes)
    wholes = [whole.split(sizes) for whole in a_batch(sizes)]
    together = [torch.cat([parts[0], parts[2]]) for parts in wholes]
    assert_equal_to_one_process([results[0], results[2]], run_layer(InPlaceABN(4).double(), *together))
    alone = run_layer(InPlaceABN(4).double(), *[parts[1].clone() for parts in wholes])
    assert_equal_to_one_process([results[1]], alone)
    for result in results:
        assert result["nobody"]
        assert result["calls"] == {"allgather_base": 1}, "the same members get the same group again"


class Network(nn.Module):
    def __init__(self, norm=InPlaceABNSync, checkpointed=False):
        super().__init__()
        torch.manual_seed(1)
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 3, padding=1, bias=False), norm(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8)
        self.checkpointed = checkpointed

    def block(self, x):
        x = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(x), x)

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)


def gradients(network, x):
    network(x).square().mean().backward()
    return {name: p.grad for name, p in network.named_parameters()}


def in_frames(rank, sizes):
    """The gradients that DDP, FSDP2, checkpointing and torch.compile give, averaged over the processes."""
    x = parts_of(rank, sizes)[0]
    found = {}
    for name in ("ddp", "ddp, checkpointed"):
        network = Network(checkpointed="checkpointed" in name).double()
        wrapped = nn.parallel.DistributedDataParallel(network)
        wrapped(x).square().mean().backward()
        found[name] = {n: p.grad for n, p in network.named_parameters()}

    network = Network().double()
    fully_shard(network)
    found["fsdp"] = {n: g.full_tensor() for n, g in gradients(network, x).items()}

    network = Network().double()
    network.bn1._compared = network.bn2._compared = True  # as after an eager step
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    found["compiled"] = {n.removeprefix("_orig_mod."): g for n, g in gradients(compiled, x).items()}
    for gradient in found["compiled"].values():
        dist.all_reduce(gradient, dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
        gradient /= dist.get_world_size()
    return found


@pytest.mark.slow
def test_ddp_fsdp_checkpointing_and_compile(tmp_path):
    sizes = (2, 2)
    expected = gradients(Network(InPlaceABN).double(), a_batch(sizes)[0])
    for found in spawn(in_frames, 2, tmp_path, sizes):
        assert found.keys() == {"ddp", "ddp, checkpointed", "fsdp", "compiled"}
        for frame, gradient in found.items():
            for name, value in gradient.items():
                torch.testing.assert_close(
                    value, expected[name], **EXACT, msg=lambda m, f=frame, n=name: f"{f} {n}: {m}"
                )


def disagreeing(rank):
    channels, dtype = ((4, torch.float32), (6, torch.float32))[rank]
    with contextlib.suppress(ValueError):
        InPlaceABNSync(channels)(torch.randn(2, channels, 3, dtype=dtype))
        return "no error"
    try:
        InPlaceABNSync(4)(torch.randn(2, 4, 3, dtype=(torch.float32, torch.bfloat16)[rank]))
    except ValueError as e:
        return str(e)
    return "no error"


def test_a_mismatch_is_an_error_on_every_process(tmp_path):
    for said in spawn(disagreeing, 2, tmp_path):
        assert "process 0: 4 channels of torch.float32, process 1: 4 channels of torch.bfloat16" in said


def losing_one(rank):
    layer = InPlaceABNSync(4)
    layer(torch.randn(2, 4, 3))
    dist.barrier()
    if rank == 1:
        torch.save("gone", f"{os.environ['FOLDER']}/1.pt")
        os._exit(0)
    try:
        layer(torch.randn(2, 4, 3))
    except RuntimeError as e:
        return str(e)
    return "no error"


def test_a_process_that_dies_is_an_error_for_the_others(tmp_path, monkeypatch):
    monkeypatch.setenv("FOLDER", str(tmp_path))
    said = spawn(losing_one, 2, tmp_path)[0]
    assert said != "no error"


def test_without_a_process_group_one_warning_says_so(caplog):
    iabn_hub.layers.distributed._warn_alone.cache_clear()
    layer = InPlaceABNSync(4)
    layer.eval()(torch.randn(2, 4, 3))
    assert not caplog.records
    layer.train()
    for _ in range(2):
        layer(torch.randn(2, 4, 3))
    assert [r.getMessage() for r in caplog.records if "without a process group" in r.getMessage()] == [
        "a synchronised layer runs without a process group and uses the statistics of this process alone; "
        "call torch.distributed.init_process_group first, or use InPlaceABN"
    ]


TRAINING = Path(__file__).parent / "train_tiny.py"


@pytest.mark.slow
def test_torchrun_trains_to_the_weights_of_one_process(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, command in (("one", [sys.executable]), ("two", launch)):
        subprocess.run([*command, str(TRAINING), str(tmp_path / name)], check=True, timeout=200)
    one, two = (torch.load(tmp_path / name) for name in ("one", "two"))
    moved = json.loads((tmp_path / "one.json").read_text())["moved"]
    assert moved > 1e-2, "the weights have been trained"
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")

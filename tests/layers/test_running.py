"""What a training step overwrites beside its result: running statistics, and the number of batches."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from iabn_hub import InPlaceABN
from iabn_hub.layers import ops

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 8e-3}


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(0, 5), (2, 1), (3, 20, 7), (2, 33, 4, 4), (40, 17)]),
    running=st.sampled_from([None, torch.float32, torch.float64, torch.bfloat16]),
    stored=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    counted=st.booleans(),
    momentum=st.sampled_from([0.0, 0.1, 1.0]),
    inplace=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_a_training_step_renews_the_running_statistics(shape, running, stored, counted, momentum, inplace, seed):
    torch.manual_seed(seed)
    x = (torch.randn(shape) * 3 + 1).to(stored)
    count = x.numel() // shape[1]
    before = None if running is None else [torch.rand(shape[1]).to(running) for _ in range(2)]
    after = [None, None] if before is None else [v.clone() for v in before]
    batches = torch.tensor(7) if counted else None
    affine = (None, None, None, 1e-5, 1, 0.01, False)
    step = ops.batch_normalize_ if inplace else ops.batch_normalize
    step(x.clone(), *affine, *after, batches, momentum)
    assert batches is None or batches.item() == 8
    if before is not None:
        values = x.double().transpose(0, 1).flatten(1)
        batch = values.mean(1), values.var(1, correction=min(1, count - 1)) if count else values.mean(1)
        for ours, old, new in zip(after, before, batch):
            expected = old.double() * (1 - momentum) + (new * momentum if momentum and count else 0)
            tolerance = TOLERANCE[running]
            torch.testing.assert_close(
                ours.double(),
                expected if count else old.double(),
                rtol=tolerance,
                atol=tolerance * expected.abs().max(),
            )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_batches_are_counted_in_any_dtype(dtype):
    counts = torch.tensor([5, 7]).to(dtype)  # the second must stay as it is
    layer = InPlaceABN(4)
    layer.num_batches_tracked = counts[0]
    layer(torch.randn(3, 4, 5, 5))
    assert counts.tolist() == [6, 7]


def test_an_average_of_all_batches_takes_the_same_path():
    ours, theirs = InPlaceABN(4, momentum=None), nn.BatchNorm2d(4, momentum=None)
    leaf = torch.zeros(1, requires_grad=True)
    for _ in range(3):
        x = torch.randn(3, 4, 5, 5)
        y = ours(x + leaf)
        theirs(x)
    assert y.grad_fn.name() == "BatchNormalizeBackward"
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert ours.num_batches_tracked == 3


def test_the_kernels_are_loaded_while_a_compiler_traces():
    code = """
import torch
from iabn_hub import InPlaceABN, use_backend
with use_backend("native"):
    torch.compile(InPlaceABN(4), backend="eager", fullgraph=True)(torch.randn(2, 4, 5, 5))
print(torch._C._dispatch_has_kernel_for_dispatch_key("iabn_hub::statistics", "CPU"))
"""
    environment = {name: value for name, value in os.environ.items() if name != "IABN_HUB_BACKEND"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["True"]

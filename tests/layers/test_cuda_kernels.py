"""The CUDA kernels, compiled for the host and run thread by thread: no GPU, no CUDA toolkit."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iabn_hub.layers.backends import building

from .cuda import on_host


@pytest.fixture(scope="module", autouse=True)
def compiler():
    try:
        return building.compiler()
    except building.BuildError as e:
        pytest.skip(f"nothing to compile the kernels with: {e}")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return on_host.Library(on_host.build(tmp_path_factory.mktemp("cuda")))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(
        st.integers(1, 4),
        st.one_of(st.integers(1, 12), st.sampled_from([33, 40, 64])),
        st.one_of(st.integers(2, 80), st.sampled_from([196, 256])),
    ),
    dtype=st.sampled_from(list(on_host.DTYPES.values())),
    rows=st.booleans(),
    activation=st.sampled_from([(0, 0.01), (1, 0.01), (1, 0.3), (2, 1.0), (2, 0.3), (3, 0.0), (4, 0.0), (5, 0.0)]),
    affine=st.sampled_from([None, torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    place=st.tuples(st.integers(0, 3), st.sampled_from([0, 0, 1, 8])),
    mean=st.sampled_from([0.0, 0.0, 100.0]),
    processors=st.sampled_from([1, 4, 40]),
    group=st.sampled_from([None, None, 8, 16]),
    seed=st.integers(0, 1 << 30),
)
def test_every_kernel_agrees_with_the_formulas(
    library, shape, dtype, rows, activation, affine, flags, place, mean, processors, group, seed
):
    joined, signed, in_place = flags
    on_host.check(
        library, shape, dtype, rows, seed=seed, activation=activation, affine=affine, joined=joined, signed=signed,
        shift=place[0], gap=place[1], mean=mean, in_place=in_place, processors=processors, group=group,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", on_host.DTYPES.values(), ids=on_host.DTYPES)
def test_every_width_is_taken(library, dtype):
    widest = 16 // dtype.itemsize
    assert on_host.check(library, (2, 3, 32), dtype, rows=False)[0].plan.width == widest
    assert on_host.check(library, (2, 3, 14 * 14), dtype, rows=False)[0].plan.width == min(4, widest)
    assert on_host.check(library, (2, 3, 32), dtype, rows=False, shift=1)[0].plan.width == 1
    assert on_host.check(library, (2, 16, 3), dtype, rows=True)[0].plan.width == widest
    assert on_host.check(library, (2, 12, 3), dtype, rows=True)[0].plan.width == min(4, widest)
    assert on_host.check(library, (2, 17, 3), dtype, rows=True)[0].plan.width == 1


@pytest.mark.parametrize("kib", [48, 49])
def test_shared_memory_is_asked_for(library, kib):
    # The limit of 48 KiB without asking includes what a kernel has beside the channel.
    shape = (1, 2, kib << 8)
    plans = on_host.check(library, shape, torch.float32, rows=False, processors=1, shared_bytes=500 << 10)
    assert len(plans) == 4, "both fused kernels have run"


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "planes"])
def test_few_channels_are_split(library, rows):
    results = on_host.check(library, (2, 2, 8192), torch.float32, rows, processors=40)
    for result in results[:2]:
        assert 1 < result.parts <= result.plan.most_parts


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "planes"])
@pytest.mark.parametrize("processors", [1, 5, 16, 40])
def test_all_blocks_of_a_split_channel_run_at_once(library, rows, processors):
    # Three fit on a multiprocessor; one more would run alone after all others.
    for result in on_host.check(library, (2, 40, 4096), torch.float32, rows, processors=processors):
        assert result.parts == 1 or result.parts * result.plan.tiles <= 3 * processors


@pytest.mark.parametrize("fused", [True, False])
def test_launches_of_a_training_step(library, fused):
    """Two each way, one where a channel stays in shared memory, for all that a layer does."""
    x = torch.randn((2, 4, 64) if fused else (2, 4, 8192))
    vectors = {name: torch.rand(4) for name in ("mean", "var", "mean_dz", "mean_dz_xhat")}
    options = (torch.rand(4), torch.rand(4), 1e-5, 1, 0.01, False)
    y, dy, dx = (on_host.Guarded(x, x, False, 0, 0) for _ in range(3))
    forward = [on_host.FUSED_FORWARD] if fused else [on_host.STATISTICS, on_host.NORMALIZE]
    backward = [on_host.FUSED_BACKWARD] if fused else [on_host.GRADIENT_SUMS, on_host.INPUT_GRADIENT]
    results = [library(operation, x, False, [y, None, y], options, **vectors) for operation in forward]
    results += [library(operation, x, False, [y, dy, None, dx, None], options, **vectors) for operation in backward]
    assert sum(result.launches for result in results) == (2 if fused else 4)


@given(n=st.integers(0, 2**31 - 1), d=st.integers(1, 2**31 - 1))
@settings(max_examples=500)
def test_division_by_a_multiplication(library, n, d):
    for number in (n, n // d * d, max(0, n // d * d - 1)):
        assert library.divide(number, d) == number // d


def test_a_channel_that_fits_is_read_once(library):
    # Statistics, sums, and both of the fused kernels; beyond half of the shared memory only the first two.
    assert len(on_host.check(library, (2, 4, 256), torch.float32, rows=False)) == 4
    assert len(on_host.check(library, (2, 4, 8192), torch.float32, rows=False)) == 2


def test_the_same_input_gives_the_same_bits(library):
    x = torch.randn(2, 3, 1024)
    options = (None, None, 1e-5, 1, 0.01, False)
    results = [
        library(on_host.STATISTICS, x, False, [on_host.Guarded(x, x, False, 0, 0)], options, processors=40).out[:2]
        for _ in range(3)  # blocks and threads take turns in another order each time
    ]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_moments_of_values_far_from_zero(library):
    x = torch.randn(2, 2, 4096, dtype=torch.float64) * 1e-2 + 1e3
    stored = x.float()
    exact = stored.double().var((0, 2), correction=0)
    options = (None, None, 1e-5, 0, 1.0, False)
    for rows in (True, False):
        held = on_host.Guarded(stored, stored, rows, 0, 0)
        var = library(on_host.STATISTICS, stored, rows, [held], options).out[1]
        assert ((var - exact).abs() < 1e-5 * exact).all()


PLANTED = {
    "no barrier before the upper half is read": (
        "    }\n    __syncthreads();\n    if (y < half) {", "    }\n    if (y < half) {",
    ),
    "no barrier before it is overwritten": (
        "upper[i * (kBlockThreads / 2) + at]);\n    }\n    __syncthreads();",
        "upper[i * (kBlockThreads / 2) + at]);\n    }",
    ),
    "no barrier between the warps": (
        "of_warp[warp] = item;\n  __syncthreads();", "of_warp[warp] = item;",
    ),
    "no barrier before fused sums are read": (
        "  __syncthreads();\n  A count = A(s.per_channel());", "  A count = A(s.per_channel());",
    ),
    "no barrier before the values of the channels are read": (
        "all[k] = values_of(channel); });\n  __syncthreads();", "all[k] = values_of(channel); });",
    ),
    "no barrier before the results of the columns are read": (
        "done[threadIdx.x * W + i] = items[i];\n  }\n  __syncthreads();",
        "done[threadIdx.x * W + i] = items[i];\n  }",
    ),
    "the last vector of a channel is missed": (
        "if (first + u * step < end) use(", "if (first + u * step < end - 1) use(",
    ),
    "a part begins one too late": (
        "return {tile, part * count / parts,", "return {tile, part * count / parts + (part > 0),",
    ),
    "channels beyond the last are written": (
        "  if (c >= s.end) return;\n  auto load_row", "  auto load_row",
    ),
    "a thread takes its neighbour's warp": (
        "lane < warps ? of_warp[lane]", "lane < warps - 1 ? of_warp[lane]",
    ),
    "the last part of a plane is left out": (
        "p = threadIdx.x; p < gridDim.y;", "p = threadIdx.x; p < gridDim.y - 1;",
    ),
    "the first block finishes, not the last": (
        "bool last = *before == gridDim.y - 1;", "bool last = *before == 0;",
    ),
    "the counter of a tile stays": (
        "count_up(&arrived[blockIdx.x], gridDim.y - 1)", "count_up(&arrived[blockIdx.x], gridDim.y)",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Of each fault: the exit code of a process that checks it, and what that wrote on stderr."""
    folders = {name: tmp_path_factory.mktemp("planted") for name in PLANTED}

    def build(name):
        return str(on_host.build(folders[name], {"f32": torch.float32}, PLANTED[name]))

    with ThreadPoolExecutor(2) as pool:
        libraries = dict(zip(PLANTED, pool.map(build, PLANTED)))
    command = [sys.executable, on_host.__file__, *libraries.values()]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {name: found[library] for name, library in libraries.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(outcomes, name):
    assert outcomes[name]["code"] != 0
    stderr = outcomes[name]["stderr"]
    assert any(word in stderr for word in ("AssertionError", "cuda_on_host")), stderr

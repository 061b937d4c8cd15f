"""Finding a CUDA toolkit, and what is said when it or a compiler is wrong. The CUDA sources are compiled by CI."""

import importlib
import stat
import sys

import pytest
import torch

from iabn_hub.layers import reference
from iabn_hub.layers.backends import building, inductor, loading

from ..paths import TOOLS


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A folder that looks like a CUDA toolkit of the given release."""

    def make(release):
        (tmp_path / "bin").mkdir()
        (tmp_path / "lib64").mkdir()
        (tmp_path / "lib64" / "libcudart_static.a").touch()
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.write_text(f"#!{sys.executable}\nprint('Cuda compilation tools, release {release}, V{release}.1')\n")
        nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        return tmp_path

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return make


def test_the_toolkit_that_is_named_is_taken(toolkit):
    home = toolkit("13.2")
    assert building.cuda_home() == home


@pytest.mark.parametrize(("cap", "levels"), [("default", ["kBaseline"]), ("avx2", ["kBaseline", "kV3"])])
def test_the_cpu_capability_can_be_capped(cap, levels, monkeypatch):
    best = list(building.levels_here())
    monkeypatch.setenv("IABN_HUB_CPU_CAPABILITY", cap)
    assert list(building.levels_here()) == (levels if len(best) > 1 else best)
    monkeypatch.setenv("IABN_HUB_CPU_CAPABILITY", "avx3")
    with pytest.raises(building.BuildError, match="CPU_CAPABILITY is 'avx3': set it to default, avx2, avx512"):
        building.levels_here()


def test_a_toolkit_of_another_version_is_refused(toolkit):
    home = toolkit("12.6")
    with pytest.raises(building.BuildError, match=f"{home} is CUDA 12, but torch is built with CUDA 13.0"):
        building.cuda_home()


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((7, 0), False), ((8, 0), True), ((8, 7), True), ((9, 0), False), ((12, 1), True), ((13, 0), True)],
)
def test_what_code_for_an_architecture_runs_on(capability, runs):
    assert building.covers(["7.5", "8.0", "12.0+PTX"], capability) == runs


def test_a_library_for_other_gpus_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    library = tmp_path / "iabn_cuda.so"
    library.with_suffix(".json").write_text('{"cuda": "13", "architectures": ["9.0"]}')
    monkeypatch.setattr(loading, "capabilities_here", lambda: [(9, 0)])
    assert loading._suits(library)
    monkeypatch.setattr(loading, "capabilities_here", lambda: [(9, 0), (10, 0)])
    assert not loading._suits(library)
    monkeypatch.setattr(loading, "capabilities_here", lambda: [(9, 0)])
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert not loading._suits(library)


def test_no_toolkit_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(building.BuildError, match=rf"looked in {tmp_path}\); install one with nvcc, or set CUDA_HOME"):
        building.cuda_home()


def test_a_gpu_without_toolkit_gets_what_torch_compile_makes(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loading, "_status", {})
    monkeypatch.delenv("IABN_HUB_BACKEND", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(loading, "capabilities_here", lambda: [(9, 0)])
    monkeypatch.setattr(loading, "has_triton", lambda: True)
    assert loading.use_native("cuda").backend == "inductor"
    assert "no CUDA 13 toolkit was found" in caplog.text
    assert "through torch.compile" in caplog.text
    monkeypatch.setattr(loading, "_status", {})
    monkeypatch.setattr(loading, "has_triton", lambda: False)
    assert loading.use_native("cuda").backend == "reference"


def test_rocm_and_other_devices_have_no_native_kernels(monkeypatch):
    monkeypatch.setattr(loading, "_status", {})
    monkeypatch.delenv("IABN_HUB_BACKEND", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this torch is built without CUDA" in loading.use_native("cuda").reason
    assert loading.use_native("xpu").backend == "reference"


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiled_operators_agree_with_the_reference(layout):
    x, dy, r = (torch.randn(3, 16, 9, 7).contiguous(memory_format=layout) for _ in range(3))
    options = (torch.randn(16), torch.randn(16), r, 1e-5, 1, 0.01, True)
    y, mean, var = reference.batch_normalize(x, *options)
    overwritten = x.clone()
    found = inductor.batch_normalize_(overwritten, *options)
    for ours, theirs in zip((overwritten, *found), (y, mean, var)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    found = inductor.batch_gradient(y, dy, var, True, *options)
    for ours, theirs in zip(found, reference.batch_gradient(y, dy, var, True, *options)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_operators_that_do_not_compile_run_as_they_are(caplog):
    def fails(x):
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()
            raise torch._dynamo.exc.UserError(torch._dynamo.exc.UserErrorType.INVALID_INPUT, "not today")
        return x + 1

    assert inductor._compiled(fails)(torch.ones(())) == 2


def test_only_hot_kernels_may_not_spill(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    log = """nvcc -DIABN_DTYPE=bf16 -c kernels.cu
ptxas info    : Compiling entry function '_ZN4iabn10rows_gradientILi8EEEvNS0_5ShapeE' for 'sm_90'
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Compiling entry function '_ZN4iabn13planes_sumsILi1EEEvNS0_5ShapeE' for 'sm_100'
    0 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Compiling entry function '_ZN4iabn13planes_sumsILi8ELNS1_4FromE0EEEvNS0_6ExtentE' for 'sm_100'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"""
    spills = importlib.import_module("build_wheel").spills
    assert spills(log) == (["rows_gradient 8 of bf16 for sm_90"], ["planes_sums 1 of bf16 for sm_100"])

"""The layer takes its kernels from a repository of the package `kernels` if that is asked for, pinned to a commit."""

import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from iabn_hub import InPlaceABN
from iabn_hub.layers.backends import building, loading

from ..paths import TOOLS

COMMIT = "a" * 40
STANDALONE = """
import sys
sys.modules["iabn_hub"] = None  # as where it is not installed
import kernels, torch
loaded = kernels.get_kernel("me/iabn", revision="a" * 40, backend="cpu", trust_remote_code=True)
x = torch.randn(4, 3, 5, 5)
mean, var = loaded.ops.statistics(x)
assert torch.allclose(mean, x.mean((0, 2, 3)), atol=1e-6)
assert torch.allclose(var, x.var((0, 2, 3), unbiased=False), atol=1e-6)
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with the library that was built here for the tests."""
    InPlaceABN(3)(torch.randn(2, 3, 4))
    status = loading.use_native("cpu")
    assert status.library is not None, status.reason
    monkeypatch.syspath_prepend(str(TOOLS))
    build_kernels = importlib.import_module("build_kernels")
    part = tmp_path / "iabn" / "build" / build_kernels.variant("cpu")
    part.mkdir(parents=True)
    shutil.copy(status.library, part / "iabn_cpu.so")
    build_kernels.complete(part, "cpu", [])
    return tmp_path / "iabn"


def run(repository, *line):
    environment = {**os.environ, "LOCAL_KERNELS": f"me/iabn={repository}", "IABN_HUB_KERNELS": f"me/iabn@{COMMIT}"}
    return subprocess.run([sys.executable, *line], env=environment, capture_output=True, text=True, check=False)


def test_the_layer_uses_it(repository):
    done = run(repository, "-m", "iabn_hub", "doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["devices"]["cpu"]
    assert (found["backend"], found["reason"]) == ("native", f"from the Hub, me/iabn@{COMMIT}")
    assert found["library"].startswith(str(repository))


def test_the_operators_need_no_package(repository):
    done = run(repository, "-c", STANDALONE)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["me/iabn", "me/iabn@main", "iabn@" + COMMIT])
def test_what_is_not_pinned_is_refused(name):
    with pytest.raises(building.BuildError, match="all 40 digits of a commit"):
        loading._published_place(name)


def test_what_cannot_be_loaded_leaves_the_other_sources(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loading, "_status", {})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IABN_HUB_KERNELS", f"me/nothing@{COMMIT}")
    monkeypatch.setenv("LOCAL_KERNELS", f"me/nothing={tmp_path}")
    assert loading.use_native("cpu").backend == "native"
    assert f"IABN_HUB_KERNELS: me/nothing@{COMMIT} cannot be loaded" in caplog.text

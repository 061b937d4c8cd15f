"""Every test runs offline in folders of its own, whatever the caller's environment says."""

import os
import tempfile

import pytest
import torch

# Kernels are built once for all tests of a run, never into the caller's cache.
KERNELS = tempfile.TemporaryDirectory(prefix="iabn_hub-kernels-")
os.environ["IABN_HUB_BUILD_DIR"] = KERNELS.name
KEPT = ("IABN_HUB_BUILD_DIR", "IABN_HUB_BACKEND", "IABN_HUB_CPU_CAPABILITY")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch, tmp_path):
    for name in os.environ:
        if name.startswith(("IABN_HUB_", "HF_")) and name not in KEPT:
            monkeypatch.delenv(name)
    monkeypatch.setenv("IABN_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def httpserver_listen_address():
    return ("127.0.0.1", 0)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))

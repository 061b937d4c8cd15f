"""Every test runs offline in folders of its own, whatever the caller's environment says."""

import json
import os
import tempfile

import numpy as np
import pytest
import torch
from PIL import Image

from iabn_hub.cli import main

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores, and inherit the folder for kernels.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
else:
    # Kernels are built once for all tests of a run, never into the caller's cache.
    # A folder of kernels for tests alone can be named, so that several runs build once.
    KERNELS = tempfile.TemporaryDirectory(prefix="iabn_hub-kernels-")
    os.environ["IABN_HUB_BUILD_DIR"] = os.environ.get("IABN_HUB_TEST_KERNELS", KERNELS.name)

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


# ---- small pictures that any network learns at once ------------------------------------------------------------------

TINY = {
    "network": {
        "arch": "test_resnet",
        "activation": "leaky_relu",
        "bn_mode": "inplace",
        "weight_init": "kaiming_normal",
    },
    "optimizer": {
        "batch_size": 8,
        "learning_rate": 0.01,
        "nesterov": True,
        "clip": 0,
        "schedule": {"type": "cosine", "mode": "step", "epochs": 6},
    },
    "input": {"crop_train": 32, "scale_val": 32, "crop_val": 32, "color_jitter_train": True, "lighting_train": True},
    "training": {"min_scale": 0.5},
}


@pytest.fixture
def pictures(tmp_path):
    """Dark and bright pictures, with grain, so that all batches have similar statistics."""

    def make(root=tmp_path / "data", train=20, val=5, classes=("bright", "dark")):
        random = np.random.RandomState(0)
        for part, count in (("train", train), ("val", val)):
            for number, name in enumerate(classes):
                folder = root / part / name
                folder.mkdir(parents=True)
                for i in range(count):
                    grain = random.randint(-30, 31, (40, 40, 3))
                    light = 220 - 190 * number // (len(classes) - 1)
                    Image.fromarray((light + grain).clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        return root

    return make


@pytest.fixture
def recipe_file(tmp_path):
    """Write the tiny recipe, with other values in its sections."""

    def write(**changes):
        content = {name: {**section, **changes.get(name, {})} for name, section in TINY.items()}
        path = tmp_path / "tiny.json"
        path.write_text(json.dumps(content))
        return path

    return write


@pytest.fixture
def train(tmp_path, recipe_file):
    """Run 'iabn-hub train' on the tiny recipe in this process; returns its exit code."""

    def run(data, *more, out=tmp_path / "run", recipe=None):
        return main(["train", str(recipe or recipe_file()), str(data), "--out", str(out), "--workers", "0", *more])

    return run


@pytest.fixture
def measure(capsys):
    """Run 'iabn-hub validate' in this process; returns its exit code and its JSON, or its error."""

    def run(model, data, *more):
        capsys.readouterr()
        code = main(["validate", str(model), str(data), "--workers", "0", "--json", *more])
        said = capsys.readouterr()
        return code, json.loads(said.out) if said.out else said.err

    return run

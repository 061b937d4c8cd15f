"""The layer's tests run on each device: what a test makes without naming one is made there."""

import pytest
import torch

ON_EVERY_DEVICE = ("test_layer", "test_native", "test_recorded_layer")


def pytest_generate_tests(metafunc):
    if metafunc.module.__name__.rpartition(".")[2] in ON_EVERY_DEVICE:
        metafunc.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


@pytest.fixture(autouse=True)
def device(request, monkeypatch):
    name = getattr(request, "param", "cpu")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # 10 bits are too few to compare with
    with torch.device(name):
        yield name

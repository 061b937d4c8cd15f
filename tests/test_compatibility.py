"""Code that was written for inplace_abn and for timm finds the layers."""

import subprocess
import sys

import pytest
import timm
import torch

import iabn_hub
from iabn_hub.checkpoints.errors import CheckpointError
from iabn_hub.checkpoints.legacy import to_legacy

from .legacy_files import MODEL, a_small_network, save_legacy

OLD_CODE = """
import sys, types
blocks = types.ModuleType("segmentation_models_pytorch.base.modules")
blocks.InPlaceABN = None
sys.modules[blocks.__name__] = blocks  # as it is where inplace_abn was not found

import iabn_hub
iabn_hub.install_as_inplace_abn()

import inplace_abn
from inplace_abn import ABN, InPlaceABN, InPlaceABNSync, active_group, inplace_abn as function, set_active_group
from inplace_abn.abn import InPlaceABN as same
from inplace_abn.functions import inplace_abn_sync
from inplace_abn.group import active_group as same_group
import torch
from timm.layers import InplaceAbn

assert same is InPlaceABN is iabn_hub.InPlaceABN is blocks.InPlaceABN
assert inplace_abn.functions.inplace_abn is function is iabn_hub.inplace_abn
layer = InplaceAbn(4, act_param=0.1)
x = torch.randn(2, 4, 5, 5)
ours = iabn_hub.InPlaceABN(4, activation_param=0.1)
torch.testing.assert_close(layer(x.clone()), ours(x.clone()))
print("works")
"""


def test_code_for_inplace_abn_runs_unchanged():
    done = subprocess.run([sys.executable, "-c", OLD_CODE], capture_output=True, text=True, check=False)
    assert done.stdout == "works\n", done.stderr


def test_timm_loads_a_legacy_file(tmp_path):
    network = a_small_network()
    path = save_legacy(tmp_path / "old.pth.tar", network)
    loaded = timm.create_model(MODEL, num_classes=7, checkpoint_path=str(path)).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(x), network(x))


def test_timm_loads_a_legacy_file_of_a_segmentation_network(tmp_path):
    network = iabn_hub.create_model("test_resnet_deeplab3_iabn", num_classes=3).eval()
    torch.save(to_legacy(network.state_dict()), tmp_path / "old.pth")
    loaded = timm.create_model("test_resnet_deeplab3_iabn", num_classes=3, checkpoint_path=str(tmp_path / "old.pth"))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded.eval()(x), network(x))


@pytest.mark.parametrize(("saved", "built"), [(False, True), (True, False)])
def test_another_stem_names_the_option(tmp_path, saved, built):
    state = iabn_hub.create_model("resnext50_iabn", input_3x3=saved).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=f"create the network with input_3x3={saved}"):
        iabn_hub.create_model("resnext50_iabn", input_3x3=built, checkpoint=tmp_path / "weights.pth")

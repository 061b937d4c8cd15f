"""Weights load exactly, from every file that people have, or not at all."""

import argparse
import pickle

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

import iabn_hub
from iabn_hub.checkpoints import CheckpointError
from iabn_hub.checkpoints.legacy import to_current
from iabn_hub.checkpoints.weights import save_safetensors
from iabn_hub.models.state_dict import fit

from ..legacy_files import CLASSES, MODEL, a_small_network, save_legacy


def logits(network):
    with torch.inference_mode():
        return network.eval()(torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64))


def load(path, **options):
    return iabn_hub.create_model(MODEL, checkpoint=path, **({"num_classes": CLASSES} | options))


def test_legacy_snapshot_gives_the_same_logits(tmp_path):
    network = a_small_network()
    loaded = load(save_legacy(tmp_path / "old.pth.tar", network))
    assert torch.equal(logits(loaded), logits(network))
    assert loaded.bn1.num_batches_tracked == 0


def test_zip_format_loads_too(tmp_path):
    network = a_small_network()
    torch.save({"state_dict": network.state_dict()}, tmp_path / "new.pth")
    assert torch.equal(logits(load(tmp_path / "new.pth")), logits(network))


def test_safetensors_load(tmp_path):
    network = a_small_network()
    save_safetensors(network.state_dict(), tmp_path / "model.safetensors", {"arch": MODEL})
    assert torch.equal(logits(load(tmp_path / "model.safetensors")), logits(network))


def test_export_repeats_byte_for_byte(tmp_path):
    state = a_small_network().state_dict()
    metadata = {letter: letter for letter in "qwertyuiopasdfghjkl"}
    for name in ("a", "b"):
        save_safetensors(state, tmp_path / name, metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = load_file(tmp_path / "a")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())


def test_our_layout_is_left_alone():
    names = dict.fromkeys(a_small_network().state_dict())
    assert to_current(names) == names


def test_other_number_of_classes_keeps_the_body(tmp_path, caplog):
    network = a_small_network()
    loaded = load(save_legacy(tmp_path / "old.pth.tar", network), num_classes=3)
    assert loaded.fc.out_features == 3
    assert "the classifier is new: the weights have 7 classes, the network 3" in caplog.text
    assert torch.equal(loaded.layer4[0].conv2.weight, network.layer4[0].conv2.weight)


def test_other_number_of_classes_unasked_is_refused(tmp_path):
    path = save_legacy(tmp_path / "old.pth.tar", a_small_network())
    with pytest.raises(CheckpointError, match=r"misshapen: fc\.weight is \(7, 96\), expected \(\d+, 96\)"):
        iabn_hub.create_model(MODEL, checkpoint=path)


def test_one_input_channel_sums_the_filters(tmp_path):
    network = a_small_network()
    loaded = load(save_legacy(tmp_path / "old.pth.tar", network), in_chans=1)
    torch.testing.assert_close(loaded.conv1.weight, network.conv1.weight.sum(1, keepdim=True))


def test_feature_extractor_takes_the_same_weights(tmp_path):
    network = a_small_network()
    path = save_legacy(tmp_path / "old.pth.tar", network)
    maps = load(path, features_only=True).eval()(torch.ones(1, 3, 64, 64))
    expected = network.forward_intermediates(torch.ones(1, 3, 64, 64), intermediates_only=True)
    assert len(maps) == len(expected) == 5
    assert all(torch.equal(a, b) for a, b in zip(maps, expected))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mod2.block1.convs.bn9.weight": torch.ones(3)}, r"not expected: layer1\.0\.bn9\.weight"),
        ({"mod1.bn1.weight": torch.ones(5)}, r"misshapen: bn1\.weight is \(5,\), expected \(24,\)"),
        ({"mod1.bn1.weight": torch.ones(24, dtype=torch.int8)}, r"bn1\.weight is torch\.strided torch\.int8"),
        ({"mod1.bn1.weight": torch.ones(24).to_sparse()}, r"bn1\.weight is torch\.sparse_coo"),
        ({"conv1.weight": torch.ones(1)}, r"two of its keys mean conv1\.weight"),
        ({"mod1.bn1.weight": 3.0}, r"not plain tensors: bn1\.weight is a float"),
    ],
)
def test_wrong_keys_are_named(tmp_path, changes, says):
    renamed = {f"module.{k}": v for k, v in changes.items()}
    path = save_legacy(tmp_path / "old.pth.tar", a_small_network(), **renamed)
    with pytest.raises(CheckpointError, match=rf"old\.pth\.tar: cannot load test_resnet_iabn: .*{says}"):
        load(path)


def test_missing_keys_are_named_even_when_the_classifier_is_new(tmp_path):
    state = a_small_network().state_dict()
    del state["layer3.0.conv1.weight"]
    torch.save(state, tmp_path / "partial.pth")
    with pytest.raises(CheckpointError, match=r"missing: layer3\.0\.conv1\.weight"):
        load(tmp_path / "partial.pth", num_classes=3)


def test_weights_of_another_architecture_are_refused(tmp_path):
    path = save_legacy(tmp_path / "old.pth.tar", a_small_network())
    with pytest.raises(CheckpointError, match=r"cannot load resnet50_iabn.*missing: .* more"):
        iabn_hub.create_model("resnet50_iabn", checkpoint=path)


class _Trap:
    def __reduce__(self):
        return (print, ("arbitrary code ran",))


def _pickle(path):
    path.write_bytes(pickle.dumps({"state_dict": {"conv1.weight": _Trap()}}))


def _torch_pickle(path):
    torch.save({"state_dict": {"conv1.weight": _Trap()}}, path)


def _truncated(path):
    whole = save_legacy(path, a_small_network()).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def _text(path):
    path.write_text("hello world")


def _page(path):
    path.write_text("<!DOCTYPE html><html><title>Sign in</title></html>")


def _list(path):
    torch.save([torch.ones(3)], path)


def _nothing(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("make", [_pickle, _torch_pickle, _truncated, _list, _text, _page, _nothing])
def test_file_without_plain_weights_is_refused_and_runs_nothing(tmp_path, make, capsys):
    make(tmp_path / "bad.pth.tar")
    with pytest.raises(CheckpointError, match=r"bad\.pth\.tar: (is not a file of weights|holds a list)") as caught:
        load(tmp_path / "bad.pth.tar")
    assert "weights_only" not in str(caught.value)
    assert "arbitrary code ran" not in capsys.readouterr().out


def test_truncated_safetensors_is_refused(tmp_path):
    path = tmp_path / "cut.safetensors"
    save_safetensors(a_small_network().state_dict(), path, {})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors: is not a file of weights"):
        load(path)


def test_own_number_of_input_channels_is_kept(tmp_path):
    network = iabn_hub.create_model(MODEL, num_classes=CLASSES, in_chans=4)
    torch.save(network.state_dict(), tmp_path / "four.pth")
    assert torch.equal(load(tmp_path / "four.pth", in_chans=4).conv1.weight, network.conv1.weight)
    with pytest.raises(CheckpointError, match=r"misshapen: conv1\.weight is \(24, 4, 7, 7\)"):
        load(tmp_path / "four.pth", in_chans=5)


OTHER_CONVENTIONS = [({"norm_layer": "abn"}, True), ({"signed_scale": True}, True), ({}, False)]


@pytest.mark.parametrize(("options", "unsigned"), OTHER_CONVENTIONS, ids=["abn", "signed", "unsigned"])
def test_negative_scales_are_not_read_another_way(options, unsigned):
    state = a_small_network().state_dict()
    network = iabn_hub.create_model(MODEL, num_classes=CLASSES, **options)
    assert fit(state, network, unsigned=unsigned)
    state["bn1.weight"][3] = -0.5
    assert fit(state, network, unsigned=not unsigned)
    with pytest.raises(CheckpointError, match=r"bn1 would read its negative scales"):
        fit(state, network, unsigned=unsigned)


@pytest.mark.parametrize("overlay", [{"file": ""}, {"url": "https://example.org/weights.pth"}])
def test_other_sources_are_not_replaced_by_the_published_weights(overlay):
    with pytest.raises(CheckpointError, match=r"is empty|weights are not loaded from a bare URL"):
        timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay=overlay)


def test_folder_of_a_training_run_loads(tmp_path):
    network = a_small_network()
    save_safetensors(network.state_dict(), tmp_path / "model.safetensors", {})
    assert torch.equal(logits(load(tmp_path)), logits(network))


def test_folder_without_weights_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=rf"{tmp_path.name}: holds no weights"):
        load(tmp_path)


def test_timm_local_dir_is_read_by_the_same_rules(tmp_path, capsys):
    network = a_small_network()
    timm.models.save_for_hf(network, tmp_path, model_config={"num_classes": CLASSES}, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(logits(loaded), logits(network))
    assert "state_dict" not in loaded.pretrained_cfg
    (tmp_path / "model.safetensors").unlink()
    _pickle(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: is not a file of weights"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert "arbitrary code ran" not in capsys.readouterr().out


def test_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.pth: there is no such file"):
        load(tmp_path / "gone.pth")


def test_model_without_weights_says_so():
    with pytest.raises(CheckpointError, match=r"no weights are published for resnet18_iabn: pass pretrained=False"):
        iabn_hub.create_model("resnet18_iabn", pretrained=True)


WRAPPERS = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "data parallel": lambda name: f"module.{name}",
    "compiled in data parallel": lambda name: f"module._orig_mod.{name}",
    "data parallel, compiled": lambda name: f"_orig_mod.module.{name}",
    "averaged data parallel": lambda name: f"module.module.{name}",
    "one stage compiled": lambda name: name.replace("layer2.", "layer2._orig_mod."),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_of_wrappers_are_removed(wrapper, tmp_path):
    network = iabn_hub.create_model("test_resnet_iabn", num_classes=3)
    state = {WRAPPERS[wrapper](name): value for name, value in network.state_dict().items()}
    torch.save({"state_dict": {**state, "n_averaged": torch.tensor(3)}}, tmp_path / "x.pth")
    loaded = iabn_hub.create_model("test_resnet_iabn", checkpoint=tmp_path / "x.pth", num_classes=3)
    assert all(value.equal(network.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    "beside",
    [np.float64(71.5), np.float32(0.1), np.int64(3), np.bool_(True), argparse.Namespace(lr=0.1, best=np.float64(2))],
    ids=["float64", "float32", "int64", "bool", "options"],
)
def test_plain_values_beside_the_weights_are_read(beside, tmp_path):
    network = iabn_hub.create_model("test_resnet_iabn")
    torch.save({"state_dict": network.state_dict(), "beside": beside}, tmp_path / "x.pth")
    loaded = iabn_hub.create_model("test_resnet_iabn", checkpoint=tmp_path / "x.pth")
    assert loaded.conv1.weight.equal(network.conv1.weight)


def negative_scales(path, legacy=False):
    network = a_small_network()
    for name, value in network.state_dict().items():
        if name.endswith("bn1.weight"):
            value.neg_()
    if legacy:
        return save_legacy(path, network)
    torch.save(network.state_dict(), path)
    return path


def test_negative_scales_of_unknown_origin_are_reported(tmp_path, caplog):
    path = negative_scales(tmp_path / "x.pth")
    iabn_hub.create_model("test_resnet_iabn", checkpoint=path, num_classes=CLASSES)
    assert "layers have negative scales, which the network reads as |w| + eps" in caplog.text
    assert "create it with signed_scale=True" in caplog.text


def test_negative_scales_of_known_origin_are_not(tmp_path, caplog):
    for options in ({"signed_scale": True}, {"norm_layer": "abn"}):
        path = negative_scales(tmp_path / "x.pth")
        iabn_hub.create_model("test_resnet_iabn", checkpoint=path, num_classes=CLASSES, **options)
    path = negative_scales(tmp_path / "x.pth.tar", legacy=True)  # trained with |w| + eps
    iabn_hub.create_model("test_resnet_iabn", checkpoint=path, num_classes=CLASSES)
    assert "negative scales" not in caplog.text

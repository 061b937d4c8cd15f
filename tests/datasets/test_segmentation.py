"""Segmentation data comes from every layout of folders, crops keep image and labels together, classes are balanced."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import Cityscapes

from iabn_hub.datasets.class_presence import find_presence
from iabn_hub.datasets.folders import DataError
from iabn_hub.datasets.images import ImageError
from iabn_hub.datasets.loaders import BatchPlan, TrainLoader, val_loader
from iabn_hub.datasets.segmentation import IGNORE_INDEX, SegmentationSamples, open_segmentation
from iabn_hub.datasets.segmentation_transforms import SegmentationCrop, WholeImage
from iabn_hub.recipes import recipe_from
from iabn_hub.world import World

ALONE = World(torch.device("cpu"))
RECIPE = {"network": {"arch": "test_resnet_deeplab3", "bn_mode": "inplace", "activation": "identity"}}


def crops(crop=32, hflip=0.0, **segmentation):
    content = {**RECIPE, "input": {"crop_train": crop}, "training": {"hflip": hflip}, "segmentation": segmentation}
    return SegmentationCrop(recipe_from(content, ""))


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def coded(height=48, width=64):
    """An image whose red and green say where a pixel is, and labels that say the same."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([x, y, x * 0], 2)), Image.fromarray(x)


@pytest.fixture
def plain(tmp_path):
    """Images with labels 0, 1 and, in the last one alone, 2."""

    def make(count=6, last=2, root=tmp_path / "plain"):
        for part in ("train", "val"):
            for i in range(count):
                label = np.zeros((24, 40))
                label[:, 20:] = 1
                label[0, 0] = last if i == count - 1 else 0
                save(root / part / "images" / "city" / f"{i}.jpg", np.full((24, 40, 3), 40 * i))
                save(root / part / "labels" / "city" / f"{i}.png", label)
        return root

    return make


def test_a_plain_folder_with_and_without_names(plain):
    root = plain()
    dataset = open_segmentation(root, "train", 3)
    assert (len(dataset), dataset.classes) == (6, None)
    image, label = dataset.read(5)
    assert image.size == label.size == (40, 24)
    assert sorted(set(np.asarray(label).ravel())) == [0, 1, 2]
    (root / "classes.json").write_text(json.dumps(["road", "sky", "bird"]))
    assert open_segmentation(root, "val", 1000).classes == ("road", "sky", "bird")


def test_vistas_leaves_out_what_its_description_does_not_evaluate(tmp_path):
    labels = [{"readable": n, "evaluate": n != "Void"} for n in ("Bird", "Void", "Sky")]
    (tmp_path / "config.json").write_text(json.dumps({"labels": labels}))
    for version in ("labels", "v1.2/labels"):
        save(tmp_path / "training" / "images" / "a.jpg", np.zeros((2, 3, 3)))
        save(tmp_path / "training" / version / "a.png", [[0, 1, 2], [2, 2, 0]])
        dataset = open_segmentation(tmp_path, "train", 65)
        assert dataset.classes == ("Bird", "Sky")
        assert np.asarray(dataset.read(0)[1]).tolist() == [[0, IGNORE_INDEX, 1], [1, 1, 0]]


def test_cityscapes_has_19_classes(tmp_path):
    ids = [c.id for c in Cityscapes.classes if c.id >= 0]
    save(tmp_path / "leftImg8bit/train/aachen/aachen_0_1_leftImg8bit.png", np.zeros((1, len(ids), 3)))
    for kind in ("labelIds", "instanceIds", "color"):
        save(tmp_path / f"gtFine/train/aachen/aachen_0_1_gtFine_{kind}.png", [ids])
    dataset = open_segmentation(tmp_path, "train", 1)
    assert dataset.classes is not None
    assert (len(dataset.classes), dataset.classes[0], dataset.classes[18]) == (19, "road", "bicycle")
    found = np.asarray(dataset.read(0)[1])[0].tolist()
    assert found == [c.train_id if 0 <= c.train_id < 255 else IGNORE_INDEX for c in Cityscapes.classes if c.id >= 0]
    with pytest.raises(DataError, match="val is not a folder"):
        open_segmentation(tmp_path, "val", 1)


def test_what_is_wrong_is_named(plain, tmp_path):
    root = plain()
    with pytest.raises(ImageError, match=r"5\.png: has the number 2, which is none of the 2 classes"):
        open_segmentation(root, "train", 2).read_label(5)
    assert np.asarray(open_segmentation(root, "train", 2, ignore_index=2).read_label(5))[0, 0] == IGNORE_INDEX
    save(root / "train/labels/city/0.png", np.zeros((24, 41)))
    with pytest.raises(ImageError, match=r"0\.png: is \(41, 24\), its image \(40, 24\)"):
        open_segmentation(root, "train", 3).read(0)
    save(root / "train/labels/city/0.png", np.zeros((24, 40, 3)))
    with pytest.raises(ImageError, match="has mode RGB"):
        open_segmentation(root, "train", 3).read_label(0)
    (root / "train/labels/city/0.png").write_bytes(b"nothing")
    with pytest.raises(ImageError, match="cannot be read as an image of labels"):
        open_segmentation(root, "train", 3).read_label(0)
    (root / "train/labels/city/0.png").unlink()
    with pytest.raises(DataError, match=r"0\.png: there is no such file; 1 of 6 images have no labels"):
        open_segmentation(root, "train", 3)
    (root / "classes.json").write_text('{"labels": 3}')
    with pytest.raises(DataError, match=r"classes\.json: is neither"):
        open_segmentation(root, "val", 3)
    (root / "classes.json").unlink()
    with pytest.raises(DataError, match=r"has no classes\.json that names the classes, and 1000 are too many"):
        open_segmentation(root, "val", 1000)
    with pytest.raises(DataError, match=r"1 is the ignore index .* and also the number of a class"):
        open_segmentation(root, "val", 3, ignore_index=1)
    (root / "classes.json").write_text(json.dumps(["class"] * 300))
    with pytest.raises(DataError, match="names 300 classes"):
        open_segmentation(root, "val", 3)
    (root / "classes.json").unlink()
    with pytest.raises(DataError, match=r"none/train is not a folder: expected ROOT/train/images"):
        open_segmentation(tmp_path / "none", "train", 3)


def test_an_image_that_is_turned_is_refused(plain):
    root = plain()
    turned = Image.Exif()
    turned[0x0112] = 3
    Image.new("RGB", (40, 24)).save(root / "train/images/city/0.jpg", exif=turned)
    with pytest.raises(ImageError, match=r"0\.jpg: is turned by its EXIF orientation"):
        open_segmentation(root, "train", 3).read(0)


def test_classes_may_be_left_out_by_name(plain):
    root = plain()
    labels = [{"readable": name, "evaluate": name != "void"} for name in ("void", "road", "sky")]
    (root / "classes.json").write_text(json.dumps({"labels": labels}))
    dataset = open_segmentation(root, "train", 3)
    assert (dataset.classes, dataset.num_classes) == (("road", "sky"), 2)
    assert set(np.asarray(dataset.read(5)[1]).ravel()) == {0, 1, IGNORE_INDEX}


@pytest.mark.parametrize("scale", [0.4, 1.0, 1.7])
@pytest.mark.parametrize("hflip", [0.0, 1.0])
def test_a_crop_keeps_image_and_labels_together(scale, hflip):
    image, label = coded()
    make = crops(hflip=hflip, min_scale=scale, max_scale=scale)
    for seed in range(5):
        torch.manual_seed(seed)
        pixels, classes = make(image, label, -1)
        assert (tuple(pixels.shape), tuple(classes.shape)) == ((3, 32, 32), (32, 32))
        there = classes != IGNORE_INDEX
        assert there.sum() == min(32, round(64 * scale)) * min(32, round(48 * scale))
        # Red is the column, as the label is; the smoothing of a scaled image may be a pixel or two off.
        assert (pixels[0].int() - classes.int())[there].abs().max() <= (0 if scale == 1 else 2)
        assert len(pixels[:, ~there].unique(dim=1).T) <= 1  # the mean colour, where there is any


def test_crops_are_random_and_contain_their_target_class():
    image, label = coded()
    make = crops(min_scale=1.5, max_scale=1.5, crop=16)
    starts = Counter(int(make(image, label, -1)[1][0, 0]) for _ in range(400))
    assert min(starts) == 0
    assert max(starts) >= 48
    for target in (0, 30, 63):
        for _ in range(20):
            assert (make(image, label, target)[1] == target).any()
    assert tuple(make(image, label, 200)[1].shape) == (16, 16)  # a class that is not there


def test_classes_are_sampled_evenly(plain, tmp_path):
    dataset = open_segmentation(plain(60), "train", 3)
    cache = tmp_path / "run" / "presence.npz"
    dataset = dataset.balanced(find_presence(dataset, cache, 0, ALONE), 0.5)
    assert dataset.presence.sum(0).tolist() == [60, 60, 1]
    samples = SegmentationSamples(dataset, crops(), 0, True)
    generator = torch.Generator().manual_seed(0)
    order = samples.order(generator)
    assert Counter(target for _, target in order) == {-1: 30, 0: 10, 1: 10, 2: 10}
    assert {dataset.labels[index].name for index, target in order if target == 2} == {"59.png"}
    assert len({index for index, target in order if target == -1}) == 30
    assert samples.order(generator) != order
    batches = list(TrainLoader(samples, BatchPlan(10), 0, ALONE).epoch(0))
    assert sum(int((batch.labels == 2).flatten(1).any(1).sum()) for batch in batches) >= 10
    again = list(TrainLoader(samples, BatchPlan(10), 2, ALONE).epoch(0))
    assert all(a.images.equal(b.images) and a.labels.equal(b.labels) for a, b in zip(batches, again))


def test_the_cache_of_classes_is_kept_until_a_label_changes(plain, tmp_path, monkeypatch):
    dataset, cache = open_segmentation(plain(), "train", 3), tmp_path / "presence.npz"
    first = find_presence(dataset, cache, 0, ALONE)
    monkeypatch.setattr(type(dataset), "read_label", None)
    assert (find_presence(dataset, cache, 0, ALONE) == first).all()
    monkeypatch.undo()
    save(dataset.labels[0], np.full((24, 40), 2))
    assert find_presence(dataset, cache, 0, ALONE)[0].tolist() == [False, False, True]
    cache.write_bytes(b"nothing")
    assert find_presence(dataset, cache, 0, ALONE)[0].tolist() == [False, False, True]


def test_validation_sees_whole_images_and_each_once(plain):
    dataset = open_segmentation(plain(7), "val", 3)
    shares = [
        list(val_loader(SegmentationSamples(dataset, WholeImage(20)), 1, 0, World(ALONE.device, rank, 2)))
        for rank in range(2)
    ]
    assert sorted(int(batch.indices) for share in shares for batch in share) == list(range(7))
    assert tuple(shares[0][0].images.shape) == (1, 3, 12, 20)
    assert tuple(shares[0][0].labels.shape) == (1, 24, 40)

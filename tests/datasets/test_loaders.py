"""Batches depend on seed and position alone; every image is there once; what is wrong with the data is said by name."""

import gc
import io
import os
import pickle
import subprocess
import tarfile
import tempfile
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from iabn_hub.datasets.folders import DataError, Location, check_same_classes, classes_of, open_split
from iabn_hub.datasets.loaders import BatchPlan, TrainLoader
from iabn_hub.datasets.loaders import val_loader as loader_of_samples
from iabn_hub.datasets.samples import Key, Samples, samples_of
from iabn_hub.datasets.transforms import train_transform, val_transform
from iabn_hub.recipes import recipe_from
from iabn_hub.world import World

from ..conftest import TINY

CPU = torch.device("cpu")
ALONE = World(CPU)
VAL = val_transform(32, 32)


def loader(source, *, batch=8, passes=1, repeats=1, seed=0, workers=0, world=ALONE):
    samples = samples_of(source, train_transform(recipe_from(TINY, "")), world, seed, training=True)
    return TrainLoader(samples, BatchPlan(batch, passes, repeats, seed), workers, world)


def val_loader(source, transform, batch, workers, world):
    return loader_of_samples(samples_of(source, transform, world), batch, workers, world)


def epoch(loader, number=0, first_step=0):
    return list(loader.epoch(number, first_step))


def same(a, b):
    return len(a) == len(b) and all(x.images.equal(y.images) and x.labels.equal(y.labels) for x, y in zip(a, b))


def numbers(batches):
    return [i for batch in batches for i in batch.indices.tolist()]


@pytest.fixture
def source(pictures):
    return open_split(Location(str(pictures())), "train", True)


def test_batches_do_not_depend_on_workers(source):
    assert same(epoch(loader(source)), epoch(loader(source, workers=2)))


def test_epochs_and_seeds_differ(source):
    first = epoch(loader(source))
    assert not same(first, epoch(loader(source), 1))
    assert not same(first, epoch(loader(source, seed=1)))
    assert same(first, epoch(loader(source)))


@pytest.mark.parametrize("passes", [1, 2])
def test_an_epoch_goes_on_in_its_middle(source, passes):
    whole = epoch(loader(source, passes=passes), 3)
    assert len(whole) == 5 * passes
    assert same(whole[2 * passes :], epoch(loader(source, passes=passes), 3, first_step=2))
    assert epoch(loader(source), 3, first_step=5) == []


def test_an_epoch_shows_every_image_once(source):
    assert sorted(numbers(epoch(loader(source)))) == list(range(40))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_and_passes_share_each_batch(source, count):
    alone = epoch(loader(source))
    shares = [epoch(loader(source, passes=2, world=World(CPU, rank, count))) for rank in range(count)]
    for step, whole in enumerate(alone):
        parts = [batch for share in shares for batch in share[2 * step : 2 * step + 2]]
        assert {len(batch.labels) for batch in parts} == {8 // 2 // count}
        together = dict(zip(numbers(parts), torch.cat([batch.images for batch in parts])))
        assert all(image.equal(together[i]) for i, image in zip(whole.indices.tolist(), whole.images))


def test_repeats_are_cropped_anew(source):
    batches = epoch(loader(source, repeats=4))
    assert len(batches) == 5
    for batch in batches:
        assert len(set(batch.indices.tolist())) == 2
        for i in set(batch.indices.tolist()):
            copies = batch.images[batch.indices == i]
            assert not copies[0].equal(copies[1])


def test_random_numbers_of_the_caller_are_left_alone(source):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Samples(source, train_transform(recipe_from(TINY, "")), 0, True)[Key(0, 0, 0)]
    assert torch.rand(3).equal(expected)


@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_validation_counts_each_image_once(pictures, count):
    source = open_split(Location(str(pictures())), "val")
    shares = [list(val_loader(source, VAL, 4, 0, World(CPU, rank, count))) for rank in range(count)]
    assert sorted(i for share in shares for i in numbers(share)) == list(range(10))


def break_image(root, name):
    path = root / name
    path.write_bytes(path.read_bytes()[:60])
    return path


def test_broken_images_are_named_and_replaced(pictures):
    root = pictures()
    path = break_image(root, "train/bright/3.png")
    batches = epoch(loader(open_split(Location(str(root)), "train", True)))
    reasons = [reason for batch in batches for reason in batch.skipped]
    assert len(reasons) == 1
    assert reasons[0].startswith(f"{path}: ")
    assert [len(batch.labels) for batch in batches] == [8] * 5


def test_broken_images_are_left_out_of_validation(pictures):
    root = pictures()
    for i in range(5):
        break_image(root, f"val/dark/{i}.png")
    batches = list(val_loader(open_split(Location(str(root)), "val"), VAL, 5, 0, ALONE))
    assert [len(batch.labels) for batch in batches] == [5, 0]
    assert len(batches[1].skipped) == 5


def test_classes_are_those_of_the_earlier_package(pictures):
    """In the order of their names as texts, and by the first folder, whatever lies below it."""
    root = pictures(classes=("1", "01", "10", "2"))
    for path in (root / "train").iterdir():
        (path / "front").mkdir()
        for image in list(path.glob("*.png")):
            image.rename(path / "front" / image.name)
    assert classes_of(open_split(Location(str(root)), "train")) == ("01", "1", "10", "2")


@pytest.mark.parametrize("workers", [0, 2])
def test_data_that_is_all_broken_ends_training(pictures, workers):
    root = pictures()
    for path in root.glob("train/*/*.png"):
        break_image(root, path)
    with pytest.raises(DataError, match=r"10 images in a row cannot be read; the last one: .*png"):
        epoch(loader(open_split(Location(str(root)), "train", True), workers=workers))


def test_missing_folders_and_empty_classes_are_named(pictures, tmp_path):
    with pytest.raises(DataError, match=r"none/train is not a folder: expected .*/none/train/CLASS/\*"):
        open_split(Location(f"{tmp_path}/none"), "train")
    root = pictures()
    (root / "train" / "grey").mkdir()
    with pytest.raises(DataError, match="split 'train' cannot be opened: Found no valid file for the classes grey"):
        open_split(Location(str(root)), "train")
    (root / "empty" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="split 'train' cannot be opened: Couldn't find any class folder"):
        open_split(Location(f"{root}/empty"), "train")


def test_different_classes_are_named(pictures):
    root = pictures()
    (root / "val" / "bright").rename(root / "val" / "brigth")
    where = Location(str(root))
    with pytest.raises(DataError, match="val has no bright; train has no brigth"):
        check_same_classes(where, open_split(where, "train"), open_split(where, "val"))


def test_fewer_images_than_a_batch(source):
    with pytest.raises(DataError, match="there are 40 training images, fewer than one batch of 64"):
        loader(source, batch=64)


def pack(folder, tar, keep):
    """Put the files of a folder into a tar, `keep` of their path's last parts as the name."""
    with tarfile.open(tar, "w") as file:
        for path in sorted(folder.rglob("*.png")):
            file.add(path, "/".join(path.parts[-keep:]))


@pytest.mark.parametrize("layout", ["one tar a split", "one tar a class"])
def test_tars_hold_what_the_folders_hold(pictures, tmp_path, layout):
    root, packed = pictures(), tmp_path / "packed"
    packed.mkdir()
    if layout == "one tar a split":
        pack(root / "train", packed / "train.tar", 2)
    else:
        (packed / "train").mkdir()
        for folder in (root / "train").iterdir():
            pack(folder, packed / "train" / f"{folder.name}.tar", 1)
    source = open_split(Location(str(packed)), "train")
    assert classes_of(source) == ("bright", "dark")
    mine = {(batch.images.sum().item(), batch.labels.item()) for batch in val_loader(source, VAL, 1, 0, ALONE)}
    folders = val_loader(open_split(Location(str(root)), "train"), VAL, 1, 0, ALONE)
    assert mine == {(batch.images.sum().item(), batch.labels.item()) for batch in folders}
    assert same(epoch(loader(source)), epoch(loader(source, workers=2)))


def shards(root, folder, split):
    """The images of a split as two WebDataset shards of unequal size."""
    folder.mkdir(exist_ok=True)
    images = sorted((root / split).rglob("*.png"))
    for number, part in enumerate((images[: len(images) // 3], images[len(images) // 3 :])):
        with tarfile.open(folder / f"{split}-{number}.tar", "w") as file:
            for i, path in enumerate(part):
                for suffix, content in (("png", path.read_bytes()), ("cls", b"%d" % (path.parent.name == "dark"))):
                    info = tarfile.TarInfo(f"{number}_{i:03d}.{suffix}")
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))


@pytest.fixture
def streamed(pictures, tmp_path):
    root = pictures()
    for split in ("train", "val"):
        shards(root, tmp_path / "shards", split)
    return Location(str(tmp_path / "shards"), "wds", "train-{0..1}.tar|40", "val-{0..1}.tar|10")


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_validation_counts_each_image_once(streamed, count, workers):
    found = []
    for rank in range(count):
        source = open_split(streamed, streamed.val_split)
        batches = val_loader(source, VAL, 4, workers, World(CPU, rank, count))
        found += [image.sum().item() for batch in batches for image in batch.images]
    folders = val_loader(open_split(Location(streamed.root.replace("shards", "data")), "val"), VAL, 1, 0, ALONE)
    assert sorted(found) == sorted(batch.images.sum().item() for batch in folders)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_repeated_exactly_and_goes_on_in_its_middle(streamed, workers):
    def stream():
        return loader(open_split(streamed, streamed.train_split, True, 8), workers=workers)

    whole = epoch(stream(), 2)
    assert len(whole) == 5
    assert same(whole, epoch(stream(), 2))
    assert same(whole[3:], epoch(stream(), 2, first_step=3))
    assert not same(whole, epoch(stream(), 1))


def test_hugging_face_datasets(pictures, tmp_path):
    root = pictures()
    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    source = open_split(Location("", f"hfds/{root}"), "train")
    assert classes_of(source) == ("bright", "dark")
    assert sorted(numbers(epoch(loader(source)))) == list(range(40))


def test_streamed_hugging_face_datasets(pictures, tmp_path):
    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    where = Location("", f"hfids/{pictures()}", val_split="validation", train_samples=40, val_samples=10)
    source = open_split(where, "train", True, 8)
    assert len(epoch(loader(source), 1)) == 5
    assert same(epoch(loader(source), 1), epoch(loader(source), 1))
    found = []
    for rank in range(2):
        batches = val_loader(open_split(where, where.val_split), VAL, 4, 0, World(CPU, rank, 2))
        found += [image.sum().item() for batch in batches for image in batch.images]
    assert len(set(found)) == len(found) == 10


def test_torchvisions_datasets(pictures):
    source = open_split(Location(str(pictures()), "torch/image_folder"), "train")
    assert classes_of(source) == ("bright", "dark")
    assert len(epoch(loader(source))) == 5


def test_a_dataset_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"wds .*: split 'train' cannot be opened: split train not found"):
        open_split(Location(str(tmp_path), "wds"), "train", True)


def test_pictures_of_every_kind_are_read(tmp_path):
    for split in ("train", "val"):
        folder = tmp_path / split / "all"
        folder.mkdir(parents=True)
        for mode in ("L", "LA", "RGBA", "P", "CMYK", "I;16"):
            image = Image.new("L", (40, 33), 128)
            image = Image.new("I;16", (40, 33), 128 * 257) if mode == "I;16" else image.convert(mode)
            image.save(folder / f"{mode[0]}{mode[-1]}.{'tif' if mode == 'CMYK' else 'png'}")
    source = open_split(Location(str(tmp_path)), "val")
    (batch,) = val_loader(source, VAL, 8, 0, ALONE)
    assert batch.images.shape == (6, 3, 32, 32)
    assert (batch.images.float() - 128).abs().max() <= 1


def test_a_class_whose_name_is_not_utf8(tmp_path):
    for name in (b"finch", b"\xff"):
        folder = os.path.join(os.fsencode(tmp_path), b"train", name)
        os.makedirs(folder)
        Image.new("RGB", (8, 8)).save(os.path.join(os.fsdecode(folder), "0.png"))
    split = open_split(Location(str(tmp_path)), "train")
    with pytest.raises(DataError, match=r"the folder '\\udcff' of a class has a name that is not UTF-8: rename it"):
        classes_of(split)


def test_a_folder_without_splits(tmp_path):
    """Every fifth image of each class is for validation."""
    for name, count in (("finch", 11), ("wren", 5)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{number:02}.png")
    train, val = (open_split(Location(str(tmp_path)), split) for split in ("train", "val"))
    named = [[os.path.relpath(path, tmp_path) for path, _ in split.samples] for split in (train, val)]
    assert named[1] == ["finch/04.png", "finch/09.png", "wren/04.png"]
    assert len(named[0]) == 13
    assert not {*named[0]} & {*named[1]}
    assert classes_of(train) == classes_of(val) == ("finch", "wren")
    assert train.note.endswith("13 of 16 images are for training, every fifth image of a class is for validation")
    (tmp_path / ".hidden").mkdir()
    assert classes_of(open_split(Location(str(tmp_path)), "train")) == ("finch", "wren")
    (tmp_path / "Test").mkdir()
    with pytest.raises(DataError, match="Test is no class"):
        open_split(Location(str(tmp_path)), "train")
    (tmp_path / "Test").rmdir()
    (tmp_path / "wren" / "00.png").unlink()
    with pytest.raises(DataError, match="wren has fewer than 5 images, so none to validate on"):
        open_split(Location(str(tmp_path)), "val")
    with pytest.raises(DataError, match=r"expected CLASS/\* in it, or .* \(Couldn't find any class"):
        open_split(Location(str(tmp_path / "wren")), "train")
    (tmp_path / "one" / "class").mkdir(parents=True)
    with pytest.raises(DataError, match="class is the only class"):
        open_split(Location(str(tmp_path / "one")), "train")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shorter_side", [-1, 40])
def test_decoded_images_are_those_of_the_files(source, workers, shorter_side):
    recipe = recipe_from({**TINY, "input": {**TINY["input"], "scale_train": shorter_side}}, "")
    made = []
    for cached in (False, True):
        samples = samples_of(source, train_transform(recipe), ALONE, training=True)
        if cached:
            samples.keep_decoded(recipe.input.scale_train)
        made.append(TrainLoader(samples, BatchPlan(8), workers, ALONE))
    for number in (0, 1, 2):
        assert same(*(epoch(each, number) for each in made))
    assert all(samples.decoded.get(i) is not None for i in numbers(epoch(made[1], 2)))


def test_decoded_images_need_their_files_once(source):
    samples = samples_of(source, train_transform(recipe_from(TINY, "")), ALONE, training=True)
    plain = [samples[Key(1, i, i)] for i in range(len(samples))]
    samples.keep_decoded(0)
    for i in range(len(samples)):
        samples[Key(0, i, i)]
    for path, _ in samples._files():
        os.truncate(path, 0)
    again = pickle.loads(pickle.dumps(samples))  # as a worker gets it that is not forked
    for i, expected in enumerate(plain):
        assert all(torch.equal(each[Key(1, i, i)].image, expected.image) for each in (samples, again))
    temporary = samples.decoded.folder
    del samples, again
    gc.collect()
    assert not os.path.exists(temporary)


def test_what_a_killed_process_left_is_deleted(source):
    finished = subprocess.Popen(["true"])
    finished.wait()
    left = Path(tempfile.gettempdir()) / f"iabn_hub-decoded-{finished.pid}-left"
    own = Path(tempfile.gettempdir()) / f"iabn_hub-decoded-{os.getpid()}-own"
    left.mkdir()
    own.mkdir()
    samples_of(source, VAL, ALONE).keep_decoded(0)
    assert not left.exists()
    assert own.exists()
    own.rmdir()


def test_a_file_that_cannot_be_decoded(source):
    samples = samples_of(source, train_transform(recipe_from(TINY, "")), ALONE, training=True)
    os.truncate(samples._files()[0][0], 0)
    samples.keep_decoded(0)
    assert "is not an image" in samples[Key(0, 0, 0)].skipped[0]


def test_images_that_are_not_files_are_not_cached(tmp_path):
    samples = Samples(datasets.Dataset.from_dict({"image": []}), VAL)
    with pytest.raises(DataError, match="needs images in files"):
        samples.keep_decoded(0)

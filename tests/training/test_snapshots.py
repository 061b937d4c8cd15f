"""Snapshots are whole or not there, and hold no code."""

import pickle
import resource
import time

import pytest
import torch

from iabn_hub.checkpoints.errors import CheckpointError
from iabn_hub.checkpoints.weights import BEST, read_snapshot
from iabn_hub.training.snapshots import Snapshots


def state(value):
    position = {"epoch": 1, "step": 1, "steps_per_epoch": 1}
    rest = {"ema": None, "optimizer": {}, "position": position, "recipe": {}, "classes": None}
    return {**rest, "model": {"weight": torch.full((1000,), float(value))}}


def value_of(path):
    return read_snapshot(path)["model"]["weight"][0].item()


@pytest.fixture
def snapshots(tmp_path):
    return Snapshots(tmp_path / "snapshots", keep=2)


def test_the_last_ones_and_the_best_stay(snapshots):
    for step in (5, 10, 15, 20):
        snapshots.save(state(step), step, best=step == 10)
    assert [value_of(path) for path in snapshots.all()] == [15, 20]
    assert value_of(snapshots.folder / BEST) == 10
    path, latest = snapshots.latest()
    assert (path.name, latest["model"]["weight"][0]) == ("step-00000020.pt", 20)
    assert len(list(snapshots.folder.iterdir())) == 3


def test_going_back_gives_up_what_came_later(snapshots):
    for step in (5, 10, 15, 20):
        snapshots.save(state(step), step)
    snapshots.save(state(7), 7)
    snapshots.save(state(9), 9)
    assert [value_of(path) for path in snapshots.all()] == [7, 9]


def test_a_file_with_two_names_takes_its_space_once(snapshots):
    paths = [snapshots.save(state(step), step, best=step == 2) for step in (1, 2)]
    assert snapshots.size() == sum(path.stat().st_size for path in paths)


def test_a_full_disk_leaves_what_was_there(snapshots):
    snapshots.save(state(1), 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError, match=r"step-00000002|File too large"):
            snapshots.save(state(2), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in snapshots.folder.iterdir()] == ["step-00000001.pt"]
    assert value_of(snapshots.latest()[0]) == 1


def test_a_damaged_one_is_passed_over(snapshots):
    snapshots.save(state(1), 1)
    newest = snapshots.save(state(2), 2)
    newest.write_bytes(newest.read_bytes()[:-500])
    assert value_of(snapshots.latest()[0]) == 1


def test_what_was_being_written_when_it_was_killed_goes(snapshots):
    snapshots.folder.mkdir()
    (snapshots.folder / "step-00000009.partial").write_bytes(b"half")
    assert snapshots.latest() is None
    snapshots.save(state(1), 1)
    assert [path.name for path in snapshots.folder.iterdir()] == ["step-00000001.pt"]


class Code:
    def __reduce__(self):
        return (time.sleep, (0,))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda path: path.write_bytes(pickle.dumps(Code())), "is not a snapshot, or is damaged"),
        (lambda path: torch.save({"weight": torch.zeros(1)}, path), "is not a snapshot of a training run"),
        (lambda path: torch.save({**state(1), "model": Code()}, path), "is not a snapshot, or is damaged"),
        (lambda path: None, "there is no such file"),
    ],
    ids=["pickle", "weights", "code", "missing"],
)
def test_other_files_are_refused(tmp_path, content, says):
    content(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=f"x.pt: {says}"):
        read_snapshot(tmp_path / "x.pt")

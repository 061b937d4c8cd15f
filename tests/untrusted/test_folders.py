"""One process at a time writes into a folder; the system lets the next one in when a process dies."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from iabn_hub import files
from iabn_hub.cli import main
from iabn_hub.files import FOLDER_LOCK, InUseError, exclusive

from .inputs import IMAGE

# The module alone: importing the package would import torch.
HOLD = f"""
import importlib.util, os, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("files", {files.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
with module.exclusive(Path(sys.argv[1])):
    if os.fork() == 0:  # as the workers of a loader
        time.sleep(60)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.2)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_folder_is_held_until_its_process_dies(tmp_path, holder):
    with (
        pytest.raises(InUseError, match=f"out: is in use by process {holder.pid} on .*, started 20"),
        exclusive(tmp_path / "out"),
    ):
        pass
    holder.kill()  # its child lives on
    holder.wait()
    with exclusive(tmp_path / "out"):
        pass


@pytest.mark.parametrize("command", ["train", "segment", "export", "mirror"])
def test_the_second_process_is_refused(tmp_path, holder, command, capsys):
    out = tmp_path / "out"
    data = tmp_path / "data"
    for split in ("train", "val"):
        for name in "ab":
            (data / split / name).mkdir(parents=True)
            (data / split / name / "0.png").symlink_to(IMAGE)
    if command == "export":  # it writes into a folder of that name
        holder.kill()
        holder.wait()
        (out / FOLDER_LOCK).unlink()
        inner = out / "test_resnet_iabn.mnist"
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(inner)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "held\n"
    arguments = {
        "train": ["train", "test_resnet_iabn.mnist", str(data), "--out", str(out), "--batch-size", "2"],
        "segment": ["segment", IMAGE, str(out), "--model", str(tmp_path / "model")],
        "export": ["export", "test_resnet_iabn.mnist", "--to-dir", str(out)],
        "mirror": ["mirror", str(out), "test_resnet_iabn.mnist"],
    }[command]
    if command == "segment":
        segmentation_model(tmp_path / "model")
    assert main(arguments) == 1
    assert "is in use by process" in capsys.readouterr().err
    if command == "export":
        process.kill()
        process.wait()
    assert [each.name for each in out.rglob("*") if each.is_file()] in ([], [FOLDER_LOCK])


def segmentation_model(folder):
    import iabn_hub  # noqa: PLC0415
    from iabn_hub.checkpoints.weights import save_safetensors  # noqa: PLC0415

    folder.mkdir()
    model = iabn_hub.create_model("test_resnet_deeplab3_iabn", num_classes=3)
    save_safetensors(model.state_dict(), folder / "model.safetensors", {"arch": "test_resnet_deeplab3_iabn"})
    (folder / "config.json").write_text(
        '{"architecture": "test_resnet_deeplab3_iabn", "num_classes": 3, "pretrained_cfg": {}, "model_args": {}}'
    )


def test_a_folder_in_which_nothing_was_written_is_removed(tmp_path):
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path / "new"):
        1 / 0  # noqa: B018
    assert not (tmp_path / "new").exists()
    with exclusive(tmp_path / "new"):
        (tmp_path / "new" / "file").write_text("kept")
    assert (tmp_path / "new" / "file").read_text() == "kept"


def test_waits_a_moment_for_a_process_that_ends(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 30.0)
    started = time.monotonic()
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {holder.pid}"])
    with exclusive(tmp_path / "out"):
        assert time.monotonic() - started < 20


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FOLDER_LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic link"), exclusive(tmp_path / "out"):
        pass
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with exclusive(tmp_path / "out"):
        (tmp_path / "out" / "file").write_text("x")
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["file"]


def test_a_forked_process_does_not_end_the_lock(tmp_path):
    with exclusive(tmp_path / "out"):
        child = os.fork()
        if child == 0:
            try:
                raise SystemExit
            except SystemExit:
                os._exit(len(files._held))
        assert os.waitpid(child, 0)[1] == 0
        assert len(files._held) == 1

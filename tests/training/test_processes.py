"""Two processes under torchrun train as one, outlive the death of one of them, and count every image once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..paths import ROOT

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(*line):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*TORCHRUN, *map(str, line)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def trainers(parent):
    """The processes that torchrun has started."""
    return [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]


@pytest.mark.slow
def test_two_processes_go_on_after_one_was_killed_and_count_exactly(recipe_file, pictures, measure, tmp_path):
    data, out = pictures(val=6), tmp_path / "run"
    (data / "val" / "dark" / "0.png").unlink()  # 11 images: one process has 6, the other 5
    rate = {"learning_rate": 0.003, "schedule": {"type": "constant", "epochs": 8}}  # calm: the last bit decides nothing
    recipe = recipe_file(network={"bn_mode": "sync"}, optimizer=rate)
    more = ("--workers", 0, "--snapshot-minutes", 0, "--resume", "auto")
    process = start("--max-restarts", 1, ROOT / "tools" / "train.py", recipe, data, "--out", out, *more)
    while process.poll() is None and not (out / "snapshots" / "step-00000007.pt").exists():
        time.sleep(0.001)
    assert process.poll() is None, process.communicate()[0]
    os.kill(trainers(process)[1], signal.SIGKILL)
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 0, said
    assert "(iabn_sync) on 2 × cpu: 40 images" in said
    assert said.count("resuming from") == 1
    report = json.loads((out / "metrics.json").read_text())
    assert [row["step"] for row in report["epochs"]] == list(range(5, 41, 5))
    assert report["result"]["top1"] == 100
    _, alone = measure(out, data)  # every image once: the figures are those of one process
    assert alone["images"] == 11
    assert report["result"]["top1"] == alone["top1"]
    assert report["result"]["loss"] == pytest.approx(alone["loss"], rel=1e-5)

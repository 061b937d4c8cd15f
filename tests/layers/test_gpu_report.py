"""The report on the CUDA kernels runs to its end on any machine."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from iabn_hub.layers.backends import building

from ..paths import ROOT

REPORT = [sys.executable, str(ROOT / "tools" / "gpu_report.py")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device on this machine")
def test_without_a_gpu_every_stage_says_why(tmp_path):
    done = subprocess.run([*REPORT, "--out", tmp_path], check=True, capture_output=True, text=True)
    names = subprocess.run([*REPORT, "--list"], check=True, capture_output=True, text=True).stdout.splitlines()
    rows = json.loads((tmp_path / "report.json").read_text())["stages"]
    assert list(rows) == names
    assert all("no CUDA device" in row["why"] for row in rows.values())
    assert "No GPU." in done.stdout
    assert not (tmp_path / "report.json.partial").exists()


def test_a_part_and_a_limit(tmp_path):
    command = [*REPORT, "--out", tmp_path, "--stages", "layer", "--seconds", "1"]
    subprocess.run(command, check=True, capture_output=True)
    rows = json.loads((tmp_path / "report.json").read_text())["stages"]
    assert list(rows) == ["device", "layer", "layer, shapes of ResNet-50"]
    assert rows["layer"]["why"].endswith("the 1.0 seconds are over")


def test_constants_can_be_overridden(monkeypatch):
    """The flags reach nvcc and the driver, and make another library."""
    try:
        usual = building.cuda_build(["8.0"])
    except building.BuildError as e:
        pytest.skip(str(e))
    monkeypatch.setenv(building.CUDA_FLAGS_VARIABLE, "-DIABN_UNDER_WAY=1")
    other = building.cuda_build(["8.0"])
    assert other.ninja_file.count("-DIABN_UNDER_WAY=1") == 1 + len(building.CUDA_DTYPES)
    assert "IABN_UNDER_WAY" not in usual.ninja_file
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("iabn*"))
    tunables = subprocess.run([*REPORT, "--list"], check=True, capture_output=True, text=True, env=os.environ)
    for line in tunables.stdout.splitlines():
        if line.startswith("tunable "):
            assert f"#ifndef {line.removeprefix('tunable ').partition('=')[0]}\n" in sources


def test_the_page_has_the_table_of_the_machine_code():
    """And every kernel keeps its promise: two vectors of each operand under way, nothing spilled."""
    try:
        building.cuda_home()
    except building.BuildError as e:
        pytest.skip(str(e))
    command = [sys.executable, str(ROOT / "tools" / "sass_table.py"), "--check", "--dtypes", "bf16"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs" / "cuda.md").read_text()
    names = {line.split("|")[1].strip() for line in done.stdout.splitlines()[2:]}
    assert names == set(re.findall(r"^\| (`\w+`) \| bf16 ", page, re.MULTILINE))

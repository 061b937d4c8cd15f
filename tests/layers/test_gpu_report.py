"""The report on the CUDA kernels runs to its end on any machine."""

import importlib.util
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
    """Two vectors of each operand under way; `tools/sass_table.py --check` compiles the kernels and measures."""
    page = (
        (ROOT / "docs" / "cuda.md").read_text().partition("<!-- sass_table -->")[2].partition("<!-- /sass_table -->")[0]
    )
    operands = {
        ("moments", ""): 1, ("normalize", "leaky ReLU"): 1, ("normalize", "any, residual"): 2,
        ("sums", "leaky ReLU"): 2, ("sums", "any, residual"): 3, ("sums", "any, from the input"): 2,
    }  # fmt: skip
    operands |= {("gradient", code): count for (kernel, code), count in operands.items() if kernel == "sums"}
    rows = re.findall(r"^\| `\w+?_(\w+)` \| ([\w, ]*?) ?\| \w+ \| \d+ \| \d+ \| (\d+) \|", page, re.MULTILINE)
    assert len(rows) == 2 * 2 * len(operands)
    assert all(int(loads) == 2 * operands[kernel, code] for kernel, code, loads in rows)


SASS = """
        IMAD.WIDE R2, R0, 0x10, R4 ;
        LDG.E.128 R8, [R2.64] ;
        LDG.E.128 R12, [R2.64+0x10] ;
        FADD R20, R8, R9 ;
        LDG.E R16, [R2.64+0x20] ;
        FADD R21, R13, R16 ;
"""


def test_loads_in_flight_are_counted_until_they_are_needed():
    spec = importlib.util.spec_from_file_location("sass_table", ROOT / "tools" / "sass_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.in_flight([line.strip().removesuffix(" ;") for line in SASS.strip().splitlines()]) == 2

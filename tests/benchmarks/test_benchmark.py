"""The benchmark measures its contenders in one run, and says so in JSON."""

import json
import subprocess
import sys

from ..paths import ROOT


def test_benchmark_measures_every_contender_in_one_run():
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "layer", "--json", "--no-compile"]
    done = subprocess.run([*command, "--rounds", "1", "--warmup", "1"], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert len(result["cases"]) == 16
    for case in result["cases"]:
        assert {"BatchNorm2d + LeakyReLU", "iABN", "iABN (reference)"} <= case["contenders"].keys()
        assert case["contenders"]["BatchNorm2d + LeakyReLU"]["times_faster"] == 1
        assert all(share > 0 for share in case["share_of_copy"].values())

"""The examples run as they are, and print what their readers are promised."""

import runpy

import pytest

from .paths import ROOT

PROMISES = {
    "classify": "digit_7.png: 7 (",
    "finetune": "coffee.jpg: coffee (",
    "features": "logits: (2, 19, 16, 16)",
    "layer": "InPlaceABN   ",
    "publish": "equal logits: True",
    "train": "step 9  loss 0.",
}


def test_every_example_is_listed():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == PROMISES.keys()


@pytest.mark.parametrize("name", PROMISES)
def test_example(name, capsys):
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert PROMISES[name] in capsys.readouterr().out

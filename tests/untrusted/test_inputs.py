"""No input ends in a traceback, runs code, or writes where it was not told; the documentation lists what was tried."""

import json
import logging
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iabn_hub import schema
from iabn_hub.checkpoints import catalogue
from iabn_hub.checkpoints.errors import CatalogueError
from iabn_hub.recipes import RecipeError, read_recipe

from ..paths import ROOT
from .inputs import CASES, PAGE, VALUES, Case, in_record, row, run

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_input_that_is_refused(case, tmp_path):
    folder = tmp_path / "given"
    folder.mkdir()
    answer = run(case, folder)
    assert answer.code in (1, 2)
    assert "iabn-hub: " in answer.err
    assert "Traceback" not in answer.err
    assert not CONTROL.search(answer.out + answer.err)
    assert "this ran" not in answer.out
    assert {each.name for each in tmp_path.iterdir()} <= {"given", "cache"}
    assert row(case, answer, folder) in PAGE.read_text().splitlines(), "run python -m tests.untrusted.inputs"


def test_the_page_lists_these_inputs_alone():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "| kind |" not in line]
    assert len(lines) == len(CASES)


@pytest.mark.parametrize("what", VALUES)
def test_an_added_catalogue_cannot_break_the_import(what, tmp_path, monkeypatch, caplog):
    path = tmp_path / "catalogue.json"
    path.write_text(in_record("description", VALUES[what]))
    monkeypatch.setenv("IABN_HUB_CATALOGUE", str(path))
    with caplog.at_level(logging.WARNING):
        found = catalogue.records_at_import.__wrapped__()
    assert "resnet50_iabn.sync_lr_512_in1k" in found
    assert str(path) in caplog.text


def test_import_with_an_endless_catalogue(tmp_path):
    os.mkfifo(tmp_path / "fifo.json")
    done = subprocess.run(
        [sys.executable, "-c", "import iabn_hub"], capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "IABN_HUB_CATALOGUE": f"{tmp_path / 'fifo.json'}{os.pathsep}/dev/zero"},
    )  # fmt: skip
    assert done.returncode == 0
    assert "fifo.json: is not a file" in done.stderr


# Any JSON, with what is rare in it more often.
scalars = (
    st.none() | st.booleans() | st.floats() | st.integers() | st.integers(10**17, 10**420)
    | st.text(st.characters(exclude_categories=())) | st.sampled_from(["mnist", "resnet50_iabn", "0" * 32])
)  # fmt: skip
NAMES = (
    "model tag md5 bytes hub options results input citation training network optimizer learning_rate schedule "
    "batch_size classes arch"
)
keys = st.sampled_from(NAMES.split())
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=5))


def assert_read_or_refused(read, path, error):
    try:
        read(path)
        message = str(path)
    except error as e:
        message = str(e)
    assert str(path) in message


@settings(max_examples=300, deadline=None, derandomize=True)
@given(values, values)
def test_any_json_is_a_catalogue_and_a_recipe_or_is_refused(tmp_path_factory, content, record):
    path = tmp_path_factory.mktemp("json") / "x.json"
    path.write_text(json.dumps({"checkpoints": [record], "citations": content}))
    assert_read_or_refused(catalogue.read_catalogue, path, CatalogueError)
    path.write_text(json.dumps(content))
    assert_read_or_refused(read_recipe, path, RecipeError)


WHOLE = {
    "model": "resnet50_iabn", "tag": "mine", "md5": "0" * 32, "bytes": 7, "parameters": 25_557_032, "num_classes": 2,
    "classes": ["finch", "wren"], "dataset": "birds", "license": "MIT", "citation": "x",
    "license_link": "https://example.org", "description": "y", "google_drive_id": "z",
    "training": {"epochs": 3}, "options": {"activation": "elu"},
    "hub": {"repo": "a/b", "md5": "0" * 32}, "input": {"size": [3, 224, 224], "crop_pct": 0.9},
    "results": [{"protocol": "224", "dataset": "birds", "top1": 50.0, "crop": 224}],
}  # fmt: skip
odd = scalars | st.sampled_from([10**400, -(10**400), 1e308, "\x00", "\ud800", "\x1b]0;t\x07", "\u202e"])
odd = odd | st.lists(odd, max_size=2) | st.dictionaries(st.sampled_from([*WHOLE, "\x1b[8m"]), odd, max_size=2)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(WHOLE)), odd)
def test_a_record_with_one_odd_value_is_shown_or_refused(tmp_path_factory, field, value):
    """`info` ends in a sentence or a description, without control characters."""
    path = tmp_path_factory.mktemp("record") / "x.json"
    path.write_text(json.dumps({"checkpoints": [{**WHOLE, field: value}]}))
    case = Case("", "", lambda folder: (["info", "resnet50_iabn.mine"], {"IABN_HUB_CATALOGUE": str(path)}))
    answer = run(case, path.parent)
    assert answer.code in (0, 1, 2)
    assert "Traceback" not in answer.err
    assert not CONTROL.search(answer.out + answer.err)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=60))
def test_any_bytes_are_json_or_are_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("bytes") / "x.json"
    path.write_bytes(content)
    assert_read_or_refused(lambda path: schema.load_json(path, CatalogueError), path, CatalogueError)


def test_a_json_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "x.json").write_text('\ufeff{"a": 1}', encoding="utf-8")
    assert schema.load_json(tmp_path / "x.json", CatalogueError) == {"a": 1}


def test_ctrl_c_while_a_command_starts(tmp_path):
    """Its import of torch is stopped without a traceback."""
    slow = tmp_path / "torch.py"  # stands for an import that takes long
    slow.write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(20)\n")
    for command in (["-m", "iabn_hub"], [str(ROOT / "tools" / "train.py")]):
        done = subprocess.run(
            [sys.executable, *command, "list"], capture_output=True, text=True, check=False, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        )  # fmt: skip
        assert done.returncode == -2
        assert done.stderr == ""

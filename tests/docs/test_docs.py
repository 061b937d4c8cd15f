"""The site builds without a warning, its generated parts are up to date, and its commands exist."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys

import click
import pytest

from iabn_hub.cli.frame import app

from ..paths import ROOT

PAGES = sorted(path for path in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


def build_docs():
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "tools" / "build_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_parts_are_up_to_date():
    pages = build_docs().pages()
    assert {path.name for path in pages} == {"models.md", "idea.svg", "README.md", "benchmarks.md"}
    for path, text in pages.items():
        assert path.read_text() == text, f"{path.name} is not what tools/build_docs.py writes"


def test_the_plot_shows_the_figures_of_the_table():
    table = (ROOT / "docs" / "conversion.md").read_text()
    rows = json.loads((ROOT / "docs" / "data" / "conversion.json").read_text())
    assert len(rows) == 70
    for row in rows:
        line = next(line for line in table.splitlines() if line.startswith(f"| {row['network']} |"))
        kept, peak = re.findall(r"\((\d\.\d\d)\)", line)
        assert (float(kept), float(peak)) == pytest.approx((row["kept"], row["peak"]), abs=0.0051)
        assert float(line.split(" | ")[4]) == pytest.approx(row["step"], abs=0.0056)


def test_the_site_builds(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"], cwd=ROOT,
        check=False, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = {path.parent.name: path.read_text() for path in (tmp_path / "site").glob("*/index.html")}
    assert "iabn_hub.conversion.convert.convert" in page["api"]
    assert "write_repository" in page["publishing"]  # of a script that is included
    assert "random_number" in page["photos"]
    assert "How to add" in page["contributing"]
    assert not any("--8" in text for text in page.values())


def commands(page):
    """The commands in the code blocks of a page, with continued lines joined."""
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r" && | \| ", line.partition("  #")[0]):
                words = shlex.split(command, comments=True)
                if "-m" in words and words[words.index("-m") + 1] == "iabn_hub":
                    words = ["iabn-hub", *words[words.index("-m") + 2 :]]
                if words[:1] == ["iabn-hub"]:
                    yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_on_a_page_exist(page):
    for words in commands(page):
        name, rest = words[0], words[1:]
        command = app.get_command(click.Context(app), name)
        assert command is not None, words
        while isinstance(command, click.Group) and rest:
            command, rest = command.get_command(click.Context(command), rest[0]), rest[1:]
            assert command is not None, words
        known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
        unknown = {word.partition("=")[0] for word in rest if word.startswith("--")} - known - {"--help"}
        assert not unknown, words


def test_repositories_of_links_in_the_readme_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"

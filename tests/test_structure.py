"""Imports between the folders of the package go one way, from the command line down to the layer."""

import ast

from .paths import ROOT

PACKAGE = ROOT / "iabn_hub"
# From the bottom to the top: a folder imports from those that stand before it.
ORDER = (
    "starting", "versions", "schema", "files", "signing", "terminal", "pages", "world", "checkpoints", "layers",
    "conversion", "compatibility", "models", "recipes",
    "datasets", "evaluation", "classification", "segmentation", "training", "publishing", "benchmarks", "demo", "cli",
)  # fmt: skip


def folder_of(path):
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_folders(path):
    """The folders that a module imports from, relative imports resolved."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                target = base.joinpath(*name.split("."))
                if target != PACKAGE and not name.startswith("__"):
                    yield target.relative_to(PACKAGE).parts[0]


def test_every_folder_has_its_place():
    folders = {folder_of(path) for path in PACKAGE.rglob("*.py")}
    assert folders - {"__init__", "__main__"} == set(ORDER)


def test_imports_go_one_way():
    wrong = [
        f"{path.relative_to(ROOT)} imports {target}"
        for path in PACKAGE.rglob("*.py")
        if folder_of(path) in ORDER
        for target in imported_folders(path)
        if ORDER.index(target) > ORDER.index(folder_of(path))
    ]
    assert wrong == []

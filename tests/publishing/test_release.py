"""What a release consists of: the same bytes each time, and a list of what they need."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version

import pytest
from packaging.requirements import Requirement

from ..paths import ROOT, TOOLS

SOURCES = (
    "iabn_hub",
    "csrc",
    "tools",
    "tests",
    "docs",
    "examples",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "hubconf.py",
)


def sbom(*line):
    done = subprocess.run([sys.executable, TOOLS / "sbom.py", *line], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_the_bill_lists_what_is_installed():
    bill = sbom()
    listed = {each["name"]: each["version"] for each in bill["components"]}
    assert all(version(name) == number for name, number in listed.items())
    assert {"torch", "timm", "safetensors", "numpy", "typing-extensions"} <= listed.keys()
    assert "pytest" not in listed
    refs = {each["bom-ref"] for each in [*bill["components"], bill["metadata"]["component"]]}
    assert {each["ref"] for each in bill["dependencies"]} == refs
    assert {needed for each in bill["dependencies"] for needed in each["dependsOn"]} <= refs
    assert sbom() == bill
    assert {"pytest", "hypothesis"} <= {each["name"] for each in sbom("--extras", "test-layer")["components"]}


def test_what_pip_would_install_is_listed():
    """The closure, found by pip's own resolver on what is installed."""
    line = [sys.executable, "-m", "pip", "inspect", "--local"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    installed = {
        each["metadata"]["name"].lower().replace("_", "-"): each["metadata"]
        for each in json.loads(done.stdout)["installed"]
    }
    listed = {each["name"] for each in sbom()["components"]}
    for name in listed & installed.keys():
        for text in installed[name].get("requires_dist", ()):
            requirement = Requirement(text)
            if requirement.marker is None:
                assert requirement.name.lower().replace("_", "-").replace(".", "-") in listed, f"{name} needs {text}"


@pytest.fixture
def copies(tmp_path):
    """The sources twice, with other times and permissions."""
    made = []
    for number, (time, mode) in enumerate([(1_000_000_000, 0o644), (1_700_000_000, 0o600)]):
        folder = tmp_path / str(number)
        for name in SOURCES:
            if (ROOT / name).is_dir():
                shutil.copytree(
                    ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_native")
                )
            elif (ROOT / name).exists():
                shutil.copy(ROOT / name, folder / name)
        for path in folder.rglob("*"):
            if path.is_file():
                path.chmod(mode)
            os.utime(path, (time, time))
        made.append(folder)
    return made


def test_the_same_sources_give_the_same_bytes(copies, tmp_path):
    (tmp_path / "iabn_hub.cdx.json").write_text(json.dumps(sbom()))
    environment = {**os.environ, "IABN_HUB_SBOM": str(tmp_path / "iabn_hub.cdx.json")}
    found = []
    for folder in copies:
        line = [sys.executable, "-m", "hatchling", "build", "-d", str(folder / "dist")]
        subprocess.run(line, cwd=folder, env=environment, check=True, capture_output=True)
        built = sorted((folder / "dist").iterdir())
        assert [path.suffix for path in built] == [".whl", ".gz"]
        found.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in built])
    assert found[0] == found[1]
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/sboms/iabn_hub.cdx.json")]
        assert json.loads(wheel.read(name)) == sbom()


PERMISSIVE = ("MIT", "BSD", "Apache", "MPL", "Mozilla Public License", "PSF", "ISC", "Zlib", "0BSD", "CC0", "Unlicense")


def test_licences_of_what_is_needed():
    """Permissive ones; NVIDIA's libraries, which torch brings, are its own."""
    for each in sbom()["components"]:
        if each["name"].startswith(("nvidia-", "cuda-")):
            continue
        (licence,) = [entry["license"]["name"] for entry in each.get("licenses", ())]
        assert any(name in licence for name in PERMISSIVE), f"{each['name']} {each['version']}: {licence}"
        assert "GPL" not in licence, f"{each['name']} {each['version']}: {licence}"
